"""What the compiler makes of the Triton kernels, without a GPU: registers, spills and shared memory.

The launches of a real call are recorded on tensors without storage and compiled ahead of time with
the signature, alignment and options that the launcher would use.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .devices import SHARED_LIMITS

ARCHITECTURES = (80, 90, 100)
EARLY_ARCHITECTURE = 90  # the first with programmatic dependent launch
_WAIT = "griddepcontrol.wait"
_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel at one specialisation: what the compiler is given."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    attributes: tuple[int, ...]  # positions of the arguments that 16 divides
    options: tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes."""

    kernel: str
    architecture: int
    registers: int  # a thread
    stack_bytes: int  # a thread; spilled registers live there
    shared_bytes: int
    warps: int
    waits: int = 0  # for the kernel in front, where this one may start before its end
    before_wait: tuple[str, ...] = ()  # the arguments through which memory is touched before the first

    @property
    def fits(self) -> bool:
        """No spills, and shared memory within the architecture's limit."""
        return self.stack_bytes == 0 and self.shared_bytes <= SHARED_LIMITS[self.architecture]


@contextlib.contextmanager
def recorded_launches() -> Iterator[dict[Launch, None]]:
    """Collect, in order and once each, the launches of Triton kernels; none of them runs."""
    launches: dict[Launch, None] = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.setdefault(_launch(kernel, args, kwargs))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = original


def _launch(kernel: JITFunction, args: tuple, kwargs: dict) -> Launch:
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, aligned = [], [], []
    for i, p in enumerate(kernel.params):
        value = values[p.name]
        if p.is_constexpr or value is None or (type(value) is int and value == 1 and not p.do_not_specialize):
            signature.append((p.name, "constexpr"))
            constants.append((p.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((p.name, _POINTERS[value.dtype]))
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations are aligned more than that
                aligned.append(i)
        else:
            signature.append((p.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if not p.do_not_specialize and value % 16 == 0:
                aligned.append(i)
    options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in names))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


def binary(launch: Launch, architecture: int):
    """Triton's compilation for one architecture, with the text of every stage in ``asm``.

    A launch is recorded as on a device whose kernels may start early, the constant PDL; the others know no such thing.
    """
    constants, options = dict(launch.constants), dict(launch.options)
    if architecture < EARLY_ARCHITECTURE and options.pop("launch_pdl", False):
        constants["PDL"] = False
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constants,
        {(i,): [["tt.divisibility", 16]] for i in launch.attributes},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compiled(launch: Launch, architecture: int) -> Resources:
    """Compile for one architecture and read the binary's resources."""
    made = binary(launch, architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    names = [name if kind.startswith("*") else None for name, kind in launch.signature if kind != "constexpr"]
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(
        launch.kernel.__name__,
        architecture,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        made.metadata.shared,
        made.metadata.num_warps,
        made.asm["ptx"].count(_WAIT),
        touched_before_wait(made.asm["ptx"], names),
    )


def touched_before_wait(ptx: str, names: list[str | None]) -> tuple[str, ...]:
    """The pointers through which a kernel reads or writes before its wait for the kernel in front.

    ``names`` has None for arguments that are no pointers. A kernel that does not wait has none.
    """
    before, waits, _ = ptx.partition(_WAIT)
    if not waits:
        return ()
    origins: dict[str, set[str]] = {}  # of a register's value
    touched: set[str] = set()
    for line in before.splitlines():
        registers = re.findall(r"%\w+", line)
        if argument := re.search(r"\bld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line):
            origins[argument[1]] = set(names[int(argument[2]) :][:1]) - {None}
        elif re.search(r"\b(ld|st|atom|red|prefetch|cp\.async)\.", line):
            for address in re.findall(r"\[\s*(%\w+)", line):
                touched |= origins.get(address, set())
        elif len(registers) > 1:
            origins[registers[0]] = set().union(*(origins.get(r, set()) for r in registers[1:]))
    return tuple(sorted(touched))
