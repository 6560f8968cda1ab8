"""The table of what ``python benchmarks/kernels.py`` measures. A case is an op, a size, a type, a backend and its
baselines.

To add cases, add a line to ``TABLE``. To add an op, write a module with a function ``group`` and name it in ``OPS``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from cspd_kernels.backends import BACKENDS, implementation, why_unavailable
from cspd_kernels.crossover import PERSISTENT, PERSISTENT_LIMIT

from baselines import COMPILED, COMPILED_ON_CPU, IN_ONE_GRAPH, PRODUCTS

HEADS = {"MAR-B": (6, 1024, 768), "MAR-L": (8, 1280, 1024), "MAR-H": (12, 1536, 1280)}  # D, W, Z
STEPS, CHANNELS = 100, 16
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
QUICK_RUNS = 3

DENOISE, SWEEPS, BLOCK, RATIO, VERDICT, EVALUATE = (
    "denoise", "denoise in parallel", "one block", "log_density_ratio", "accept_reject", "evaluate",
)  # fmt: skip
# The module that makes the groups of an op, and the op whose backends it measures.
OPS = {
    DENOISE: ("denoising", "denoise"),
    SWEEPS: ("in_parallel", "denoise"),
    BLOCK: ("blocks", "denoise"),
    RATIO: ("judging", "log_density_ratio"),
    VERDICT: ("judging", "accept_reject"),
    EVALUATE: ("evaluating", "evaluate"),
}


@dataclass(frozen=True)
class Case:
    """One contender at one size, and what it is compared with."""

    op: str
    head: str  # one of HEADS; empty where the op has no head
    tokens: int
    dtype: str
    backend: str
    baselines: tuple[str, ...]
    runs: int
    device: str  # "cpu" or "cuda"
    variant: str = ""
    quick: bool = False  # whether --quick measures it

    @property
    def name(self) -> str:
        """What ``--only`` looks at: op/size/N/dtype/backend."""
        size = "-".join(filter(None, (self.head or f"C={CHANNELS}", self.variant)))
        return (
            "/".join((self.op, size, str(self.tokens), self.dtype, self.backend)).replace(", ", "-").replace(" ", "-")
        )

    @property
    def together(self) -> tuple:
        """Cases that agree in this are measured in turns on the same inputs."""
        return self.op, self.head, self.tokens, self.variant


@dataclass(frozen=True)
class Plan:
    """A line of the table: every size with every variant, type and backend."""

    op: str
    device: str
    sizes: tuple[tuple[str, int], ...]  # head and tokens
    baselines: dict[str, tuple[str, ...]]  # by type
    backends: tuple[str, ...]
    runs: int
    variants: tuple[str, ...] = ("",)

    def cases(self) -> Iterator[Case]:
        for (head, tokens), variant in itertools.product(self.sizes, self.variants):
            for backend, (dtype, baselines) in itertools.product(self.backends, self.baselines.items()):
                yield Case(self.op, head, tokens, dtype, backend, baselines, self.runs, self.device, variant)


FLOAT32, BFLOAT16 = "float32", "bfloat16"
KERNELS = ("triton", "cuda")
REPLAYED = ", replayed"  # behind a backend's name: the same call in a CUDA graph
AUTOCAST = "eager autocast bfloat16"
ON_CPU = {
    FLOAT32: ("eager float32", f"{COMPILED_ON_CPU} float32"),
    BFLOAT16: ("eager float32", AUTOCAST, f"{COMPILED_ON_CPU} bfloat16"),
}
ON_GPU = {
    FLOAT32: ("eager float32",),
    BFLOAT16: ("eager float32", AUTOCAST, IN_ONE_GRAPH, f"{COMPILED} bfloat16", PRODUCTS),
}
SIMPLE = {FLOAT32: ("eager float32",), BFLOAT16: ("eager float32", PRODUCTS)}
STEP_BY_STEP = ("its steps",)  # the same backend, as the automatic choice would call it
TWO_PRODUCTS = ("its two library products bfloat16",)
MOVED = ("copy of as many bytes", "sum of as many bytes")
LOOP = ("looped torch",)  # eager: it waits for the host every round, and no graph can hold it
RESIDUALS = ("rejection", "closed_form")
GUIDED = "guided"


def at(head: str, *tokens: int) -> tuple[tuple[str, int], ...]:
    return tuple((head, n) for n in tokens)


FIRST = (*at("MAR-B", 2, 8, 64), *at("MAR-L", 2), *at("MAR-H", 2, 512))
# Sizes beside the simplest baselines alone.
MORE = (*at("MAR-B", 16), *at("MAR-H", 64, 8, 16), *at("MAR-B", 1, 4), *at("MAR-H", 1))
# In this order, so that a run that is cut short has both ends.
ALL_HEADS = tuple((head, n) for head in ("MAR-B", "MAR-H", "MAR-L") for n in (1, 8, 64))
EVERYWHERE = tuple(BACKENDS)
VERDICTS = tuple(f"{name}{how}" for name in BACKENDS for how in ("", REPLAYED))

TABLE = (
    Plan(DENOISE, "cpu", at("MAR-B", 2, 8), ON_CPU, ("torch",), 7),
    Plan(DENOISE, "cpu", at("MAR-B", 64), ON_CPU, ("torch",), 5),
    Plan(DENOISE, "cuda", FIRST, ON_GPU, (*EVERYWHERE, PERSISTENT), 15),
    Plan(DENOISE, "cuda", MORE, SIMPLE, (*KERNELS, PERSISTENT), 7),
    Plan(SWEEPS, "cpu", at("MAR-B", 1), {FLOAT32: STEP_BY_STEP, BFLOAT16: STEP_BY_STEP}, ("torch",), 7, ("", GUIDED)),
    Plan(SWEEPS, "cpu", at("MAR-B", 8), {FLOAT32: STEP_BY_STEP, BFLOAT16: STEP_BY_STEP}, ("torch",), 7),
    Plan(SWEEPS, "cuda", ALL_HEADS, {BFLOAT16: STEP_BY_STEP}, EVERYWHERE, 7, ("", GUIDED)),
    Plan(
        BLOCK, "cuda", (*at("MAR-B", 100, 200, 400, 1024, 2048), *at("MAR-H", 100, 200, 400, 1024, 2048)),
        {BFLOAT16: TWO_PRODUCTS}, KERNELS, 31,
    ),
    Plan(
        EVALUATE, "cpu", at("MAR-B", 2, 64),
        {kind: (f"eager {kind}", f"{COMPILED_ON_CPU} {kind}") for kind in (FLOAT32, BFLOAT16)}, ("torch",), 31,
    ),
    Plan(
        EVALUATE, "cuda", at("MAR-B", 2),
        {BFLOAT16: ("eager bfloat16", "eager in a CUDA graph bfloat16", f"{COMPILED} bfloat16")}, EVERYWHERE, 31,
    ),
    Plan(
        EVALUATE, "cuda", (*at("MAR-B", 64), *at("MAR-H", 2)),
        {BFLOAT16: ("eager bfloat16", "eager in a CUDA graph bfloat16")}, EVERYWHERE, 31,
    ),
    *(
        plan
        for n in (64, 1024, 8192, 131072)
        for plan in (
            Plan(RATIO, "cpu", at("", n), {FLOAT32: MOVED}, ("torch",), 5 if n > 10_000 else 31),
            Plan(VERDICT, "cpu", at("", n), {FLOAT32: LOOP}, ("torch",), 5 if n > 10_000 else 31, RESIDUALS),
            Plan(RATIO, "cuda", at("", n), {FLOAT32: MOVED}, EVERYWHERE, 31),
            Plan(VERDICT, "cuda", at("", n), {FLOAT32: LOOP}, VERDICTS, 31, RESIDUALS),
        )
    ),
)  # fmt: skip


def all_cases() -> list[Case]:
    """The table's, of all devices, in the order in which they are measured."""
    made, first = [], {}
    for case in itertools.chain.from_iterable(plan.cases() for plan in TABLE):
        if case.backend == PERSISTENT and case.tokens > PERSISTENT_LIMIT:
            continue  # the layered kernels are for these
        size = first.setdefault((case.op, case.device), (case.head, case.tokens))
        made.append(replace(case, quick=size == (case.head, case.tokens)))
    return made


def selected(cases: list[Case], patterns: list[str]) -> list[Case]:
    """Those whose name holds one of the patterns, or matches it as a glob. Without patterns, all."""
    if not patterns:
        return cases
    return [case for case in cases if any(text in case.name or fnmatchcase(case.name, text) for text in patterns)]


def groups(cases: list[Case]) -> list[list[Case]]:
    """Cases that are measured together, in the order of the first of each."""
    made: dict[tuple, list[Case]] = {}
    for case in cases:
        made.setdefault(case.together, []).append(case)
    return list(made.values())


def why_not_here(case: Case, device: torch.device) -> str | None:
    """None where the case is to be measured on this device, else the reason."""
    if case.device != device.type:
        return f"it is measured on {'GPUs' if case.device == 'cuda' else 'CPUs'}"
    return why_not_measured(OPS[case.op][1], case.backend.partition(",")[0].split()[0], device)


def why_not_measured(op: str, backend: str, device: torch.device) -> str | None:
    """None where a backend is to be measured, else the reason. What runs on the CPU for tests says nothing of speed."""
    if device.type != "cuda":
        return None if backend == "torch" else why_unavailable(backend, op) or "it runs on GPUs"
    try:
        implementation(op, backend, device)
    except RuntimeError as error:
        return str(error)
    return None
