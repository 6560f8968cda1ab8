"""What a head's patch finds out before it takes the head's place: what of it the kernels compute, and what they do not.

Everything is compared on small copies. What was found is kept by the patch: kinds of calls, and its network's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from .diffusions import DDIM, LOOPS, NO_DIFFUSION, NotServedError
from .errors import InvalidInput, UnsupportedModel
from .heads import FoundHead
from .loop import LoopHook
from .meanings import Meaning
from .network import FastNetwork
from .twin import CannotRunError
from .verify import DiffersError, check_loop, check_sample, plain_calls
from .whole.chosen import training

if TYPE_CHECKING:
    from .head_patch import HeadPatch

_logger = logging.getLogger("cspd")


def compare(patch: HeadPatch) -> None:
    """Sample with and without the kernels on a copy, and tell what of it runs its own code.

    Raises:
        ValueError: the two differ.
    """
    found = patch.found
    _check_values(found, patch.options.dtype)
    if patch.options.loop == "own" or not (found.diffusions or patch.own_sampler):
        _keep_loop(patch, "loop='own' was asked for" if patch.options.loop else NO_DIFFUSION)
        return
    try:
        _compare_sampler(patch) if patch.own_sampler is not None else _compare(patch, found)
    except DiffersError as error:
        _keep_loop(patch, f"{error}")
        return
    model = patch.model
    if patch.options.whole and model is not None and not training(model):
        try:
            patch.sampler_of(model).check()
        except NotServedError as error:
            patch.tell_of_model(model, f"{error}")


def _keep_loop(patch: HeadPatch, why: str) -> None:
    """Its loops stay as they are, and its network's calls are taken over.

    Raises:
        ValueError: those differ, too.
    """
    patch.own_loop, patch.own_sampler, patch.verdicts = why, None, {}
    patch.network = _network(patch)
    try:
        patch.network.check()
    except CannotRunError as error:
        _logger.info(
            "cspd.patch: %s: its network does not run here, so it is compared at its first call: %s", patch.name, error
        )
    except DiffersError as error:
        raise UnsupportedModel(
            f"{patch.name} samples differently and is left unpatched: {why}; its network also differs: {error}"
        ) from None
    if patch.options.loop is None:
        _logger.warning("cspd.patch: %s %s: %s", patch.name, patch.network.outcome, why)
    if (model := patch.model) is not None:
        patch.tell_of_model(model, why)


def _network(patch: HeadPatch) -> FastNetwork:
    o = patch.options
    return FastNetwork(patch.net, patch.cache, o.backend, o.dtype, asked=o.loop == "own" or o.backend is not None)


def _add_network(patch: HeadPatch) -> None:
    """Accelerate the network for loops that run their own code; if it differs, they run all of it."""
    patch.network = _network(patch)
    try:
        patch.network.check()
    except (CannotRunError, DiffersError):
        patch.network = None


def _compare_sampler(patch: HeadPatch) -> None:
    """Raises DiffersError where its own sampler is another one than its adapter says."""
    _add_network(patch)  # for the calls that are not served; and which of its candidates the network is, is known
    try:
        patch.own_sampler.check(patch.cache.choice, patch.written)
    except CannotRunError as error:
        _logger.info(
            "cspd.patch: %s: its own code does not run here, so it is compared at its first call: %s", patch.name, error
        )


def _compare(patch: HeadPatch, found: FoundHead) -> None:
    try:
        outcome = check_sample(found)
        patch.verdicts = dict(outcome.kinds)
        _compare_loops(patch, LOOPS[1])  # which sample does not call
        if outcome.own:
            _add_network(patch)
        for reason in outcome.own:
            patch.tell(reason)
    except CannotRunError as error:
        _without_sample(patch, str(error))


def _without_sample(patch: HeadPatch, why: str) -> None:
    """Its own ``sample`` did not run: compare the loops by themselves, as far as those run."""
    results = [_compare_loops(patch, loop) for loop in LOOPS if loop != DDIM]  # which waits for a first call
    _add_network(patch)  # it may come to a loop of its own
    if any(agree for agree, _ in results):
        _logger.info(
            "cspd.patch: %s: its sample did not run on a copy (%s), so only its loop was compared", patch.name, why
        )
    else:
        reasons = "; ".join(dict.fromkeys([why, *(failure for _, failure in results if failure)]))
        _logger.info(
            "cspd.patch: %s: its own code does not run here, so it is compared at its first call: %s",
            patch.name,
            reasons,
        )


def _compare_loops(patch: HeadPatch, loop: str) -> tuple[int, str]:
    """Compare a loop by itself, as the released code calls it: how many kinds of calls agree, and what else came.

    Raises:
        DiffersError: from the kernels'.
    """
    agree, failure = 0, ""
    for diffusion in patch.found.samplers:
        if not callable(getattr(diffusion, loop, None)):
            continue
        hook = LoopHook.of(diffusion) or LoopHook(diffusion)
        try:
            for call in plain_calls(patch.net, loop, hook.tables.schedule().num_steps):
                kind = hook.kind(call)
                if not isinstance(patch.verdicts.get(kind), Meaning):
                    patch.verdicts[kind] = check_loop(call, diffusion)
                agree += 1
        except (CannotRunError, NotServedError) as error:
            failure = str(error)
    return agree, failure


def check_sampling(patch: HeadPatch) -> None:
    """Check that the steps that replace the loops' own can be made, and say so once.

    Raises:
        ValueError: they cannot.
    """
    sampling = patch.options.sampling
    if not sampling.changes:
        return
    if patch.own_loop is not None or patch.own_sampler is not None:
        why = "" if patch.own_loop is None else f"; it keeps its own loop: {patch.own_loop}"
        raise UnsupportedModel(f"{patch.name} is left unpatched: {sampling} needs a head with a diffusion object{why}")
    unread = []
    for path, diffusion in patch.found.diffusions.items():
        try:
            schedule = (LoopHook.of(diffusion) or LoopHook(diffusion)).tables.schedule()
        except NotServedError as error:
            unread.append(f"its {path} cannot be sampled by {sampling}: {error}")
            continue  # its loop runs as it is, which is told
        try:
            for step in (0, 1):
                sampling.schedule(schedule, step, 2)
        except ValueError as error:
            raise UnsupportedModel(f"{patch.name} is left unpatched: its {path}: {error}") from None
    if len(unread) == len(patch.found.diffusions):
        raise UnsupportedModel(f"{patch.name} is left unpatched: {'; '.join(unread)}")
    _logger.warning(
        "cspd.patch: %s samples by %s, as you asked: its tokens differ from those of its own sampler",
        patch.name,
        sampling,
    )


def _check_values(found: FoundHead, dtype: torch.dtype | None) -> None:
    for name, weight in found.net.named_parameters(prefix="net"):
        if weight.is_meta:
            return
        weight = weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise InvalidInput(
                f"{found.name} is left unpatched: expected finite weights, got NaN or infinity in {name}: load "
                "another checkpoint"
            )
        if dtype == torch.float16 and weight.numel() and float(weight.abs().max()) > torch.finfo(dtype).max:
            raise InvalidInput(
                f"{found.name} is left unpatched: {name} holds values beyond float16's range: use dtype=torch.bfloat16"
            )
