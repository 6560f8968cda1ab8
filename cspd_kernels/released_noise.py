"""Noise as released code draws it: the numbers of many calls of ``torch.randn`` on a CUDA device, in one launch.

PyTorch fills a tensor of n values there by ``256 * grid`` threads with four normals a round. ``grid`` depends on n and
on the device, and a call moves the generator by four a round. Seed and offset are the host's. So one kernel can compute
what T calls would have drawn, bit for bit, and the host can move the generator as they would have moved it.
csrc/include/cspd/randn.cuh has the numbers.

PyTorch promises none of this. So a kernel is compared with PyTorch's own calls before its first use on a device. Where
it gives other bits, those calls are made from then on.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence

import torch

from . import cuda_support
from .backends import ENVIRONMENT_VARIABLE, untraced, why_unavailable
from .devices import on, read
from .logs import log_once

THREADS = 256  # of a block of PyTorch's
PER_ROUND = 4  # normals of a thread
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc's Operand
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_LIMIT = 2**31  # bytes; a larger tensor PyTorch fills in parts
_SERVED = "cuda"  # type of the devices with such a generator
_AUTOMATIC = ("cuda", "triton")  # the extension's launch costs the host less
# (out, seed, counter, grid, rounds, first, newest_first): fills out
Kernel = Callable[[torch.Tensor, int, int, int, int, torch.dtype, bool], None]

_lock = threading.Lock()
_chosen: dict[tuple[torch.device, str], Kernel | None] = {}


@untraced
def randn_steps(
    count: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
    *,
    first: torch.dtype | None = None,
    newest_first: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The standard normals of ``count`` calls of ``torch.randn(shape)``, (count, *shape).

    On a CUDA device one launch where a kernel has proved to give the same bits, else the calls. The generator ends as
    after the calls. The calls also happen while a CUDA graph is captured, which records them with its generator, and
    under modes that are to see every operation.

    Args:
        generator: of the device; None is its default one.
        first: dtype of the first call, whose numbers are then converted; None: ``dtype``, as of the others.
        newest_first: the last call's numbers come first.
        backend: "torch" makes the calls, "triton" or "cuda" takes that kernel only; None: ``CSPD_BACKEND``, else any.
    """
    first = dtype if first is None else first
    out = torch.empty((count, *shape), dtype=dtype, device=device)
    if out.device.type == _SERVED and out.numel() > 0 and type(out) is torch.Tensor and not _watched():
        with on(out.device):
            kernel = None if _needs_calls(out, first, generator) else _kernel(out.device, backend)
            if kernel is not None:
                _draw(kernel, out, first, generator, newest_first)
                return out
    _call(out, first, generator, newest_first)
    return out


def layout(numel: int, most_blocks: int) -> tuple[int, int]:
    """(blocks, rounds of each of their threads) in which PyTorch fills so many values, more than none."""
    grid = min(most_blocks, -(-numel // THREADS))
    return grid, (numel - 1) // (THREADS * grid * PER_ROUND) + 1


@functools.cache
def _most_blocks(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * (properties.max_threads_per_multi_processor // THREADS)


def _call(out: torch.Tensor, first: torch.dtype, generator, newest_first: bool) -> None:
    for i, to in enumerate(out.unbind() if not newest_first else reversed(out.unbind())):
        if i == 0 and first != out.dtype:
            to.copy_(torch.randn(to.shape, dtype=first, device=out.device, generator=generator))
        else:
            to.normal_(generator=generator)


def _draw(kernel: Kernel, out: torch.Tensor, first: torch.dtype, generator, newest_first: bool) -> None:
    if generator is None:
        generator = torch.cuda.default_generators[out.device.index]
    grid, rounds = layout(out.numel() // len(out), _most_blocks(out.device))
    # PyTorch's own draws in other threads do not take this lock: threads that draw at the same time want generators of
    # their own. Setting the offset also lets cuDNN seed the dropout of its RNNs anew.
    with _lock:
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + PER_ROUND * rounds * len(out))
    kernel(out, seed, offset // PER_ROUND, grid, rounds, first, newest_first)


def _needs_calls(out: torch.Tensor, first: torch.dtype, generator) -> bool:
    """Whether no kernel can stand in for the calls here and now."""
    numel = out.numel() // len(out)
    return (
        out.dtype not in CODES
        or first not in CODES
        or numel * 4 >= _LIMIT
        or out.numel() // THREADS + 2 * len(out) * _most_blocks(out.device) >= 2**31  # blocks of a launch, at most
        or (generator is not None and generator.device != out.device)  # for PyTorch to judge
        or torch.cuda.is_current_stream_capturing()
    )


def _watched() -> bool:
    """Whether somebody is to see every operation, or to replace it; so too where this PyTorch does not tell."""
    try:
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._are_functorch_transforms_active()
            or any(
                type(mode) is not torch.utils._device.DeviceContext
                for mode in torch.overrides._get_current_function_mode_stack()
            )
        )
    except AttributeError:
        return True


# --- which kernel ---


def _kernel(device: torch.device, backend: str | None) -> Kernel | None:
    key = device, backend or os.environ.get(ENVIRONMENT_VARIABLE) or ""
    if key not in _chosen:
        try:
            _chosen[key] = _choose(*key)
        except torch.cuda.OutOfMemoryError:  # no room for a proof; a later call may have it
            return None
    return _chosen[key]


def _choose(device: torch.device, backend: str) -> Kernel | None:
    """The first that is there and proves itself."""
    missing, wrong = {}, {}
    for name in (backend,) if backend else _AUTOMATIC:
        if name == "torch":
            continue
        if (reason := _why_not(name, device)) is not None:
            missing[name] = reason
            continue
        kernel = _by_cuda if name == "cuda" else _by_triton
        try:
            reason = _difference(kernel, device)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever a compiler or driver raises; the calls are there)
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            _log(wrong, device, slow=False)
            return kernel
        wrong[name] = reason
    _log(missing | wrong, device, slow=True)
    return None


def _log(refusals: dict[str, str], device: torch.device, slow: bool) -> None:
    for name, reason in refusals.items():
        log_once(
            f"the noise of a sampling loop is not drawn by the {name} kernel on {device}: {reason}",
            slow_on=device if slow else None,
            cause=reason,
        )


def _why_not(name: str, device: torch.device) -> str | None:
    if reason := why_unavailable(name):
        return reason
    if name == "cuda":
        return cuda_support.why_unsupported_here(device)
    from .triton_support import why_unsupported_here

    return why_unsupported_here(device)


def _by_cuda(out, seed, counter, grid, rounds, first, newest_first) -> None:
    cuda_support.extension().randn(
        CODES[out.dtype], CODES[first], seed, counter, out.numel() // len(out), len(out), grid, rounds, newest_first,
        out.data_ptr(), cuda_support.launch_stream(out.device),
    )  # fmt: skip


def _by_triton(*arguments) -> None:
    from .triton_randn import randn

    randn(*arguments)


# --- the proof ---


def _difference(kernel: Kernel, device: torch.device) -> str | None:
    """None where a kernel's numbers and the state it leaves are those of PyTorch's calls, else what differs. The host
    waits for the device."""
    theirs, ours = (_generator(device) for _ in range(2))
    cap = THREADS * _most_blocks(device)  # values up to which a thread has one
    single, half, brain = CODES
    cases = [(33, single, single), (64, single, half), (1000, single, brain), (4096, half, half), (4096, brain, brain)]
    cases += [(cap + 77, single, half), (cap + 4096, brain, brain)]
    cases += [(PER_ROUND * cap + 77, half, half), (PER_ROUND * cap + 4096, single, single)]
    equal = []
    for i, (numel, dtype, first) in enumerate(cases):
        expected = torch.empty((3, numel), dtype=dtype, device=device)
        got = torch.full_like(expected, torch.nan)
        newest_first = i % 2 == 0
        _call(expected, first, theirs, newest_first)
        _draw(kernel, got, first, ours, newest_first)
        if theirs.get_offset() != ours.get_offset():
            return f"{numel} values would move PyTorch's generator by another offset"
        equal.append((got.view(_BITS[dtype]) == expected.view(_BITS[dtype])).all())
    return None if read(torch.stack(equal).all()) else "PyTorch's own calls draw different bits"


def _generator(device: torch.device) -> torch.Generator:
    """A generator whose state has words that all count."""
    generator = torch.Generator(device)
    generator.manual_seed(0xFEDC_BA98_7654_3210)
    generator.set_offset(PER_ROUND * (2**32 - 5))
    return generator
