"""The Triton kernels of other heads than MAR's, of the sizes that are released, for ``compile_report``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cspd_kernels import DiffusionHead, PhiloxNoise, Schedule
from cspd_kernels.head import Block
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.parallel_chain import ParallelChain
from cspd_kernels.ops.denoise.triton import KERNELS
from cspd_kernels.ops.evaluate.on_device import NetworkCall
from cspd_kernels.spec import TimeSpec
from cspd_kernels.time_embedding import TimeEmbedding
from cspd_kernels.triton_report import Launch, recorded_launches

STEPS = 28


class Network(NamedTuple):
    """A head's sizes and kinds."""

    channels: int
    width: int
    hidden: int
    cond: int | None  # None: given embedded
    norm: str
    mlp: str
    shared: bool = False  # one modulation for all blocks


# microsoft/VibeVoice, stepfun-ai/NextStep-1, shallowdream204/BitDance; and the widest that the kernels cover.
NETWORKS = {
    "VibeVoice-1.5B": Network(64, 1536, 4608, 1536, "rms", "swiglu"),
    "BitDance-H": Network(32, 1280, 1920, 1280, "layer", "swiglu", True),
    "VibeVoice-0.5B": Network(64, 896, 2688, 896, "rms", "swiglu"),
    "VibeVoice-7B": Network(64, 3584, 10752, 3584, "rms", "swiglu"),
    "NextStep-1": Network(64, 1536, 1536, 5120, "layer", "silu"),
    "BitDance-L": Network(32, 1024, 1536, 1024, "layer", "swiglu", True),
    "the widest": Network(64, 4096, 12288, None, "layer", "silu"),
}
CASES = ((1, 2), (64, 3), (1, 1), (1, 3), (512, 2))  # tokens, groups of rows
QUICK = (("VibeVoice-1.5B", 1, 2), ("BitDance-H", 64, 3))


def head_of(network: Network, dtype: torch.dtype, schedule: Schedule) -> DiffusionHead:
    """Without storage, of two blocks."""
    channels, width, hidden, cond, norm, mlp, shared = network
    rows, stream = 2 * hidden if mlp == "swiglu" else hidden, torch.float32
    with torch.device("meta"):

        def layer(outputs: int, inputs: int, dtype=dtype) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.empty(outputs, inputs, dtype=dtype), torch.empty(outputs, dtype=dtype)

        first = layer(3 * width, width)
        blocks = tuple(
            Block(*torch.empty(2, width).unbind(), *layer(rows, width), *layer(width, hidden), *modulation)
            for modulation in (first, first if shared else layer(3 * width, width))
        )
        time = TimeEmbedding(TimeSpec(), *layer(width, 256, stream), *layer(width, width, stream))
        return DiffusionHead(
            schedule, dtype, 1e-5, torch.empty(schedule.num_steps, width),
            *((None, None) if cond is None else layer(width, cond)), *layer(width, channels, stream), blocks,
            *layer(2 * width, width), *layer(channels, width, stream), norm=norm, mlp=mlp, time=(time,),
        )  # fmt: skip


def launches_of(name: str, dtype: torch.dtype, tokens: int, groups: int) -> list[Launch]:
    """Of a chain with limits, step by step; with one and three groups of one token also in parallel over the steps, and
    with one group of the network's call."""
    schedule = Schedule.euler_maruyama([i / STEPS for i in range(STEPS + 1)]).clipped(-1.0, 1.0)
    head = head_of(NETWORKS[name], dtype, schedule)
    with torch.device("meta"), recorded_launches() as launches:
        noise = PhiloxNoise(0, torch.empty(tokens, dtype=torch.int64))
        KERNELS.layered(head, tokens, groups, noise, STEPS, static=True).launch(head, Tables(head))
        if tokens == 1 and groups != 2:
            chain = ParallelChain(KERNELS.layered, head, tokens, groups, noise, static=True, guessed=False)
            chain.launch(head, Tables(head))
        if groups == 1:
            NetworkCall(KERNELS, head, tokens, torch.empty(tokens), static=True).launch(head, Tables(head))
    return list(launches)
