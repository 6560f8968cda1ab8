"""The persistent chain in CUDA: all steps of a few rows in one cooperative launch, where ``crossover`` prefers it."""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream, multiprocessors
from ...devices import shared_limit
from ...head import DiffusionHead
from .chain import modulations_of
from .cuda_chain import DTYPE_CODES, CudaChain, address


def plan_of(head: DiffusionHead, tokens: int, groups: int):
    """How the kernel would run so many tokens of this head: ``blocks`` (0: they are more than 16 rows, or do not fit
    the device), and more."""
    return extension().persistent_plan(
        DTYPE_CODES[head.dtype], tokens * groups, tokens, head.channels, head.width, head.depth,
        multiprocessors(head.device), shared_limit(head.device),
    )  # fmt: skip


class PersistentChain(CudaChain):
    """A chain whose steps are one launch a workspace of modulations."""

    timeout_ns = 2_000_000_000  # one wait takes about a microsecond
    silent = -1  # a block that tells the others nothing, for tests of what happens then

    @staticmethod
    def serves(head: DiffusionHead, tokens: int, groups: int) -> bool:
        """Whether the kernel covers so many tokens of this head, on its device."""
        covered = PersistentChain.why_not_covered(head) is None and groups <= 2
        return covered and plan_of(head, tokens, groups).blocks > 0

    @staticmethod
    def why_not_covered(head: DiffusionHead) -> str | None:
        """None where the kernel is for networks like this one, however many tokens."""
        if head.norm != "layer" or head.mlp != "silu" or head.hidden != head.width:
            return "its persistent kernel is for LayerNorm and silu, in blocks as wide as the network"
        if len(set(modulations_of(head))) not in (1, head.depth):
            return "its persistent kernel is for blocks that share all modulations or none"
        return None

    def __init__(self, head, tokens, groups, noise, steps, static):
        super().__init__(head, tokens, groups, noise, steps, static)
        self.plan = plan_of(head, tokens, groups)
        # Cleared by every launch.
        self.exchange = torch.empty(self.plan.exchange_words, dtype=torch.int32, device=head.device)
        self.error = torch.zeros(1, dtype=torch.int32, device=head.device)

    def run_steps(self, head, tables, start, stop) -> None:
        extension().persistent(
            DTYPE_CODES[head.dtype], self.plan, tables.addresses.data_ptr(), self.mods.data_ptr(),
            self.mods.stride(0) if len(self.mods) > 1 else 0,
            self.final_mods.data_ptr(), head.final_weight.data_ptr(), head.final_bias.data_ptr(),
            head.input_weight.data_ptr(), head.input_bias.data_ptr(), tables.coefficients.data_ptr(),
            self.temperature.data_ptr(), self.scale_pointer, address(tables.clip), self.x.data_ptr(),
            0 if self.philox else self.noise.data_ptr(), self.noise.stride(0), self.seed.data_ptr(),
            self.addresses.data_ptr(), self.log_std.data_ptr(), self.path.data_ptr(), self.exchange.data_ptr(),
            self.error.data_ptr(), self.tokens, self.groups, head.channels, head.learned_variance, head.depth,
            head.width, head.norm_eps, start, start, stop, self.timeout_ns, self.silent, launch_stream(head.device),
        )  # fmt: skip
