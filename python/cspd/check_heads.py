"""What a speculative runner asks of its models' heads: that they sample as it does, and that their tokens have
densities that can be compared."""

from __future__ import annotations

import logging
import math

from cspd_kernels import Schedule
from cspd_kernels.ops.accept_reject import check_method
from cspd_kernels.spec import spec_of
from cspd_kernels.structure import why_not_plain

from .errors import InvalidInput, UnsupportedModel
from .heads import FoundHead, unwrapped
from .sampling import OWN, Sampling
from .twin import CannotRunError
from .verify import DiffersError, check_sample

_logger = logging.getLogger("cspd")


def schedule_of(diffloss) -> Schedule:
    """A head's own."""
    return Schedule.from_diffusion(diffloss.gen_diffusion)


def sampled(sampling: Sampling, schedule: Schedule, step: int = 0, of: int = 1) -> Schedule:
    """What a run makes of a schedule at an autoregressive step; one step stays what it is."""
    return schedule if schedule.num_steps == 1 else sampling.schedule(schedule, step, of)


def learned_variance(diffloss, sampling: Sampling = OWN) -> bool:
    """Whether the variance of a head's steps is an output of its network."""
    wide = spec_of(diffloss.net).outputs == 2 * diffloss.in_channels
    return wide and sampled(sampling, schedule_of(diffloss)).learned


def check_sampling(role: str, diffloss) -> None:
    """Raise where a model's own ``sample`` is not the plain ancestral one, which is all that a run computes."""
    name = f"the {role}'s diffloss ({type(diffloss).__name__})"
    net, reason = unwrapped(diffloss.net)
    if (reason := reason or why_not_plain(net)) is not None:
        raise UnsupportedModel(f"expected {name} to compute what its layers say: {reason}")
    try:
        outcome = check_sample(FoundHead(name, diffloss, net, {"gen_diffusion": diffloss.gen_diffusion}))
    except DiffersError as error:
        raise UnsupportedModel(f"expected {name} to sample as MAR does: {error}") from None
    except CannotRunError as error:
        _logger.info("%s could not be compared with its own sample method, which does not run here: %s", name, error)
        return
    if not outcome.plain or not all(outcome.plain.values()):
        more = "its sample does more than ancestral steps (limits of x0, other guidance, work outside its loop)"
        reason = "; ".join(dict.fromkeys(outcome.own)) or more
        raise UnsupportedModel(
            f"expected {name} to sample as MAR does, without further work before or after the loop: {reason}"
        )


def check_sampler(draft, target, sampling: Sampling, verify: str, drafts: bool) -> None:
    """Raise where a sampler cannot be made of the models' schedules, or does not go with what is to be verified.

    Args:
        drafts: whether there is anything to verify; the target alone needs no densities.
    """
    for role, model in (("draft", draft), ("target", target)):
        for step in range(2 if sampling.anneals else 1):
            made = sampled(sampling, schedule_of(model.diffloss), step, 2)
            if drafts and made.deterministic:
                raise UnsupportedModel(
                    f"expected a {role} whose steps add noise, got {made!r}: without noise its tokens have no density. "
                    "Pass eta > 0 with sampler='ddim'; a flow needs Euler-Maruyama"
                )
    if sampling.anneals and verify == "strict":
        raise InvalidInput(
            f"expected one number as sampling_steps with verify='strict', got {sampling.steps}: its images are at "
            "different steps"
        )


def check_residual(draft, target, residual, target_sigma, num_candidates: int = 1, sampling: Sampling = OWN) -> None:
    """Raise where rejected tokens cannot be redrawn in the way that is asked for."""
    check_method("SpecDecodeRunner", residual, target_sigma, num_candidates)
    if (residual != "closed_form" and num_candidates == 1) or target_sigma:
        return
    what = "residual='closed_form'" if num_candidates == 1 else f"num_candidates={num_candidates}"
    other = "residual='rejection'" if num_candidates == 1 else "one candidate"
    instead = f"pass target_sigma=True to redraw with the target's sigma, or {other}"
    pair = (("draft", draft), ("target", target))
    learned = [role for role, model in pair if learned_variance(model.diffloss, sampling)]
    if learned:
        raise UnsupportedModel(
            f"expected heads with a fixed variance for {what}, got a learned one in the "
            f"{' and the '.join(learned)}: {instead}"
        )
    # Of one noise schedule the last step's is the same, whichever kind of fixed variance; a head of one step has its
    # own. Annealed windows are compared at both ends.
    ours, theirs = (
        math.exp(sampled(sampling, schedule_of(model.diffloss)).log_std_lower[0]) for model in (draft, target)
    )
    if not math.isclose(ours, theirs, rel_tol=1e-6):
        raise UnsupportedModel(f"expected heads with one sigma for {what}, got {ours:.4g} and {theirs:.4g}: {instead}")
