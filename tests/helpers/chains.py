"""A chain's result beside its definition in float64."""

from __future__ import annotations

import torch

from cspd_kernels import denoise
from cspd_kernels.ops.denoise import Denoised, reference
from cspd_kernels.testing import relative_error

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def definition(head, cond, x, noise, temperature=1.0, cfg_scale=1.0) -> Denoised:
    """The chain in float64, guided exactly when cond has twice the rows of x, as ``denoise`` has it."""
    if len(cond) == len(x):
        cfg_scale = None
    elif isinstance(cfg_scale, torch.Tensor):
        cfg_scale = cfg_scale.to(x.device, torch.float64).reshape(-1, 1)
    return Denoised(*reference.denoise(head, cond, x, noise, temperature, cfg_scale, dtype=torch.float64))


def assert_close(actual, expected, tolerance):
    """Every field within a tolerance of its largest value; exactly equal where that is no finite number above 0."""
    for name, a, b in zip(Denoised._fields, actual, expected, strict=True):
        assert a.shape == b.shape, name
        if bool(torch.isfinite(b).all()) and bool(b.any()):
            assert relative_error(a, b) <= tolerance, name
        else:
            assert torch.equal(a.double(), b.double()), name


def assert_agrees(head, cond, x, noise, *, temperature=1.0, cfg_scale=1.0, tolerance=None, **options):
    """``denoise(..., **options)`` agrees with the definition on the same operands."""
    actual = denoise(head, cond, x, noise, temperature=temperature, cfg_scale=cfg_scale, **options)
    expected = definition(head, cond, x, noise, temperature, cfg_scale)
    assert_close(actual, expected, tolerance or BOUNDS[head.dtype])


def workspace_of(chain) -> int:
    """Bytes of the modulations that a Triton chain holds, and of what they are projected from."""
    return sum(v.numel() * v.element_size() for v in (chain.mods, chain.final_mods, chain.embedded))
