"""The layered chain in Triton: its buffers, and its launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ...head import Block, DiffusionHead
from ...triton_support import INTERPRETED, starts_early
from .chain import Chain, Tables
from .triton_config import (
    FEW_COLUMNS,
    Products,
    Shape,
    Tile,
    few_tile,
    input_tile,
    own_products,
    power_of_two,
    products,
    row_warps,
    sweep_tile,
    update_channels,
)  # fmt: skip
from .triton_ends import _condition_kernel, _input_kernel, _output_kernel, _update_kernel
from .triton_few import _few_mlp0_kernel, _few_mlp1_kernel
from .triton_layered import (
    _bias_silu_kernel,
    _bias_swiglu_kernel,
    _mlp0_kernel,
    _mlp1_kernel,
    _norm_kernel,
    _residual_kernel,
)  # fmt: skip
from .triton_sweep import SETTLED_AT_ONCE, _settle_kernel, _sweep_kernel

if TYPE_CHECKING:
    from .parallel_chain import Sweeps

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SWIGLU_COLUMNS = 1024  # of a program behind the library's product
OPTIONS = {"enable_fp_fusion": True}  # explicit: the default differs between versions of Triton


def dot_dtype(dtype: torch.dtype):
    """Type of the operands of ``tl.dot``: the interpreter's bfloat16 products are wrong, float32 holds their values."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TL_DTYPES[dtype]


class LayeredChain(Chain):
    """A chain of a few kernels a block; see ``triton_layered`` for their order."""

    reads_copies = False

    def __init__(self, head, tokens, groups, noise, steps, static, sweeps_of=None):
        super().__init__(head, tokens, groups, noise, steps, static, sweeps_of)
        rows, width, dtype = self.rows, head.width, head.dtype
        self.shape = Shape(width, head.hidden, head.mlp == "swiglu")
        self.products = self.choose(head) if sweeps_of is None else self.choose_own(head)

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, device=head.device, dtype=dtype)

        self.h = empty(rows, width, dtype=torch.float32)
        self.activations = empty(rows, head.hidden)
        if self.products:
            self.operand = empty(rows, width)
            self.gate_and_up = self.activations
            if self.products.first is None and self.shape.swiglu:
                self.gate_and_up = empty(rows, 2 * head.hidden)
            if self.products.second is None:
                self.product = empty(rows, width)
        self.own = self.products is None or None not in self.products
        self._prepare(head)

    def choose(self, head: DiffusionHead) -> Products | None:
        """What makes the products of a block; None: the kernels for a few rows."""
        return products(self.rows, self.shape, head.dtype, head.device)

    def choose_own(self, head: DiffusionHead) -> Products:
        """Likewise of sweeps, whose kernels must all be able to return at once: by kernels, whatever the rows."""
        return own_products(self.rows, self.shape, head.dtype, head.device)

    def _prepare(self, head: DiffusionHead) -> None:
        """Grids and constants of the launches, which a thousand launches of a call share."""
        (width, hidden, swiglu), channels = self.shape, head.channels
        together, columns = input_tile(self.tokens, channels)
        early = {"PDL": starts_early(head.device), **OPTIONS}
        if early["PDL"]:
            early["launch_pdl"] = True
        common = early | {"W": width}
        whole = common | {"WP": power_of_two(width), "num_warps": row_warps(width)}
        norm = whole | {"EPS": head.norm_eps, "RMS": head.norm == "rms"}
        self._input_grid = triton.cdiv(self.tokens, together), triton.cdiv(width, columns)
        self._input_options = common | {
            "C": channels, "GROUPS": self.groups, "CP": max(16, power_of_two(channels)), "R": together, "BN": columns,
            "num_warps": 4,
        }  # fmt: skip
        outputs = channels if self.out is None else self.out.shape[2]
        group = update_channels(self.tokens, outputs)
        self._update_grid = self.tokens, triton.cdiv(outputs, group)
        # maxnreg: two programs fit an SM; without it, the assembler may spill to fit more.
        ends = norm | {"C": outputs, "GROUPS": self.groups, "G": group, "maxnreg": 128}
        self._output_options = ends | {"LEARNED": self.v is not None}
        if head.schedule is not None:
            self._update_options = ends | {"LEARNED": head.learned_variance, "PHILOX": self.philox}
            self._prepare_sweeps(head, early)
        self._norm_options = norm
        if not self.products:
            few = common | {"H": hidden, "BM": power_of_two(self.rows), "BN": FEW_COLUMNS}
            first, second = few_tile(width, width, swiglu), few_tile(hidden, width)
            self._first_grid, self._second_grid = ((triton.cdiv(n, FEW_COLUMNS),) for n in (hidden, width))
            self._first_options = norm | few | {"SWIGLU": swiglu, "BK": first.bk, "num_warps": first.warps}
            self._second_options = few | {"BK": second.bk, "num_warps": second.warps}
            return
        dot = dot_dtype(head.dtype)
        if tile := self.products.first:
            self._first_grid, self._first_options = self._tiled(tile, hidden, dot, common)
            self._first_options["SWIGLU"] = swiglu
        elif swiglu:
            self._first_grid = self.rows, triton.cdiv(hidden, SWIGLU_COLUMNS)
            self._first_options = early | {"H": hidden, "BLOCK": SWIGLU_COLUMNS, "num_warps": 4}
        else:
            self._first_grid = (self.rows,)
            self._first_options = early | {
                "W": hidden, "WP": power_of_two(hidden), "num_warps": row_warps(hidden),
            }  # fmt: skip
        if tile := self.products.second:
            self._second_grid, self._second_options = self._tiled(tile, width, dot, common)
            # Many accumulators a thread leave no registers for what the end of the tile needs.
            self._second_options["EARLY"] = tile.bm * tile.bn <= 512 * tile.warps

    def _prepare_sweeps(self, head: DiffusionHead, early: dict) -> None:
        """Likewise of sweeps over the steps."""
        channels = head.channels
        # By steps and channels alone, so that a token's bits are its own in any batch.
        group, warps = sweep_tile(head.num_steps, channels)
        self._sweep_grid = self.period, triton.cdiv(channels, group)
        self._sweep_options = early | {
            "C": channels, "G": group, "BT": power_of_two(head.num_steps), "GROUPS": self.groups,
            "PHILOX": self.philox, "num_warps": warps,
        }  # fmt: skip
        padded = power_of_two(channels)
        self._settle_options = early | {
            "C": channels, "CP": padded, "BN": SETTLED_AT_ONCE // padded, "num_warps": 4,
        }  # fmt: skip

    def _tiled(self, tile: Tile, columns: int, dot, common: dict) -> tuple[tuple[int], dict]:
        """Grid and constants of a product."""
        grid = (triton.cdiv(self.rows, tile.bm) * triton.cdiv(columns, tile.bn),)
        own = {"H": self.shape.hidden, "DOT": dot, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "STAGES": tile.stages}
        return grid, common | own | tile.options

    def warm_up_products(self, head: DiffusionHead) -> None:
        if self.products and None in self.products and head.depth:
            torch.mm(self.operand, head.blocks[0].weight0.t(), out=self.gate_and_up)

    def embed(self, head: DiffusionHead, start: int, stop: int) -> None:
        self._embed(head.time_embedding[start:stop], stop - start, False)

    def embed_rows(self, embedding: torch.Tensor) -> None:
        self._embed(embedding, 1, len(embedding) > 1)

    def _embed(self, embedding: torch.Tensor, steps: int, own: bool) -> None:
        width = self.shape.width
        block = min(1024, power_of_two(width))
        _condition_kernel[(steps * self.rows, triton.cdiv(width, block))](
            self.y, embedding, self.embedded, self.rows, OWN=own, W=width, BLOCK=block, num_warps=4, **OPTIONS
        )

    def run_steps(self, head: DiffusionHead, tables: Tables, start: int, stop: int) -> None:
        update, noise_step = _update_kernel[self._update_grid], self.noise.stride(0)
        for step in reversed(range(start, stop)):
            first_row = (step - start) * self.rows
            self.begin_step(head, tables, first_row)
            for index in range(head.depth):
                self.run_block(head, index, first_row)
            update(
                self.h, self.final_mods, head.final_weight, head.final_bias, tables.coefficients, tables.clip,
                self.temperature, self.scale, self.x, self.noise, noise_step, self.seed, self.addresses, self.log_std,
                self.path, self.live, self.tokens, step, first_row, **self._update_options,
            )  # fmt: skip

    def begin_step(self, head: DiffusionHead, tables: Tables, first_row: int) -> None:
        """h from x, and of more than a few rows the first block's operand."""
        _input_kernel[self._input_grid](
            self.x, head.input_weight, head.input_bias, self.h, self.live, self.tokens, self.period,
            **self._input_options,
        )  # fmt: skip
        if self.products and head.depth:
            self.normalise(head, 0, first_row)

    def run_block(self, head: DiffusionHead, index: int, first_row: int) -> None:
        """One block of one step, whose modulations begin at row ``first_row``: h, and with more than a few rows the
        block's operand, become those of the next one."""
        self.run_first(head, index, first_row)
        self.run_second(head, index, first_row)

    def run_first(self, head: DiffusionHead, index: int, first_row: int) -> None:
        """The first layer of a block: the activations."""
        b = head.blocks[index]
        if not self.products:
            _few_mlp0_kernel[self._first_grid](
                self.h, self.block_mods[index], b.norm_weight, b.norm_bias, b.weight0, b.bias0, self.activations,
                self.live, self.rows, first_row, **self._first_options,
            )  # fmt: skip
        elif self.products.first:
            _mlp0_kernel[self._first_grid](
                self.operand, b.weight0, b.bias0, self.activations, self.live, self.rows, **self._first_options
            )
        else:
            torch.mm(self.operand, b.weight0.t(), out=self.gate_and_up)
            self.activate(b)

    def activate(self, b: Block) -> None:
        """The activations, behind the library's product."""
        if self.shape.swiglu:
            _bias_swiglu_kernel[self._first_grid](
                self.gate_and_up, b.bias0, self.activations, self.live, **self._first_options
            )
        else:
            _bias_silu_kernel[self._first_grid](self.activations, b.bias0, self.live, **self._first_options)

    def run_second(self, head: DiffusionHead, index: int, first_row: int) -> None:
        """The second layer of a block: h, and the next block's operand."""
        b, mods, more = head.blocks[index], self.block_mods[index], index + 1 < head.depth
        if not self.products:
            _few_mlp1_kernel[self._second_grid](
                self.activations, mods, b.weight1, b.bias1, self.h, self.live, self.rows, first_row,
                **self._second_options,
            )  # fmt: skip
        elif self.products.second:
            _mlp1_kernel[self._second_grid](
                self.activations, mods, b.weight1, b.bias1, self.h, self.live, self.rows, first_row,
                **self._second_options,
            )  # fmt: skip
            if more:
                self.normalise(head, index + 1, first_row)
        else:
            torch.mm(self.activations, b.weight1.t(), out=self.product)
            following = head.blocks[index + 1] if more else b
            _residual_kernel[(self.rows,)](
                self.product, b.bias1, mods, self.h, self.block_mods[index + more], following.norm_weight,
                following.norm_bias, self.operand, self.live, first_row, NORM=more, **self._norm_options,
            )  # fmt: skip

    def normalise(self, head: DiffusionHead, index: int, first_row: int) -> None:
        """The operand of a block of more than a few rows."""
        b = head.blocks[index]
        _norm_kernel[(self.rows,)](
            self.h, self.block_mods[index], b.norm_weight, b.norm_bias, self.operand, self.live, first_row,
            **self._norm_options,
        )  # fmt: skip

    def evaluate(self, head: DiffusionHead, tables: Tables) -> None:
        self.begin_step(head, tables, 0)
        for index in range(head.depth):
            self.run_block(head, index, 0)
        _output_kernel[self._update_grid](
            self.h, self.final_mods, head.final_weight, head.final_bias, self.out, self.v, self.live, self.tokens,
            self.period, **self._output_options,
        )  # fmt: skip

    def sweep(self, tables: Tables, chain: Chain, state: Sweeps, begin: bool) -> None:
        _sweep_kernel[self._sweep_grid](
            self.out, self.v, chain.x, chain.noise, chain.noise.stride(0), chain.seed, chain.addresses, chain.scale,
            chain.temperature, tables.coefficients, tables.clip, state.x, state.before, state.x0, state.mean,
            state.log_std, state.path, state.change, state.size, state.settled, state.done, state.live, self.period,
            state.steps, BEGIN=begin, GUESSED=state.guessed, **self._sweep_options,
        )  # fmt: skip

    def settle(self, state: Sweeps, begin: bool) -> None:
        _settle_kernel[(1,)](
            state.change, state.size, state.settled, state.sweeps, state.tolerance, state.count, state.done,
            state.live, state.left, self.period, state.steps, state.limit, BEGIN=begin, **self._settle_options,
        )  # fmt: skip
