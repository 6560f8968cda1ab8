"""Claims of docs/benchmarks.md, docs/kernels.md, docs/cuda.md and CHANGELOG.md: seconds and bytes of devices."""

from __future__ import annotations

from figures import Claim
from figures_sources import IMAGES, SWEEPS, image, megabytes, only, results, row
from registry import HEADS


def node(what: str) -> float:
    """Microseconds of a node of a CUDA graph with 128 blocks."""
    return only(results("profile-h100.json")["hand_overs"], what=what, blocks=128)["us"]


def eager_image() -> list[float]:
    """Seconds in the timed runs, and in the run that was split into parts."""
    found = image(IMAGES, "MAR-B", "eager loop bfloat16")
    return [found["seconds"], found["details"]["seconds"]["total"]]


def guided(field: str) -> int:
    """Of the trained head at guidance 3 with bfloat16 operands."""
    return row("parallel-cpu.json", case="100 steps, guidance 3", kind="bfloat16")[field]


CLAIMS = {
    "docs/benchmarks.md": [
        Claim("took 99.4 s for an image", lambda: eager_image()[:1]),
        Claim("it took 80.2 s.", lambda: eager_image()[1:]),
        Claim(
            "At guidance 3 the slowest of 48 tokens of a trained head took 27 sweeps. Half of these tokens took 10",
            lambda: [3, guided("tokens"), guided("sweeps"), guided("median sweeps")],
        ),
    ],
    "docs/kernels.md": [
        Claim("| MAR-B | 6, 1024 | 71 MB | 42 MB | 25 MB |", lambda: [*HEADS["MAR-B"][:2], *megabytes("MAR-B")]),
        Claim("| MAR-L | 8, 1280 | 144 MB | 85 MB | 52 MB |", lambda: [*HEADS["MAR-L"][:2], *megabytes("MAR-L")]),
        Claim("| MAR-H | 12, 1536 | 302 MB | 179 MB | 113 MB |", lambda: [*HEADS["MAR-H"][:2], *megabytes("MAR-H")]),
    ],
    "docs/cuda.md": [
        Claim("took 1.11 us on", lambda: [node("graph node")]),
        Claim("It took 0.71 us where", lambda: [node("graph node with PDL")]),
    ],
    "CHANGELOG.md": [
        Claim(
            "MAR-B N=1 takes 1.4 ms in place of 2.8.",
            lambda: [1, *(1e3 * row(SWEEPS, **HEAD)[field] for field in ("seconds", "baseline_seconds"))],
        )
    ],
}
HEAD = {"size": "MAR-B N=1 T=100", "backend": "triton 10 sweeps bfloat16"}
SETTINGS = {
    "docs/benchmarks.md": ["with 15 % of the steps pre-filled"],
    "docs/kernels.md": ["At a sigma of 1e-6 the"],
    "docs/cuda.md": ["(9.0, 10.0)"],
    "docs/environment.md": [
        "| Python | 3.10 or later | 3.11, 3.12 |",
        "| PyTorch | 2.4 or later | 2.4.1, 2.13 and 2.14.1 on x86 CPUs, 2.11 on",
        "| Triton | 3.6 or later, for the Triton kernels | 3.6 and 3.9 |",
        "at installation only | 13.0 |",
    ],
    "docs/gpus.md": ["| Hopper | 9.0 |", "RTX 50 series (12.0)"],
}
