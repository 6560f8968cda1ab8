"""Heads of every kind that the kernels cover, with random weights."""

from __future__ import annotations

import torch

from cspd_kernels import DiffusionHead
from cspd_kernels.head import Block
from cspd_kernels.spec import TimeSpec
from cspd_kernels.time_embedding import TimeEmbedding, embed_schedule


def random_network(
    schedule=None, *, dtype=torch.float32, device="cpu", channels=4, outputs=None, width=48, hidden=80, depth=2,
    cond=12, norm="layer", mlp="silu", modulations=None, given=False, times=1, seed=0,
):  # fmt: skip
    """A head whose every part has its share in the result.

    Args:
        outputs: C or 2C; None: C. modulations: by block, which one it uses; None: its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def stream(*shape, mean=0.0):
        return (mean + torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device)

    def layer(rows, columns, of=dtype):
        return stream(rows, columns).to(of), stream(rows).to(of)

    made = [layer(3 * width, width) for _ in range(depth)]
    both = 2 if mlp == "swiglu" else 1
    blocks = tuple(
        Block(
            stream(width, mean=1.0),
            torch.zeros(width, device=device) if norm == "rms" else stream(width),
            *layer(both * hidden, width),
            *layer(width, hidden),
            *made[i if modulations is None else modulations[i]],
        )
        for i in range(depth)
    )
    stream_layer = lambda rows, columns: layer(rows, columns, torch.float32)  # noqa: E731
    time = tuple(
        TimeEmbedding(TimeSpec(size=16), *stream_layer(width, 16), *stream_layer(width, width)) for _ in range(times)
    )
    return DiffusionHead(
        schedule,
        dtype,
        1e-5,
        None if schedule is None else embed_schedule(time, schedule),
        *((None, None) if given else layer(width, cond)),
        *stream_layer(width, channels),
        blocks,
        *layer(2 * width, width),
        *stream_layer(outputs or channels, width),
        norm=norm,
        mlp=mlp,
        time=time,
    )


def grouped_inputs(head, rows, groups=1, seed=0):
    """(cond (G N, Z), x_T (N, C), noise (T, N, C))."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (groups * rows, head.cond_channels), (rows, head.channels), (head.num_steps, rows, head.channels)
    return tuple(torch.randn(shape, generator=generator).to(head.device) for shape in shapes)
