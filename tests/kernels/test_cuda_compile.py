"""What nvcc makes of the CUDA kernels on every architecture; needs the toolkit and no GPU, and may take minutes."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from building import compiling

from cspd_kernels import cuda_support
from cspd_kernels.devices import SHARED_LIMITS

compile_py = compiling()

every_kernel = pytest.mark.slow  # a fresh build takes a minute or two


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(folder, record) of the extension of these sources: the installed one, or a fresh build where that is another."""
    if reason := compile_py.why_not():
        pytest.skip(reason)
    folder, record = cuda_support.RECORD.parent, cuda_support.build_record()
    if record.get("sources") != compile_py.digest():
        folder = tmp_path_factory.mktemp("cuda")
        record = compile_py.build(folder)
    return folder, record


@every_kernel
def test_every_kernel_fits_every_architecture(build):
    _, record = build
    kernels = record["kernels"]
    assert {kernel["architecture"] for kernel in kernels} == set(record["architectures"])
    assert [k for k in kernels if k["spill_store_bytes"] or k["spill_load_bytes"]] == []
    assert all(0 < kernel["registers"] <= 255 for kernel in kernels)
    assert all(kernel["shared_bytes"] <= SHARED_LIMITS.get(kernel["architecture"], 48 << 10) for kernel in kernels)


@every_kernel
def test_the_record_leaves_no_kernel_out(build):
    _, record = build
    names = {kernel["kernel"] for kernel in record["kernels"]}
    sources = "".join(path.read_text() for path in sorted(compile_py.HERE.rglob("*.cu*")))
    written = set(re.findall(r"__global__\s+void\b[^;{]*?(\w+_kernel)\(", sources))
    assert len(written) == sources.count("__global__")
    assert {name.partition("<")[0] for name in names} == written
    for architecture in record["architectures"]:
        assert {k["kernel"] for k in record["kernels"] if k["architecture"] == architecture} == names


@every_kernel
def test_the_extension_exports_its_entry_only(build):
    """A CUDA runtime of its own that others could see would be mixed up with torch's."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm")
    module = build[0] / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    done = subprocess.run([tool, "-D", "--defined-only", module], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    assert "PyInit__C" in symbols
    assert [s for s in symbols if "cuda" in s.lower() or "cspd" in s] == []
    needed = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed


@every_kernel
def test_the_extension_imports_without_a_gpu_and_without_torch(build):
    code = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import _C\n"
        "assert 'torch' not in sys.modules\n"
        "print(_C.EMULATED)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, build[0]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


# --- the report ---


@pytest.fixture
def compile_report(monkeypatch):
    pytest.importorskip("triton", reason="the report is about Triton's kernels, too: pip install triton")
    monkeypatch.syspath_prepend(str(compile_py.HERE.parent / "benchmarks"))
    import compile_report

    yield compile_report
    sys.modules.pop("compile_report")


def test_launches_of_the_persistent_kernel_fit_every_architecture(compile_report, device_of):
    device_of("cuda")
    rows = compile_report.plan_rows({"MAR-B": (6, 1024, 768), "MAR-H": (12, 1536, 1280)})
    assert all(row["fits"] for row in rows)
    assert {(row["architecture"], row["model"]) for row in rows} == {
        (architecture, model) for architecture in SHARED_LIMITS for model in ("MAR-B", "MAR-H")
    }
    stay = [r for r in rows if "weights stay" in r["kernel"]]
    assert {(r["model"], r["dtype"], r["architecture"], r["tokens"]) for r in stay} == {
        ("MAR-B", "bfloat16", architecture, tokens) for architecture in (90, 100) for tokens in (2, 16)
    }
    too_large = compile_report.plan_rows({"wide": (1, 2064, 768)})
    assert not any(row["fits"] for row in too_large)


def test_a_cuda_kernel_that_spills_fails_the_report(compile_report, tmp_path):
    kernel = {"kernel": "k<4>", "architecture": 90, "registers": 40, "stack_bytes": 16, "spill_store_bytes": 0}
    kernel |= {"spill_load_bytes": 0, "shared_bytes": 100, "barriers": 1}
    spills = [kernel | {"spill_store_bytes": 4}, kernel | {"spill_load_bytes": 4}, kernel | {"shared_bytes": 1 << 20}]
    rows = compile_report.cuda_rows({"kernels": [kernel, *spills]})
    assert [row["fits"] for row in rows] == [True, False, False, False]
    compile_report.print_report(rows[:1], None)
    with pytest.raises(SystemExit):
        compile_report.print_report(rows, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())[1]["backend"] == "cuda"
