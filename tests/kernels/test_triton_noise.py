"""The random numbers of the Triton kernels are those of their definition."""

import pytest
import torch

from cspd_kernels import PhiloxNoise, noise

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton
import triton.language as tl

from cspd_kernels.triton_noise import cos_sin_of_quarters, normal, normals


@triton.jit(do_not_specialize=["index"])
def _normal_kernel(out, seed, rows, index, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * R + tl.arange(0, R)
    channels = tl.arange(0, CP)
    value = normal(tl.load(seed), tl.load(rows + at)[:, None], index, channels[None, :], 0)
    tl.store(out + at[:, None] * C + channels[None, :], value, (channels < C)[None, :])


@triton.jit
def _cosine_kernel(cosine, sine, t, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = cos_sin_of_quarters(tl.load(t + at))
    tl.store(cosine + at, x)
    tl.store(sine + at, y)


@triton.jit
def _normals_kernel(out, seed, rows, C: tl.constexpr, G: tl.constexpr, K: tl.constexpr):  # noqa: N803
    """Tries 3..3 + K - 1 of row program_id(0)."""
    row, k, channels = tl.program_id(0), tl.arange(0, K), tl.arange(0, 4 * G)
    value = normals(tl.load(seed), tl.load(rows + row), 3 + k[:, None], tl.arange(0, G)[None, :], 3)
    tl.store(out + (row * K + k[:, None]) * C + channels[None, :], value, (channels < C)[None, :])


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


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (5, 2), (16, 4)])
def test_normals_of_many_tries_are_those_of_the_definition(triton_device, channels, groups):
    rows = torch.tensor([0, 5, 2**31, 2**33 + 1, 2**63 - 1], device=triton_device)
    out = torch.empty(5, 8, channels, device=triton_device)
    _normals_kernel[(5,)](out, torch.tensor([-9], device=triton_device), rows, C=channels, G=groups, K=8)
    index = torch.arange(3, 11, device=triton_device)
    expected = noise.normals(2**64 - 9, rows[:, None], index[None, :], channels, noise.STREAM_PROPOSAL)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_cosine_and_sine_of_quarter_turns(triton_device):
    t = torch.linspace(0, 4, 4 * 4096, device=triton_device)
    cosine, sine = torch.empty_like(t), torch.empty_like(t)
    _cosine_kernel[(4,)](cosine, sine, t, BLOCK=4096)
    angle = torch.pi / 2 * t.double()
    assert (cosine - torch.cos(angle)).abs().max() < 3e-7
    assert (sine - torch.sin(angle)).abs().max() < 3e-7
