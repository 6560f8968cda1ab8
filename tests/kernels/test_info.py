"""``python -m cspd_kernels.info``: text, JSON, and no failure whatever the machine answers."""

import json
import os
import subprocess
import sys

import pytest
import torch

import cspd_kernels
from cspd_kernels import backends, cuda_support, info

KEYS = {"cspd-kernels", "python", "platform", "torch", "triton", "numpy", "gpus", "backends", "CSPD_BACKEND"}
KEYS |= {"cuda extension"}


def broken(*_):
    raise OSError("the machine is odd")


def test_json(capsys, monkeypatch):
    monkeypatch.setenv("CSPD_BACKEND", "torch")
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= KEYS
    assert report["torch"] == torch.__version__
    assert report["backends"] == cspd_kernels.available_backends()
    assert report["CSPD_BACKEND"] == "torch"
    assert isinstance(report["gpus"], list)


def test_text(capsys):
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch: {torch.__version__}" in lines
    assert "CSPD_BACKEND: not set (automatic)" in lines
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
