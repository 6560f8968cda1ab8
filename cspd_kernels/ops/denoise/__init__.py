"""The denoising chain: T reverse steps of the diffusion head for a batch of independent tokens."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch

from ...backends import implementation
from ...head import DiffusionHead, stream_dtype, without_autocast
from ...noise import PhiloxNoise

WORKSPACE_BYTES = 256 << 20


class Denoised(NamedTuple):
    """What a chain leaves behind, in the residual stream's type (float32; float64 for a float64 head).

    The last step adds no noise, so ``sample`` and ``mean`` are one tensor. With mean, log_std and path_log_std the
    density of a chain against another one is known (:func:`cspd_kernels.log_density_ratio`).
    """

    sample: torch.Tensor  # (N, C)
    mean: torch.Tensor  # (N, C) mean of the last step
    log_std: torch.Tensor  # (N, C) log standard deviation of the last step, log(temperature) included
    path_log_std: torch.Tensor  # (N,) sum over steps T-1..1 and channels of log std, without the temperature


@torch.no_grad()
def denoise(
    head: DiffusionHead,
    cond: torch.Tensor,
    x_T: torch.Tensor,  # noqa: N803  (the mathematics' name)
    noise: torch.Tensor | PhiloxNoise,
    *,
    temperature: float = 1.0,
    cfg_scale: float | torch.Tensor = 1.0,
    backend: str | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Denoised:
    """Run the whole reverse chain; same noise in, same tokens out, up to rounding, whatever the backend.

    For i = T-1..0, with (eps, v) the network's output and the tables of ``head.schedule``::

        eps  = eps_u + cfg_scale (eps_c - eps_u)                  with guidance; v is the conditional row's
        x0   = sqrt_recip_acp[i] x - sqrt_recipm1_acp[i] eps
        mean = coef1[i] x0 + coef2[i] x
        logvar = f log_beta[i] + (1 - f) log_posterior[i],        f = (v + 1) / 2, not clamped
        x   <- mean + [i > 0] temperature exp(logvar / 2) noise[i]

    Inference only: nothing is recorded for autograd. Rows are independent. Non-finite inputs raise
    on the CPU; on other devices they are not looked for (that would synchronise) and spoil only
    their own row.

    Args:
        head: the packed network; its dtype is the GEMM operand type.
        cond: (N, Z) floating, or (2N, Z) with the conditional rows first when cfg_scale is not 1.
        x_T: (N, C) floating, the starting points. N = 0 is allowed.
        noise: (T, N, C) floating, indexed by step (noise[0] adds nothing), or a PhiloxNoise of N rows.
        temperature: >= 0, scales the noise of every step. At 0 the chain is deterministic and
            log_std is -inf.
        cfg_scale: guidance. A number; or a tensor of one element (on the head's device or the CPU) or
            of N (one a token, on the head's device), for which the host never waits: guidance is then
            on exactly when cond has 2N rows.
        backend: "torch", "triton", "cuda", or None: ``CSPD_BACKEND``, else automatic.
        workspace_bytes: bound on the memory of the hoisted modulations.

    Returns:
        :class:`Denoised`.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been computed.
        RuntimeError: the chosen backend cannot serve.

    Source: LTH14/mar ``diffusion/gaussian_diffusion.py`` (p_sample), arXiv 2406.11838 section 3.2.
    """
    run = implementation("denoise", backend)
    guided = _check(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes)
    stream = stream_dtype(head.dtype)
    if isinstance(cfg_scale, torch.Tensor):
        if cfg_scale.device != head.device:  # one element on the CPU, see _check
            cfg_scale = float(cfg_scale)
        else:
            cfg_scale = cfg_scale.detach().to(stream).reshape(-1, 1)  # [1 or N, 1]
    noise = noise if isinstance(noise, PhiloxNoise) else noise.to(stream)
    with without_autocast(head.device):  # the head's dtype decides, not the caller's autocast
        scale = cfg_scale if guided else None
        return Denoised(*run(head, cond, x_T.to(stream), noise, temperature, scale, workspace_bytes))


def _check(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes) -> bool:  # noqa: N803
    """Raise on arguments that do not fit; otherwise say whether the call is guided."""
    if not isinstance(head, DiffusionHead):
        raise TypeError(f"denoise expected a DiffusionHead, got {type(head).__name__}: use DiffusionHead.from_module")
    _check_tensor("x_T", x_T, head, ("N", head.channels))
    rows = x_T.shape[0]
    _check_tensor("cond", cond, head, ("N or 2N", head.cond_channels))
    if isinstance(noise, PhiloxNoise):
        if len(noise) != rows or noise.rows.device != head.device:
            raise ValueError(
                f"denoise expected PhiloxNoise of {rows} rows on {head.device}, got {len(noise)} on {noise.rows.device}"
            )
    else:
        _check_tensor("noise", noise, head, (head.num_steps, rows, head.channels))
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(f"denoise expected a finite temperature >= 0, got {temperature!r}")
    if isinstance(cfg_scale, torch.Tensor):
        one = cfg_scale.numel() == 1
        near = cfg_scale.device == head.device or (one and cfg_scale.device.type == "cpu")
        if not near or not cfg_scale.is_floating_point() or cfg_scale.numel() not in (1, rows):
            raise ValueError(
                f"denoise expected cfg_scale as a number or a floating tensor of 1 or {rows} elements on "
                f"{head.device}, got {cfg_scale.dtype} {tuple(cfg_scale.shape)} on {cfg_scale.device}"
            )
        if cfg_scale.device.type == "cpu" and not torch.isfinite(cfg_scale).all():
            raise ValueError("denoise expected finite values in cfg_scale, got NaN or infinity")
        guided = cond.shape[0] == 2 * rows
        expected = f"{rows} or {2 * rows}"
        fits = guided or cond.shape[0] == rows
    else:
        if not isinstance(cfg_scale, Real) or not math.isfinite(cfg_scale):
            raise ValueError(f"denoise expected a finite cfg_scale, got {cfg_scale!r}")
        guided = cfg_scale != 1.0
        expected = f"{2 * rows} (conditional first)" if guided else f"{rows}"
        fits = cond.shape[0] == (2 * rows if guided else rows)
    if not fits:
        raise ValueError(
            f"denoise expected cond to have {expected} rows for cfg_scale {cfg_scale} and the {rows} rows of x_T, "
            f"got {cond.shape[0]}"
        )
    if not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"denoise expected workspace_bytes as an int > 0, got {workspace_bytes!r}")
    return guided and rows > 0


def _check_tensor(name: str, tensor, head: DiffusionHead, shape: tuple) -> None:
    wanted = f"({', '.join(map(str, shape))})"
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"denoise expected {name} as a tensor {wanted}, got {type(tensor).__name__}")
    fixed = [(i, size) for i, size in enumerate(shape) if isinstance(size, int)]
    if tensor.dim() != len(shape) or any(tensor.shape[i] != size for i, size in fixed):
        raise ValueError(f"denoise expected {name} of shape {wanted}, got {tuple(tensor.shape)}")
    if tensor.device != head.device:
        raise ValueError(f"denoise expected {name} on the head's device {head.device}, got {tensor.device}")
    if not tensor.is_floating_point() or (tensor.dtype == torch.float64 and head.dtype != torch.float64):
        raise ValueError(
            f"denoise expected {name} floating and no wider than the head's arithmetic ({stream_dtype(head.dtype)}), "
            f"got {tensor.dtype}: convert it with {name}.to({stream_dtype(head.dtype)})"
        )
    if tensor.device.type == "cpu" and not torch.isfinite(tensor).all():
        raise ValueError(f"denoise expected finite values in {name}, got NaN or infinity")
