"""What users install: the wheel's contents and metadata, and imports that need nothing."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that the checkout stays clean."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("cspd_kernels", "python", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", work, source]
    # -S-like isolation from the current folder: torch must not be imported to build.
    subprocess.run(command, check=True, cwd=work, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(_no_torch(work))})
    return zipfile.ZipFile(next(work.glob("cspd_kernels-*.whl")))


def _no_torch(work: Path) -> Path:
    blocker = work / "blocker"
    blocker.mkdir()
    (blocker / "torch.py").write_text("raise ImportError('torch is not there at build time')\n")
    return blocker


def test_wheel_holds_both_packages_whole(wheel):
    names = set(wheel.namelist())
    for package, folder in (("cspd_kernels", ROOT / "cspd_kernels"), ("cspd", ROOT / "python" / "cspd")):
        modules = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert modules <= names
    weights = {name for name in names if name.endswith(".safetensors")}
    assert weights == {f"cspd/demo/data/{name}.safetensors" for name in ("target", "draft", "reference")}
    size = sum(wheel.getinfo(name).file_size for name in weights)
    assert size < 8 * 2**20
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
        "Provides-Extra: test",
        "Provides-Extra: dev",
    }
    assert "Requires-Python: >=3.10" in headers
    entry = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "cspd = cspd.cli:main" in wheel.read(entry).decode()
    assert any(n.endswith("LICENSE") for n in wheel.namelist())


def test_version_is_stated_once(wheel):
    import cspd_kernels

    assert f"cspd_kernels-{cspd_kernels.__version__}" in wheel.filename


def test_imports_are_quiet_and_light():
    code = (
        "import sys, cspd, cspd_kernels\n"
        "heavy = {'triton', 'sklearn', 'scipy', 'PIL', 'matplotlib', 'timm', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
