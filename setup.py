"""Build script: adds the CUDA extension where it can be built, and a note why not elsewhere; all metadata is in
pyproject.toml.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "cspd_kernels"
SWITCH = "CSPD_BUILD_CUDA"  # 1: required, 0: skipped, not set: built where it can be and is of use

spec = importlib.util.spec_from_file_location("cspd_compile", Path(__file__).resolve().parent / "csrc" / "compile.py")
compiling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiling)

choice = os.environ.get(SWITCH, "")
if choice not in ("", "0", "1"):
    raise SystemExit(f"expected {SWITCH} as 1 (required), 0 (skipped) or not set, got {choice!r}")


def why_left_out() -> str | None:
    """None where the extension is to be built, else the reason for people."""
    if choice == "0":
        return f"{SWITCH}=0 skipped it: install again without that variable"
    if reason := compiling.why_not():
        return reason
    version = None if choice == "1" else compiling.cpu_torch()
    return version and f"torch here ({version}) was a CPU build: {SWITCH}=1 pip install . compiles the kernels anyway"


missing = why_left_out()


def leave_out(folder: Path, reason: str) -> None:
    """The record of a package without the extension; what an earlier build left goes."""
    for stale in folder.glob("_C.*.so"):
        stale.unlink()
    record = {"built": False, "reason": f"when this package was installed, {reason}"}
    (folder / compiling.RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(f"installing cspd-kernels without its CUDA kernels: {reason}", file=sys.stderr)


class BuildPackage(build_py):
    def run(self):
        super().run()
        if not self.distribution.has_ext_modules():
            leave_out(Path(PACKAGE if self.editable_mode else f"{self.build_lib}/{PACKAGE}"), missing)


class BuildExtension(build_ext):
    def run(self):
        if missing:
            raise SystemExit(f"{SWITCH}=1, but the CUDA extension cannot be built: {missing}")
        folder = Path(PACKAGE if self.inplace or self.editable_mode else f"{self.build_lib}/{PACKAGE}")
        try:
            compiling.build(folder, Path(self.build_temp) / "cuda")
        except compiling.BuildError as error:
            if choice == "1":
                raise SystemExit(f"{SWITCH}=1, but the CUDA extension did not compile: {error}") from None
            reason = f"the CUDA extension did not compile ({error}): {SWITCH}=1 pip install -v . shows all of it"
            leave_out(folder, reason)
        except ValueError as error:
            raise SystemExit(str(error)) from None

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    # Without the extension this is a pure Python package, and its wheel says so.
    ext_modules=[] if missing and choice != "1" else [Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildExtension},
)
