"""The public surface under ``mypy --strict``: its own modules, and a user's program."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from building import ROOT

import cspd
import cspd_kernels

USAGE = ROOT / "tests" / "typing" / "usage.py"


def mypy() -> str | None:
    """The command, of this environment or of the machine."""
    own = Path(sysconfig.get_path("scripts")) / "mypy"
    return str(own) if own.exists() else shutil.which("mypy")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """``check(*arguments)``: what mypy says, with the types of this environment's packages."""
    command, cache = mypy(), tmp_path_factory.mktemp("mypy")
    if command is None:
        pytest.skip("no mypy: pip install mypy")

    def run(*arguments: str) -> tuple[int, str]:
        options = ["--python-executable", sys.executable, "--cache-dir", cache, "--no-error-summary"]
        done = subprocess.run([command, *options, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_types(check, tmp_path):
    """The public modules, the program, and a program whose mistakes are found: one run of mypy is most of the time."""
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # earlier ones have less types of their own
        assert check() == (0, "")
    assert check(str(USAGE)) == (0, "")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import cspd\nimport cspd_kernels\nfrom cspd.demo.pair import load_pair\n"
        "cspd.patch('a model')\n"
        "cspd.nothing\n"
        "cspd_kernels.nothing\n"
        "cspd_kernels.denoise(1, 2, 3, 4)\n"
        "cspd.sample_tokens(load_pair()[0], 'two')\n"
    )
    code, said = check(str(wrong))
    assert code == 1
    assert {int(line.split(":")[1]) for line in said.splitlines()} == {4, 5, 6, 7, 8}


def test_the_program_runs(tmp_path):
    runpy.run_path(str(USAGE))["main"](tmp_path)


def test_every_module_with_public_names_is_checked():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    files = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"])
    public = [getattr(package, name) for package in (cspd, cspd_kernels) for name in package.__all__]
    modules = {getattr(value, "__module__", None) or value.__name__ for value in public}
    homes = {package.__name__: Path(package.__file__).parent.parent for package in (cspd, cspd_kernels)}
    places = {Path(find_spec(module).origin).relative_to(homes[module.split(".")[0]]) for module in modules}
    sources = {(Path("python") / p if p.parts[0] == "cspd" else p).as_posix() for p in places}  # also where installed
    assert sources <= files
