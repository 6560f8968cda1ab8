"""What was measured to be fastest, per compute capability and size: the one table to fill.

A size is what an op's time depends on. For ``denoise`` it is the head's width and depth, the bytes of an operand and
the number of rows computed. For the other ops it is the number of tokens. A size that was not measured takes its
nearest measured neighbour. The names are "triton", "cuda" and "torch"; for ``denoise`` also "cuda persistent", where
the persistent kernel covers the size, and "... parallel" and "... parallel guided": sweeps over all steps to the
arithmetic's own rounding.

Sweeps are taken only on the device and with the sampler that they were measured with (ancestral sampling without
limits). The nearest size that has both figures must have been faster in sweeps. Sweeps of the torch backend are not in
the table: the host waits after each of them.
"""

from __future__ import annotations

import functools
import math
import os

import torch

from .errors import InvalidInput

PERSISTENT_VARIABLE = "CSPD_PERSISTENT_MAX_TOKENS"
PERSISTENT_LIMIT = 16  # rows; beyond it the layered kernels fill the device
PERSISTENT = "cuda persistent"
PARALLEL, GUIDED = "parallel", "parallel guided"  # behind a backend's name
STEPS = 100  # of the chains in the table
DEFAULT = ("triton", "cuda", "torch")  # where nothing was measured, and after what was

Size = tuple[int, ...]
Times = dict[str, float]  # name -> milliseconds of one call
_OPERAND, _ROWS = 2, 3  # places of a size of ``denoise``
_OTHER_TYPE = 100.0  # the weight of another operand type in a distance: float32 says nothing about bfloat16

# Compute capability -> op -> size -> what was measured there. tests/kernels/test_crossover.py compares it with the
# result files. To fill in a device: `python benchmarks/kernels.py --json FILE` on it. "... parallel" are rows of
# "denoise in parallel", with as many sweeps as trained heads need (docs/parallel.md): 10, and of the slowest of several
# tokens under guidance 27.
FASTEST: dict[tuple[int, int], dict[str, dict[Size, Times]]] = {
    # H100 80GB HBM3, commit 3093537: kernels-h100.json, denoise-h100.json and in-parallel-h100.json in
    # benchmarks/results. Chains of 100 steps with a cold L2; verdicts of 16 channels, accept_reject by rejection and
    # with its host time.
    (9, 0): {
        "denoise": {
            (1024, 6, 2, 1): {
                "triton": 2.88, PERSISTENT: 2.98, "cuda": 4.26, "torch": 136,
                "triton parallel": 1.41, "cuda parallel": 1.43,
            },
            (1024, 6, 2, 2): {
                PERSISTENT: 3.05, "triton": 3.29, "cuda": 4.34, "torch": 83,
                "triton parallel": 1.94, "cuda parallel": 1.99,
                "triton parallel guided": 1.94, "cuda parallel guided": 1.99,
            },
            (1024, 6, 2, 4): {PERSISTENT: 3.19, "cuda": 4.59, "triton": 4.9},
            (1024, 6, 2, 8): {
                PERSISTENT: 4.08, "cuda": 4.54, "triton": 5.63, "torch": 84.8,
                "cuda parallel": 2.51, "triton parallel": 2.99,
            },
            (1024, 6, 2, 16): {
                "cuda": 4.75, "triton": 5.33, PERSISTENT: 6.6, "torch": 102,
                "triton parallel": 3.25, "cuda parallel": 4.08,
                "triton parallel guided": 7.64, "cuda parallel guided": 9.89,
            },
            (1024, 6, 2, 64): {
                "cuda": 6.28, "triton": 6.44, "torch": 86.4,
                "triton parallel": 11.2, "cuda parallel": 13,
            },
            (1024, 6, 2, 128): {
                "triton": 9.49, "cuda": 9.63, "torch": 149,
                "triton parallel": 19.3, "cuda parallel": 25.2,
                "triton parallel guided": 49.3, "cuda parallel guided": 64.6,
            },
            (1280, 8, 2, 1): {
                "triton": 5.2, PERSISTENT: 6, "torch": 103,
                "cuda parallel": 2.03, "triton parallel": 2.21,
            },
            (1280, 8, 2, 2): {
                PERSISTENT: 6.03, "triton": 6.62, "cuda": 7.18, "torch": 102,
                "triton parallel": 2.72, "cuda parallel": 2.78,
                "triton parallel guided": 2.72, "cuda parallel guided": 2.78,
            },
            (1280, 8, 2, 8): {
                "triton": 8.91, PERSISTENT: 8.95, "torch": 114,
                "triton parallel": 3.75, "cuda parallel": 3.77,
            },
            (1536, 12, 2, 1): {
                "triton": 8.09, PERSISTENT: 9.6, "torch": 171,
                "cuda parallel": 3.59, "triton parallel": 3.64,
            },
            (1536, 12, 2, 2): {
                PERSISTENT: 9.93, "triton": 10.1, "cuda": 11.7, "torch": 150,
                "cuda parallel": 4.33, "triton parallel": 4.58,
                "cuda parallel guided": 4.33, "triton parallel guided": 4.58,
            },
            (1536, 12, 2, 8): {
                "cuda": 11.6, PERSISTENT: 13.4, "triton": 16.6, "torch": 135,
                "triton parallel": 6.46, "cuda parallel": 7.77,
            },
            (1536, 12, 2, 16): {
                "cuda": 11.7, "triton": 14.7, PERSISTENT: 20, "torch": 150,
                "triton parallel": 10, "cuda parallel": 12.1,
                "triton parallel guided": 25.6, "cuda parallel guided": 31.2,
            },
            (1536, 12, 2, 64): {
                "cuda": 17.8, "triton": 22.8, "torch": 165,
                "triton parallel": 37.2, "cuda parallel": 47.6,
            },
            (1536, 12, 2, 128): {
                "triton": 23.6, "cuda": 31.6, "torch": 169,
                "triton parallel": 71.7, "cuda parallel": 95.2,
                "triton parallel guided": 187, "cuda parallel guided": 248,
            },
            (1536, 12, 2, 512): {"cuda": 44.5, "triton": 51.7, "torch": 196},
            (1024, 6, 4, 1): {"triton": 4.13, PERSISTENT: 4.8, "cuda": 9.01},
            (1024, 6, 4, 2): {"triton": 4.45, PERSISTENT: 4.94, "cuda": 12.6, "torch": 70.2},
            (1024, 6, 4, 4): {"triton": 5.53, PERSISTENT: 6.42, "cuda": 13.2},
            (1024, 6, 4, 8): {PERSISTENT: 9.35, "triton": 15.2, "cuda": 15.7, "torch": 70.1},
            (1024, 6, 4, 16): {PERSISTENT: 15.8, "triton": 24.6, "cuda": 25.1},
            (1024, 6, 4, 64): {"triton": 26.9, "cuda": 27.3, "torch": 86.9},
            (1280, 8, 4, 2): {"triton": 8.83, PERSISTENT: 9.74, "cuda": 18.9, "torch": 86.6},
            (1536, 12, 4, 2): {"triton": 15.7, PERSISTENT: 17.3, "cuda": 32, "torch": 126},
            (1536, 12, 4, 8): {PERSISTENT: 28.3, "triton": 51.7, "cuda": 52.4},
            (1536, 12, 4, 16): {PERSISTENT: 47.7, "triton": 65, "cuda": 65.8},
            (1536, 12, 4, 64): {"triton": 80.8, "cuda": 81.8},
            (1536, 12, 4, 512): {"triton": 409, "cuda": 409, "torch": 496},
        },
        "log_density_ratio": {
            (64,): {"triton": 0.0087, "cuda": 0.0089, "torch": 0.0692},
            (1024,): {"triton": 0.00861, "cuda": 0.00864, "torch": 0.0712},
            (8192,): {"triton": 0.0096, "cuda": 0.00973, "torch": 0.082},
            (131072,): {"cuda": 0.022, "triton": 0.0224, "torch": 0.254},
        },
        "accept_reject": {
            (64,): {"cuda": 0.0909, "triton": 0.149, "torch": 5.35},
            (1024,): {"cuda": 0.0955, "triton": 0.159, "torch": 5.35},
            (8192,): {"cuda": 0.0972, "triton": 0.167, "torch": 7.42},
            (131072,): {"cuda": 0.228, "triton": 0.335, "torch": 92.4},
        },
    },
}  # fmt: skip


def bucket(tokens: int) -> int:
    """The number of tokens that the kernels of ``denoise`` compute: at most an eighth more than asked for, beyond 128.

    So few CUDA graphs serve all numbers.
    """
    if tokens <= 16:
        return 1 << max(tokens - 1, 0).bit_length()
    multiple = max(16, (1 << tokens.bit_length() - 1) // 8)
    return -(-tokens // multiple) * multiple


def size_of(op: str, subject, tokens: int, groups: int = 1) -> Size:
    """The size of an op's call; ``subject`` is the head of ``denoise``, which computes ``groups`` rows a token."""
    if op != "denoise":
        return (tokens,)
    return _square_width(subject), subject.depth, subject.dtype.itemsize, bucket(tokens) * groups


def _square_width(head) -> int:
    """The width of a head like those in the table, whose blocks have two square weights, of as many weights."""
    if head.hidden == head.width and head.mlp == "silu":
        return head.width
    return round(math.sqrt(head.width * head.hidden * (3 if head.mlp == "swiglu" else 2) / 2))


def _swept(head) -> bool:
    """Whether sweeps of such chains were measured: how many there are depends on the sampler."""
    return head.schedule.name == "ddpm" and head.schedule.clip is None


def nearest(
    op: str, capability: tuple[int, int], size: Size, way: str = ""
) -> tuple[tuple[int, int], Size, Times] | None:
    """(capability, size, milliseconds) of the measurement nearest to a size; None where the op was never measured.

    Among devices the nearest capability, then among sizes the least sum of |log ratio|: twice the rows are as far as
    twice the width. Of two that are as near it is the smaller one.

    Args:
        way: of ``denoise``: ``PARALLEL`` or ``GUIDED``, of sizes with such sweeps. Then it must be the device's own
            capability and the operands' own size, and of two that are as near it is the larger one.
    """
    if way:
        table = FASTEST.get(capability, {}).get(op, {})
        table = {key: times for key, times in table.items() if key[_OPERAND] == size[_OPERAND] and _has(times, way)}
        if not table:
            return None
        found = min(table, key=lambda key: (_distance(op, key, size), [-x for x in key]))
        return capability, found, table[found]
    measured = [key for key, ops in FASTEST.items() if op in ops]
    if not measured:
        return None
    at = min(measured, key=lambda key: (abs(10 * (key[0] - capability[0]) + key[1] - capability[1]), key))
    table = FASTEST[at][op]
    found = min(table, key=lambda key: (_distance(op, key, size), key))
    return at, found, table[found]


def way_of(name: str) -> str:
    """``PARALLEL`` or ``GUIDED`` of sweeps, "" of a chain step by step."""
    return name.partition(" ")[2] if PARALLEL in name else ""


def _has(times: Times, way: str) -> bool:
    return any(way_of(name) == way for name in times)


def _distance(op: str, a: Size, b: Size) -> float:
    weights = [_OTHER_TYPE if op == "denoise" and i == _OPERAND else 1.0 for i in range(len(a))]
    return sum(w * abs(math.log(max(x, 1) / max(y, 1))) for w, x, y in zip(weights, a, b, strict=True))


@functools.lru_cache(maxsize=4096)
def _measured_order(op: str, capability: tuple[int, int], size: Size, way: str = "", steps: int = STEPS):
    """Names, the fastest first: step by step, or with a ``way`` of sweeps these among them, as backend + "parallel".

    A chain of fewer steps than the table's takes less time step by step, its sweeps at most as much.
    """
    found = nearest(op, capability, size, way)
    if found is None:
        return ()
    times = {name: time * min(1.0, steps / STEPS) for name, time in found[2].items() if not way_of(name)}
    if way:
        times |= {f"{name.split()[0]} {PARALLEL}": time for name, time in found[2].items() if way_of(name) == way}
    return tuple(sorted(times, key=times.get))


def ranked(
    op: str,
    device: torch.device,
    subject=None,
    tokens: int | None = None,
    groups: int = 1,
    parallel: bool | None = False,
) -> tuple[str, ...]:
    """Names in the order in which the automatic choice of an op tries them on a CUDA device, the fastest first.

    ``CSPD_PERSISTENT_MAX_TOKENS`` goes before the table: up to so many tokens the persistent kernel comes first, beyond
    it is omitted. Before the size is known (``tokens`` None) the order is the default one.

    Args:
        parallel: of ``denoise``: whether its steps are made in parallel. None: as is faster, if that was measured.

    Raises:
        ValueError: the variable is not a number from 0 to 16.
    """
    if tokens is None:
        return DEFAULT
    size, order = size_of(op, subject, tokens, groups), ()
    if device.type == "cuda":
        swept = ()
        if op == "denoise" and (parallel or (parallel is None and _swept(subject))):
            swept = GUIDED if groups > 1 else PARALLEL, subject.num_steps
        order = _measured_order(op, _capability(device), size, *swept)
        order = order or _measured_order(op, _capability(device), size)
    if op == "denoise" and parallel:
        order = tuple(name for name in order if name.endswith(PARALLEL))
        return tuple(dict.fromkeys((*order, *(f"{name} {PARALLEL}" for name in DEFAULT))))
    if op == "denoise":
        limit = persistent_limit()
        fits = size[_ROWS] <= PERSISTENT_LIMIT  # the nearest measured size may have fewer rows
        if limit is not None or not fits:
            order = tuple(name for name in order if name != PERSISTENT)
        if limit is not None and fits and tokens <= limit:
            order = (PERSISTENT, *order)
    return tuple(dict.fromkeys((*order, *DEFAULT)))


def prefers_persistent(head, tokens: int, groups: int) -> bool:
    """Whether the CUDA backend is to try its persistent kernel before the layered ones."""
    order = ranked("denoise", head.device, head, tokens, groups)
    return PERSISTENT in order and order.index(PERSISTENT) < order.index("cuda")


def prefers_parallel(head, tokens: int, groups: int, backend: str) -> bool:
    """Whether a backend's sweeps were measured to be faster than what else it has."""
    own = [name for name in ranked("denoise", head.device, head, tokens, groups, None) if name.split()[0] == backend]
    return own[:1] == [f"{backend} {PARALLEL}"]


def persistent_limit() -> int | None:
    """``CSPD_PERSISTENT_MAX_TOKENS``; None where it is not set.

    Raises:
        ValueError: it is not a number from 0 to 16.
    """
    value = os.environ.get(PERSISTENT_VARIABLE)
    if not value:
        return None
    if not value.isdecimal() or int(value) > PERSISTENT_LIMIT:
        raise InvalidInput(f"expected {PERSISTENT_VARIABLE} as a number from 0 to {PERSISTENT_LIMIT}, got {value!r}")
    return int(value)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
