"""``evaluate`` by the kernels of a backend: buckets of row counts, and a graph or plain launches of one call."""

from __future__ import annotations

import contextlib
import weakref

import torch

from ...crossover import bucket
from ...graphs import CALLER_CAPTURES, Plan, captures_ours, why_not_here
from ...head import DiffusionHead
from ...logs import log_once
from ...scratch import scratch
from ...time_embedding import embed
from ..denoise.chain import Tables, modulations_of
from ..denoise.on_device import Kernels, Plans, plans_of

_HEADS: Plans = weakref.WeakKeyDictionary()


class NetworkCall:
    """The network at a fixed number of rows, from the inputs in its buffers: the same launches every time.

    The condition is projected in every call: no version counter shows what a replayed graph has written into it.
    """

    def __init__(self, kernels: Kernels, head: DiffusionHead, rows: int, timesteps: torch.Tensor, static: bool):
        self.chain = kernels.layered(head, rows, 1, None, 1, static)
        one = len(timesteps) == 1
        self.timesteps = timesteps.new_zeros(1 if one else rows, *timesteps.shape[1:])

    def buffers(self) -> list[torch.Tensor]:
        return [*self.chain.buffers(), self.timesteps]

    def load(self, x: torch.Tensor, timesteps: torch.Tensor, cond: torch.Tensor) -> None:
        """Copy the inputs of n rows into the buffers; timesteps of n rows, or of one for all."""
        self.chain.x[: len(x)].copy_(x)
        self.chain.cond[0, : len(x)].copy_(cond)
        self.timesteps[: len(timesteps)].copy_(timesteps)

    def launch(self, head: DiffusionHead, tables: Tables) -> None:
        chain = self.chain
        if chain.reads_copies:
            tables.refresh(head)
        chain.project(head)
        self.modulate(head)
        chain.evaluate(head, tables)

    def modulate(self, head: DiffusionHead) -> None:
        self.chain.take_memory(head)
        self.chain.embed_rows(embed(head.time, self.timesteps))
        self.chain.modulate(head, self.chain.rows)

    def warm_up(self, head: DiffusionHead) -> None:
        """What of a launch uses the workspaces of libraries."""
        self.modulate(head)
        self.chain.warm_up_products(head)

    def results(self, n: int) -> torch.Tensor:
        """A copy of what the network puts out for the first n rows."""
        return self.chain.out[0, :n].clone()


def evaluate_on_device(kernels: Kernels, head, x, timesteps, cond, workspace_bytes) -> torch.Tensor:
    """Like :func:`cspd_kernels.evaluate`, by the kernels of a backend; ``timesteps`` (M,) or (M, K), on the device.

    The host waits for the device only where a head's graphs outgrow their memory and the oldest goes.
    """
    rows = len(x)
    if rows == 0:
        return x.new_empty(0, head.outputs)
    # Shift, scale and gate of every block that does not share them, shift and scale of the last layer, silu(y).
    bytes_per_row = head.width * (3 * len(set(modulations_of(head))) + 3) * head.dtype.itemsize
    limit = max(1, workspace_bytes // bytes_per_row)
    if timesteps.stride(0) == 0:  # one for all rows
        timesteps = timesteps[:1]
    device = torch.cuda.device(head.device) if head.device.type == "cuda" else contextlib.nullcontext()
    # Buffers and graphs are for every later call, inference mode or not.
    with device, torch.inference_mode(False), torch.no_grad():
        out = []
        for start in range(0, rows, limit):
            part = slice(start, start + limit)
            own = timesteps if len(timesteps) == 1 else timesteps[part]
            out.append(_call(kernels, head, x[part], own, cond[part], limit, workspace_bytes))
        return out[0] if len(out) == 1 else torch.cat(out)


def _call(kernels, head, x, timesteps, cond, limit, workspace_bytes) -> torch.Tensor:
    """One block of rows."""
    rows, reason, inputs = len(x), why_not_here(head.device), (x, timesteps, cond)
    shared = plans_of(_HEADS, "evaluate", head, kernels.backend, reason)
    size = min(bucket(rows), limit)
    if reason is not None:
        if head.device.type == "cuda" and not captures_ours():
            log_once(f"evaluate launches its kernels one by one: {reason}")
        captured = reason == CALLER_CAPTURES  # there, the bucket, whose kernels an earlier call has compiled
        call = NetworkCall(kernels, head, size if captured else rows, timesteps, static=captured)
        call.load(*inputs)
        call.launch(head, shared.tables)
        return call.results(rows)

    def make() -> tuple[NetworkCall, list[torch.Tensor]]:
        call = NetworkCall(kernels, head, size, timesteps, static=True)
        return call, call.buffers()

    times = len(timesteps) == 1, timesteps.dtype, timesteps.shape[1:]
    with shared.plans.lock:
        plan: Plan = shared.plans.get((size, *times), make, head.device)
        call = plan.value
        with plan.in_turn():
            if call.chain.memory is None:  # taken in turn, so that who takes the same block next waits for this stream
                memory = scratch(head.device).take(call.chain.memory_bytes, workspace_bytes)
                call.chain.keep_modulations_in(memory)
            call.load(*inputs)
            plan.graph.run(lambda: call.launch(head, shared.tables), lambda: call.warm_up(head))
            return call.results(rows)
