"""When the Triton kernels serve, and what they say when they do not."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from chains import UNSUPPORTED, unsupported_head

from cspd_kernels import accept_reject, backends, log_density_ratio
from cspd_kernels.backends import implementation
from cspd_kernels.testing import random_chains

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


from cspd_kernels import triton_support
from cspd_kernels.ops.accept_reject import triton as accept_reject_backend
from cspd_kernels.ops.denoise import triton as triton_backend
from cspd_kernels.ops.density_ratio import triton as density_ratio_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VERDICTS = {
    "log_density_ratio": (density_ratio_backend, log_density_ratio),
    "accept_reject": (accept_reject_backend, lambda *chains, **options: accept_reject(*chains, seed=0, **options)),
}


@pytest.fixture(autouse=True)
def here(triton_device):
    """Every test needs a place where the kernels run."""


@pytest.mark.parametrize(("options", "limit"), UNSUPPORTED)
def test_the_automatic_choice_leaves_them_to_torch_and_says_so_once(make_diffloss, monkeypatch, caplog, options, limit):
    head = unsupported_head(make_diffloss, "cpu", **options)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        for _ in range(2):
            assert implementation("denoise", None, CUDA, head) is implementation("denoise", "torch")
    assert [limit in message for message in caplog.messages] == [True]


def test_the_automatic_choice_on_a_gpu_takes_these_kernels(head, monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert implementation("denoise", None, CUDA, head) is triton_backend.denoise


def test_the_interpreter_must_be_chosen_before_the_import(head, monkeypatch):
    monkeypatch.setattr(triton_support, "interpreting", lambda: not triton_support.INTERPRETED)
    assert "TRITON_INTERPRET was changed" in triton_backend.why_unsupported(head)


@pytest.mark.parametrize("op", VERDICTS)
def test_a_gpu_takes_the_kernels_of_the_verdict(monkeypatch, op):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for channels in (1, 16, 256):
        assert implementation(op, None, CUDA, torch.empty(2, channels)) is getattr(VERDICTS[op][0], op)


@pytest.mark.parametrize("op", VERDICTS)
def test_more_channels_than_the_kernels_of_the_verdict_cover(monkeypatch, caplog, op):
    x = torch.empty(2, 257)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        for _ in range(2):
            assert implementation(op, None, CUDA, x) is implementation(op, "torch")
    assert [f"automatic backend of {op}: torch (triton: its kernels cover up to 256" in m for m in caplog.messages] == [
        True
    ]


@pytest.mark.parametrize("op", VERDICTS)
def test_the_kernels_of_the_verdict_know_where_they_run(monkeypatch, triton_device, op):
    why_unsupported, x = VERDICTS[op][0].why_unsupported, torch.empty(2, 16, device=triton_device)
    assert why_unsupported(x) is None
    monkeypatch.setattr(triton_support, "interpreting", lambda: not triton_support.INTERPRETED)
    assert "TRITON_INTERPRET was changed" in why_unsupported(x)
    if triton_device == CPU:
        chains = random_chains(2, 16, 0)
        with pytest.raises(RuntimeError, match=f"cannot serve {op}: TRITON_INTERPRET was changed"):
            VERDICTS[op][1](*chains, backend="triton")


def test_old_devices_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = triton_support._why_unsupported_device.__wrapped__(CUDA)
    assert reason == "its kernels need compute capability 8.0, and this device has 7.5"


@pytest.mark.slow
def test_cpu_tensors_without_the_interpreter():
    code = (
        "import torch, cspd_kernels as k\n"
        "from cspd.models import DiffLoss\n"
        "head = k.DiffusionHead.from_module(DiffLoss(5, 7, 1, 48, '2'))\n"
        "k.denoise(head, torch.ones(1, 7), torch.ones(1, 5), torch.ones(2, 1, 5), backend='triton')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "backend='triton' cannot serve denoise" in done.stderr.splitlines()[-1]
    assert "TRITON_INTERPRET=1" in done.stderr.splitlines()[-1]
