"""The ops never wait for the device: no tensor is read on the host, none is made from a Python number."""

import pytest
import torch
from dispatch_modes import Inside, NoHostRead

from cspd_kernels import PhiloxNoise, denoise
from cspd_kernels.ops.accept_reject import reference
from cspd_kernels.ops.accept_reject import torch_backend as accept_reject_backend
from cspd_kernels.ops.denoise import torch_backend
from cspd_kernels.testing import random_chains, random_inputs, relative_error

C, Z = 5, 7  # of make_diffloss


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, bool, torch.nonzero, lambda v: v[v > 0], lambda v: torch.arange(int(v[0]))]
)
def test_the_check_for_host_reads_can_fail(read):
    with NoHostRead(), pytest.raises(AssertionError, match="the host waits"):
        read(torch.ones(1))


def test_the_check_sees_what_happens_inside_the_op(head):
    with NoHostRead(), pytest.raises(AssertionError, match="the host waits"):
        denoise(head, *random_inputs(head, 2, 0))  # on the CPU it looks for NaN


@pytest.mark.parametrize("scale", [1.0, torch.linspace(1, 2, 5)])
@pytest.mark.parametrize("addressed", [False, True])
def test_the_op_reads_no_tensor_but_to_look_for_nan(head, monkeypatch, addressed, scale):
    cond, x, noise = random_inputs(head, 5, 16, guided=isinstance(scale, torch.Tensor))
    if addressed:
        noise = PhiloxNoise(0, torch.arange(5))
    expected = denoise(head, cond, x, noise, cfg_scale=scale)
    monkeypatch.setattr("cspd_kernels.ops.denoise.check_values", lambda **_: None)
    monkeypatch.setattr("cspd_kernels.ops.denoise.check_result", lambda *_: None)
    with NoHostRead():
        out = denoise(head, cond, x, noise, cfg_scale=scale)
    assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("workspace", [1, 1 << 28])
@pytest.mark.parametrize("scale", [None, 2.0, torch.tensor([[2.0]]), torch.linspace(1, 2, 5)[:, None]])
@pytest.mark.parametrize("addressed", [False, True])
def test_torch_backend_never_reads_a_tensor_on_the_host(head, addressed, scale, workspace):
    cond, x, noise = random_inputs(head, 5, 16, guided=scale is not None)
    if addressed:
        noise = PhiloxNoise(0, torch.arange(5), C)
    with torch.no_grad(), NoHostRead():
        out = torch_backend.denoise(head, cond, x, noise, 0.9, () if scale is None else (scale,), workspace)
    expected = denoise(head, cond, x, noise, temperature=0.9, cfg_scale=1.0 if scale is None else scale)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
@pytest.mark.parametrize("max_tries", [0, 12])
def test_verdicts_of_devices_read_no_tensor_on_the_host(residual, max_tries):
    x, draft, target = random_chains(9, C, 0)
    arguments = (x, draft, target, 5, torch.arange(9), torch.ones(9), "released", max_tries, residual)
    with torch.no_grad(), NoHostRead():
        verdict = accept_reject_backend.accept_reject(*arguments, compact=False)
    expected = reference.accept_reject(*arguments)
    assert all(map(torch.equal, verdict[1:3], expected[1:3]))
    with torch.no_grad(), NoHostRead(), pytest.raises(AssertionError, match="the host waits"):
        accept_reject_backend.accept_reject(*arguments, compact=True)


class NoTensorFromHost(Inside):
    """Fails where a Python number becomes a tensor: on a device that would wait for it."""

    def seen(self, func, args):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh"), name


def test_addressed_noise_and_verdicts_make_no_tensor_from_a_number(head):
    """What runs between the first kernel and the last, with everything checked before it."""
    cond = torch.randn(4, Z)
    x, draft, target = random_chains(4, C, 0)
    rows = torch.arange(4)
    arguments = (x, draft, target, 5, rows, 1.0, "paper", 12)
    with torch.no_grad(), NoTensorFromHost():
        noise = PhiloxNoise(3, rows)
        torch_backend.denoise(head, cond, noise.x_T(C), noise, 1.0, (), 1 << 20)
        for residual in ("rejection", "closed_form"):
            accept_reject_backend.accept_reject(*arguments, residual, compact=False)
