"""The torch backend on a GPU: the same numbers as on the CPU, and no wait for the host."""

import pytest
import torch

import cspd
from cspd_kernels import DiffusionHead, PhiloxNoise, accept_reject, denoise, log_density_ratio
from cspd_kernels.ops.denoise import reference
from cspd_kernels.testing import random_chains, random_inputs, relative_error

pytestmark = pytest.mark.gpu


def on_gpu(chain):
    return type(chain)(*(field.cuda() for field in chain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 33])
def test_denoise_agrees_with_float64(make_diffloss, dtype, rows):
    head = DiffusionHead.from_module(make_diffloss().cuda(), dtype=dtype)
    inputs = random_inputs(head, rows, 0)
    expected = reference.denoise(head, *inputs, 1.0, None, dtype=torch.float64)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(denoise(head, *inputs).sample, expected[0]) <= bound


def test_noise_is_that_of_the_cpu():
    rows = torch.arange(1000) * 2**31
    noise = PhiloxNoise(2**63 + 5, rows)
    there = PhiloxNoise(2**63 + 5, rows.cuda())
    assert relative_error(there.x_T(7), noise.x_T(7)) < 1e-5
    assert relative_error(there.step(3), noise.step(3)) < 1e-5


def test_verdicts_are_those_of_the_cpu():
    x, draft, target = random_chains(5000, 3, 0, shift=1.0)
    here = accept_reject(x, draft, target, seed=1)
    there = accept_reject(x.cuda(), on_gpu(draft), on_gpu(target), seed=1)
    assert (here.tries != there.tries.cpu()).float().mean() < 1e-3  # within rounding of a threshold


def test_ops_and_patched_heads_do_not_wait_for_the_host(make_diffloss):
    module = cspd.patch(make_diffloss().cuda(), noise="philox")
    head = DiffusionHead.from_module(module)
    x, draft, target = random_chains(64, head.channels, 0)
    x, draft, target = x.cuda(), on_gpu(draft), on_gpu(target)
    inputs = random_inputs(head, 8, 0)
    noise = PhiloxNoise(0, torch.arange(8, device="cuda"))
    rows = torch.arange(64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise(head, *inputs)
        denoise(head, inputs[0], noise.x_T(head.channels), noise)
        log_density_ratio(x, draft, target)
        accept_reject(x, draft, target, seed=1, rows=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_guidance_scale_may_lie_on_the_cpu(make_diffloss):
    head = DiffusionHead.from_module(make_diffloss().cuda())
    inputs = random_inputs(head, 5, 0, guided=True)
    expected = denoise(head, *inputs, cfg_scale=3.0).sample
    for scale in (torch.tensor([3.0]), torch.tensor(3.0).cuda()):
        assert relative_error(denoise(head, *inputs, cfg_scale=scale).sample, expected) <= 1e-6
