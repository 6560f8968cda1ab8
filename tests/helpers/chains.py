"""A chain's result beside its definition in float64."""

from __future__ import annotations

import importlib

import torch

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.ops.denoise import Denoised, reference
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.testing import relative_error

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def definition(head, cond, x, noise, temperature=1.0, cfg_scale=1.0) -> Denoised:
    """The chain in float64, guided exactly when cond has more rows than x, as ``denoise`` has it."""
    scales = () if len(cond) == len(x) else reference.as_scales(cfg_scale)
    scales = tuple(s.to(x.device, torch.float64).reshape(-1, 1) if isinstance(s, torch.Tensor) else s for s in scales)
    return Denoised(*reference.denoise(head, cond, x, noise, temperature, scales, dtype=torch.float64))


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
    """Bytes of the modulations that a chain holds, and of what they are projected from."""
    return sum(v.numel() * v.element_size() for v in (chain.mods, chain.final_mods, chain.embedded))


def kernels_of(backend):
    """A backend's chains."""
    return importlib.import_module(f"cspd_kernels.ops.denoise.{backend}").KERNELS


def counted(run_steps, used):
    """A chain's ``run_steps`` that adds the chain to a list."""

    def run(self, *arguments):
        used.append(self)
        return run_steps(self, *arguments)

    return run


def addressed(head, rows, seed=2**63 + 5):
    """Noise of addresses that need all of their 64 bits."""
    return PhiloxNoise(seed, torch.arange(rows, device=head.device) * 2**33 + 2**32 - 1)


def run_chain(chain, head, inputs, temperature=0.9, cfg_scale=None):
    """What a chain puts out for inputs of at most its number of tokens."""
    chain.load(*inputs, temperature, reference.as_scales(cfg_scale))
    tables = Tables(head)
    chain.launch(head, tables)
    return chain.results(len(inputs[1]), temperature, tables)


UNSUPPORTED = [  # options of a head, and what is said of it
    ({"dtype": torch.float64}, "this head is float64: use backend='torch', or build the head with"),
    ({"channels": 257}, "channels, and this head has 257: use backend='torch'"),
    ({"width": 50}, "multiples of 16 up to 4096, and this head's is 50: use backend='torch'"),
    ({"width": 4112}, "multiples of 16 up to 4096, and this head's is 4112: use backend='torch'"),
]


def unsupported_head(make_diffloss, device, *, dtype=torch.float32, **options):
    return DiffusionHead.from_module(make_diffloss(depth=0, steps=2, **options).to(device), dtype=dtype)
