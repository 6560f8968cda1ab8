"""MAR's ``sample_tokens`` without the host: the released loop's images, seed for seed, by a launch a step."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn

from cspd_kernels.backends import untraced
from cspd_kernels.dtypes import as_dtype_or_none
from cspd_kernels.ops.denoise.parallel import AUTO

from ..output import SampleOutput
from ..reporting import Callback
from ..sampling import Sampling
from ..seeds import drawn_seed
from .images import SampleOptions, Sampler

_SAMPLERS = "_cspd_samplers"  # attribute of a model: its samplers, which so end with it
_MOST_SAMPLERS = 4
_lock = threading.Lock()


class _Samplers(OrderedDict[SampleOptions, Sampler]):
    """Samplers by their options. Copies and pickles of the model make their own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Samplers:
        return _Samplers()

    def __reduce__(self) -> tuple[type[_Samplers], tuple[()]]:
        return _Samplers, ()


@untraced
def sample_tokens(
    model: nn.Module,
    bsz: int,
    num_iter: int = 64,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    labels: torch.Tensor | None = None,
    temperature: float = 1.0,
    progress: bool = False,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str | None = None,
    noise: str = "upstream",
    parallel_tol: float | str | None = AUTO,
    compile: bool = False,
    sampler: str | None = None,
    eta: float = 0.0,
    sampling_steps: int | tuple[int, int] | None = None,
) -> SampleOutput:
    """Generate images with a MAR model: the images that ``model.sample_tokens`` draws from the same seeds.

    They are the same up to rounding. The transformer runs over packed weights, and its last layer for the positions of
    the step alone. On a GPU a step is one CUDA graph that includes the head, and the host does not synchronise with the
    device. The first call of a kind (batch, guidance on or off, temperature) makes the graphs. A later call makes more
    if one of its steps draws more tokens than any before.

    Args:
        model: ``cspd.models.MAR``, or a MAR of LTH14/mar or of a fork whose loop and transformer compute the same. Both
            are compared at the first call. In eval mode.
        bsz, num_iter, cfg, cfg_schedule, labels, temperature: as of the model's own method.
        progress: show a bar.
        seed: an int in [0, 2^64). The images are those that the model's own method draws after
            ``torch.manual_seed(seed)`` and ``numpy.random.seed(seed % 2**32)``. The global generators stay as they are.
            By default the numbers come from the global generators, as the model's own method draws them.
        generator: a :class:`torch.Generator` that the seed is drawn from, in place of ``seed``. The seed is
            ``torch.randint(2**63 - 1, (), generator=generator)``, so every call gets a different seed.
        callback: called with a :class:`cspd.Progress` after every step. To stop early, raise an exception in it: it
            comes out of this call, and the next call starts afresh.
        dtype: type of the matrix products' operands in transformer and head, also by name ("bfloat16"). By default it
            is the autocast dtype, or the dtype of the weights. The residual streams stay float32.
        backend, noise, parallel_tol: as in :func:`cspd.patch`.
        compile: run the transformer's blocks under ``torch.compile``, on a GPU. It takes about a minute at first.
        sampler, eta, sampling_steps: as in :func:`cspd.patch`. The images then differ from the model's own.

    Returns:
        (bsz, c, h, w) float32 latents. A tensor, and also ``.images``; ``.stats`` is None.

    Raises:
        NotAModel: the object is not such a model. InvalidInput: an argument is out of range. Nothing was drawn.
        NotServedError: the model computes something else. The message says what. ``cspd.patch(model, whole=True)`` runs
            the model's own method in this case.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> model, _ = load_pair()
        >>> labels = torch.tensor([3, 7])
        >>> images = cspd.sample_tokens(model, 2, num_iter=4, labels=labels, seed=0)
        >>> images.shape
        torch.Size([2, 1, 8, 8])
        >>> torch.equal(images, cspd.sample_tokens(model, 2, num_iter=4, labels=labels, seed=0))
        True

    Source: LTH14/mar ``models/mar.py`` (sample_tokens), arXiv 2406.11838.
    """
    dtype = as_dtype_or_none(dtype, "sample_tokens")
    sampling = Sampling(sampler, eta, sampling_steps)
    options = SampleOptions(dtype, backend, noise, parallel_tol, compile, sampling)
    options.check()
    with drawn_seed("sample_tokens", seed, generator) as drawn:
        chosen = _sampler_of(model, options)
        images = chosen.sample(bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress, drawn, callback)
    return SampleOutput.of(images)


def _sampler_of(model: nn.Module, options: SampleOptions) -> Sampler:
    """The model's sampler with these options, kept from call to call."""
    with _lock:
        kept = vars(model).get(_SAMPLERS) if isinstance(model, nn.Module) else None
        if kept is None or options not in kept or kept[options].model is not model:
            made = Sampler(model, options)
            kept = model.__dict__.setdefault(_SAMPLERS, _Samplers())
            kept[options] = made
            while len(kept) > _MOST_SAMPLERS:
                kept.popitem(last=False)
        kept.move_to_end(options)
        chosen: Sampler = kept[options]
        return chosen
