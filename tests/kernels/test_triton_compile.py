"""What the compiler makes of the Triton kernels for the released heads; needs no GPU, but takes a minute or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cspd_kernels.backends import why_unavailable

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
if "is older than" in (reason := why_unavailable("triton") or ""):
    pytest.skip(reason, allow_module_level=True)

import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from cspd_kernels.devices import SHARED_LIMITS
from cspd_kernels.triton_report import ARCHITECTURES, Resources, recorded_launches, touched_before_wait

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VERDICTS = {"_log_density_ratio_kernel": {""}, "_accept_reject_kernel": {" rejection", " closed_form"}}
ONE_EACH = {"_refresh_kernel", "_randn_kernel"}  # for every type
ALWAYS = {"_condition_kernel", "_input_kernel", "_update_kernel"}
FEW = {"_few_mlp0_kernel", "_few_mlp1_kernel"}
OWN, LIBRARY = (
    {"_norm_kernel", "_mlp0_kernel", "_mlp1_kernel"},
    {"_norm_kernel", "_bias_silu_kernel", "_residual_kernel"},
)
# What a guided chain of so many tokens launches, by the rules of the table.
LAYERED = {
    ("bfloat16", 1): FEW, ("bfloat16", 64): OWN, ("bfloat16", 512): LIBRARY,
    ("float32", 1): FEW, ("float32", 64): LIBRARY, ("float32", 512): LIBRARY,
}  # fmt: skip
# What a guided chain of one token of 100 steps launches in parallel over its steps: all may be called off.
SWEPT, FIRST = ("bfloat16", "1 x 100"), {"_sweep_kernel", "_settle_kernel"}
SWEEPS = ALWAYS | FEW | OWN | FIRST | {"_output_kernel"}
# Of heads of other shapes: tokens in groups of rows.
OTHERS = {
    ("VibeVoice-1.5B", "1 in 2"): ALWAYS | FEW,
    ("BitDance-H", "64 in 3"): ALWAYS | OWN,
}  # fmt: skip
WEIGHTS = {"weight", "bias", "norm_weight", "norm_bias", "coefficients", "clip"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The quick report, in a process of its own: what the interpreter runs cannot be compiled."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    command = [sys.executable, BENCHMARKS / "kernels.py", "--compile-report", "--quick", "--json", path]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [row for row in json.loads(path.read_text()) if row["backend"] == "triton"]


@pytest.mark.slow
def test_every_kernel_fits_every_architecture(rows):
    misfits = [row for row in rows if row["stack_bytes"] or row["shared_bytes"] > SHARED_LIMITS[row["architecture"]]]
    assert misfits == []
    assert all(row["fits"] and 0 < row["registers"] <= 255 for row in rows)


@pytest.mark.slow
def test_the_report_leaves_nothing_out(rows):
    def case(row):
        return row["model"], row["architecture"], row["dtype"]

    assert ARCHITECTURES == (80, 90, 100)
    sizes = {(model, architecture) for model in ("MAR-B", "MAR-L", "MAR-H") for architecture in ARCHITECTURES}
    for (dtype, tokens), kernels in LAYERED.items():
        of_case = [row for row in rows if (row["dtype"], row["tokens"]) == (dtype, tokens)]
        assert {row["kernel"] for row in of_case} == ALWAYS | kernels
        for kernel in ALWAYS | kernels:
            assert {case(row)[:2] for row in of_case if row["kernel"] == kernel} == sizes
    of_case = [row for row in rows if (row["dtype"], row["tokens"]) == SWEPT]
    for kernel in SWEEPS:
        assert {case(row)[:2] for row in of_case if row["kernel"] == kernel} == sizes
    assert {row["kernel"] for row in of_case} == SWEEPS
    for (model, tokens), kernels in OTHERS.items():
        of_case = [row for row in rows if (row["model"], row["tokens"], row["dtype"]) == (model, tokens, "bfloat16")]
        assert {(r["kernel"], r["architecture"]) for r in of_case} == {(k, a) for k in kernels for a in ARCHITECTURES}
    types = {(a, d) for a in ARCHITECTURES for d in ("float32", "bfloat16")}
    tiles = [row for row in rows if str(row["tokens"]).startswith("tile ")]  # the smallest of either type
    assert {case(row)[1:] for row in tiles} == types
    assert {row["kernel"] for row in tiles} == {"_mlp0_kernel", "_mlp1_kernel"}
    for kernel, methods in VERDICTS.items():
        for model in (f"C={channels}{method}" for channels in (16, 256) for method in methods):
            assert {case(r)[1:] for r in rows if (r["kernel"], r["model"]) == (kernel, model)} == types
    for model in (f"C={channels} {method} K=16" for channels in (16, 256) for method in ("rejection", "closed_form")):
        assert {case(r)[1:] for r in rows if r["model"] == model} == {(a, "bfloat16") for a in ARCHITECTURES}
    for kernel in ONE_EACH:
        assert {case(r)[1:] for r in rows if r["kernel"] == kernel} == types
    chain = SWEEPS.union(*LAYERED.values())
    assert {row["kernel"] for row in rows} == chain | ONE_EACH | set(VERDICTS)


@pytest.mark.slow
def test_kernels_that_may_start_early_wait_before_they_touch_more_than_weights(rows):
    """On every architecture that has it; on others, and between library products, nothing waits."""
    early = SWEEPS.union(*LAYERED.values()) - {"_condition_kernel"}
    for row in rows:
        waits = row["kernel"] in early and row["architecture"] >= 90
        assert (row["waits"] > 0) == waits, row
        assert set(row["before_wait"]) <= WEIGHTS, row
        weights = any("bias" in name or name == "coefficients" for name in row["before_wait"])
        # The settled test, and a sweep that begins from a guess, have nothing to read before it.
        assert weights == waits or row["kernel"] in FIRST, row  # or the listing was not understood


@pytest.fixture
def compile_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compile_report

    yield compile_report
    sys.modules.pop("compile_report")


def row(**changes):
    fitting = {
        "kernel": "k", "dtype": "float32", "tokens": 1, "model": "MAR-B", "architecture": 80, "registers": 99,
        "stack_bytes": 0, "shared_bytes": 1, "warps": 4, "fits": True,
    }  # fmt: skip
    return fitting | changes


def test_a_kernel_that_does_not_fit_fails_the_report(compile_report, capsys, tmp_path):
    compile_report.print_report([row()], None)
    assert "1 compiled, 0 with spills" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        compile_report.print_report([row(), row(stack_bytes=8, fits=False)], tmp_path / "report.json")
    assert stop.value.code == 1
    assert "2 compiled, 1 with spills" in capsys.readouterr().out
    assert [r["fits"] for r in json.loads((tmp_path / "report.json").read_text())] == [True, False]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_or_too_much_shared_memory_do_not_fit(architecture):
    limit = SHARED_LIMITS[architecture]
    for stack, shared, fits in ((0, limit, True), (8, 0, False), (0, limit + 1, False)):
        assert Resources("k", architecture, 255, stack, shared, 4).fits is fits


LISTING = """
    ld.param.b64 %rd1, [k_param_0];
    ld.param.u64 %rd2, [k_param_1];
    ld.param.b32 %r1, [k_param_2];
    cvta.to.global.u64 %rd3, %rd1;
    mul.wide.s32 %rd4, %r1, 4;
    add.s64 %rd5, %rd3, %rd4;
    @%p1 ld.global.b32 {{ %r2 }}, [ %rd5 + 0 ];
    add.s64 %rd6, %rd2, %rd4;
    {early}
    griddepcontrol.wait;
    st.global.b32 [ %rd6 + 0 ], {{ %r2 }};
"""


@pytest.mark.parametrize(
    ("early", "touched"),
    [
        ("", ("x",)),
        ("@%p1 st.global.b32 [ %rd6 + 0 ], { %r2 };", ("out", "x")),
        ("cp.async.cg.shared.global [ %r9 + 0 ], [ %rd6 + 0 ], 0x10;", ("out", "x")),
        ("prefetch.global.L2 [%rd6];", ("out", "x")),
        ("atom.global.add.u32 %r3, [%rd6], 1;", ("out", "x")),
    ],
)
def test_what_is_touched_before_the_wait_is_read_from_the_listing(early, touched):
    listing = LISTING.format(early=early)
    assert touched_before_wait(listing, ["x", "out", None]) == touched
    assert touched_before_wait(listing.replace("griddepcontrol.wait", "nop"), ["x", "out", None]) == ()


# --- the launches that the report compiles ---


def _specialised(x, n, flag, SIZE: tl.constexpr):  # noqa: N803
    raise AssertionError("nothing runs")


@pytest.fixture
def kernel():
    """Compiled, never interpreted, whatever the environment says."""
    return JITFunction(_specialised, do_not_specialize=["flag"])


def test_launches_are_recorded_once_each_in_order_and_none_runs(kernel):
    x = torch.empty(8)
    with recorded_launches() as launches:
        for size in (2, 3, 2):
            kernel[(1,)](x, 5, 7, SIZE=size, num_warps=4)
    assert [dict(launch.constants) for launch in launches] == [{"SIZE": 2}, {"SIZE": 3}]
    assert [launch.kernel for launch in launches] == [kernel] * 2
    assert [dict(launch.options) for launch in launches] == [{"num_warps": 4}] * 2


def test_the_launcher_is_itself_again_afterwards(kernel):
    run = JITFunction.run
    with pytest.raises(ValueError, match="odd"), recorded_launches():
        assert JITFunction.run is not run
        raise ValueError("odd")
    assert JITFunction.run is run


POINTERS = [torch.zeros(64, dtype=t) for t in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)]
POINTERS += [torch.zeros(64)[1:], torch.zeros(64)[4:], torch.zeros(64).half()[4:], torch.zeros(64).half()[8:]]


@pytest.mark.parametrize("x", [*POINTERS, None])
@pytest.mark.parametrize("flag", [1, 16, 2**31, -(2**31)])
def test_arguments_are_specialised_as_triton_does(kernel, x, flag):
    for n in (0, 1, 2, 16, 2**31 - 1, 2**31, 2**40):
        with recorded_launches() as launches:
            kernel[(1,)](x, n, flag, SIZE=16)
        (launch,) = launches
        signature, constants, aligned = {"SIZE": "constexpr"}, {"SIZE": 16}, []
        for i, (name, value) in enumerate({"x": x, "n": n, "flag": flag}.items()):
            signature[name], key = native_specialize_impl(CUDABackend, value, False, name != "flag", True)
            if signature[name] == "constexpr":
                constants[name] = key
            elif key:
                assert key == "D"  # divisible by 16
                aligned.append(i)
        assert dict(launch.signature) == signature
        assert dict(launch.constants) == constants
        assert list(launch.attributes) == aligned


def test_tensors_without_storage_are_specialised_as_real_ones(kernel):
    for start in (0, 1, 4):
        with recorded_launches() as launches:
            for device in ("meta", "cpu"):
                kernel[(1,)](torch.zeros(64, device=device)[start:], 2, 2, SIZE=16)
        assert len(launches) == 1
