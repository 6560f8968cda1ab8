"""add_norm: every backend against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from cspd_kernels.ops.add_norm import add_norm, norm_backend
from cspd_kernels.ops.add_norm.reference import add_norm as reference
from cspd_kernels.testing import relative_error

BACKENDS = ("torch", "triton")


def inputs(rows, width, seed=0, delta=torch.float32):
    g = torch.Generator().manual_seed(seed)
    stream = 3.0 * torch.randn(*rows, width, generator=g) + 1.0
    branch = None if delta is None else torch.randn(*rows, width, generator=g).to(delta)
    return stream, branch, 1.0 + torch.randn(width, generator=g), torch.randn(width, generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [((1,), 1), ((3,), 33), ((2, 5), 64), ((1, 2), 1280), ((0,), 48)])
def test_a_branch_is_added_and_the_stream_normalised(backend, delta, rows, width):
    stream, branch, weight, bias = inputs(rows, width, delta=delta)
    wide = stream.double()
    expected = reference(
        wide, None if branch is None else branch.double(), weight.double(), bias.double(), 1e-6, wide.dtype
    )
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        mine = stream.clone()
        out = add_norm(mine, branch, weight, bias, 1e-6, dtype, backend=backend)
        assert out.dtype == dtype
        assert out.shape == stream.shape
        if stream.numel():
            assert relative_error(mine, wide) < 1e-6  # the stream, with the branch in it
            assert relative_error(out.float(), expected) < bound


def test_float64_streams_are_torchs():
    stream, branch, weight, bias = (v.double() for v in inputs((4,), 32))
    wide = stream.clone()
    assert relative_error(add_norm(stream, branch, weight, bias, 1e-6, torch.float64),
                          reference(wide, branch, weight, bias, 1e-6, torch.float64)) < 1e-12  # fmt: skip
    with pytest.raises(RuntimeError, match="covers float32 streams"):
        add_norm(stream, branch, weight, bias, 1e-6, torch.float64, backend="triton")


def test_which_backend_goes_with_the_others(monkeypatch):
    monkeypatch.delenv("CSPD_BACKEND", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert norm_backend(None, cpu) == norm_backend("cuda", gpu) == norm_backend("torch", gpu) == "torch"
    monkeypatch.setattr("cspd_kernels.ops.add_norm.why_unavailable", lambda *_: None)
    assert norm_backend(None, gpu) == norm_backend("triton", gpu) == "triton"
    monkeypatch.setenv("CSPD_BACKEND", "torch")
    assert norm_backend(None, gpu) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("delta", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [((1,), 768), ((2, 320), 1280), ((5000,), 1024), ((3,), 8191)])
def test_on_a_gpu(delta, rows, width):
    stream, branch, weight, bias = (None if v is None else v.cuda() for v in inputs(rows, width, delta=delta))
    wide = stream.double()
    expected = reference(
        wide, None if branch is None else branch.double(), weight.double(), bias.double(), 1e-6, wide.dtype
    )
    for backend in BACKENDS:
        mine = stream.clone()
        assert (
            relative_error(add_norm(mine, branch, weight, bias, 1e-6, torch.float32, backend=backend), expected) < 1e-5
        )
        assert relative_error(mine, wide) < 1e-6
