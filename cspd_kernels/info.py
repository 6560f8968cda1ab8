"""``python -m cspd_kernels.info [--json]``: what is installed and which backends can serve. Never fails."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata

HEADS = {"MAR-B": (6, 1024), "MAR-L": (8, 1280), "MAR-H": (12, 1536)}  # D, W of the released sizes
TOKENS = (1, 8, 64, 512)


def _guarded(probe) -> object:
    """A probe's answer, or its failure as text: a report must not fail because a machine is odd."""
    try:
        return probe()
    except Exception as error:  # noqa: BLE001
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[dict]:
    import torch

    devices = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]


def _torch(read):
    def probe():
        import torch

        return read(torch)

    return probe


def _backends() -> dict[str, str]:
    from .backends import available_backends

    return available_backends()


def _cuda_extension() -> dict[str, str]:
    from .cuda_support import build_record, compiled_for, why_not_covered

    record = build_record()
    if not record["built"]:
        return {"built": f"no: {record['reason']}"}
    report = {"built": "yes", "for": compiled_for(record), "nvcc": record["nvcc"]}
    for gpu in _devices():
        capability = tuple(map(int, gpu["capability"].split(".")))
        report[gpu["name"]] = why_not_covered(record, capability) or "covered"
    return report


@dataclass(frozen=True, eq=False)
class _Head:
    """What the choice of a backend looks at in a head of MAR's, without weights."""

    depth: int
    width: int
    dtype: object
    device: object
    channels: int = 16
    num_steps: int = 100
    blocks: tuple = ()
    norm: str = "layer"
    mlp: str = "silu"

    @property
    def hidden(self) -> int:
        return self.width

    @property
    def modulation_of(self) -> tuple[int, ...]:
        return tuple(range(self.depth))

    @property
    def shared(self) -> dict:
        return {}

    @property
    def schedule(self):
        from .schedule import Schedule

        return Schedule.linear(self.num_steps)


def _chosen() -> dict[str, str]:
    """What ``denoise`` would take for the released heads, and why."""
    import torch

    if not torch.cuda.device_count():
        return {"cpu": "torch: the kernels run on CUDA devices"}
    return {
        f"cuda:{i} {model} bfloat16, {tokens} tokens{', guided' if groups > 1 else ''}": _explained(
            _Head(depth, width, torch.bfloat16, torch.device("cuda", i)), tokens, groups
        )
        for i in range(torch.cuda.device_count())
        for model, (depth, width) in HEADS.items()
        for tokens in TOKENS
        for groups in (1, 2)
    }


def _explained(head: _Head, tokens: int, groups: int) -> str:
    import torch

    from .backends import ENVIRONMENT_VARIABLE, choice
    from .crossover import GUIDED, PARALLEL, nearest, size_of
    from .ops.denoise.parallel import switched_off

    if forced := os.environ.get(ENVIRONMENT_VARIABLE):
        return f"{forced}: {ENVIRONMENT_VARIABLE} is set"
    way = "" if switched_off() else GUIDED if groups > 1 else PARALLEL
    name, refusals = choice("denoise", head.device, head, tokens, groups, None if way else False)
    if way and not name.endswith(PARALLEL):
        way = ""
        name, refusals = choice("denoise", head.device, head, tokens, groups)
    capability, size = torch.cuda.get_device_capability(head.device), size_of("denoise", head, tokens, groups)
    text = name
    if found := nearest("denoise", capability, size, way):
        at, measured, times = found
        listed = ", ".join(f"{n} {times[n]:g}" for n in sorted(times, key=times.get))
        where = "measured" if (at, measured) == (capability, size) else "not measured; nearest"
        width, depth, _, rows = measured
        text += f" ({where}: width {width}, depth {depth}, {rows} rows on {at[0]}.{at[1]}, milliseconds: {listed})"
    return text + "".join(f"; not {n}: {why}" for n, why in refusals.items())


def collect() -> dict:
    """The report as a dictionary; a probe that fails leaves its reason as the value."""
    return {
        "cspd-kernels": _guarded(lambda: _version("cspd-kernels")),
        "python": platform.python_version(),
        "platform": _guarded(lambda: f"{platform.system()} {platform.machine()}"),
        "torch": _guarded(_torch(lambda torch: torch.__version__)),
        "triton": _guarded(lambda: _version("triton")),
        "numpy": _guarded(lambda: _version("numpy")),
        "cuda (torch built for)": _guarded(_torch(lambda torch: torch.version.cuda or "none")),
        "gpus": _guarded(_devices),
        "nvidia driver": _guarded(_driver),
        "cuda extension": _guarded(_cuda_extension),
        "cpu threads": _guarded(_torch(lambda torch: torch.get_num_threads())),
        "cpu capability": _guarded(_torch(lambda torch: torch.backends.cpu.get_cpu_capability())),
        "backends": _guarded(_backends),
        "chosen": _guarded(_chosen),
        "CSPD_PERSISTENT_MAX_TOKENS": os.environ.get("CSPD_PERSISTENT_MAX_TOKENS", "not set (as measured)"),
        "CSPD_PARALLEL": os.environ.get("CSPD_PARALLEL", "not set (as measured)"),
        "CSPD_CUDA_EMULATION": os.environ.get("CSPD_CUDA_EMULATION", "not set"),
        "CSPD_BACKEND": os.environ.get("CSPD_BACKEND", "not set (automatic)"),
        "CSPD_LOG_LEVEL": os.environ.get("CSPD_LOG_LEVEL", "not set (warnings)"),
    }


def render(as_json: bool) -> str:
    """The report as text for a person, or as JSON."""
    report = collect()
    if as_json:
        return json.dumps(report, indent=2, default=str)
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines += [f"{key}:"] + [f"  {k:8s} {v}" for k, v in value.items()]
        else:
            text = value if not isinstance(value, list) else "; ".join(map(str, value)) or "none"
            lines.append(f"{key}: {text}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cspd_kernels.info", description="Versions, devices and backends.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    print(render(parser.parse_args(argv).json))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
