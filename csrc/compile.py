"""Build the extension ``cspd_kernels._C``, the CUDA kernels and their Python bindings; needs no torch.

``python csrc/compile.py --out DIR [--archs "80;90"]`` writes ``_C<suffix>`` and ``_build.json``, as setup.py does.
``python csrc/compile.py --out DIR --emulated`` compiles the same sources for the CPU, with the host's compiler alone:
slow, for tests on machines without a GPU.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = (80, 90, 100)
OLDEST_ARCHITECTURE = 80  # background copies, tensor cores for bfloat16
ARCHITECTURES_VARIABLE = "CSPD_CUDA_ARCHS"
RECORD = "_build.json"


class BuildError(Exception):
    """Something that is needed is missing, or a compiler failed; the message is one line."""


def why_not() -> str | None:
    """None where the extension can be built with CUDA, else what is missing."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, and this is {sys.platform}"
    try:
        nvcc_version(find_nvcc())
        _pybind11()
        _ninja()
    except BuildError as error:
        return str(error)
    return None


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME, else of CUDA_PATH, else of PATH."""
    folders = [str(Path(os.environ[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in [*folders, None]:  # None is PATH
        if found := shutil.which("nvcc", path=folder):
            return Path(found)
    raise BuildError("nvcc was not found in CUDA_HOME, CUDA_PATH or PATH: install the CUDA toolkit and install again")


def cpu_torch() -> str | None:
    """Such as 2.13.0+cpu, the version, where the torch that packages installed here run with is a build for CPUs only;
    None where it is another build, or none is found. It is not imported: where pip builds, it cannot be.
    """
    folders = [*sys.path, *site.getsitepackages()]
    if sys.prefix == sys.base_prefix or sys.base_prefix in site.PREFIXES:  # pip hides the user's folder when it builds
        folders.append(site.getusersitepackages())
    file = next((file for folder in folders if (file := Path(folder, "torch", "version.py")).is_file()), None)
    try:
        values = _constants(ast.parse(file.read_text())) if file else {}
    except (OSError, SyntaxError, ValueError):
        return None
    built_for = {name: values.get(name) for name in ("cuda", "hip", "xpu")}
    return str(values.get("__version__")) if "cuda" in values and not any(built_for.values()) else None


def _constants(module: ast.Module) -> dict[str, object]:
    """What a module gives to names, where that is a plain constant."""
    values = {}
    for line in module.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if isinstance(getattr(line, "value", None), ast.Constant):
            values |= {target.id: line.value.value for target in targets if isinstance(target, ast.Name)}
    return values


def _pybind11() -> Path:
    """pybind11's headers."""
    spec = importlib.util.find_spec("pybind11")
    if spec is None:
        raise BuildError("pybind11 was not found: pip install pybind11, or install without --no-build-isolation")
    return Path(spec.origin).parent / "include"


def _ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    packaged = spec and shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR)
    if found := packaged or shutil.which("ninja"):
        return found
    raise BuildError("ninja was not found: pip install ninja, or install without --no-build-isolation")


def nvcc_version(nvcc: Path) -> str:
    """Such as 13.0.88."""
    text = _output(nvcc, "--version")
    if found := re.search(r"\bV(\d+[.\d]*)", text):
        return found[1]
    raise BuildError(f"expected a version such as V13.0.88 from {nvcc} --version, got {_first_error(text)!r}")


def supported_architectures(nvcc: Path) -> list[int]:
    """What this nvcc compiles for: 90 is compute capability 9.0."""
    return [int(a) for a in re.findall(r"^compute_(\d+)$", _output(nvcc, "--list-gpu-arch"), re.MULTILINE)]


def _output(nvcc: Path, option: str) -> str:
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:  # of another platform, or a script whose interpreter is gone
        raise BuildError(
            f"{nvcc} cannot be executed ({error.strerror}): install a CUDA toolkit for this platform, or set CUDA_HOME "
            "to another one, and install again"
        ) from None
    if done.returncode:
        raise BuildError(f"{nvcc} {option} failed: {_first_error(done.stderr + done.stdout)}")
    return done.stdout


def architectures(wanted: str, supported: list[int]) -> list[int]:
    """Those to compile for, ascending: ``wanted`` such as "80;90" or "9.0, 10.0", or, where it is empty, the default
    ones that nvcc supports.

    Raises:
        ValueError: not such a list, or nvcc does not support one of them.
    """
    known = ", ".join(map(str, supported))
    if not wanted.strip():
        if default := [a for a in DEFAULT_ARCHITECTURES if a in supported]:
            return default
        raise BuildError(f"nvcc supports none of {DEFAULT_ARCHITECTURES}, only {known}: set {ARCHITECTURES_VARIABLE}")
    words = re.split(r"[;,\s]+", wanted.strip())
    if not all(re.fullmatch(r"\d+(\.\d)?", word, re.ASCII) for word in words):
        raise ValueError(f"expected {ARCHITECTURES_VARIABLE} as architectures such as 80;90 or 9.0, got {wanted!r}")
    chosen = sorted({int(word.replace(".", "")) for word in words})
    if missing := [str(a) for a in chosen if a not in supported]:
        raise ValueError(f"{ARCHITECTURES_VARIABLE}={wanted!r}: this nvcc knows {known}, and not {', '.join(missing)}")
    if chosen[0] < OLDEST_ARCHITECTURE:
        raise ValueError(f"{ARCHITECTURES_VARIABLE}={wanted!r}: the kernels need {OLDEST_ARCHITECTURE} or later")
    return chosen


def flags(name: str) -> list[str]:
    """One line of flags.txt."""
    lines = (line.split() for line in (HERE / "flags.txt").read_text().splitlines())
    return next(words[1:] for words in lines if words and words[0] == name)


def sources(emulated: bool = False) -> list[Path]:
    """The kernels, what runs them where they are emulated, and their bindings last."""
    return [
        *sorted(HERE.glob("*.cu")),
        *(sorted(HERE.glob("emulation/*.cpp")) if emulated else ()),
        HERE / "bindings.cpp",
    ]


def digest() -> str:
    """Of everything in this folder: which sources an extension was built from."""
    total = hashlib.sha256()
    for path in sorted(HERE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(HERE)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def build(out: Path, objects: Path | None = None, wanted: str | None = None) -> dict:
    """Build with nvcc into the folder ``out``, the record ``_build.json`` beside the module, and return that record.

    Args:
        objects: where intermediate files go and stay, so that what has not changed is not compiled again.
        wanted: as for ``architectures``; left out, the environment variable ``CSPD_CUDA_ARCHS``.

    Raises:
        BuildError: something is missing or a compiler failed. ValueError: from ``architectures``.
    """
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    wanted = os.environ.get(ARCHITECTURES_VARIABLE, "") if wanted is None else wanted
    chosen = architectures(wanted, supported_architectures(nvcc))
    targets = [(a, f"sm_{a}") for a in chosen] + [(chosen[-1], f"compute_{chosen[-1]}")]
    generate = [word for a, code in targets for word in ("-gencode", f"arch=compute_{a},code={code}")]
    objects = objects or out / "objects" / "cuda"
    names = ", ".join(code for _, code in targets)
    print(f"compiling {len(sources())} files with {nvcc} ({version}) for {names}", file=sys.stderr, flush=True)
    # Handed .cpp files, nvcc calls the host's compiler and tells it where the toolkit is.
    compiler = [str(nvcc), *flags("nvcc"), *generate]
    commands = dict.fromkeys((".cu", ".cpp"), compiler)
    logs = _ninja_build(out, objects, sources(), commands, [str(nvcc), *flags("link_nvcc")])
    record = {
        "built": True,
        "architectures": chosen,
        "ptx": chosen[-1:],
        "nvcc": version,
        "sources": digest(),
        "kernels": parse_ptxas(_demangled(logs)),
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def build_emulated(out: Path) -> Path:
    """Build with the host's compiler ($CXX, else g++) for the CPU, and return the module's file: what the environment
    variable ``CSPD_CUDA_EMULATION`` is to name. What has not changed is not compiled again.

    Raises:
        BuildError: something is missing or the compiler failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"the C++ compiler {compiler[0]} was not found: install it, or set CXX")
    command = [*compiler, *flags("host"), "-DCSPD_EMULATED", "-I", str(HERE / "emulation")]
    commands = {".cu": [*command, "-x", "c++"], ".cpp": command}
    _ninja_build(out, out / "objects" / "emulated", sources(emulated=True), commands, [*compiler, *flags("link_host")])
    return _module(out)


def _module(out: Path) -> Path:
    return out / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _ninja_build(
    out: Path, objects: Path, sources: list[Path], compile_commands: dict[str, list[str]], link: list[str]
) -> str:
    """Compile the sources, by a command per file name suffix, and link them; what the compilers printed."""
    ninja, out, objects = _ninja(), out.resolve(), objects.resolve()
    python = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    include = [word for folder in (_pybind11(), *sorted(python)) for word in ("-isystem", str(folder))]
    include = ["-I", str(HERE / "include"), *include]
    out.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    # Relative to the folder of objects: compilers do not escape what they write into dependency files.
    lines, made = [], [f"{path.name}.o" for path in sources]
    for suffix, command in compile_commands.items():
        lines += [
            f"rule compile{suffix}",
            f"  command = {_quoted([*command, *include])} -MD -MF $out.d -c $in -o $out >$out.log 2>&1 "
            "|| { cat $out.log; exit 1; }",
            "  depfile = $out.d",
        ]
    lines += ["rule link", f"  command = {_quoted(link)} $in -o $out"]
    lines += [f"build {o}: compile{path.suffix} {_escaped(path)}" for path, o in zip(sources, made)]
    lines.append(f"build {_escaped(_module(out))}: link {' '.join(made)}")
    (objects / "build.ninja").write_text("\n".join(lines) + "\n")
    try:
        done = subprocess.run([ninja, "-C", objects], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{ninja} cannot be executed ({error.strerror}): pip install ninja") from None
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise BuildError(_first_error(done.stdout))
    logs = "".join((objects / f"{name}.log").read_text() for name in made)
    for line in logs.splitlines():
        if "warning" in line:
            print(line, file=sys.stderr)
    return logs


def _quoted(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _escaped(path: Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1])


def _demangled(text: str) -> str:
    tool = shutil.which("c++filt")  # comes with the linker; without it names stay mangled
    try:
        return subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout if tool else text
    except (OSError, subprocess.CalledProcessError):
        return text


def parse_ptxas(text: str) -> list[dict]:
    """What ``ptxas -v`` says of every kernel on every architecture; its functions' stack and spills are added up."""
    kernels = []
    for block in re.split(r"(?=Compiling entry function ')", text)[1:]:
        name, architecture = re.match(r"Compiling entry function '(.+)' for 'sm_(\d+)", block).groups()
        kernels.append(
            {
                "kernel": _short(name),
                "architecture": int(architecture),
                "registers": _number(r"Used (\d+) registers", block),
                "stack_bytes": _number(r"(\d+) bytes stack frame", block),
                "spill_store_bytes": _number(r"(\d+) bytes spill stores", block),
                "spill_load_bytes": _number(r"(\d+) bytes spill loads", block),
                "shared_bytes": _number(r"(\d+) bytes smem", block),
                "barriers": _number(r"used (\d+) barriers", block),
            }
        )
    return kernels


def _number(pattern: str, text: str) -> int:
    """The sum of all that it finds; 0 where that is nothing: an installation does not fail for its report."""
    return sum(map(int, re.findall(pattern, text)))


def _short(name: str) -> str:
    """A function's name and template arguments, without namespaces, the type it returns and its parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\bcspd::", "", name).removeprefix("void ")
    depth = 0
    for i in range(len(name) - 1, 0, -1):
        depth += (name[i] == ")") - (name[i] == "(")
        if depth == 0:
            return name[:i] if name[i] == "(" else name
    return name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--emulated", action="store_true", help="for the CPU, by the host's compiler: for tests")
    parser.add_argument("--archs", metavar="LIST", help=f"such as '80;90' (default: {ARCHITECTURES_VARIABLE})")
    args = parser.parse_args(argv)
    try:
        if args.emulated:
            print(build_emulated(args.out))
        else:
            build(args.out, wanted=args.archs)
            print(_module(args.out))
    except (BuildError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
