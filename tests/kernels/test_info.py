"""``python -m cspd_kernels.info``: text, JSON, and no failure whatever the machine answers."""

import json
import os
import subprocess
import sys

import pytest
import torch

import cspd_kernels
from cspd_kernels import backends, crossover, cuda_support, info

KEYS = {"cspd-kernels", "python", "platform", "torch", "triton", "numpy", "gpus", "backends", "CSPD_BACKEND"}
KEYS |= {"cuda extension", "chosen", "CSPD_PERSISTENT_MAX_TOKENS", "CSPD_PARALLEL", "CSPD_LOG_LEVEL"}


def broken(*_):
    raise OSError("the machine is odd")


def test_json(capsys, monkeypatch):
    monkeypatch.setenv("CSPD_BACKEND", "torch")
    monkeypatch.setenv("CSPD_PARALLEL", "0")
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= KEYS
    assert report["torch"] == torch.__version__
    assert report["backends"] == cspd_kernels.available_backends()
    assert (report["CSPD_BACKEND"], report["CSPD_PARALLEL"]) == ("torch", "0")
    assert isinstance(report["gpus"], list)


def test_text(capsys):
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch: {torch.__version__}" in lines
    assert "CSPD_BACKEND: not set (automatic)" in lines
    assert "CSPD_PARALLEL: not set (as measured)" in lines
    assert any(line.split() == ["torch", "ok"] for line in lines)
    assert {line.split(":")[0] for line in lines} >= KEYS


def test_devices_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(info, "_devices", lambda: [{"name": "Card A"}, {"name": "Card B"}])
    info.main([])
    text = capsys.readouterr().out
    assert "Card A" in text
    assert "Card B" in text
    info.main(["--json"])
    assert [gpu["name"] for gpu in json.loads(capsys.readouterr().out)["gpus"]] == ["Card A", "Card B"]


def test_the_cuda_extension_and_the_devices_it_covers(capsys, monkeypatch):
    record = {"built": True, "architectures": [80, 90], "ptx": [], "nvcc": "13.0.88"}
    gpus = [{"name": "Card A", "capability": "8.6"}, {"name": "Card B", "capability": "10.0"}]
    monkeypatch.setattr(cuda_support, "build_record", lambda: record)
    monkeypatch.setattr(info, "_devices", lambda: gpus)
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out)["cuda extension"] == {
        "built": "yes",
        "for": "8.0, 9.0",
        "nvcc": "13.0.88",
        "Card A": "covered",
        "Card B": "its kernels were compiled for 8.0, 9.0, and this device has compute capability 10.0: install again "
        "with CSPD_CUDA_ARCHS=10.0",
    }
    monkeypatch.setattr(cuda_support, "build_record", lambda: {"built": False, "reason": "nobody did"})
    info.main([])
    assert "cuda extension:\n  built    no: nobody did\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize(
    ("target", "name"),
    [
        (info, "_devices"),
        (info, "_version"),
        (info.platform, "machine"),
        (backends, "available_backends"),
        (cuda_support, "build_record"),
        (torch.cuda, "device_count"),
        (torch, "get_num_threads"),
    ],
)
def test_a_probe_that_fails_leaves_its_reason(capsys, monkeypatch, arguments, target, name):
    monkeypatch.setattr(target, name, broken)
    assert info.main(arguments) == 0
    out = capsys.readouterr().out
    assert "unknown (OSError: the machine is odd)" in out
    if arguments:
        assert set(json.loads(out)) >= KEYS


def test_a_package_that_is_not_installed_is_said_so(capsys, monkeypatch):
    def absent(package):
        raise info.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(info.metadata, "version", absent)
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out)["triton"] == "not installed"


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "cspd_kernels.info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(json.loads(result.stdout)) >= KEYS
    assert result.stderr == ""


def test_reports_a_torch_that_does_not_import(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')\n")
    command = [sys.executable, "-m", "cspd_kernels.info", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    report = json.loads(done.stdout)
    assert "broken on purpose" in report["torch"]
    assert report["python"]


@pytest.fixture
def hopper(monkeypatch):
    """One device of compute capability 9.0, on which all backends could serve; ``refuse`` names those that do not."""
    refused = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(crossover, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_why_not", lambda op, backend, device, subject: refused.get(backend))

    def load(op, backend, name):
        assert (op, backend, name) == ("denoise", "cuda", "why_not_persistent")
        return lambda head, tokens, guided: refused.get("cuda persistent")

    monkeypatch.setattr(backends, "_load", load)
    return refused


def test_what_would_be_chosen_and_why(hopper, monkeypatch):
    chosen = info.collect()["chosen"]
    assert len(chosen) == 24
    one = "(measured: width 1024, depth 6, 8 rows on 9.0, milliseconds: cuda parallel 2.51, triton parallel 2.99, "
    assert chosen["cuda:0 MAR-B bfloat16, 8 tokens"].startswith(f"cuda parallel {one}cuda persistent 4.08, cuda 4.54, ")
    assert chosen["cuda:0 MAR-B bfloat16, 8 tokens, guided"].startswith("cuda (measured: width 1024, depth 6, 16 rows ")
    assert chosen["cuda:0 MAR-B bfloat16, 512 tokens"].startswith("cuda (not measured; nearest: width 1536, depth 12, ")
    assert [chosen[f"cuda:0 MAR-H bfloat16, {n} tokens"].split(" (")[0] for n in (1, 64, 512)] == [
        "cuda parallel", "cuda", "cuda",
    ]  # fmt: skip
    assert "cuda:0 MAR-L bfloat16, 512 tokens" in info.render(as_json=False)
    monkeypatch.setenv("CSPD_PARALLEL", "0")
    assert info.collect()["chosen"]["cuda:0 MAR-B bfloat16, 8 tokens"].startswith("cuda persistent (measured: ")


def test_what_does_not_serve_is_told_with_the_choice(hopper, monkeypatch):
    monkeypatch.setenv("CSPD_PARALLEL", "0")
    hopper["cuda persistent"] = "it is too long"
    chosen = info.collect()["chosen"]["cuda:0 MAR-B bfloat16, 8 tokens"]
    assert chosen.startswith("cuda (measured: ")
    assert chosen.endswith("; not cuda persistent: it is too long")
    hopper["cuda"] = "nobody built it"
    chosen = info.collect()["chosen"]["cuda:0 MAR-B bfloat16, 8 tokens"]
    assert chosen.startswith("triton (measured: ")
    assert chosen.endswith("; not cuda: nobody built it")
    monkeypatch.delenv("CSPD_PARALLEL")
    assert info.collect()["chosen"]["cuda:0 MAR-B bfloat16, 8 tokens"].startswith("triton parallel (measured: ")


def test_a_choice_of_the_user_is_told(hopper, monkeypatch):
    monkeypatch.setenv("CSPD_BACKEND", "torch")
    assert set(info.collect()["chosen"].values()) == {"torch: CSPD_BACKEND is set"}


def test_without_a_device_torch_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert info.collect()["chosen"] == {"cpu": "torch: the kernels run on CUDA devices"}
