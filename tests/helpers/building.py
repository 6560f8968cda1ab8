"""What tests build from: copies of the sources, a small stand-in for the kernels, and an nvcc that compiles nothing."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = ("cspd_kernels", "python", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
SOURCES += ("CMakeLists.txt",)
BUILT = shutil.ignore_patterns("__pycache__", "_build.json", "_C.*")

STAND_IN = {
    "answer.h": "int answer();\n",
    "answer.cu": '#include "answer.h"\nint answer() { return 42; }\n',
    "bindings.cpp": """
#include <Python.h>
#include "answer.h"
#ifdef CSPD_EMULATED
const bool kEmulated = true;
#else
const bool kEmulated = false;
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddObject(module, "EMULATED", PyBool_FromLong(kEmulated));
  PyModule_AddIntConstant(module, "answer", answer());
  return module;
}
""",
}

# Answers as nvcc does, writes what -o names, keeps its arguments; fails on sources that say so.
NVCC = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
case "$*" in
--version) echo "Cuda compilation tools, release 12.8, V12.8.61"; exit;;
--list-gpu-arch) printf 'compute_80\\ncompute_89\\ncompute_90\\n'; exit;;
esac
for word; do
  case "$word" in *.cu) grep -q BROKEN "$word" && { echo "$word(7): error: it is broken"; echo more; exit 2; };; esac
  [ "$previous" = -o ] && : > "$word"
  previous=$word
done
echo "ptxas info    : Compiling entry function '_ZN4cspd6kernelEv' for 'sm_90'"
echo "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads"
echo "ptxas info    : Used 32 registers"
"""


def compiling(root: Path = ROOT) -> ModuleType:
    """csrc/compile.py."""
    spec = importlib.util.spec_from_file_location("cspd_compile", root / "csrc" / "compile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulation() -> Path | None:
    """The CUDA kernels compiled for the CPU, by way of a folder that stays; None without a C++ compiler, and where the
    emulation's fibers are not known."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not sys.platform.startswith("linux") or shutil.which(compiler[0]) is None:
        return None
    import fcntl

    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # one test session at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compiling().build_emulated(folder)


def copy_sources(folder: Path) -> Path:
    """A copy of what the package is built from, so that the checkout stays clean."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": BUILT} if copy is shutil.copytree else {}))
    return folder


def with_stand_in(folder: Path) -> Path:
    """Put a small module, which needs neither nvcc nor pybind11, in the place of the kernels."""
    csrc = folder / "csrc"
    for path in [*csrc.rglob("*.cu"), *csrc.rglob("*.cpp")]:
        path.unlink()
    for name, text in STAND_IN.items():
        path = csrc / "include" / name if name.endswith(".h") else csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def fake_nvcc(folder: Path) -> Path:
    """A folder to go to PATH."""
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(NVCC)
    (folder / "nvcc").chmod(0o755)
    return folder


def stand_in_torch(folder: Path, cuda: str | None = "13.0") -> Path:
    """A folder to go to PYTHONPATH: a torch built for this CUDA (None: for CPUs). It must not be imported to build."""
    package = folder / "torch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise ImportError('torch is not there at build time')\n")
    (package / "version.py").write_text(f"""from typing import Optional
__version__ = '2.99.0'
cuda: Optional[str] = {cuda!r}
hip: Optional[str] = None
""")
    return folder


def build_wheel(
    source: Path, out: Path, path: Path | str, *, cuda: str | None = "13.0", **environment: str
) -> subprocess.CompletedProcess:
    """``pip wheel`` with nothing of the caller's environment, beside a torch that was built for this CUDA."""
    torch = stand_in_torch(out / "torch for the build", cuda)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", out, source]
    environment |= {"PATH": str(path), "PYTHONPATH": str(torch)}
    return subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment, check=False)
