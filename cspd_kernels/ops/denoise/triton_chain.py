"""The layered chain in Triton: its tiles, its statistics, and its launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...head import DiffusionHead
from ...triton_support import INTERPRETED
from .chain import Chain, Tables
from .triton_config import Tile, block_tile, input_columns, multiprocessors, power_of_two, update_tile
from .triton_layered import _condition_kernel, _input_kernel, _mlp0_kernel, _mlp1_kernel, _update_kernel

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
OPTIONS = {"enable_fp_fusion": True}  # explicit: the default differs between versions of Triton


def dot_dtype(dtype: torch.dtype):
    """Type of the operands of ``tl.dot``: the interpreter's bfloat16 products are wrong, float32 holds their values."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TL_DTYPES[dtype]


class LayeredChain(Chain):
    """A chain of one kernel a layer."""

    def __init__(self, head, tokens, guided, noise, steps, static):
        super().__init__(head, tokens, guided, noise, steps, static)
        self.update = update_tile(tokens, head.channels)
        self.tile, self.input_columns = self.tiles(head)

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, device=head.device, dtype=dtype)

        rows, width = self.rows, head.width
        self.h = empty(rows, width)
        self.activations = empty(rows, width, dtype=head.dtype)
        self.stats = empty(2, rows, triton.cdiv(width, self.tile.bn))
        self.input_stats = self.stats
        if self.input_columns != self.tile.bn:
            self.input_stats = empty(2, rows, triton.cdiv(width, self.input_columns))

    def tiles(self, head: DiffusionHead) -> tuple[Tile, int]:
        """The tile of a block's products, and the columns of h that an input projection makes at a time."""
        tile = block_tile(self.rows, head.width, head.dtype, multiprocessors(head.device))
        return tile, input_columns(self.update, head.width)

    def start(self, head: DiffusionHead) -> None:
        """The projected condition, and the first h."""
        super().start(head)
        r = self.update.bm
        _input_kernel[(triton.cdiv(self.tokens, r), self.input_stats.shape[2])](
            self.x, head.input_weight, head.input_bias, self.h, self.input_stats, self.tokens, self.rows,
            C=head.channels, CP=self.update.bn, W=head.width, GUIDED=self.halves == 2, R=r,
            BN=self.input_columns, num_warps=4, **OPTIONS,
        )  # fmt: skip

    def embed(self, head: DiffusionHead, start: int, stop: int) -> None:
        block = min(1024, power_of_two(head.width))
        _condition_kernel[((stop - start) * self.rows, triton.cdiv(head.width, block))](
            self.y,
            head.time_embedding[start:stop],
            self.embedded,
            self.rows,
            W=head.width,
            BLOCK=block,
            num_warps=4,
            **OPTIONS,
        )

    def run_steps(self, head: DiffusionHead, tables: Tables, start: int, stop: int) -> None:
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
