"""The layered chain in CUDA: two products a network block, and everything between them in kernels of the extension.

Per reverse step: ``input`` (input projection, and the first block's operand), the blocks, then ``update`` (final layer,
guidance, the update rule, noise). A block is, as :mod:`cuda_config` has it, either

- A library product, ``bias_silu``, another product, and ``residual`` (bias, gate, residual, and the next layer's
  operand). In a swiglu block the first product has both factors side by side, and their product goes where the first
  factor was. All products follow PyTorch's settings at the time a graph is captured, as those of the modulations do.
  Those in float32 are IEEE unless ``torch.backends.cuda.matmul.allow_tf32`` is set.
- Or ``block``: two products of the extension, which do what follows them themselves, and the next layer's operand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...conditional import surely_wanted
from ...cuda_support import extension, launch_stream
from . import cuda_config
from .cuda_chain import DTYPE_CODES, CudaChain, address


class Layers(NamedTuple):
    """What the kernels are given of a head's blocks; it is made once for many steps."""

    norms: list[tuple[int, int]]  # addresses of every block's gain and offset, and two zeros: the final norm has none
    weights: list[tuple[torch.Tensor, int, torch.Tensor, int]]  # (W, H), (H, W), and addresses of the biases

    @staticmethod
    def of(head) -> Layers:
        blocks = head.blocks
        norms = [(b.norm_weight.data_ptr(), b.norm_bias.data_ptr()) for b in blocks]
        weights = [(b.weight0.t(), b.bias0.data_ptr(), b.weight1.t(), b.bias1.data_ptr()) for b in blocks]
        return Layers([*norms, (0, 0)], weights)


class LayeredChain(CudaChain):
    """A chain of a few launches a layer."""

    table = cuda_config.TABLE  # for tests and benchmarks to replace: () leaves all products to the library

    def __init__(self, head, tokens, groups, noise, steps, static, sweeps_of=None):
        super().__init__(head, tokens, groups, noise, steps, static, sweeps_of)
        shape = self.rows, head.width
        # At all steps at once the products are the extension's own: a part of a graph that the device repeats cannot
        # hold the library's, whose workspace would lie outside of the graph's memory.
        table = self.table if sweeps_of is None else cuda_config.OWN
        self.inner, self.swiglu, self.rms = head.hidden, head.mlp == "swiglu", head.norm == "rms"
        self.tile = cuda_config.tile_for(self.rows, max(head.width, self.inner), head.dtype, table, self.swiglu)
        self.own = self.tile is not None
        self.h = torch.empty(shape, device=head.device, dtype=torch.float32)
        self.operand, self.product = torch.empty((2, *shape), device=head.device, dtype=head.dtype)
        # Of the library's, a swiglu block's factors are side by side.
        inner = 2 * self.inner if self.swiglu and not self.own else self.inner
        self.hidden = torch.empty(self.rows, inner, device=head.device, dtype=head.dtype)
        self.final_operand = torch.empty_like(self.h)
        self.code, self.width, self.epsilon = DTYPE_CODES[head.dtype], head.width, head.norm_eps
        # Addresses and strides that every step asks for.
        self.h_at, self.operand_at, self.hidden_at, self.product_at, self.final_operand_at = (
            buffer.data_ptr() for buffer in (self.h, self.operand, self.hidden, self.product, self.final_operand)
        )
        self.row_bytes = 3 * head.width * head.dtype.itemsize  # of a block's modulations

    def read_modulations(self, embedded, mods, final_mods) -> None:
        super().read_modulations(embedded, mods, final_mods)
        self.mods_at = [block.data_ptr() for block in self.block_mods]

    @property
    def live_pointer(self) -> int:
        """Address of the flag at whose 0 kernels leave everything as it is; 0 if there is none, or none is needed."""
        return 0 if surely_wanted() else address(self.live)

    def warm_up_products(self, head) -> None:
        if self.tile is None:
            for b in head.blocks[:1]:
                torch.mm(self.operand, b.weight0.t(), out=self.hidden)

    def modulation(self, index: int, first_row: int) -> int:
        """The address of a layer's modulations from a row on; the final layer comes after the last block."""
        if index < len(self.mods_at):
            return self.mods_at[index] + first_row * self.row_bytes
        return self.final_mods.data_ptr() + first_row * self.row_bytes // 3 * 2

    def next_operand(self, layers: Layers, index: int, first_row: int) -> tuple[int, int, int, int]:
        """How h becomes a layer's operand: the norm's gain and offset, its modulation, and where to."""
        to = self.operand_at if index < len(layers.weights) else self.final_operand_at
        return *layers.norms[index], self.modulation(index, first_row), to

    def begin_step(
        self,
        head,
        tables,
        first_row: int,
        layers: Layers | None = None,
        stream: int | None = None,
        early: bool = False,
    ) -> None:
        """h of a step and the first block's operand, from x; arguments as of ``run_block``.

        Args:
            early: whether a kernel of this chain's steps comes before it.
        """
        layers = layers or Layers.of(head)
        stream = launch_stream(head.device) if stream is None else stream
        extension().input(
            self.code, self.x.data_ptr(), tables.input_weight.data_ptr(), head.input_bias.data_ptr(), self.h_at,
            *self.next_operand(layers, 0, first_row), self.tokens, self.groups, head.channels, self.width, self.epsilon,
            self.rms, self.period, self.live_pointer, early, stream,
        )  # fmt: skip

    def run_block(
        self, head, index: int, first_row: int, layers: Layers | None = None, stream: int | None = None
    ) -> None:
        """One network block of one step, from ``h`` and ``operand`` to ``h`` and the next layer's operand.

        Args:
            first_row: of the step in the modulations.
            layers, stream: what ``Layers.of`` and ``launch_stream`` return, of who has them.
        """
        layers = layers or Layers.of(head)
        stream = launch_stream(head.device) if stream is None else stream
        kernels, rows, width, live = extension(), self.rows, self.width, self.live_pointer
        weight0, bias0, weight1, bias1 = layers.weights[index]
        mods, following = self.modulation(index, first_row), self.next_operand(layers, index + 1, first_row)
        if self.tile is not None:
            kernels.block(
                self.code, *self.tile, self.operand_at, self.hidden_at, self.h_at, weight0.data_ptr(), bias0,
                weight1.data_ptr(), bias1, mods, *following, rows, width, self.inner, self.swiglu, self.epsilon,
                self.rms, live, stream,
            )  # fmt: skip
            return
        torch.mm(self.operand, weight0, out=self.hidden)
        next_gated = index + 1 < head.depth
        kernels.bias_silu(
            self.code, self.hidden_at, bias0, mods, following[2], next_gated, rows, width, self.inner, self.swiglu,
            live, stream,
        )  # fmt: skip
        torch.mm(self.hidden[:, : self.inner] if self.swiglu else self.hidden, weight1, out=self.product)
        kernels.residual(
            self.code, self.product_at, bias1, mods, self.h_at, *following, rows, width, self.epsilon, self.rms, live,
            stream,
        )  # fmt: skip

    def run_steps(self, head, tables, start, stop) -> None:
        if stop == head.num_steps:
            tables.refresh(head)
        kernels, stream, layers = extension(), launch_stream(head.device), Layers.of(head)
        ends = head.final_weight.data_ptr(), head.final_bias.data_ptr()
        coefficients, x = tables.coefficients.data_ptr(), self.x.data_ptr()
        coefficients_bytes = tables.coefficients.stride(0) * tables.coefficients.itemsize
        noise, noise_bytes = (0, 0) if self.philox else (self.noise.data_ptr(), 4 * self.noise.stride(0))
        clip = address(tables.clip)
        seed, addresses, log_std, path, temperature = (
            v.data_ptr() for v in (self.seed, self.addresses, self.log_std, self.path, self.temperature)
        )
        for step in reversed(range(start, stop)):
            first_row = (step - start) * self.rows
            self.begin_step(head, tables, first_row, layers, stream, early=step < stop - 1)
            for index in range(head.depth):
                self.run_block(head, index, first_row, layers, stream)
            kernels.update(
                self.final_operand_at, *ends, coefficients + step * coefficients_bytes, temperature,
                self.scale_pointer, clip, x, noise + step * noise_bytes, seed, addresses, step, log_std, path,
                self.tokens, self.groups, head.channels, head.learned_variance, self.width, self.live_pointer, stream,
            )  # fmt: skip

    def evaluate(self, head, tables) -> None:
        stream, layers = launch_stream(head.device), Layers.of(head)
        self.begin_step(head, tables, 0, layers, stream)
        for index in range(head.depth):
            self.run_block(head, index, 0, layers, stream)
        extension().output(
            self.final_operand_at, head.final_weight.data_ptr(), head.final_bias.data_ptr(), self.out.data_ptr(),
            address(self.v), self.tokens, self.period, self.groups, self.out.shape[-1], self.width, self.live_pointer,
            stream,
        )  # fmt: skip

    def sweep(self, tables, chain, state, begin) -> None:
        noise, noise_step = (0, 0) if chain.philox else (chain.noise.data_ptr(), chain.noise.stride(0))
        given = (self.out, self.v, chain.x, chain.scale, chain.temperature, tables.clip)
        kept = (state.x, state.before, state.x0, state.mean, state.log_std, state.path, state.change, state.size)
        flags = (state.settled, state.done, state.live)
        extension().sweep(
            *map(address, given), noise, noise_step, chain.seed.data_ptr(), chain.addresses.data_ptr(),
            tables.coefficients.data_ptr(), *map(address, (*kept, *flags)), chain.tokens, state.steps, self.groups,
            chain.x.shape[1], begin, state.guessed, launch_stream(state.x.device),
        )  # fmt: skip

    def settle(self, state, begin) -> None:
        tensors = (
            state.change, state.size, state.tolerance, state.count, state.settled, state.sweeps, state.done, state.live,
            state.left,
        )  # fmt: skip
        tokens, channels = state.change.shape
        extension().settle(
            *map(address, tensors), tokens, state.steps, channels, state.limit, begin, launch_stream(state.x.device)
        )
