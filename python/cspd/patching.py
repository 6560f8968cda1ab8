"""``patch``: the kernels take over the sampling loop of every diffusion head in a model, in place, per instance."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from .before_patching import check_sampling, compare
from .description import describe_head
from .diffusions import diffusions_of
from .errors import UnsupportedModel
from .head_patch import HeadPatch, leave_whole
from .heads import FoundHead, find_heads
from .loop import LOCK, PATCHES, LoopHook
from .options import Options
from .sampling import Sampling
from .standins import WatchedMoves, WatchedSample

_logger = logging.getLogger("cspd")
_SAMPLING = {"sampler": None, "eta": 0.0, "sampling_steps": None}


def patch(
    model: nn.Module,
    *,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    noise: str = "upstream",
    weights: str = "live",
    parallel_tol: float | str | None = "auto",
    whole: bool = False,
    compile: bool = False,
    sampler: str | None = None,
    eta: float = 0.0,
    sampling_steps: int | tuple[int, int] | None = None,
    loop: str | None = None,
) -> nn.Module:
    """Make every diffusion head of a model sample through :func:`cspd_kernels.denoise`.

    Exact: the same seed gives the same tokens, up to rounding. In place and per instance: classes,
    other models, ``state_dict``, ``isinstance``, device moves and copies are as before. Patching again
    replaces the options.

    Taken over are ``p_sample_loop`` and ``ddim_sample_loop`` of the diffusion objects that the model holds,
    and ``p_sample_loop_with_noise`` of MarkXCloud/CSpD (its distribution manager is filled as before). The
    head's own ``sample`` runs as it is; where that is a loop of its own which is known
    (:mod:`cspd.samplers`), it is taken over itself. Served are learned and fixed variances, networks that predict the
    noise, x0 or v, limits of x0, guidance of two or three groups of rows, tokens of any rank, and further
    inputs that modules of the network's own embed. What of it is code and not data is found by comparison:
    of a few meanings the one that agrees is taken. A loop that does anything else runs its own code, and so
    does a network that computes more than its weights say (hooks, replaced or computed layers); the log
    tells why, once.

    Before anything is changed, a small copy of each head with random weights samples with and without
    the kernels. Where its own code does not run here, the first call that can compares.

    A head whose loop is none of these (a solver or a scheduler of its own), or whose tokens differ, keeps its loop, and
    its network's ``forward`` is taken over: the kernels make each of the loop's calls (docs/loops.md). The log tells
    so, and :func:`describe`. A network that differs, too, refuses.

    Under guidance 2N rows come back as before; the last N, which callers drop, repeat the first. On a
    GPU the host waits nowhere that the replaced code does not. Weights are looked at at every call, so that
    they are never stale. ``torch.compile`` of a model around it breaks its graph at the loop. A CUDA graph
    of the caller's needs one call before it, and the patch as long as it is replayed. Shallow copies
    (``copy.copy``) of a patched head, diffusion object or model go on calling the original one: unpatch
    first.

    Args:
        model: any module tree that holds one or more heads.
        backend: as in :func:`cspd_kernels.denoise`.
        dtype: type of the matrix products' operands (float32, bfloat16, float16); None follows
            autocast at the call, else the weights' type. The residual stream stays float32.
        noise: ``"upstream"`` draws the numbers of the replaced code in its order; ``"philox"`` draws
            one seed per call and stores no noise of the steps (in a captured graph the same at every replay).
        weights: ``"live"`` sees every change at the next call; ``"frozen"`` looks at nothing after the
            first one, for serving: patch again after a change.
        parallel_tol: as in :func:`cspd_kernels.denoise`. None makes the steps one after the other. A number
            makes all at once and gives the tokens to about as much, relative to the largest value: looser
            than rounding, it is not exact any more. The comparison above is always of the steps.
        whole: also take over ``sample_tokens`` of the MAR model around the head, by :func:`cspd.sample_tokens`: the
            same images from the same seeds, and on a GPU one launch a step. Its loop and its transformer are compared
            with the model's own first; where they differ, in training mode and with hooks, its own method runs with
            the patched head, and the log tells why. ``dtype`` is then also that of the transformer's products.
        compile: with ``whole``, the transformer's blocks under ``torch.compile``, on a GPU.
        sampler: None for the loop's own steps, or ``"ddim"`` (arXiv 2010.02502) in place of them. This and the next two
            change the tokens, which the log says once; all that is exact above is so of the head's other code.
        eta: of DDIM, in [0, 1]: 0 adds no noise.
        sampling_steps: so many of the loop's steps, evenly strided; or a pair (first, last), linearly from the first to
            the last autoregressive step of the model's ``sample_tokens`` (DiSA, arXiv 2505.20297). None: all.
        loop: ``"own"`` leaves every loop as it is and takes over the networks alone. None: where that is all there is.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: nothing to patch, a network that computes something else, or an option that cannot be;
            nothing was changed.
        RuntimeError: the backend cannot serve.
    """
    sampling = Sampling(sampler, eta, sampling_steps)
    options = Options(backend, dtype, noise, weights, parallel_tol, whole, compile, loop, sampling)
    options.check()
    with LOCK:
        patches = _prepare(model, options)
        lines = [describe_head(p.found, p).line for p in patches] if _logger.isEnabledFor(logging.INFO) else []
        older = _patches_in(model)
        _install(patches, lines)
        _remove(older)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`; a model that is not patched is left as it is. Returns the model."""
    with LOCK:
        _remove(_patches_in(model))
        for module in model.modules():  # copies of patches do not know the models that they are copied with
            leave_whole(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any diffusion head of the model is patched."""
    return any(module.__dict__.get(PATCHES) for module in model.modules())


@contextlib.contextmanager
def patched(model: nn.Module, **options) -> Iterator[nn.Module]:
    """Patch for the length of a ``with`` block; afterwards the model is as it was, also after an exception.

    Blocks may overlap, in several threads too: the last one to begin decides the options, and the model
    is patched until the last one ends.
    """
    sampling = Sampling(*(options.pop(name, default) for name, default in _SAMPLING.items()))
    options = Options(**options, sampling=sampling)
    options.check()
    with LOCK:
        patches = _prepare(model, options)
        _install(patches)
    try:
        yield model
    finally:
        with LOCK:
            _remove(patches)


def _prepare(model: nn.Module, options: Options) -> list[HeadPatch]:
    """A compared patch for each head of a model, not installed.

    Raises:
        ValueError: there is no head, or one samples differently.
    """
    found = find_heads(model)
    around = [_model_of(model, head, options) if options.watches else None for head in found.heads]
    patches = [HeadPatch(head, options, its) for head, its in zip(found.heads, around)]
    for head_patch in patches:
        compare(head_patch)
        check_sampling(head_patch)
    for name, reason in found.near.items():
        _logger.warning("cspd.patch: %s is left unpatched: %s", name, reason)
    return patches


def _model_of(model: nn.Module, head: FoundHead, options: Options) -> nn.Module:
    """The model around a head that samples whole images.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if module._modules.get("diffloss") is head.module and callable(getattr(module, "sample_tokens", None)):
            return module
    if not options.whole:
        raise UnsupportedModel(
            f"patch(sampling_steps={options.sampling.steps}) expected a model with sample_tokens and diffloss around "
            f"{head.name}, found none in {type(model).__name__}: pass one number, which needs no autoregressive steps"
        )
    raise UnsupportedModel(
        f"patch(whole=True) expected a MAR model with sample_tokens and diffloss around {head.name}, found none in "
        f"{type(model).__name__}: omit whole=True to patch the head alone"
    )


def _patches_in(model: nn.Module) -> list[HeadPatch]:
    """All patches of a model's heads, also of networks that the model no longer holds."""
    modules = dict.fromkeys(model.modules())
    hooks = [LoopHook.of(diffusion) for diffusion in diffusions_of(model).values()]
    hooks += [kind.of(module) for module in modules for kind in (WatchedSample, WatchedMoves)]
    users = [p for hook in hooks if hook is not None for p in hook.users if p.found.module in modules]
    return list(dict.fromkeys([*(p for module in modules for p in module.__dict__.get(PATCHES, ())), *users]))


def _install(patches: list[HeadPatch], lines: Sequence[str] = ()) -> None:
    """All of them or none."""
    try:
        for head_patch in patches:
            head_patch.install()
        for line in lines:
            _logger.info("cspd.patch: %s", line)
    except BaseException:
        _remove(patches)
        raise


def _remove(patches: list[HeadPatch]) -> None:
    for head_patch in patches:
        head_patch.remove()
