"""What was measured to be fastest, per compute capability and size: the one table to fill.

A size is what an op's time depends on: of ``denoise`` the head's width and depth, the bytes of an operand and the rows
that are computed; of the others the tokens. What was not measured takes its nearest measured neighbour. The names are
"triton", "cuda" and "torch"; for ``denoise`` also "cuda persistent", where the persistent kernel covers the size, and
each backend's "... parallel": sweeps over all steps to the arithmetic's own rounding.
"""

from __future__ import annotations

import functools
import math
import os

import torch

PERSISTENT_VARIABLE = "CSPD_PERSISTENT_MAX_TOKENS"
PERSISTENT_LIMIT = 16  # rows; beyond it the layered kernels fill the device
PERSISTENT = "cuda persistent"
PARALLEL = "parallel"  # second word of a name
DEFAULT = ("triton", "cuda", "torch")  # where nothing was measured, and after what was

Size = tuple[int, ...]
Times = dict[str, float]  # name -> milliseconds of one call
_OPERAND, _ROWS = 2, 3  # places of a size of ``denoise``
_OTHER_TYPE = 100.0  # the weight of another operand type in a distance: float32 says nothing about bfloat16

# Compute capability -> op -> size -> what was measured there. tests/kernels/test_crossover.py compares it with the
# result files. To fill in a device: `python benchmarks/kernels.py --json FILE` on it. "... parallel" are rows of
# "denoise in parallel", with as many sweeps as trained heads need (docs/parallel.md).
FASTEST: dict[tuple[int, int], dict[str, dict[Size, Times]]] = {
    # H100 80GB HBM3, commit b589fd5: benchmarks/results/kernels-h100.json and denoise-h100.json. Chains of 100 steps
    # with a cold L2; verdicts of 16 channels, accept_reject by rejection and with its host time. The kernels have
    # changed since: Triton's float32 times beyond 4 rows are of products of its own, which are now the library's.
    (9, 0): {
        "denoise": {
            (1024, 6, 2, 2): {PERSISTENT: 2.95, "triton": 5.78, "cuda": 8.39, "torch": 78.6},
            (1024, 6, 2, 8): {PERSISTENT: 6.48, "cuda": 8.71, "triton": 8.77, "torch": 92.3},
            (1024, 6, 2, 16): {"cuda": 9.07, "triton": 9.21, PERSISTENT: 11.2, "torch": 138},
            (1024, 6, 2, 64): {"cuda": 9.99, "triton": 13.4, "torch": 130},
            (1280, 8, 2, 2): {PERSISTENT: 7.05, "triton": 12.0, "cuda": 13.9, "torch": 144},
            (1536, 12, 2, 2): {PERSISTENT: 11.6, "triton": 17.7, "cuda": 20.8, "torch": 149},
            (1536, 12, 2, 64): {"cuda": 23.9, "triton": 30.3, "torch": 186},
            (1536, 12, 2, 512): {"cuda": 48.9, "triton": 81.4, "torch": 172},
            (1024, 6, 4, 2): {PERSISTENT: 5.05, "triton": 7.71, "cuda": 12.1, "torch": 68.3},
            (1024, 6, 4, 8): {PERSISTENT: 9.79, "cuda": 16.8, "triton": 31.8, "torch": 82.5},
            (1024, 6, 4, 16): {PERSISTENT: 16.7, "cuda": 25.4, "triton": 33.3, "torch": 86.6},
            (1024, 6, 4, 64): {"cuda": 28.3, "triton": 65.8, "torch": 127},
            (1280, 8, 4, 2): {PERSISTENT: 10.0, "triton": 15.1, "cuda": 18.9, "torch": 111},
            (1536, 12, 4, 2): {PERSISTENT: 17.4, "triton": 23.8, "cuda": 31.1, "torch": 129},
            (1536, 12, 4, 64): {"cuda": 91.0, "torch": 178, "triton": 211},
            (1536, 12, 4, 512): {"cuda": 449, "torch": 495, "triton": 1095},
        },
        "log_density_ratio": {
            (64,): {"cuda": 0.0208, "triton": 0.0229, "torch": 0.0805},
            (1024,): {"cuda": 0.00989, "triton": 0.0103, "torch": 0.0724},
            (8192,): {"cuda": 0.0122, "triton": 0.0124, "torch": 0.0838},
            (131072,): {"cuda": 0.0241, "triton": 0.0247, "torch": 0.255},
        },
        "accept_reject": {
            (64,): {"cuda": 0.141, "triton": 0.269, "torch": 5.21},
            (1024,): {"cuda": 0.150, "triton": 0.278, "torch": 5.66},
            (8192,): {"cuda": 0.183, "triton": 0.350, "torch": 8.04},
            (131072,): {"cuda": 0.272, "triton": 0.468, "torch": 91.0},
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


def size_of(op: str, subject, tokens: int, guided: bool = False) -> Size:
    """The size of an op's call; ``subject`` is the head of ``denoise``, which computes two rows a token if guided."""
    if op != "denoise":
        return (tokens,)
    return subject.width, subject.depth, subject.dtype.itemsize, bucket(tokens) * (2 if guided else 1)


def nearest(op: str, capability: tuple[int, int], size: Size) -> tuple[tuple[int, int], Size, Times] | None:
    """(capability, size, milliseconds) of the measurement nearest to a size; None where the op was never measured.

    Among devices the nearest capability, then among sizes the least sum of |log ratio|: twice the rows are as far as
    twice the width.
    """
    measured = [key for key, ops in FASTEST.items() if op in ops]
    if not measured:
        return None
    at = min(measured, key=lambda key: (abs(10 * (key[0] - capability[0]) + key[1] - capability[1]), key))
    table = FASTEST[at][op]
    found = min(table, key=lambda key: (_distance(op, key, size), key))
    return at, found, table[found]


def _distance(op: str, a: Size, b: Size) -> float:
    weights = [_OTHER_TYPE if op == "denoise" and i == _OPERAND else 1.0 for i in range(len(a))]
    return sum(w * abs(math.log(max(x, 1) / max(y, 1))) for w, x, y in zip(weights, a, b, strict=True))


@functools.lru_cache(maxsize=4096)
def _measured_order(op: str, capability: tuple[int, int], size: Size) -> tuple[str, ...]:
    found = nearest(op, capability, size)
    return () if found is None else tuple(sorted(found[2], key=found[2].get))


def ranked(
    op: str,
    device: torch.device,
    subject=None,
    tokens: int | None = None,
    guided: bool = False,
    parallel: bool | None = False,
) -> tuple[str, ...]:
    """Names in the order in which the automatic choice of an op tries them on a CUDA device, the fastest first.

    ``CSPD_PERSISTENT_MAX_TOKENS`` goes before the table: up to so many tokens the persistent kernel comes first, beyond
    it is left out. Before anybody knows the size (``tokens`` None) the order is the default one.

    Args:
        parallel: of ``denoise``: whether its steps are made in parallel. None: as is faster, if that was measured.

    Raises:
        ValueError: the variable is not a number from 0 to 16.
    """
    if tokens is None:
        return DEFAULT
    size, order = size_of(op, subject, tokens, guided), ()
    if device.type == "cuda":
        order = _measured_order(op, _capability(device), size)
    if op == "denoise" and parallel:
        order = tuple(name for name in order if name.endswith(PARALLEL))
        return tuple(dict.fromkeys((*order, *(f"{name} {PARALLEL}" for name in DEFAULT))))
    if op == "denoise":
        if parallel is not None:
            order = tuple(name for name in order if not name.endswith(PARALLEL))
        limit = persistent_limit()
        fits = size[_ROWS] <= PERSISTENT_LIMIT  # the nearest measured size may have fewer rows
        if limit is not None or not fits:
            order = tuple(name for name in order if name != PERSISTENT)
        if limit is not None and fits and tokens <= limit:
            order = (PERSISTENT, *order)
    return tuple(dict.fromkeys((*order, *DEFAULT)))


def prefers_persistent(head, tokens: int, guided: bool) -> bool:
    """Whether the CUDA backend is to try its persistent kernel before the layered ones."""
    order = ranked("denoise", head.device, head, tokens, guided)
    return PERSISTENT in order and order.index(PERSISTENT) < order.index("cuda")


def prefers_parallel(head, tokens: int, guided: bool, backend: str) -> bool:
    """Whether a backend's sweeps were measured to be faster than what else it has."""
    own = [name for name in ranked("denoise", head.device, head, tokens, guided, None) if name.split()[0] == backend]
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
        raise ValueError(f"expected {PERSISTENT_VARIABLE} as a number from 0 to {PERSISTENT_LIMIT}, got {value!r}")
    return int(value)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
