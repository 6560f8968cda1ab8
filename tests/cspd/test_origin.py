"""Whether both packages come from one place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import cspd
import cspd_kernels
from cspd.origin import warn_of_a_mixture


def place(folder: Path, *, source_tree: bool = False) -> tuple[str, str]:
    """The files of cspd and cspd_kernels in a folder."""
    cspd = folder / "python" / "cspd" if source_tree else folder / "cspd"
    return str(cspd / "__init__.py"), str(folder / "cspd_kernels" / "__init__.py")


@pytest.mark.parametrize("source_tree", [False, True])
def test_one_place_is_nothing_to_speak_of(tmp_path, source_tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_a_mixture(*place(tmp_path, source_tree=source_tree))


def test_links_to_one_place_are_one_place(tmp_path):
    for name in ("cspd", "cspd_kernels"):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / "__init__.py").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cspd").symlink_to(tmp_path / "store" / "cspd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_a_mixture(place(tmp_path / "site")[0], place(tmp_path / "store")[1])


def test_two_places_are_named(tmp_path):
    site, clone = tmp_path / "site", tmp_path / "clone"
    for own, kernels in [
        (place(site)[0], place(clone, source_tree=True)[1]),
        (place(clone, source_tree=True)[0], place(site)[1]),
        (place(clone)[0], place(site)[1]),
    ]:
        both = f"cspd is loaded from {Path(own).parent}, but cspd_kernels from {Path(kernels).parent}: "
        with pytest.warns(UserWarning, match=re.escape(both)) as caught:
            warn_of_a_mixture(own, kernels)
        assert len(caught) == 1


def test_python_inside_a_clone_warns_once(tmp_path):
    """An installation on the path, and a clone as the folder that Python runs in."""
    site, clone = tmp_path / "site", tmp_path / "clone"
    for package in (cspd, cspd_kernels):
        folder = Path(package.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__", "_C.*")
        shutil.copytree(folder, site / folder.name, ignore=ignored)
        shutil.copytree(folder, clone / ("python/cspd" if package is cspd else "cspd_kernels"), ignore=ignored)
    for folder, expected in ((clone, 1), (tmp_path, 0)):
        done = subprocess.run(
            [sys.executable, "-c", "import cspd, cspd_kernels, cspd.cli; cspd.cli.main(['info'])"],
            capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(site)}, check=True,
        )  # fmt: skip
        assert done.stderr.count("UserWarning: ") == expected
        assert done.stderr.count("two installations are mixed") == expected
        if expected:
            assert f"cspd is loaded from {site / 'cspd'}, but cspd_kernels from {clone / 'cspd_kernels'}" in done.stderr
            assert "python -P" in done.stderr
            assert "pip install -e ." in done.stderr
