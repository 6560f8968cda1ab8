"""A call of a sampling loop by the kernels: what the loop draws is drawn, and what it returns comes back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from cspd_kernels import Denoised, DenoisedInParallel, DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.head import stream_dtype
from cspd_kernels.released_noise import randn_steps

from .calls import Call, broadcasts
from .diffusions import DDIM, NotServedError

if TYPE_CHECKING:
    from .meanings import Meaning


def run_call(
    call: Call,
    head: DiffusionHead,
    meaning: Meaning,
    *,
    backend: str | None,
    philox: bool,
    parallel_tol: float | str | None,
) -> Denoised | DenoisedInParallel:
    """A call by the kernels. What the loop would draw is drawn, in its order; (N, ...) come back.

    Args:
        head: with the schedule of the call; of embedded conditions where the meaning has them embedded.
        philox: the noise of the steps is addressed by one drawn seed, not drawn step by step.
        parallel_tol: as in :func:`cspd_kernels.denoise`.
    """
    device, stream, rows = head.device, stream_dtype(head.dtype), call.rows
    if call.inter_noise is not None and len(call.inter_noise) != head.num_steps:
        raise NotServedError(f"the noise is of {len(call.inter_noise)} steps, the head has {head.num_steps}")
    cond = embedded(call, meaning, head)  # it may raise, so before anything is drawn
    x_T = call.noise  # noqa: N806
    if x_T is None:
        x_T = torch.randn(call.shape, device="cpu" if meaning.draw == "cpu" else device)  # noqa: N806
    x_T = x_T.reshape(-1, call.shape[-1])  # noqa: N806
    wide = loop_dtype(call, x_T.dtype)
    if call.inter_noise is not None:
        noise = call.inter_noise[:, :rows].to(stream)
    elif not meaning.each_step:
        noise = PhiloxNoise(0, torch.arange(rows, device=device))  # no step adds any of it
    elif philox:
        noise = PhiloxNoise(int(torch.randint(2**63 - 1, (), device="cpu")), torch.arange(rows, device=device))
    else:
        drawn = draw_steps(head.num_steps, tuple(x_T.shape), x_T.dtype, wide, device, backend)
        noise = drawn[:, :rows].to(stream)
    scales = meaning.scales(list(call.scales.values()))
    x_T = x_T[:rows].to(device)  # noqa: N806
    return denoised(head, cond, x_T, noise, scales, call.temperature, backend=backend, parallel_tol=parallel_tol)


def denoised(
    head: DiffusionHead, cond, x_T, noise, scales, temperature, *, backend, parallel_tol  # noqa: N803
) -> Denoised | DenoisedInParallel:  # fmt: skip
    """:func:`cspd_kernels.denoise` by what a foreign loop has: G - 1 ``scales``, numbers or tensors of one element or
    (N, 1); conditions and x_T (N, C) of any type.

    A tensor of one element stays where it is: the host does not wait for its value.
    """
    device, stream = head.device, stream_dtype(head.dtype)
    scales = [
        s if not isinstance(s, torch.Tensor) else s.to(stream) if s.numel() == 1 else s.to(device, stream)
        for s in scales
    ]
    if len(scales) == 1 and isinstance(scales[0], float) and scales[0] == 1.0:  # guided by nothing
        cond, scales = cond[: len(x_T)], []
    cond, x_T = (v.to(stream) if v.dtype == torch.float64 else v for v in (cond, x_T))  # noqa: N806
    return denoise(
        head,
        cond,
        x_T,
        noise,
        temperature=temperature,
        cfg_scale=tuple(scales) if len(scales) > 1 else scales[0] if scales else 1.0,
        backend=backend,
        parallel_tol=parallel_tol,
    )


def embedded(call: Call, meaning: Meaning, head: DiffusionHead) -> torch.Tensor:
    """(G N, Z), the conditions of all tokens; (G N, W) where the network's own modules embed them.

    Raises:
        NotServedError: those make something else.
    """
    cond, inner = call.cond, call.shape[1:-1]
    if meaning.way is None and not inner:
        return cond
    if meaning.way is not None:
        with torch.no_grad():
            cond = meaning.way.embed(call.net, cond, call.extra)
    if not broadcasts(cond.shape[1:-1], inner) or cond.shape[-1] != head.cond_channels:
        raise NotServedError(f"its conditions become {tuple(cond.shape)}, not (..., {head.cond_channels})")
    return cond.expand(len(cond), *inner, cond.shape[-1]).reshape(-1, cond.shape[-1]) if inner else cond


def loop_dtype(call: Call, noise: torch.dtype) -> torch.dtype:
    """Type of x after the first step: the loop's tables are float32, its network's output as wide as its weights."""
    weights = call.spec.parts.input.weight.dtype
    return torch.promote_types(torch.promote_types(noise, torch.float32), weights)


def draw_steps(
    steps: int,
    shape: tuple[int, int],
    first: torch.dtype,
    then: torch.dtype,
    device: torch.device,
    backend: str | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """(T, rows, C) in ``then``, as the loop draws it: ``randn_like(x)`` at every step, T-1 first and 0 included.

    x is of type ``first`` at the first step. ``backend`` and ``generator`` are as in :func:`randn_steps`.
    """
    if device.type == "cpu" and first == then and math.prod(shape) % 16 == 0:
        # In blocks of 16 the CPU's generator gives the same numbers at once as it gives step by step.
        return torch.randn((steps, *shape), dtype=then, device=device, generator=generator).flip(0)
    return randn_steps(steps, shape, then, device, generator, first=first, newest_first=True, backend=backend)


def finish(call: Call, out: Denoised | DenoisedInParallel, diffusion) -> torch.Tensor:
    """What the loop returns: under guidance G N rows, of which callers keep the first N; here the others repeat those.

    CSpD's distribution manager is filled as its loops fill it.
    """
    dtype = loop_dtype(call, torch.float32 if call.noise is None else call.noise.dtype)
    double = call.groups
    tokens = out.sample.to(dtype).repeat(double, 1).view(call.shape)
    manager = getattr(diffusion, "manager", None)
    if manager is not None and call.loop != DDIM:
        manager.sample, manager.mean = tokens, out.mean.to(dtype).repeat(double, 1)
        manager.variance = out.log_std.exp().to(dtype).repeat(double, 1)  # a standard deviation, despite its name
        if call.loop == "p_sample_loop_with_noise":  # only its sum over the channels is ever used
            channels = out.mean.shape[1]
            manager.log_var = (out.path_log_std[:, None] / channels).to(dtype).repeat(double, channels)
    return tokens
