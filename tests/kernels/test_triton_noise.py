"""The random numbers of the Triton kernels are those of their definition."""

import pytest
import torch

from cspd_kernels import PhiloxNoise

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton
import triton.language as tl

from cspd_kernels.triton_noise import cos_of_quarters, normal


@triton.jit(do_not_specialize=["index"])
def _normal_kernel(out, seed, rows, index, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * R + tl.arange(0, R)
    channels = tl.arange(0, CP)
    value = normal(tl.load(seed), tl.load(rows + at)[:, None], index, channels[None, :], 0)
    tl.store(out + at[:, None] * C + channels[None, :], value, (channels < C)[None, :])


@triton.jit
def _cosine_kernel(out, t, quarters, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, cos_of_quarters(tl.load(t + at), tl.load(quarters + at)))


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 1, 99])
def test_normals_are_those_of_the_definition(triton_device, seed, index):
    rows = torch.randint(0, 2**63 - 1, (512,), generator=torch.Generator().manual_seed(0))
    rows[:8] = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**62, 2**63 - 1])
    rows = rows.to(triton_device)
    out = torch.empty(512, 33, device=triton_device)
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=triton_device)
    _normal_kernel[(8,)](out, signed, rows, index, C=33, CP=64, R=64)
    torch.testing.assert_close(out, PhiloxNoise(seed, rows).step(index, 33), rtol=0, atol=1e-5)


def test_cosine_of_quarter_turns(triton_device):
    t = torch.linspace(0, 4, 4 * 4096, device=triton_device)
    for quarters in (0, 1):
        out = torch.empty_like(t)
        _cosine_kernel[(4,)](out, t, torch.full_like(t, quarters, dtype=torch.int32), BLOCK=4096)
        exact = torch.cos(torch.pi / 2 * (t.double() - quarters))
        assert (out - exact).abs().max() < 3e-7
