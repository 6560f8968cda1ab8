"""csrc/compile.py: what it finds, how it reads the compilers, and builds for the CPU and with a fake nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from building import ROOT, compiling, copy_sources, fake_nvcc, with_stand_in

compile_py = compiling()
SUPPORTED = [75, 80, 86, 90, 100, 103, 120]
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void cspd::(anonymous namespace)::scale_kernel<4, float>(float*, int)' for 'sm_80'
ptxas info    : Function properties for void cspd::(anonymous namespace)::scale_kernel<4, float>(float*, int)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 2 barriers, 512 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 13.418 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'cspd::spill_kernel(float*)' for 'sm_100'
ptxas info    : Function properties for cspd::spill_kernel(float*)
    304 bytes stack frame, 568 bytes spill stores, 596 bytes spill loads
ptxas info    : Function properties for cspd::helper(float)
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 32 registers, 360 bytes cmem[0]
"""  # noqa: E501


@pytest.fixture(autouse=True)
def no_toolkit(monkeypatch, tmp_path):
    """Neither the caller's nvcc nor the caller's choices."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CSPD_CUDA_ARCHS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    folders = os.environ["PATH"].split(os.pathsep)
    with_nvcc = [folder for folder in folders if shutil.which("nvcc", path=folder)]
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere", *(f for f in folders if f not in with_nvcc)]))


@pytest.fixture
def source(tmp_path):
    return with_stand_in(copy_sources(tmp_path / "a folder" / "source"))


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """The fake nvcc, and the calls it saw."""
    folder = fake_nvcc(tmp_path / "toolkit" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(folder.parent))
    return lambda: (folder / "calls").read_text().splitlines()


def test_the_first_nvcc_is_that_of_cuda_home_then_cuda_path_then_path(monkeypatch, tmp_path):
    found = {name: fake_nvcc(tmp_path / name / "bin") / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH", "PATH")}
    monkeypatch.setenv("PATH", str(found["PATH"].parent))
    assert compile_py.find_nvcc() == found["PATH"]
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert compile_py.find_nvcc() == found[name]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "moved away"))
    assert compile_py.find_nvcc() == found["CUDA_PATH"]


def test_what_is_missing_is_named(monkeypatch, toolkit):
    assert compile_py.why_not() is None
    with monkeypatch.context() as patch:
        patch.delenv("CUDA_HOME")
        assert "nvcc was not found in CUDA_HOME, CUDA_PATH or PATH" in compile_py.why_not()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert "on Linux only, and this is win32" in compile_py.why_not()
    with monkeypatch.context() as patch:
        patch.setattr(compile_py.importlib.util, "find_spec", lambda name: None)
        assert "pip install pybind11" in compile_py.why_not()
        patch.setattr(compile_py, "_pybind11", lambda: None)
        patch.setenv("PATH", "/nowhere")
        assert "pip install ninja" in compile_py.why_not()


VERSIONS = {  # as the wheels of PyTorch have them
    "cpu": ("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n", "2.13.0+cpu"),
    "2.4 cpu": ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "2.13.0+cpu"),
    "cuda": ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", None),
    "plain": ("cuda = '12.1'\n", None),
    "rocm": ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", None),
    "xpu": ("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = '2025'\n", None),
    "says nothing": ("debug = False\n", None),
    "computed": ("cuda = find()\n", None),
    "broken": ("cuda = (\n", None),
}


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Folders that packages are installed into, and nothing else: of sys.path, of the environment, of the user."""
    folders = {name: tmp_path / name for name in ("path", "environment", "user")}
    monkeypatch.setattr(sys, "path", [str(folders["path"])])
    monkeypatch.setattr(compile_py.site, "getsitepackages", lambda: [str(folders["environment"])])
    monkeypatch.setattr(compile_py.site, "getusersitepackages", lambda: str(folders["user"]))
    return folders


def put_torch(folder, kind):
    (folder / "torch").mkdir(parents=True)
    text, version = VERSIONS[kind]
    head = "from typing import Optional\n\n__version__ = '2.13.0+cpu'\n"
    (folder / "torch" / "version.py").write_text(head + text)
    return version


@pytest.mark.parametrize("kind", VERSIONS)
def test_a_torch_for_cpus_is_told_from_others(places, kind):
    version = put_torch(places["environment"], kind)  # not on sys.path: as where pip builds
    assert compile_py.cpu_torch() == version


def test_no_torch_is_no_torch_for_cpus(places):
    assert compile_py.cpu_torch() is None


def test_the_first_torch_counts(places):
    put_torch(places["environment"], "cpu")
    put_torch(places["path"], "cuda")
    assert compile_py.cpu_torch() is None


@pytest.mark.parametrize(("environment", "seen"), [("none", True), ("closed", False), ("open", True)])
def test_the_users_folder_counts_where_python_looks_there(places, monkeypatch, environment, seen):
    """In a virtual environment only where that one is open to the system's packages."""
    version = put_torch(places["user"], "cpu")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "prefix", "/usr" if environment == "none" else "/venv")
    monkeypatch.setattr(compile_py.site, "PREFIXES", ["/venv", *(["/usr"] if environment == "open" else [])])
    assert compile_py.cpu_torch() == (version if seen else None)


def test_the_torch_of_these_tests_is_judged_rightly():
    import torch

    expected = None if torch.version.cuda or torch.version.hip else torch.__version__
    assert compile_py.cpu_torch() == expected


def test_the_toolkit_is_asked(toolkit):
    nvcc = compile_py.find_nvcc()
    assert compile_py.nvcc_version(nvcc) == "12.8.61"
    assert compile_py.supported_architectures(nvcc) == [80, 89, 90]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("", [80, 90, 100]),
        (" ", [80, 90, 100]),
        ("80;90", [80, 90]),
        ("90,100", [90, 100]),
        ("9.0", [90]),
        ("10.0; 8.6 80", [80, 86, 100]),
        ("90;9.0", [90]),
        ("103", [103]),
    ],
)
def test_architectures(wanted, chosen):
    assert compile_py.architectures(wanted, SUPPORTED) == chosen


def test_the_default_is_what_nvcc_supports_and_never_more():
    assert compile_py.architectures("", [70, 80, 89, 90, 103]) == [80, 90]
    with pytest.raises(compile_py.BuildError, match=r"none of \(80, 90, 100\), only 50, 103: set CSPD_CUDA_ARCHS"):
        compile_py.architectures("", [50, 103])


@pytest.mark.parametrize("wanted", ["sm_90", "90a", "9.0+PTX", "all", "80;;90;", "-80", "²", "8.00"])
def test_architectures_that_mean_nothing(wanted):
    with pytest.raises(ValueError, match=re.escape(f"such as 80;90 or 9.0, got {wanted!r}")):
        compile_py.architectures(wanted, SUPPORTED)


def test_architectures_older_than_the_kernels():
    with pytest.raises(ValueError, match=r"CSPD_CUDA_ARCHS='90;75': the kernels need 80 or later"):
        compile_py.architectures("90;75", SUPPORTED)


def test_architectures_that_nvcc_does_not_know():
    with pytest.raises(ValueError, match=r"this nvcc knows 75, 80, .*, and not 9, 110$"):
        compile_py.architectures("9;80;11.0", SUPPORTED)


def test_names_stay_as_they_are_where_nothing_demangles_them(monkeypatch, tmp_path):
    broken = tmp_path / "c++filt"
    broken.write_text("#!/nonexistent/interpreter\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compile_py._demangled("_ZN4cspd6kernelEv") == "_ZN4cspd6kernelEv"


def test_a_ninja_that_does_not_work_is_named(monkeypatch, source, toolkit, tmp_path):
    module = compiling(source)
    monkeypatch.setattr(module, "_ninja", lambda: str(tmp_path / "ninja"))
    with pytest.raises(module.BuildError, match=r"ninja cannot be executed \(No such file or directory\)"):
        module.build(tmp_path / "out")


def test_what_ptxas_says_of_every_kernel():
    first, second = compile_py.parse_ptxas(PTXAS)
    assert first == {
        "kernel": "scale_kernel<4, float>", "architecture": 80, "registers": 10, "stack_bytes": 0,
        "spill_store_bytes": 0, "spill_load_bytes": 0, "shared_bytes": 512, "barriers": 2,
    }  # fmt: skip
    assert second == {
        "kernel": "spill_kernel", "architecture": 100, "registers": 32, "stack_bytes": 312,
        "spill_store_bytes": 572, "spill_load_bytes": 598, "shared_bytes": 0, "barriers": 0,
    }  # fmt: skip
    assert compile_py.parse_ptxas("ptxas info    : 0 bytes gmem\n") == []
    (unknown,) = compile_py.parse_ptxas("ptxas info    : Compiling entry function 'k' for 'sm_90'\nnothing more\n")
    assert (unknown["kernel"], unknown["registers"], unknown["stack_bytes"]) == ("k", 0, 0)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void cspd::chain_kernel<float, (cspd::Kind)1>(cspd::Chain, int (*)(int))", "chain_kernel<float, (Kind)1>"),
        ("cspd::denoise::update_kernel(float*)", "denoise::update_kernel"),
        ("plain_kernel", "plain_kernel"),
        ("_ZN4cspd6kernelEv", "_ZN4cspd6kernelEv"),
    ],
)
def test_short_names(name, short):
    assert compile_py._short(name) == short


def test_nvcc_gets_the_flags_and_the_architectures(source, toolkit, tmp_path):
    module = compiling(source)
    record = module.build(tmp_path / "out", wanted="8.0;90")
    assert record == module.json.loads((tmp_path / "out" / "_build.json").read_text())
    assert (record["architectures"], record["ptx"], record["nvcc"]) == ([80, 90], [90], "12.8.61")
    assert record["sources"] == module.digest()
    kernels = {kernel["kernel"] for kernel in record["kernels"]}
    assert kernels <= {"kernel", "_ZN4cspd6kernelEv"}  # the latter without c++filt
    assert len(kernels) == 1
    (compiled,) = [call for call in toolkit() if "answer.cu.o" in call and " -c " in call]
    assert " ".join(module.flags("nvcc")) in compiled
    for code in ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"):
        assert f"-gencode {code}" in compiled
    assert compiled.count("-gencode") == 3
    (linked,) = [call for call in toolkit() if "-shared" in call]
    assert "-cudart static" in linked


def test_flags_keep_products_and_sums_apart():
    assert "-fmad=false" in compile_py.flags("nvcc")
    assert "-ffp-contract=off" in compile_py.flags("host")
    assert any("-ffp-contract=off" in flag for flag in compile_py.flags("nvcc"))
    assert not any("fast" in flag for name in ("nvcc", "host") for flag in compile_py.flags(name))


def test_cmake_reads_the_same_flags():
    names = re.findall(r"^read_flags\((\w+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert names == ["nvcc", "host"]
    assert all(compile_py.flags(name) for name in names)


@pytest.fixture
def emulated(source, tmp_path):
    """Build for the CPU, and load."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")

    def build():
        path = str(compiling(source).build_emulated(tmp_path / "an out"))
        loader = ExtensionFileLoader("_C", path)
        return module_from_spec(spec_from_file_location("_C", path, loader=loader))

    return build


def test_the_emulation_needs_no_nvcc(emulated):
    module = emulated()
    assert (module.EMULATED, module.answer) == (True, 42)


def test_only_what_changed_is_compiled_again(emulated, source, tmp_path):
    emulated()
    objects = tmp_path / "an out" / "objects" / "emulated"
    first = {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")}
    assert first.keys() == {"answer.cu.o", "bindings.cpp.o"}
    emulated()
    assert {path.name: path.stat().st_mtime_ns for path in objects.glob("*.o")} == first
    (source / "csrc" / "answer.cu").write_text("int answer() { return 43; }\n")
    emulated()
    assert [path.name for path in objects.glob("*.o") if path.stat().st_mtime_ns != first[path.name]] == ["answer.cu.o"]
    header = source / "csrc" / "include" / "answer.h"
    header.write_text(header.read_text() + "\n")
    emulated()
    assert (objects / "bindings.cpp.o").stat().st_mtime_ns != first["bindings.cpp.o"]


def test_an_error_names_its_line(emulated, source, capsys):
    (source / "csrc" / "answer.cu").write_text("#warning odd\nint answer() { return who; }\n")
    with pytest.raises(Exception, match=r"answer\.cu:2:\d+: error: .*who") as error:
        emulated()
    assert type(error.value).__name__ == "BuildError"
    assert "\n" not in str(error.value)
    assert "#warning odd" in capsys.readouterr().err


def test_the_digest_is_that_of_the_sources(source):
    module = compiling(source)
    digests = {module.digest()}
    (source / "csrc" / "__pycache__").mkdir(exist_ok=True)
    (source / "csrc" / "__pycache__" / "x.pyc").write_text("not a source")
    assert module.digest() in digests
    for name in ("answer.cu", "include/answer.h", "flags.txt", "emulation/new.h"):
        path = source / "csrc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + "\n")
        assert module.digest() not in digests
        digests.add(module.digest())


def command(source, *arguments):
    line = [sys.executable, source / "csrc" / "compile.py", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_from_the_shell(source, toolkit, tmp_path):
    done = command(source, "--out", tmp_path / "out", "--archs", "90")
    assert done.returncode == 0
    assert done.stdout.strip() == str(next((tmp_path / "out").glob("_C.*")))
    assert (tmp_path / "out" / "_build.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nvcc was not found"), (["--emulated"], "the C++ compiler odd++ was not found: install it, or set CXX")],
)
def test_from_the_shell_without_compilers(source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("CXX", "odd++")
    done = command(source, "--out", tmp_path / "out", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
