"""Small helpers that tests, benchmarks and ``cspd selftest`` share: heads, inputs, aligned chains, errors."""

from __future__ import annotations

import torch
import torch.nn as nn

from .errors import InvalidInput
from .head import Block, DiffusionHead
from .ops.denoise import Denoised
from .spec import TimeSpec
from .time_embedding import TimeEmbedding, embed_schedule


@torch.no_grad()
def randomize_(diffloss: nn.Module, seed: int, scale: float = 0.02) -> nn.Module:
    """Give every all-constant parameter of a freshly built head random values, in place.

    The released initialisation zeroes the modulations and the output layer: a head that puts out
    zeros would pass any test.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in diffloss.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") * scale
            parameter.add_(values.to(parameter))
    return diffloss


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


def random_inputs(head: DiffusionHead, rows: int, seed: int, guided: bool = False):
    """(cond (N or 2N, Z), x_T (N, C), noise (T, N, C)) float32 on the head's device."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2 * rows if guided else rows, head.cond_channels),
        (rows, head.channels),
        (head.num_steps, rows, head.channels),
    ]
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(head.device) for shape in shapes
    )


def random_chains(rows: int, channels: int, seed: int, shift: float = 0.5, scale: float = 0.2):
    """(x, draft, target): two Gaussians per channel whose means differ by about ``shift`` sigma and whose
    log sigmas differ by about ``scale``; x is the draft's draw."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    mean_q, log_q = normal(rows, channels), 0.3 * normal(rows, channels) - 1.0
    mean_p = mean_q + shift * log_q.exp() * normal(rows, channels)
    log_p = log_q + scale * normal(rows, channels)
    x = mean_q + log_q.exp() * normal(rows, channels)
    draft = Denoised(x, mean_q, log_q, scale * normal(rows))
    target = Denoised(mean_p + log_p.exp() * normal(rows, channels), mean_p, log_p, scale * normal(rows))
    return x, draft, target


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``max |actual - expected| / max |expected|``, in float64; NaN where either holds one, 0 where both are empty.

    Raises:
        ValueError: their shapes differ; or all that is expected is 0, to which nothing has a relative error: 0 / 0
            would be NaN, and a comparison of zeros shows nothing.
    """
    if actual.shape != expected.shape:
        raise InvalidInput(f"relative_error expected two equal shapes, got {(*actual.shape,)} and {(*expected.shape,)}")
    actual, expected = actual.double().cpu(), expected.double().cpu()
    if expected.numel() == 0:
        return 0.0
    if not bool(expected.any()):
        raise InvalidInput(
            "relative_error expected values other than 0 to compare with, got only zeros: choose inputs that give "
            "others, or compare by torch.equal"
        )
    return float((actual - expected).abs().max() / expected.abs().max())
