"""What both packages show: their names, their version, the errors that they raise, and dtypes by name."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys

import pytest
import torch
from building import ROOT

import cspd
import cspd_kernels
from cspd.cli_support import one_line
from cspd_kernels import dtype_names, errors
from cspd_kernels.dtypes import OPERAND_DTYPES, as_dtype, as_dtype_or_none

CSPD = {
    "AdaptiveDraft",
    "BackendUnavailable",
    "CheckpointError",
    "ContextRelaxation",
    "CspdError",
    "EntropyDraft",
    "InvalidInput",
    "Progress",
    "RunStats",
    "SampleOutput",
    "SimilarityRelaxation",
    "SpecDecodeRunner",
    "UnsupportedModel",
    "Window",
    "WrongDtype",
    "describe",
    "errors",
    "is_patched",
    "load_mar",
    "load_vae",
    "models",
    "patch",
    "patched",
    "sample_tokens",
    "samplers",
    "unpatch",
}
KERNELS = {
    "BackendUnavailable",
    "CandidateVerdict",
    "CspdError",
    "Denoised",
    "DenoisedInParallel",
    "DiffusionHead",
    "InvalidInput",
    "PhiloxNoise",
    "Schedule",
    "UnsupportedModel",
    "Verdict",
    "WrongDtype",
    "accept_reject",
    "available_backends",
    "denoise",
    "errors",
    "evaluate",
    "log_density_ratio",
}
# Raised for no caller to catch: a mistake of ours, or another package's place for it.
OWN = {"cspd_kernels/products.py"}


@pytest.mark.parametrize(("package", "names"), [(cspd, CSPD), (cspd_kernels, KERNELS)])
def test_dir_shows_public_names_alone(package, names):
    assert {name for name in dir(package) if not name.startswith("__")} == names
    assert set(package.__all__) == names
    assert {"__doc__", "__file__", "__name__", "__version__"} <= set(dir(package))
    for name in names:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_names_are_there_before_torch(tmp_path):
    code = (
        "import sys, cspd, cspd_kernels\n"
        "assert dir(cspd) and dir(cspd_kernels) and issubclass(cspd.CspdError, cspd_kernels.errors.CspdError)\n"
        "assert cspd.errors.InvalidInput is cspd_kernels.InvalidInput\n"
        "print(cspd.__version__, cspd_kernels.__version__, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [cspd_kernels.__version__, cspd_kernels.__version__, "False"]


def test_every_error_is_what_was_raised_before():
    builtin = {
        "BackendUnavailable": RuntimeError, "CallError": RuntimeError, "MissingPackage": RuntimeError,
        "InvalidInput": ValueError, "UnsupportedModel": ValueError, "CheckpointError": ValueError,
        "WrongType": TypeError, "WrongDtype": TypeError, "NotAModel": TypeError, "CspdError": Exception,
    }  # fmt: skip
    assert set(builtin) == set(errors.__all__) == set(cspd.errors.__all__)
    for name, parent in builtin.items():
        error = getattr(errors, name)
        assert issubclass(error, parent)
        assert issubclass(error, errors.CspdError)
        assert error is getattr(cspd.errors, name)
        copy = pickle.loads(pickle.dumps(error("no\nway")))
        assert (type(copy), str(copy), one_line(copy)) == (error, "no\nway", "no way")
    assert issubclass(errors.WrongDtype, ValueError)
    assert issubclass(errors.NotAModel, errors.UnsupportedModel)


def test_callers_errors_have_classes_of_their_own():
    """No module raises a bare ValueError, TypeError or RuntimeError, or derives from one."""
    bare = []
    for path in sorted([*ROOT.glob("cspd_kernels/**/*.py"), *ROOT.glob("python/cspd/**/*.py")]):
        name = path.relative_to(ROOT).as_posix()
        if name in OWN or name == "cspd_kernels/errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.func if isinstance(node, ast.Call) else None
            for used in [call, *(node.bases if isinstance(node, ast.ClassDef) else ())]:
                if isinstance(used, ast.Name) and used.id in ("ValueError", "TypeError", "RuntimeError"):
                    bare.append(f"{name}:{node.lineno}")
    assert bare == []


def test_errors_of_calls(monkeypatch):
    head = cspd_kernels.DiffusionHead.from_module(cspd.models.DiffLoss(3, 5, 2, 8, num_sampling_steps="4"))
    cond, x = torch.zeros(2, 5), torch.zeros(2, 3)

    def denoise(**options):
        return cspd_kernels.denoise(head, cond, x, noise=torch.zeros(4, 2, 3), **options)

    with pytest.raises(cspd.InvalidInput, match="expected backend one of"):
        denoise(backend="tpu")
    with pytest.raises(cspd.InvalidInput, match="finite temperature"):
        denoise(temperature=-1.0)
    with pytest.raises(errors.WrongType, match="expected a DiffusionHead"):
        cspd_kernels.denoise("head", cond, x, noise=torch.zeros(4, 2, 3))
    monkeypatch.setattr("cspd_kernels.backends._why_not_triton", lambda: "it is of wood")
    with pytest.raises(cspd.BackendUnavailable, match=r"backend='triton' cannot serve denoise: it is of wood"):
        denoise(backend="triton")
    with pytest.raises(errors.NotAModel, match="expected a DiffLoss-like module"):
        cspd_kernels.DiffusionHead.from_module(torch.nn.Linear(2, 2))
    with pytest.raises(cspd.UnsupportedModel, match="no diffusion head found"):
        cspd.patch(torch.nn.Linear(2, 2))
    with pytest.raises(errors.NotAModel, match=r"expected a torch\.nn\.Module"):
        cspd.patch("model")


def test_errors_of_files(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(cspd.CheckpointError, match="expected the state dict of a MAR model"):
        cspd.load_mar(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError):
        cspd.load_mar(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32), ("fp32", torch.float32), ("torch.float32", torch.float32),
        ("bfloat16", torch.bfloat16), ("bf16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16),
        ("BF16", torch.bfloat16), (" float16 ", torch.float16), ("fp16", torch.float16), ("half", torch.float16),
        ("torch.half", torch.float16), ("float64", torch.float64), ("double", torch.float64), ("float", torch.float32),
    ],
)  # fmt: skip
def test_a_dtype_by_name(name, dtype):
    assert as_dtype(name) is as_dtype_or_none(name) is as_dtype(dtype) is dtype


def test_names_of_dtypes_are_pytorchs():
    assert list(OPERAND_DTYPES) == [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for full, short in dtype_names.SHORT.items():
        for name in short:
            assert getattr(torch, name, getattr(torch, full)) is getattr(torch, full)
    assert as_dtype_or_none(None) is None


@pytest.mark.parametrize("dtype", ["int8", "", "bf", "complex64", torch.int8, 16, None, ["bf16"]])
def test_what_is_no_dtype_lists_those_that_are(dtype):
    with pytest.raises(cspd.WrongDtype) as caught:
        as_dtype(dtype, "patch")
    assert str(caught.value) == (
        "patch expected dtype as float32, bfloat16, float16, float64 "
        f"(or fp32, float, bf16, fp16, half, fp64, double), got {dtype!r}"
    )


def test_every_place_takes_a_name():
    module = cspd.models.DiffLoss(3, 5, 2, 8, num_sampling_steps="4")
    head = cspd_kernels.DiffusionHead.from_module(module, dtype="bf16")
    assert head.dtype is cspd_kernels.DiffusionHead.from_network(module.net, head.schedule, dtype="bf16").dtype
    assert head.to("float64").dtype is torch.float64
    with cspd.patched(module, dtype="bfloat16"):
        assert cspd.describe(module).heads[0].dtype is torch.bfloat16
    for call in (
        lambda: cspd.patch(module, dtype="int8"), lambda: head.to("int8"), lambda: cspd.load_vae("none", dtype="fp16"),
        lambda: cspd.load_mar("none", dtype="int8"), lambda: cspd_kernels.DiffusionHead.from_module(module, dtype="q"),
    ):  # fmt: skip
        with pytest.raises(cspd.WrongDtype, match="expected dtype as float32, bfloat16"):
            call()
    assert not cspd.is_patched(module)
