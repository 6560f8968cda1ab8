"""The layered chain in CUDA: library products, and one kernel for everything between two of them.

Per reverse step: ``input`` (input projection, and the first block's operand), for each block product, ``bias_silu``,
product and ``residual`` (gate, residual, and the next layer's operand), then ``update`` (final layer, guidance,
posterior, noise). The products follow PyTorch's settings at the time a graph is captured, as those of the modulations
do: float32 ones are IEEE unless ``torch.backends.cuda.matmul.allow_tf32`` is set.
"""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream
from .cuda_chain import DTYPE_CODES, CudaChain


class LayeredChain(CudaChain):
    """A chain whose products are the library's."""

    def __init__(self, head, tokens, guided, noise, steps, static):
        super().__init__(head, tokens, guided, noise, steps, static)
        shape = self.rows, head.width
        self.h = torch.empty(shape, device=head.device, dtype=torch.float32)
        self.operand, self.hidden, self.product = torch.empty((3, *shape), device=head.device, dtype=head.dtype)
        self.final_operand = torch.empty_like(self.h)

    def warm_up(self, head) -> None:
        super().warm_up(head)
        for b in head.blocks[:1]:
            torch.mm(self.operand, b.weight0.t(), out=self.hidden)

    def run_steps(self, head, tables, start, stop) -> None:
        if stop == head.num_steps:
            tables.input_weight.copy_(head.input_weight.t())  # the module's own weights may have changed
        kernels, stream, code = extension(), launch_stream(head.device), DTYPE_CODES[head.dtype]
        rows, width, eps = self.rows, head.width, head.norm_eps
        norms = [(b.norm_weight.data_ptr(), b.norm_bias.data_ptr()) for b in head.blocks]
        weights = [(b.weight0.t(), b.bias0.data_ptr(), b.weight1.t(), b.bias1.data_ptr()) for b in head.blocks]
        for step in reversed(range(start, stop)):
            of_step = slice((step - start) * rows, (step - start + 1) * rows)
            mods = [m.data_ptr() for m in self.mods[:, of_step]]
            # How h becomes the operand of every block and of the final layer: its norm, its modulation, and where to.
            operands = [(*norm, m, self.operand.data_ptr()) for norm, m in zip(norms, mods)]
            operands.append((0, 0, self.final_mods[of_step].data_ptr(), self.final_operand.data_ptr()))
            kernels.input(
                code, self.x.data_ptr(), tables.input_weight.data_ptr(), head.input_bias.data_ptr(), self.h.data_ptr(),
                *operands[0], self.tokens, self.halves, head.channels, width, eps, stream,
            )  # fmt: skip
            for (weight0, bias0, weight1, bias1), m, following in zip(weights, mods, operands[1:]):
                torch.mm(self.operand, weight0, out=self.hidden)
                kernels.bias_silu(code, self.hidden.data_ptr(), bias0, rows, width, stream)
                torch.mm(self.hidden, weight1, out=self.product)
                kernels.residual(
                    code, self.product.data_ptr(), bias1, m, self.h.data_ptr(), *following, rows, width, eps, stream
                )
            kernels.update(
                self.final_operand.data_ptr(), head.final_weight.data_ptr(), head.final_bias.data_ptr(),
                tables.coefficients[step].data_ptr(), self.temperature.data_ptr(), self.scale_pointer,
                self.x.data_ptr(), 0 if self.philox else self.noise[step].data_ptr(), self.seed.data_ptr(),
                self.addresses.data_ptr(), step, self.log_std.data_ptr(), self.path.data_ptr(), self.tokens,
                head.channels, head.learned_variance, width, stream,
            )  # fmt: skip
