"""What a speculative runner refuses: one error that says what was expected, before anything is computed."""

from __future__ import annotations

import inspect
import logging
import math
from numbers import Integral, Real

import numpy as np
import torch

from cspd_kernels.noise import CANDIDATE_STRIDE, check_seed
from cspd_kernels.ops.accept_reject import MOST_CANDIDATES
from cspd_kernels.ops.density_ratio import SIGMAS
from cspd_kernels.structure import why_not_a_head

from .candidates import CRITERIA
from .check_heads import check_sampling, learned_variance, sampled, schedule_of
from .errors import InvalidInput, NotAModel, UnsupportedModel, WrongType
from .order import is_count
from .sampling import OWN, Sampling

VERIFY = ("window", "strict")
_logger = logging.getLogger("cspd")
_MODEL_INTERFACE = (
    "seq_len", "token_embed_dim", "diffloss", "fake_latent", "class_emb",
    "forward_mae_encoder", "forward_mae_decoder", "unpatchify",
)  # fmt: skip
_METHODS = {"forward_mae_encoder": ("x", "mask", "class_embedding"), "forward_mae_decoder": ("x", "mask")}


def check_models(draft, target, criterion: str = "trajectory") -> None:
    """Raise where one of the models is no MAR object, or the two do not fit together by the criterion."""
    for role, model in (("draft", draft), ("target", target)):
        missing = [name for name in _MODEL_INTERFACE if not hasattr(model, name)]
        if missing:
            raise NotAModel(
                f"expected the {role} to be a MAR model, got {type(model).__name__} without " + ", ".join(missing)
            )
        for name, parameters in _METHODS.items():
            _check_method(role, model, name, parameters)
    for name in ("seq_len", "token_embed_dim"):
        ours, theirs = getattr(draft, name), getattr(target, name)
        if ours != theirs:
            raise InvalidInput(f"expected draft and target with the same {name}, got {ours} and {theirs}")
    for role, model in (("draft", draft), ("target", target)):
        if (problem := why_not_a_head(model.diffloss)) is not None:
            raise UnsupportedModel(f"expected the {role}'s diffloss to be a diffusion head: {problem}")
        check_sampling(role, model.diffloss)
    ours, theirs = (schedule_of(model.diffloss) for model in (draft, target))
    if ours.num_steps == 1 and criterion == "last_step":  # no trajectory, and none is compared
        return
    if ours.num_steps != theirs.num_steps:
        if ours.num_steps == 1:
            raise InvalidInput(
                f"expected criterion='last_step', got {criterion!r}: the draft has one denoising step and the target "
                f"{theirs.num_steps}, so their trajectories cannot be compared"
            )
        raise InvalidInput(
            "expected draft and target with the same number of denoising steps (their trajectories are aligned "
            f"step by step), got {ours.num_steps} and {theirs.num_steps}"
        )
    # These say the noise schedule and the sampler, whatever the networks predict.
    if not all(np.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6) for name in ("mean_x0", "mean_x")):
        raise InvalidInput(
            "expected draft and target with the same noise schedule (their trajectories are compared step by "
            "step), got two different ones"
        )


def _check_method(role: str, model, name: str, parameters: tuple[str, ...]) -> None:
    """Raise where a method of the model cannot be called with just these arguments."""
    method = getattr(model, name)
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # a builtin, or the like
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise UnsupportedModel(
            f"expected the {role} ({type(model).__name__}) with {name}({', '.join(parameters)}), got "
            f"{name}{signature}: {error}"
        ) from None


def check_options(seq_len: int, relaxation, prefill, sigma, max_tries) -> None:
    """Raise on an option of the runner that is out of range."""
    if not isinstance(prefill, Real) or not 0.0 <= prefill <= 1.0:
        raise InvalidInput(f"expected prefill in [0, 1], got {prefill!r}")
    if sigma not in SIGMAS:
        raise InvalidInput(f"expected sigma one of {SIGMAS}, got {sigma!r}")
    if isinstance(relaxation, torch.Tensor):
        if relaxation.shape != (seq_len,) or not ((relaxation > 0) & torch.isfinite(relaxation)).all():
            raise InvalidInput(
                f"expected relaxation finite and > 0, one number or ({seq_len},), got shape {tuple(relaxation.shape)}"
            )
    elif isinstance(relaxation, Real):
        if not 0 < relaxation < math.inf:
            raise InvalidInput(f"expected a finite relaxation > 0, got {relaxation!r}")
    elif not callable(relaxation) or isinstance(relaxation, type):
        raise WrongType(
            "expected relaxation as a number, a tensor or a policy (a function of a cspd.Window), got "
            f"{_kind(relaxation)}"
        )
    if isinstance(max_tries, bool) or not isinstance(max_tries, int) or max_tries < 0:
        raise InvalidInput(f"expected max_tries as an int >= 0, got {max_tries!r}")


def check_verify(
    draft, target, relaxation, verify, num_candidates, branches, criterion, sampling: Sampling = OWN
) -> None:
    """Raise where a way to verify does not exist, or a policy wants what it does not compute."""
    if verify not in VERIFY:
        raise InvalidInput(f"expected verify one of {VERIFY}, got {verify!r}")
    if criterion not in CRITERIA:
        raise InvalidInput(f"expected criterion one of {CRITERIA}, got {criterion!r}")
    for name, value in (("num_candidates", num_candidates), ("branches", branches)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_CANDIDATES:
            raise InvalidInput(f"expected {name} as an int in 1..{MOST_CANDIDATES}, got {value!r}")
    if branches > num_candidates:
        raise InvalidInput(
            f"expected at most as many branches as candidates, got branches={branches} with "
            f"num_candidates={num_candidates}: each branch goes on from one candidate"
        )
    if branches > 1 and verify != "strict":
        raise InvalidInput(f"expected verify='strict' for branches={branches}, got verify={verify!r}")
    if verify != "strict" and getattr(relaxation, "looks_ahead", False):
        raise InvalidInput(
            f"expected verify='strict' for {type(relaxation).__name__}, got verify={verify!r}: only strict "
            "verification computes the target's hidden states of later tokens"
        )
    if num_candidates > 1 and criterion == "trajectory":
        _warn_of_candidates(draft, target, num_candidates, sampling)


def _warn_of_candidates(draft, target, num_candidates, sampling: Sampling) -> None:
    """Say so where no candidate that ends a chain of its own can be accepted but the first."""
    learned = any(learned_variance(model.diffloss, sampling) for model in (draft, target))
    ours, theirs = (sampled(sampling, schedule_of(m.diffloss)).log_std_lower for m in (draft, target))
    if not learned and len(ours) == len(theirs) and np.allclose(ours, theirs):
        _logger.warning(
            "num_candidates=%d is of no use with criterion='trajectory' and heads of one fixed variance. A later "
            "candidate needs a density ratio above 1, which no trajectory has at its end; pass criterion='last_step'",
            num_candidates,
        )


def check_gamma(gamma) -> None:
    """Raise where ``gamma`` is neither a number of steps nor a policy."""
    number = isinstance(gamma, Integral) and not isinstance(gamma, bool)
    policy = (callable(gamma) or wants_entropy(gamma)) and not isinstance(gamma, type)
    if not policy and not (number and gamma >= 1):
        raise InvalidInput(
            "expected gamma as an int >= 1 or a policy (a function of the windows so far), got "
            + (_kind(gamma) if isinstance(gamma, type) else repr(gamma))
        )


def wants_entropy(gamma) -> bool:
    """Whether windows end by the entropy of the draft's attention (:class:`cspd.EntropyDraft`)."""
    return bool(getattr(gamma, "wants_entropy", False))


def check_attention(draft) -> None:
    """Raise where the draft of a run does not show its attention."""
    if not draft.transformer.shows_attention:
        raise UnsupportedModel(
            "expected a draft that shows its attention, for a gamma that looks at it: the transformer of "
            f"{draft.name} runs its own blocks or methods; the log says why"
        )


def check_initial_scale(models: dict) -> None:
    """Raise where a head scales its x_T by its transformer's attention, which that does not show."""
    for role, model in models.items():
        if model.initial_scale is not None and not model.transformer.shows_attention:
            raise UnsupportedModel(
                f"expected a {role} that shows its attention, because its head scales its first noise by the "
                f"attention's entropy. The transformer of {model.name} runs its own blocks or methods; the log says why"
            )


def check_run(draft, target, bsz, labels, temperature, cfg, seed, first_image, orders) -> None:
    """Raise on an argument of a run that does not fit; values of tensors are looked at on the CPU only."""
    length = target.seq_len
    _check_count("bsz", bsz, 1)
    if not _is_finite(temperature) or temperature < 0 or not _is_finite(cfg):
        raise InvalidInput(f"expected a finite temperature >= 0 and a finite cfg, got {temperature!r} and {cfg!r}")
    if labels is not None and (
        not isinstance(labels, torch.Tensor) or labels.shape != (bsz,) or labels.dtype not in (torch.int64, torch.int32)
    ):
        got = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise InvalidInput(f"expected labels as an integer tensor of shape ({bsz},) or None, got {got}")
    if labels is not None and labels.device.type == "cpu":
        classes = [getattr(model, "num_classes", math.inf) for model in (draft, target)]
        if not ((labels >= 0) & (labels < min(classes))).all():
            raise InvalidInput(f"expected labels in 0..{min(classes) - 1}, got {labels.tolist()}")
    if orders is not None and not isinstance(orders, torch.Tensor):
        raise InvalidInput(f"expected orders as int64 ({bsz}, {length}) or None, got {type(orders).__name__}")
    if orders is not None and (orders.shape != (bsz, length) or orders.dtype != torch.int64):
        raise InvalidInput(f"expected orders as int64 ({bsz}, {length}), got {orders.dtype} {tuple(orders.shape)}")
    on_cpu = orders is not None and orders.device.type == "cpu"
    if on_cpu and not (orders.sort(1).values == torch.arange(length, device="cpu")).all():
        raise InvalidInput(f"expected every row of orders to be a permutation of 0..{length - 1}")
    if seed is not None:
        check_seed(seed)
    _check_count("first_image", first_image, 0)
    if (first_image + bsz) * length > CANDIDATE_STRIDE:  # addresses of noise; behind them are those of candidates
        most = CANDIDATE_STRIDE // length - bsz
        raise InvalidInput(f"expected first_image <= {most} with {bsz} images, got {first_image}")
    devices = {model.fake_latent.device for model in (draft, target)}
    if len(devices) > 1:
        raise InvalidInput(f"expected draft and target on one device, got {sorted(map(str, devices))}")


def _is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _check_count(name: str, value, least: int) -> None:
    if not is_count(value, least):
        raise InvalidInput(f"expected {name} >= {least}, got {value!r}")


def _kind(value) -> str:
    return f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__
