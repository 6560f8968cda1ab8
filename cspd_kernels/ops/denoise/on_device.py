"""``denoise`` by the kernels of a backend: buckets of token counts, and graphs or plain launches of a chain.

On a CUDA device the whole chain is captured once per (head, backend, bucket of token counts) and replayed as
a CUDA graph. Buckets and graphs belong to the head and end with it.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass

import torch

from ...crossover import bucket, prefers_persistent
from ...errors import CallError
from ...graphs import CALLER_CAPTURES, Plan, PlanCache, captures_ours, why_not_here
from ...head import DiffusionHead
from ...logs import log_once
from ...noise import PhiloxNoise
from ...scratch import scratch
from .chain import Chain, Tables, modulations_of
from .parallel import Parallel, nothing
from .parallel_chain import ParallelChain
from .workspace import in_blocks_of_rows

GRAPH_BYTES = 1 << 30  # of the buffers of a head's graphs together, for each backend; the modulations are shared
MOST_CHANNELS, _MAX_WIDTH, _MAX_HIDDEN, _WIDTH_MULTIPLE = 64, 4096, 12288, 16


@dataclass(frozen=True)
class Kernels:
    """A backend's chains; ``persistent``, if there is one, has a static ``serves(head, tokens, groups)``."""

    backend: str
    layered: type[Chain]
    persistent: type[Chain] | None = None


class HeadPlans:
    """What a head's calls by one backend share. It does not hold the head."""

    def __init__(self, head: DiffusionHead):
        self.plans = PlanCache(GRAPH_BYTES)  # first, so that it goes first, and waits: graphs read the tables
        self.tables = Tables(head)
        self.uploaded = None
        if head.device.type == "cuda":
            self.uploaded = torch.cuda.Event()
            self.uploaded.record()


Plans = weakref.WeakKeyDictionary[DiffusionHead, dict[str, HeadPlans]]
_HEADS: Plans = weakref.WeakKeyDictionary()


def why_not_covered(head: DiffusionHead, most_channels: int = MOST_CHANNELS) -> str | None:
    """None when a backend's kernels cover heads like this one, else the limit it exceeds."""
    if head.dtype == torch.float64:
        return (
            "its kernels compute in float32, float16 or bfloat16, and this head is float64: use backend='torch', "
            "or build the head with dtype=torch.float32"
        )
    if head.channels > most_channels:
        return (
            f"its kernels cover up to {most_channels} channels, and this head has {head.channels}: use backend='torch'"
        )
    if head.width > _MAX_WIDTH or head.width % _WIDTH_MULTIPLE:
        return (
            f"its kernels cover widths that are multiples of {_WIDTH_MULTIPLE} up to {_MAX_WIDTH}, and this head's "
            f"is {head.width}: use backend='torch'"
        )
    if head.hidden > _MAX_HIDDEN or head.hidden % _WIDTH_MULTIPLE:
        return (
            f"its kernels cover hidden widths that are multiples of {_WIDTH_MULTIPLE} up to {_MAX_HIDDEN}, and this "
            f"head's is {head.hidden}: use backend='torch'"
        )
    return None


def denoise_on_device(
    kernels, head, cond, x_T, noise, temperature, scales, workspace_bytes, parallel: Parallel | None = None  # noqa: N803
):  # fmt: skip
    """As :func:`cspd_kernels.denoise`, by the kernels of a backend; ``scales``: of guidance, one less than groups.

    The host waits for the device in two cases only:

    - a head's graphs outgrow their memory, so that the oldest goes;
    - it is the first call in parallel on a device, for the proof of :mod:`cspd_kernels.conditional`.
    """
    rows, groups = x_T.shape[0], 1 + len(scales)
    if rows == 0:
        return nothing(head, x_T, parallel)
    # Shift, scale and gate of every block that does not share them, shift and scale of the last layer, silu(y).
    bytes_per_row = groups * head.width * (3 * len(set(modulations_of(head))) + 3) * head.dtype.itemsize
    limit = max(1, workspace_bytes // bytes_per_row)

    if parallel is not None:  # all steps of a token at once
        limit, bytes_per_row = max(1, limit // head.num_steps), bytes_per_row * head.num_steps

    def chain(cond, x, noise, scales, guess, steps):
        own = None if parallel is None else parallel._replace(guess=guess)
        return _chain(kernels, head, cond, x, noise, temperature, scales, own, limit, workspace_bytes)

    cond, guess = cond.reshape(groups, rows, cond.shape[-1]), None if parallel is None else parallel.guess
    device = torch.cuda.device(head.device) if head.device.type == "cuda" else contextlib.nullcontext()
    # Buffers and graphs are for every later call, inference mode or not.
    with device, torch.inference_mode(False), torch.no_grad():
        return in_blocks_of_rows(chain, cond, x_T, noise, scales, bytes_per_row, workspace_bytes, guess)


def _chain(kernels, head, cond, x, noise, temperature, scales, parallel, limit, workspace_bytes):
    """One block of rows; ``limit`` is the number of rows times steps whose modulations fit the workspace; in parallel
    it is that of rows.
    """
    rows, groups = len(x), 1 + len(scales)
    reason = why_not_here(head.device)
    shared = plans_of(_HEADS, "denoise", head, kernels.backend, reason)
    shared.tables.check()
    tokens, philox, kind = min(bucket(rows), limit), isinstance(noise, PhiloxNoise), kernels.layered
    steps = head.num_steps if parallel is not None else _evenly(head.num_steps, limit // tokens)
    if parallel is None and kernels.persistent is not None and prefers_persistent(head, rows, groups):
        kind = kernels.persistent if kernels.persistent.serves(head, tokens, groups) else kind
    if reason is None and (0 if philox else 4 * noise[:, :1].numel() * tokens) > GRAPH_BYTES // 2:
        reason = "the noise is too large to copy"
    inputs = (cond, x, noise, temperature, scales, *(parallel or ()))

    def new(tokens: int, steps: int, static: bool) -> Chain | ParallelChain:
        if parallel is None:
            return kind(head, tokens, groups, noise, steps, static)
        return ParallelChain(kind, head, tokens, groups, noise, static, guessed=parallel.guess is not None)

    if reason is not None:
        if head.device.type == "cuda" and not captures_ours():
            log_once(f"denoise launches its kernels one by one: {reason}")
        if reason != CALLER_CAPTURES:  # there, the bucket, whose kernels an earlier call has compiled
            tokens, steps = rows, steps if parallel is not None else _evenly(head.num_steps, limit // rows)
        chain = new(tokens, steps, static=reason == CALLER_CAPTURES)
        chain.load(*inputs)
        chain.launch(head, shared.tables)
        return chain.results(rows, temperature, shared.tables)

    def make() -> tuple[Chain | ParallelChain, list[torch.Tensor]]:
        chain = new(tokens, steps, static=True)
        return chain, chain.buffers()

    in_parallel = None if parallel is None else parallel.guess is not None
    with shared.plans.lock:
        plan: Plan = shared.plans.get((kind, tokens, groups, philox, steps, in_parallel), make, head.device)
        chain = plan.value
        with plan.in_turn():
            if chain.memory is None:  # taken in turn, so that who takes the same block next waits for this stream
                chain.keep_modulations_in(scratch(head.device).take(chain.memory_bytes, workspace_bytes))
            chain.load(*inputs)
            plan.graph.run(lambda: chain.launch(head, shared.tables), lambda: chain.warm_up(head))
            return chain.results(rows, temperature, shared.tables)


def _evenly(steps: int, at_most: int) -> int:
    """Steps whose modulations are made at once: none is left over to be made alone, in a product of a poor shape."""
    groups = -(-steps // max(1, at_most))
    return -(-steps // groups)


def plans_of(heads: Plans, op: str, head: DiffusionHead, backend: str, reason: str | None) -> HeadPlans:
    """What earlier calls of an op have left behind, for which the current stream waits; ``reason`` as
    :func:`why_not_here` has it."""
    shared = heads.get(head, {}).get(backend)
    if shared is None:
        if reason == CALLER_CAPTURES:
            raise CallError(
                f"{op} expected a first call with this head before you capture a CUDA graph: the first call uploads "
                f"tables. Call it once with these sizes and backend={backend!r}, then capture"
            )
        shared = heads.setdefault(head, {}).setdefault(backend, HeadPlans(head))
    if shared.uploaded is not None and reason != CALLER_CAPTURES:
        torch.cuda.current_stream().wait_event(shared.uploaded)
    return shared
