"""One chain's buffers, and the launches that take them from the inputs to the result."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...head import DiffusionHead
from ...noise import PhiloxNoise
from ...triton_support import INTERPRETED
from .triton_config import (
    PERSISTENT_VARIABLE,
    Tile,
    block_tile,
    input_columns,
    multiprocessors,
    power_of_two,
    update_tile,
)
from .triton_layered import _condition_kernel, _input_kernel, _mlp0_kernel, _mlp1_kernel, _update_kernel

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
OPTIONS = {"enable_fp_fusion": True}  # explicit: the default differs between versions of Triton


def dot_dtype(dtype: torch.dtype):
    """Type of the operands of ``tl.dot``: the interpreter's bfloat16 products are wrong, float32 holds their values."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TL_DTYPES[dtype]


class Tables:
    """What the kernels read of a head besides its weights, uploaded once; and what they report to the host."""

    def __init__(self, head: DiffusionHead):
        s = head.schedule
        upper, lower = (s.log_beta, s.log_posterior) if head.learned_variance else (s.fixed_log_variance,) * 2
        columns = [s.sqrt_recip_acp, s.sqrt_recipm1_acp, s.coef1, s.coef2, 0.5 * upper, 0.5 * lower]
        table = torch.zeros(s.num_steps, 8, device="cpu")
        for i, column in enumerate(columns):
            table[:, i] = torch.from_numpy(column.copy())
        self.coefficients = to_device(table, head.device)  # (T, 8), as step_table reads them
        fields = ("norm_weight", "norm_bias", "weight0", "bias0", "weight1", "bias1")
        addresses = [[getattr(block, field).data_ptr() for field in fields] for block in head.blocks]
        # Wide loads through a table of addresses need multiples of 16 bytes.
        self.serves_persistent = head.depth > 0 and all(a % 16 == 0 for block in addresses for a in block)
        self.addresses = to_device(torch.tensor(addresses, dtype=torch.int64, device="cpu"), head.device)  # (D, 6)
        # Of an earlier call, in host memory: the device writes it, and nobody waits for that.
        pinned = head.device.type == "cuda"
        self.gave_up = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)

    def check(self) -> None:
        """Raise where an earlier call is known to have failed."""
        if int(self.gave_up):
            self.gave_up.zero_()
            raise RuntimeError(
                "the persistent denoising kernel of an earlier call gave up waiting at a grid barrier, and that call's "
                f"tokens are NaN: another stream may have held the device. Set {PERSISTENT_VARIABLE}=0"
            )


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device; the host does not wait for the copy."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class Chain:
    """The layered chain of a fixed number of tokens on one head.

    ``load`` copies a call's inputs into the buffers, ``launch`` runs every kernel from them, with the
    same pointers every time, so that a CUDA graph can stand in for it, and ``results`` copies out.
    Rows beyond the call's own are computed and not returned: rows are independent.

    It does not hold the head, whose life ends the chain's.
    """

    def __init__(
        self,
        head: DiffusionHead,
        tokens: int,
        guided: bool,
        noise: torch.Tensor | PhiloxNoise,
        steps: int,
        static: bool,
    ):
        """``steps``: whose modulations are alive at a time. ``static``: a tensor of noise is copied, too."""
        device, dtype = head.device, head.dtype
        self.tokens, self.halves, self.steps = tokens, 2 if guided else 1, steps
        self.rows = rows = tokens * self.halves
        self.philox, self.static = isinstance(noise, PhiloxNoise), static
        self.update = update_tile(tokens, head.channels)
        self.tile, self.input_columns = self.tiles(head)

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, device=device, dtype=dtype)

        width, channels = head.width, head.channels
        # Zeroed: the rows beyond a call's own are computed, too, from whatever lies there.
        self.cond = empty(self.halves, tokens, head.cond_channels, dtype=dtype).zero_()
        self.x = empty(tokens, channels).zero_()
        self.scale = empty(tokens).zero_()
        self.temperature = empty(1)
        self.seed = empty(1, dtype=torch.int64)
        self.addresses = empty(tokens if self.philox else 1, dtype=torch.int64).zero_()
        self.noise = self.x
        if static and not self.philox:
            self.noise = empty(head.num_steps, tokens, channels).zero_()
        self.y = empty(rows, width, dtype=dtype)
        self.embedded = empty(steps * rows, width, dtype=dtype)
        self.mods = empty(head.depth, steps * rows, 3 * width, dtype=dtype)
        self.final_mods = empty(steps * rows, 2 * width, dtype=dtype)
        self.h = empty(rows, width)
        self.activations = empty(rows, width, dtype=dtype)
        self.stats = empty(2, rows, triton.cdiv(width, self.tile.bn))
        self.input_stats = self.stats
        if self.input_columns != self.tile.bn:
            self.input_stats = empty(2, rows, triton.cdiv(width, self.input_columns))
        self.log_std = empty(tokens, channels)
        self.path = empty(tokens)
        self.result = self.x

    def tiles(self, head: DiffusionHead) -> tuple[Tile, int]:
        """The tile of a block's products, and the columns of h that an input projection makes at a time."""
        tile = block_tile(self.rows, head.width, head.dtype, multiprocessors(head.device))
        return tile, input_columns(self.update, head.width)

    def buffers(self) -> list[torch.Tensor]:
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def load(self, cond, x_T, noise, temperature, cfg_scale) -> None:
        """Copy the inputs of n <= ``tokens`` tokens into the buffers; never waits for the device."""
        n = len(x_T)
        self.cond[:, :n].copy_(cond.view(self.halves, n, -1))
        self.x[:n].copy_(x_T)
        self.temperature.fill_(temperature)
        if isinstance(cfg_scale, torch.Tensor):
            self.scale[:n].copy_(cfg_scale.reshape(-1).expand(n))
        elif cfg_scale is not None:
            self.scale.fill_(cfg_scale)
        if self.philox:
            self.addresses[:n].copy_(noise.rows)
            self.seed.fill_(noise.seed - (1 << 64) if noise.seed >= 1 << 63 else noise.seed)
        elif self.static:
            self.noise[:, :n].copy_(noise)
        else:
            self.noise = noise.contiguous()

    def launch(self, head: DiffusionHead, tables: Tables) -> None:
        """Every kernel of the chain, from the inputs in the buffers to the results in them."""
        self.start(head)
        for stop in range(head.num_steps, 0, -self.steps):
            begin = max(0, stop - self.steps)
            self.hoist(head, begin, stop)
            self.run_steps(head, tables, begin, stop)

    def results(self, n: int, temperature: float, tables: Tables) -> tuple[torch.Tensor, ...]:
        """Copies of (sample, mean, log_std, path_log_std) of the first n tokens; sample and mean are one tensor."""
        log_temperature = math.log(temperature) if temperature > 0 else -math.inf
        mean = self.result[:n].clone()
        return mean, mean, self.log_std[:n] + log_temperature, self.path[:n].clone()

    def start(self, head: DiffusionHead) -> None:
        """The embedded condition and the first h."""
        cond = self.cond.view(self.rows, -1)
        torch.addmm(head.cond_bias, cond, head.cond_weight.t(), out=self.y)
        self.path.zero_()
        r = self.update.bm
        _input_kernel[(triton.cdiv(self.tokens, r), self.input_stats.shape[2])](
            self.x, head.input_weight, head.input_bias, self.h, self.input_stats, self.tokens, self.rows,
            C=head.channels, CP=self.update.bn, W=head.width, GUIDED=self.halves == 2, R=r,
            BN=self.input_columns, num_warps=4, **OPTIONS,
        )  # fmt: skip

    def hoist(self, head: DiffusionHead, start: int, stop: int) -> None:
        """The modulations of steps start..stop-1: one library product a layer."""
        count = (stop - start) * self.rows
        block = min(1024, power_of_two(head.width))
        _condition_kernel[(count, triton.cdiv(head.width, block))](
            self.y,
            head.time_embedding[start:stop],
            self.embedded,
            self.rows,
            W=head.width,
            BLOCK=block,
            num_warps=4,
            **OPTIONS,
        )
        embedded = self.embedded[:count]
        for b, mods in zip(head.blocks, self.mods):
            torch.addmm(b.mod_bias, embedded, b.mod_weight.t(), out=mods[:count])
        torch.addmm(head.final_mod_bias, embedded, head.final_mod_weight.t(), out=self.final_mods[:count])

    def run_steps(self, head: DiffusionHead, tables: Tables, start: int, stop: int) -> None:
        """Reverse steps stop-1..start."""
        tile, update, rows, width = self.tile, self.update, self.rows, head.width
        grid = (triton.cdiv(width, tile.bn), triton.cdiv(rows, tile.bm))
        product = dict(
            DOT=dot_dtype(head.dtype), BY_SUM=tile.by_sum, BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages,
            **tile.options, **OPTIONS,
        )  # fmt: skip
        for step in reversed(range(start, stop)):
            first_row = (step - start) * rows
            stats, columns = self.input_stats, self.input_columns
            for b, mods in zip(head.blocks, self.mods):
                _mlp0_kernel[grid](
                    self.h, stats, mods, b.norm_weight, b.norm_bias, b.weight0, b.bias0, self.activations, rows,
                    first_row, W=width, EPS=head.norm_eps, TILE=columns, TILES_P2=power_of_two(stats.shape[2]),
                    **product,
                )  # fmt: skip
                _mlp1_kernel[grid](
                    self.activations, mods, b.weight1, b.bias1, self.h, self.stats, rows, first_row, W=width, **product
                )
                stats, columns = self.stats, tile.bn
            _update_kernel[(triton.cdiv(self.tokens, update.bm),)](
                self.h, stats, self.final_mods, head.final_weight, head.final_bias, head.input_weight, head.input_bias,
                self.input_stats, tables.coefficients, self.temperature, self.scale, self.x, self.noise,
                self.noise.stride(0), self.seed, self.addresses, self.log_std, self.path, self.tokens, rows, step,
                first_row,
                C=head.channels, CP=update.bn, W=width, EPS=head.norm_eps, TILE=columns,
                TILES_P2=power_of_two(stats.shape[2]), GUIDED=self.halves == 2, LEARNED=head.learned_variance,
                PHILOX=self.philox, BY_SUM=update.by_sum, R=update.bm, BK=update.bk, STAGES=update.stages,
                BN=self.input_columns, **update.options, **OPTIONS,
            )  # fmt: skip
