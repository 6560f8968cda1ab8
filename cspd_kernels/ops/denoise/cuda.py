"""``denoise`` in CUDA: modulations and large products by the library, the rest in kernels of the extension."""

from __future__ import annotations

import weakref

import torch

from ...crossover import bucket
from ...head import DiffusionHead
from .cuda_layered import LayeredChain
from .cuda_persistent import PersistentChain
from .on_device import Kernels, denoise_on_device, why_not_covered

KERNELS = Kernels("cuda", LayeredChain, PersistentChain)
_ALIGNMENT, _MOST_CHANNELS = 16, 256  # bytes; tokens of the verdict have as many at most
_REASONS: weakref.WeakKeyDictionary[DiffusionHead, str | None] = weakref.WeakKeyDictionary()


def why_unsupported(head: DiffusionHead) -> str | None:
    """None when the kernels cover this head, else the limit it exceeds."""
    if head not in _REASONS:  # its tensors are up to a hundred, and never change
        _REASONS[head] = why_not_covered(head, _MOST_CHANNELS) or _why_not_read_wide(head)
    return _REASONS[head]


def why_not_persistent(head: DiffusionHead, tokens: int, groups: int) -> str | None:
    """None when the persistent kernel covers so many tokens of this head, on its device."""
    if PersistentChain.serves(head, bucket(tokens), groups):
        return None
    rows = bucket(tokens) * groups
    return PersistentChain.why_not_covered(head) or f"{rows} rows of this head do not fit one launch here"


def _why_not_read_wide(head: DiffusionHead) -> str | None:
    """None where every tensor of the head can be read 16 bytes at a time, else the first that cannot."""
    named = list(vars(head).items())
    for i, block in enumerate(head.blocks):
        named += [(f"blocks[{i}].{name}", value) for name, value in vars(block).items()]
    for name, value in named:
        if not isinstance(value, torch.Tensor):
            continue
        if not value.is_contiguous():
            return f"its kernels read contiguous weights, and {name} has strides {value.stride()}: use backend='torch'"
        if value.data_ptr() % _ALIGNMENT:
            return (
                f"its kernels read weights on {_ALIGNMENT}-byte boundaries, and {name} lies "
                f"{value.data_ptr() % _ALIGNMENT} bytes after one: use backend='triton' or 'torch', or give the "
                "parameter memory of its own"
            )
    return None


def denoise(head, cond, x_T, noise, temperature, scales, workspace_bytes, parallel=None):  # noqa: N803
    """Like :func:`cspd_kernels.denoise`; ``scales``: of guidance."""
    return denoise_on_device(KERNELS, head, cond, x_T, noise, temperature, scales, workspace_bytes, parallel)
