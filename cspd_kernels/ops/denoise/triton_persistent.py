"""The persistent chain: all steps in one launch, for a few tokens. Off until measured, see ``crossover``.

One program owns one tile of columns for the whole chain. Between two layers all programs wait for each
other at a grid barrier, with the next layer's weights already on their way. The final layer is spread
over the programs by channel; its update is repeated by all of them, so that it needs no barrier of its
own before the next input projection. Per step 2 D + 2 barriers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from ...head import DiffusionHead
from ...triton_support import INTERPRETED
from .chain import Tables
from .triton_chain import OPTIONS, TL_DTYPES, LayeredChain
from .triton_config import Tile, multiprocessors, persistent_tile, power_of_two
from .triton_tiles import (
    input_tile,
    input_weights,
    mlp0_tile,
    mlp1_tile,
    output_tile,
    reverse_step,
    step_noise,
    step_table,
    weight_tile,
)  # fmt: skip

ALL, MLP0, MLP1, OUTPUT, UPDATE = (tl.constexpr(i) for i in range(-1, 4))
WATCHDOG_NANOSECONDS = 2_000_000_000  # a barrier takes about a microsecond


@triton.jit
def grid_barrier(counter, error, PROGRAMS: tl.constexpr, TIMEOUT: tl.constexpr):
    """Wait until every program has arrived; what each wrote before is visible to all after.

    The counter only grows: the barrier's end follows from the ticket drawn on arrival, so nothing is
    ever reset between barriers or launches. A program that waits longer than TIMEOUT sets ``error``,
    and from then on nobody waits.
    """
    tl.debug_barrier()  # all threads of this program have written
    ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    end = (ticket // PROGRAMS + 1) * PROGRAMS
    if tl.load(counter, volatile=True) < end:
        started = globaltimer()
        while (tl.load(counter, volatile=True) < end) & (tl.load(error, volatile=True) == 0):
            if globaltimer() - started > TIMEOUT:
                tl.store(error, 1)
    tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def block_pointer(pointers, block, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """The address of one weight of one block."""
    return tl.multiple_of(tl.load(pointers + block * 6 + FIELD).to(tl.pointer_type(DTYPE)), 16)


@triton.jit(
    do_not_specialize=["N", "M", "first", "start", "stop", "first_block", "last_block", "noise_step", "mods_block"]
)
def _persistent_kernel(
    pointers, mods, mods_block, final_mods, weight, bias, input_weight, input_bias, h, stats, activations, outputs,
    coefficients, temperature, scale, x, noise, noise_step, seed, addresses, log_std_out, path,
    counter, error, N, M, first, start, stop, first_block, last_block,
    C: tl.constexpr, CP: tl.constexpr, D: tl.constexpr, W: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr,
    GUIDED: tl.constexpr, LEARNED: tl.constexpr, PHILOX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, R: tl.constexpr,
    OUTPUT_R: tl.constexpr, OUTPUT_BK: tl.constexpr, TILES_P2: tl.constexpr, PROGRAMS: tl.constexpr,
    TIMEOUT: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Reverse steps stop-1..start, with modulations that begin at step ``first``.

    PHASE is ALL, or the one phase to run, of blocks first_block..last_block-1: where programs run one
    after another (the interpreter) a barrier would wait for ever.

    x is [2, N, C]: step i reads x[i % 2] and writes x[(i + 1) % 2], since all programs read it while one writes.
    ``outputs`` [3, N, C] passes eps_c, v and eps_u from the final layer to the update.
    """
    WAIT: tl.constexpr = PHASE == ALL
    pid = tl.program_id(0)
    cols = pid * BN + tl.arange(0, BN)
    tokens = tl.arange(0, R)
    mask = tokens < N
    channels = tl.arange(0, CP)
    valid = mask[:, None] & (channels < C)[None, :]
    at = tokens[:, None] * C + channels[None, :]
    strength = tl.load(temperature)
    guidance = tl.load(scale + tokens, mask, 0.0) if GUIDED else None
    input_w, input_b = input_weights(input_weight, input_bias, pid, channels, C, W, BN)
    w = weight_tile(block_pointer(pointers, 0, 2, DTYPE), cols, 0, W, BK)
    for back in range(0, stop - start):
        step = stop - 1 - back
        row = (step - first).to(tl.int64) * M
        for block in range(first_block, last_block):
            block_mods = mods + mods_block.to(tl.int64) * block + row * (3 * W)
            if WAIT or PHASE == MLP0:
                norm_weight = block_pointer(pointers, block, 0, tl.float32)
                norm_bias = block_pointer(pointers, block, 1, tl.float32)
                weight0 = block_pointer(pointers, block, 2, DTYPE)
                bias0 = block_pointer(pointers, block, 3, DTYPE)
                if not WAIT:
                    w = weight_tile(weight0, cols, 0, W, BK)
                # The input projection leaves its statistics in tiles of the same width as the blocks do.
                mlp0_tile(
                    0, pid, h, stats, block_mods, norm_weight, norm_bias, weight0, bias0, activations, w, M,
                    W, EPS, BN, TILES_P2, tl.float32, True, BM, BN, BK, STAGES, True,
                )  # fmt: skip
            weight1 = block_pointer(pointers, block, 4, DTYPE)
            w = weight_tile(weight1, cols, 0, W, BK)
            if WAIT:
                grid_barrier(counter, error, PROGRAMS, TIMEOUT)
            if WAIT or PHASE == MLP1:
                bias1 = block_pointer(pointers, block, 5, DTYPE)
                mlp1_tile(
                    0, pid, activations, block_mods, weight1, bias1, h, stats, w, M,
                    W, tl.float32, True, BM, BN, BK, STAGES, True,
                )  # fmt: skip
            if WAIT:
                following = (block + 1) % D  # after the last block, the first one of the next step
                w = weight_tile(block_pointer(pointers, following, 2, DTYPE), cols, 0, W, BK)
                grid_barrier(counter, error, PROGRAMS, TIMEOUT)
        if WAIT or PHASE == OUTPUT:
            for item in range(pid, C * ((N + OUTPUT_R - 1) // OUTPUT_R), PROGRAMS):
                channel = item % C
                some = item // C * OUTPUT_R + tl.arange(0, OUTPUT_R)
                there = some < N
                eps, v, eps_u = output_tile(
                    channel, some, there, h, stats, final_mods + row * (2 * W), weight, bias, N, M,
                    C, W, EPS, BN, TILES_P2, GUIDED, LEARNED, True, OUTPUT_R, 1, OUTPUT_BK, STAGES,
                )  # fmt: skip
                to = outputs + some[:, None] * C + channel
                tl.store(to, eps, there[:, None])
                tl.store(to + N * C, v, there[:, None])
                tl.store(to + 2 * N * C, eps_u, there[:, None])
        # Noise and coefficients do not wait for anybody either.
        z = step_noise(noise, noise_step, seed, addresses, step, tokens, mask, channels, valid, C, PHILOX)
        table = step_table(coefficients, step)
        if WAIT:
            grid_barrier(counter, error, PROGRAMS, TIMEOUT)
        if WAIT or PHASE == UPDATE:
            eps = tl.load(outputs + at, valid, 0.0, cache_modifier=".cg")
            v = tl.load(outputs + N * C + at, valid, 0.0, cache_modifier=".cg")
            eps_u = tl.load(outputs + 2 * N * C + at, valid, 0.0, cache_modifier=".cg")
            now = tl.load(x + (step % 2) * N * C + at, valid, 0.0, cache_modifier=".cg")
            value, log_std = reverse_step(now, eps, v, eps_u, z, table, step, guidance, strength, GUIDED)
            value = tl.where(valid, value, 0.0)
            if pid == 0:
                # A chain that stopped waiting has computed nothing: its tokens must not look like any.
                broken = tl.load(error, volatile=True) != 0
                result = tl.where(broken, float("nan"), value)
                tl.store(x + ((step + 1) % 2) * N * C + at, result, valid)
                if step > 0:
                    total = tl.sum(tl.where(valid, log_std, 0.0), 1)
                    tl.store(path + tokens, tl.load(path + tokens, mask, 0.0) + total, mask)
                else:
                    tl.store(log_std_out + at, log_std, valid)
            if step > 0:
                input_tile(value, input_w, input_b, pid, tokens, mask, h, stats, N, M, W, GUIDED, BN)
        if WAIT:
            grid_barrier(counter, error, PROGRAMS, TIMEOUT)


class PersistentChain(LayeredChain):
    """A chain whose steps are one launch a workspace of modulations."""

    @staticmethod
    def serves(head: DiffusionHead, tables: Tables, tokens: int, guided: bool) -> bool:
        """Whether the kernel covers so many tokens of this head."""
        return tables.serves_persistent

    def __init__(self, head, tokens, guided, noise, steps, static):
        super().__init__(head, tokens, guided, noise, steps, static)
        device = head.device
        self.outputs = torch.zeros(3, tokens, head.channels, dtype=torch.float32, device=device)
        self.both_x = torch.zeros(2, tokens, head.channels, dtype=torch.float32, device=device)
        # Step i reads half i % 2 and writes the other; the result is that of step 0.
        self.x, self.result = self.both_x[(head.num_steps - 1) % 2], self.both_x[1]
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.error = torch.zeros(1, dtype=torch.int32, device=device)

    def tiles(self, head: DiffusionHead) -> tuple[Tile, int]:
        tile = persistent_tile(self.rows, head.width, multiprocessors(head.device))
        return tile, tile.bn

    def run_steps(self, head, tables, start, stop) -> None:
        if INTERPRETED and triton.cdiv(head.width, self.tile.bn) > 1:  # one program waits for nobody
            for step in reversed(range(start, stop)):
                for block in range(head.depth):
                    self._phase(head, tables, start, step, step + 1, MLP0, block, block + 1)
                    self._phase(head, tables, start, step, step + 1, MLP1, block, block + 1)
                self._phase(head, tables, start, step, step + 1, OUTPUT, 0, 0)
                self._phase(head, tables, start, step, step + 1, UPDATE, 0, 0)
        else:
            self._phase(head, tables, start, start, stop, ALL, 0, head.depth)

    def _phase(self, head, tables, first, start, stop, phase, first_block, last_block) -> None:
        """Steps stop-1..start with modulations that begin at step ``first``."""
        tile, tokens = self.tile, self.tokens
        programs = triton.cdiv(head.width, tile.bn)
        cooperative = {} if INTERPRETED else {"launch_cooperative_grid": True}
        _persistent_kernel[(programs,)](
            tables.addresses, self.mods, self.mods.stride(0), self.final_mods, head.final_weight, head.final_bias,
            head.input_weight, head.input_bias, self.h, self.stats, self.activations, self.outputs, tables.coefficients,
            self.temperature, self.scale, self.both_x, self.noise, self.noise.stride(0), self.seed, self.addresses,
            self.log_std, self.path, self.counter, self.error, tokens, self.rows, first, start, stop, first_block,
            last_block, C=head.channels, CP=self.update.bn, D=head.depth, W=head.width, EPS=head.norm_eps,
            DTYPE=TL_DTYPES[head.dtype], GUIDED=self.halves == 2,
            LEARNED=head.learned_variance, PHILOX=self.philox, BM=tile.bm, BN=tile.bn, BK=tile.bk,
            STAGES=tile.stages, R=power_of_two(tokens), OUTPUT_R=min(4, power_of_two(tokens)),
            OUTPUT_BK=min(128, power_of_two(head.width)),
            TILES_P2=power_of_two(programs), PROGRAMS=programs, TIMEOUT=WATCHDOG_NANOSECONDS, PHASE=phase.value,
            **tile.options, **OPTIONS, **cooperative,
        )  # fmt: skip
