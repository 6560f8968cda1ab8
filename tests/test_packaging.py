"""What users install: the wheel's contents and metadata, with the CUDA extension or a reason why it is missing, and
imports that need nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from building import ROOT, build_wheel, copy_sources, fake_nvcc, stand_in_torch, with_stand_in
from slow import mostly_slow, slow

TOOLS = "/usr/bin:/bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel where there is no CUDA toolkit."""
    work = tmp_path_factory.mktemp("wheel")
    return built(build_wheel(copy_sources(work / "source"), work, work / "no tools"), work)


@pytest.fixture
def source(tmp_path):
    """Sources whose kernels are a small stand-in."""
    return with_stand_in(copy_sources(tmp_path / "source"))


@pytest.fixture
def tools(tmp_path):
    """A PATH with an nvcc that compiles nothing, before any other."""
    return f"{fake_nvcc(tmp_path / 'tools')}:{TOOLS}"


def built(done: subprocess.CompletedProcess, work: Path) -> zipfile.ZipFile:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return zipfile.ZipFile(next(work.glob("cspd_kernels-*.whl")))


def record(wheel: zipfile.ZipFile) -> dict:
    return json.loads(wheel.read("cspd_kernels/_build.json"))


def modules(wheel: zipfile.ZipFile) -> list[str]:
    """The extension modules in it."""
    return [name for name in wheel.namelist() if name.endswith(".so")]


def test_wheel_holds_both_packages_whole(wheel):
    names = set(wheel.namelist())
    for package, folder in (("cspd_kernels", ROOT / "cspd_kernels"), ("cspd", ROOT / "python" / "cspd")):
        modules = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert modules | {f"{package}/py.typed"} <= names
    weights = {name for name in names if name.endswith(".safetensors")}
    shipped = ("target", "draft", "reference", "digits", "head100", "drift")
    assert weights == {f"cspd/demo/data/{name}.safetensors" for name in shipped}
    size = {name: wheel.getinfo(name).file_size for name in weights}
    assert size.pop("cspd/demo/data/head100.safetensors") < 2e6
    assert size.pop("cspd/demo/data/drift.safetensors") < 2e6
    assert sum(size.values()) < 8 * 2**20  # the pair
    allowed = ("cspd/", "cspd_kernels/", "cspd_kernels-")
    assert all(name.startswith(allowed) for name in names)


def test_metadata(wheel):
    name = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    metadata = wheel.read(name).decode()
    headers = metadata.split("\n\n")[0].splitlines()
    assert "Name: cspd-kernels" in headers
    needs = [line.removeprefix("Requires-Dist: ") for line in headers if line.startswith("Requires-Dist")]
    runtime = [need for need in needs if "extra ==" not in need]
    assert sorted(need.split(">=")[0] for need in runtime) == ["numpy", "pillow", "safetensors", "torch", "tqdm"]
    assert not any(mark in need for need in runtime for mark in ("==", "<", "~="))
    assert {line for line in headers if line.startswith("Provides-Extra")} == {
        f"Provides-Extra: {extra}" for extra in ("test", "dev", "eval", "docs", "serve", "vae")
    }
    assert "Requires-Python: >=3.10" in headers
    assert "Classifier: Typing :: Typed" in headers
    urls = dict(line.removeprefix("Project-URL: ").split(", ") for line in headers if line.startswith("Project-URL"))
    assert urls["Paper"] == "https://arxiv.org/abs/2411.11925"
    assert all(url.startswith("https://") for url in urls.values())
    entry = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "cspd = cspd.cli:main" in wheel.read(entry).decode()
    assert any(n.endswith("LICENSE") for n in wheel.namelist())


def test_version_is_stated_once(wheel):
    import cspd_kernels

    assert f"cspd_kernels-{cspd_kernels.__version__}" in wheel.filename


def test_imports_are_quiet_and_light(tmp_path):
    code = (
        "import sys, cspd, cspd_kernels\n"
        "heavy = {'triton', 'sklearn', 'scipy', 'PIL', 'matplotlib', 'timm', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NOT_FOUND = "nvcc was not found in CUDA_HOME, CUDA_PATH or PATH: install the CUDA toolkit and install again"


def test_without_nvcc_the_wheel_is_pure_and_says_why(wheel):
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert record(wheel) == {"built": False, "reason": f"when this package was installed, {NOT_FOUND}"}
    assert modules(wheel) == []


def test_with_nvcc_the_wheel_holds_the_extension(source, tools, tmp_path):
    wheel = built(build_wheel(source, tmp_path, tools), tmp_path)
    assert modules(wheel) == [f"cspd_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert not wheel.filename.endswith("-any.whl")
    found = record(wheel)
    assert (found["built"], found["architectures"], found["ptx"], found["nvcc"]) == (True, [80, 90], [90], "12.8.61")
    assert found["kernels"][0]["spill_store_bytes"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("archs", [None, "8.0"])
def test_what_is_compiled_is_printed(source, tools, tmp_path, archs):
    done = build_wheel(source, tmp_path, tools, **({"CSPD_CUDA_ARCHS": archs} if archs else {}))
    built(done, tmp_path)
    codes = "sm_80, compute_80" if archs else "sm_80, sm_90, compute_90"
    assert f"compiling 2 files with {tmp_path}/tools/nvcc (12.8.61) for {codes}" in done.stdout + done.stderr


LEFT_OUT = "installing cspd-kernels without its CUDA kernels: "
CPU_BUILD = "torch here (2.99.0) was a CPU build: CSPD_BUILD_CUDA=1 pip install . compiles the kernels anyway"


def test_beside_a_torch_for_cpus_nothing_is_compiled(source, tools, tmp_path):
    done = build_wheel(source, tmp_path, tools, cuda=None)
    wheel = built(done, tmp_path)
    assert record(wheel) == {"built": False, "reason": f"when this package was installed, {CPU_BUILD}"}
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert LEFT_OUT + CPU_BUILD in done.stdout + done.stderr
    assert "-c" not in (tmp_path / "tools" / "calls").read_text()


@pytest.mark.slow
def test_the_kernels_may_be_asked_for_beside_a_torch_for_cpus(source, tools, tmp_path):
    wheel = built(build_wheel(source, tmp_path, tools, cuda=None, CSPD_BUILD_CUDA="1"), tmp_path)
    assert record(wheel)["built"] is True
    assert len(modules(wheel)) == 1


BROKEN_NVCC = {
    "no interpreter": (b"#!/nonexistent/interpreter\n", "cannot be executed (No such file or directory)"),
    "another platform": (b"\x7fELF\x02\x01\x01" + bytes(57), "cannot be executed (Exec format error)"),
    "an error": (b"#!/bin/sh\necho 'error: no licence' >&2\nexit 3\n", "--version failed: error: no licence"),
    "no version": (b"#!/bin/sh\necho hello\n", "expected a version such as V13.0.88 from"),
}


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("kind", mostly_slow(BROKEN_NVCC, fast=("no version",)))
def test_an_nvcc_that_does_not_work_is_no_nvcc(source, tools, tmp_path, kind, required):
    content, said = BROKEN_NVCC[kind]
    (tmp_path / "tools" / "nvcc").write_bytes(content)
    done = build_wheel(source, tmp_path, tools, **({"CSPD_BUILD_CUDA": "1"} if required else {}))
    text = done.stdout + done.stderr
    assert said in text
    assert "Traceback" not in text
    if required:
        assert done.returncode != 0
        assert "CSPD_BUILD_CUDA=1, but the CUDA extension cannot be built: " in text
        return
    wheel = built(done, tmp_path)
    assert said in record(wheel)["reason"]
    assert wheel.filename.endswith("-py3-none-any.whl")


@pytest.mark.slow
def test_a_required_extension_that_cannot_be_built_is_an_error(source, tmp_path):
    done = build_wheel(source, tmp_path, tmp_path / "no tools", CSPD_BUILD_CUDA="1")
    assert done.returncode != 0
    assert f"CSPD_BUILD_CUDA=1, but the CUDA extension cannot be built: {NOT_FOUND}" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_extension_can_be_skipped(source, tools, tmp_path):
    wheel = built(build_wheel(source, tmp_path, tools, CSPD_BUILD_CUDA="0"), tmp_path)
    assert "CSPD_BUILD_CUDA=0 skipped it: install again without" in record(wheel)["reason"]
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert not (tmp_path / "tools" / "calls").exists()  # nvcc is not even looked at


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CSPD_BUILD_CUDA", "yes", "expected CSPD_BUILD_CUDA as 1 (required), 0 (skipped) or not set, got 'yes'"),
        ("CSPD_CUDA_ARCHS", "new", "expected CSPD_CUDA_ARCHS as architectures such as 80;90 or 9.0, got 'new'"),
    ],
)
def test_values_that_mean_nothing_are_refused(source, tools, tmp_path, name, value, message):
    done = build_wheel(source, tmp_path, tools, **{name: value})
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize("required", [slow(False), True])
def test_kernels_that_do_not_compile(source, tools, tmp_path, required):
    (source / "csrc" / "answer.cu").write_text("BROKEN\n")
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cspd_kernels"
    stale.mkdir(parents=True)
    (stale / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()  # of an earlier build
    done = build_wheel(source, tmp_path, tools, **({"CSPD_BUILD_CUDA": "1"} if required else {}))
    error = "answer.cu(7): error: it is broken"
    if required:
        assert done.returncode != 0
        assert "CSPD_BUILD_CUDA=1, but the CUDA extension did not compile: " in done.stdout + done.stderr
        assert error in done.stdout + done.stderr
        return
    wheel = built(done, tmp_path)
    assert LEFT_OUT in done.stdout + done.stderr
    assert modules(wheel) == []
    assert record(wheel)["built"] is False
    assert f"{error}): CSPD_BUILD_CUDA=1 pip install -v . shows all of it" in record(wheel)["reason"]


def hook(source: Path, name: str, out: Path, path: str) -> None:
    """Call a hook of the build backend, as pip does, beside a torch that was built for CUDA."""
    code = f"import setuptools.build_meta as backend; backend.{name}({str(out)!r})"
    environment = {"PATH": path, "PYTHONPATH": str(stand_in_torch(out / "torch for the build"))}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)


def test_an_editable_installation_builds_in_the_source_tree(source, tools, tmp_path):
    package, out = source / "cspd_kernels", tmp_path / "out"
    out.mkdir()
    hook(source, "build_editable", out, tools)
    assert json.loads((package / "_build.json").read_text())["built"] is True
    assert len([*package.glob("_C.*.so")]) == 1
    hook(source, "build_editable", out, str(tmp_path / "no tools"))
    assert NOT_FOUND in json.loads((package / "_build.json").read_text())["reason"]
    assert [*package.glob("_C.*.so")] == []


def test_the_source_distribution_builds(source, tmp_path):
    csrc = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*") if path.is_file()}
    out = tmp_path / "out"
    out.mkdir()
    hook(source, "build_sdist", out, str(tmp_path / "no tools"))
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml"} | csrc <= names
    assert {"cspd_kernels/py.typed", "python/cspd/py.typed"} <= names
    assert not any(name.endswith((".pyc", ".so", "_build.json")) for name in names)


def test_the_source_distribution_installs(tmp_path):
    """What ``pip install`` makes of it, without a network: packages, versions, data, and a command."""
    source, out = copy_sources(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    hook(source, "build_sdist", out, str(tmp_path / "no tools"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, next(out.glob("*.tar.gz"))],
        capture_output=True, text=True, env={"PATH": TOOLS, "CSPD_BUILD_CUDA": "0"}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    code = (
        "import cspd, cspd_kernels, importlib.resources as resources\n"
        "from cspd.demo.pair import load_pair\n"
        "load_pair()\n"
        "assert all(resources.files(package).joinpath('py.typed').is_file() for package in (cspd, cspd_kernels))\n"
        "print(cspd.__version__, cspd.__file__, cspd_kernels.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": TOOLS, "PYTHONPATH": str(tmp_path / "site")}, check=True,
    )  # fmt: skip
    version, *files = done.stdout.split()
    assert next(out.glob("*.tar.gz")).name == f"cspd_kernels-{version}.tar.gz"
    assert files == [str(tmp_path / "site" / package / "__init__.py") for package in ("cspd", "cspd_kernels")]
    assert (tmp_path / "site" / "bin" / "cspd").is_file()


def test_the_source_distribution_compiles_the_kernels(source, tools, tmp_path):
    """Its csrc is enough for the extension where there is an nvcc, here a stand-in."""
    out = tmp_path / "out"
    out.mkdir()
    hook(source, "build_sdist", out, str(tmp_path / "no tools"))
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "wheel").mkdir()
    assert record(built(build_wheel(unpacked, tmp_path / "wheel", tools), tmp_path / "wheel"))["built"] is True
