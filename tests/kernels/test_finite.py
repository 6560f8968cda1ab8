"""Tokens that would be NaN or infinite because of the head are errors that name the cause."""

import pytest
import torch

from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.late import LateReport
from cspd_kernels.testing import random_inputs


@pytest.fixture
def overflowing(make_diffloss):
    """Finite in float32 and bfloat16; one layer's activations are more than float16 holds.

    The activations of the first layer, as all backends store them as operands of the next product; what the second one
    puts out the kernels add up in float32.
    """
    module = make_diffloss("mild", 1, steps=3)
    with torch.no_grad():
        module.net.res_blocks[0].mlp[0].weight.mul_(2e5)
    return module


def test_float16_that_overflows_names_the_types_that_do_not(overflowing):
    for dtype in (torch.float32, torch.bfloat16):
        head = DiffusionHead.from_module(overflowing, dtype=dtype)
        assert torch.isfinite(denoise(head, *random_inputs(head, 3, 0)).sample).all()
    head = DiffusionHead.from_module(overflowing, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"this call's tokens.*float16.*65504.*bfloat16"):
        denoise(head, *random_inputs(head, 3, 0))


def test_the_kernels_overflow_where_the_loop_does(overflowing, kernel_device, backend):
    if kernel_device.type == "cuda":
        pytest.skip("on a device the next call tells")
    head = DiffusionHead.from_module(overflowing, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"this call's tokens.*bfloat16"):
        denoise(head, *random_inputs(head, 3, 0), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_nan_are_named(make_diffloss, dtype):
    module = make_diffloss("mild", 1)
    module.net.res_blocks[0].mlp[0].bias.data[3] = float("nan")
    head = DiffusionHead.from_module(module, dtype=dtype)
    with pytest.raises(ValueError, match="expected finite weights in the head, got NaN"):
        denoise(head, *random_inputs(head, 3, 0))


def test_no_rows_and_finite_tokens_raise_nothing(overflowing):
    head = DiffusionHead.from_module(overflowing, dtype=torch.float16)
    cond, x, noise = random_inputs(head, 3, 0)
    assert denoise(head, cond[:0], x[:0], noise[:, :0]).sample.shape == (0, 5)


def test_a_late_report_tells_each_count_once():
    report = LateReport(torch.device("cpu"))
    assert not report.news()
    report.add(torch.tensor(False))
    assert not report.news()
    report.add(torch.tensor(True))
    report.add(torch.tensor([2], dtype=torch.int32))
    assert report.news()
    assert not report.news()


@pytest.mark.gpu
@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_on_a_gpu_the_next_call_tells_and_none_waits(overflowing, backend):
    head = DiffusionHead.from_module(overflowing.cuda(), dtype=torch.float16)
    inputs = random_inputs(head, 3, 0)
    denoise(head, *inputs, backend=backend)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"an earlier call's tokens.*bfloat16"):
        denoise(head, *inputs, backend=backend)
