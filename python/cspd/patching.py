"""``patch``: the kernels take over the sampling loop of every diffusion head in a model, in place, per instance."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn

from cspd_kernels.dtypes import as_dtype_or_none

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

    It is exact: the same seed gives the same tokens, up to rounding. It works in place and on this instance only:
    classes, other models, ``state_dict``, ``isinstance``, device moves and copies are as before. Patching again
    replaces the options.

    **What is replaced.** These loops of the diffusion objects that the model holds: ``p_sample_loop``,
    ``ddim_sample_loop``, and ``p_sample_loop_with_noise`` of MarkXCloud/CSpD (its distribution manager is filled as
    before). The head's own ``sample`` runs as it is. If it has its own loop and the package knows that loop
    (:mod:`cspd.samplers`), the loop itself is replaced. The kernels compute learned and fixed variances, networks that
    predict the noise, x0 or v, limits of x0, and guidance of two or three groups of rows. Tokens may have any rank, and
    the network's own modules may embed further inputs.

    **What is compared.** Before anything is changed, a small copy of each head with random weights samples with and
    without the kernels. If a head can be read in several ways, the reading that agrees is used. If the head's own code
    does not run here, the comparison happens at the first call that can run it.

    **What runs its own code.** A loop that does anything else, and a network that computes more than its weights say
    (hooks, replaced or computed layers). The log says why, once. A head keeps its loop if that is none of the above (a
    solver or a scheduler of its own), or if its tokens differ. Then the network's ``forward`` is taken over: the
    kernels make each of the loop's calls (docs/loops.md). The log and :func:`describe` say so. If the network differs
    as well, the head is refused.

    Under guidance 2N rows come back as before. The last N, which callers drop, repeat the first. On a GPU this adds no
    synchronisation. Weights are checked at every call, so they are never stale.

    ``torch.compile`` of a model around it breaks its graph at the loop. A CUDA graph of your own needs one call before
    the capture, and the patch as long as it is replayed. Shallow copies (``copy.copy``) of a patched head, diffusion
    object or model go on calling the original one: unpatch first.

    Args:
        model: any module tree with one or more heads.
        backend: as in :func:`cspd_kernels.denoise`.
        dtype: dtype of the matrix products' operands: float32, bfloat16 or float16, also by name. By default it is the
            autocast dtype, or the dtype of the weights. The residual stream stays float32.
        noise: ``"upstream"`` draws the numbers of the replaced code in its order. ``"philox"`` draws one seed per call
            and stores no noise of the steps; in a captured graph it is the same at every replay.
        weights: ``"live"`` sees every change at the next call. ``"frozen"`` checks nothing after the first call, for
            serving: patch again after a change.
        parallel_tol: as in :func:`cspd_kernels.denoise`. None computes the denoising steps one by one. A number
            computes all at once, to about that accuracy, relative to the largest value. If it is looser than rounding,
            the result is no longer exact. The comparison above is always of single steps.
        whole: also take over ``sample_tokens`` of the MAR model around the head, by :func:`cspd.sample_tokens`. The
            same seeds give the same images, and on a GPU a step is one launch. The loop and the transformer are first
            compared with the model's own. The model's own method runs, with the patched head, if they differ, if
            there are hooks, or in training mode. The log says why. ``dtype`` also applies to the transformer.
        compile: with ``whole``, run the transformer's blocks under ``torch.compile``, on a GPU.
        sampler: ``"ddim"`` (arXiv 2010.02502) in place of the loop's own steps. None keeps those. This and the next two
            options change the tokens, and the log says so once. The head's other code stays exact as above.
        eta: of DDIM, in [0, 1]: 0 adds no noise.
        sampling_steps: how many of the loop's steps to make, evenly strided. A pair (first, last) goes linearly from
            the first to the last autoregressive step of the model's ``sample_tokens`` (DiSA, arXiv 2505.20297). None
            makes all.
        loop: ``"own"`` leaves every loop as it is and takes over the networks alone. None does so only for heads whose
            loop cannot be taken over.

    Returns:
        The same model.

    Raises:
        UnsupportedModel: there is nothing to patch, or a network computes something else. InvalidInput: an option that
            does not exist, or weights that are not finite. BackendUnavailable: the backend cannot be used. In each
            case nothing was changed.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> model = cspd.patch(model)
        >>> labels = torch.tensor([3, 7])
        >>> model.sample_tokens(2, num_iter=4, labels=labels).shape
        torch.Size([2, 1, 8, 8])
    """
    options = _options(backend, dtype, noise, weights, parallel_tol, whole, compile, sampler, eta, sampling_steps, loop)
    with LOCK:
        patches = _prepare(model, options)
        lines = [describe_head(p.found, p).line for p in patches] if _logger.isEnabledFor(logging.INFO) else []
        older = _patches_in(model)
        _install(patches, lines)
        _remove(older)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch` and return the model. A model that is not patched stays as it is.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> cspd.patch(model) is cspd.unpatch(model)
        True
        >>> cspd.is_patched(model)
        False
    """
    with LOCK:
        _remove(_patches_in(model))
        for module in model.modules():  # copies of patches do not know the models that they are copied with
            leave_whole(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any diffusion head of the model is patched.

    Example:
        >>> import cspd
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> cspd.is_patched(model), cspd.is_patched(cspd.patch(model))
        (False, True)
    """
    return any(module.__dict__.get(PATCHES) for module in model.modules())


@contextlib.contextmanager
def patched(
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
) -> Iterator[nn.Module]:
    """Patch a model for one ``with`` block. Afterwards the model is restored, also after an exception.

    Blocks may overlap, also in several threads. The block that begins last decides the options. The model stays
    patched until the last block ends.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> with cspd.patched(model, dtype="bfloat16"):
        ...     images = model.sample_tokens(2, num_iter=4, labels=torch.tensor([3, 7]))
        >>> cspd.is_patched(model)
        False
    """
    options = _options(backend, dtype, noise, weights, parallel_tol, whole, compile, sampler, eta, sampling_steps, loop)
    with LOCK:
        patches = _prepare(model, options)
        _install(patches)
    try:
        yield model
    finally:
        with LOCK:
            _remove(patches)


def _options(
    backend: str | None,
    dtype: torch.dtype | str | None,
    noise: str,
    weights: str,
    parallel_tol: float | str | None,
    whole: bool,
    compile: bool,
    sampler: str | None,
    eta: float,
    sampling_steps: int | tuple[int, int] | None,
    loop: str | None,
) -> Options:
    """What a caller asked for, or one clear error."""
    operands = as_dtype_or_none(dtype, "patch")
    sampling = Sampling(sampler, eta, sampling_steps)
    options = Options(backend, operands, noise, weights, parallel_tol, whole, compile, loop, sampling)
    options.check()
    return options


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
    hooks: list[Any] = [LoopHook.of(diffusion) for diffusion in diffusions_of(model).values()]
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
