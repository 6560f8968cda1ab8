"""What ``denoise`` refuses: an error that says what was expected, before anything is computed."""

from __future__ import annotations

import math
from numbers import Real

import torch

from ...errors import InvalidInput, WrongDtype, WrongType
from ...head import DiffusionHead, stream_dtype
from ...noise import PhiloxNoise
from .parallel import check_tolerance


def check(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes) -> None:  # noqa: N803
    """Raise on arguments that do not fit, by all that is known without looking at a tensor's values.

    Numbers are compared one by one, and nothing else is done with them until an error is certain. torch.compile takes
    a number that is formatted, or given to the math module, for a constant, and compiles its caller again for the next
    one. And `in` does not find a size that it holds as a symbol.
    """
    if not isinstance(head, DiffusionHead):
        raise WrongType(f"denoise expected a DiffusionHead, got {type(head).__name__}: use DiffusionHead.from_module")
    if head.schedule is None:
        raise InvalidInput("denoise expected a head with a schedule, got one without: it can only be evaluated")
    check_tensor("denoise", "x_T", x_T, head, ("N", head.channels))
    rows = x_T.shape[0]
    check_tensor("denoise", "cond", cond, head, ("N, 2N or 3N", head.cond_channels))
    if isinstance(noise, PhiloxNoise):
        if noise.rows.shape[0] != rows or noise.rows.device != head.device:
            raise InvalidInput(
                f"denoise expected PhiloxNoise of {rows} rows on {head.device}, got {len(noise)} on {noise.rows.device}"
            )
    else:
        check_tensor("denoise", "noise", noise, head, (head.num_steps, rows, head.channels))
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1 or not _is_near(temperature, head):
            raise InvalidInput(
                "denoise expected temperature as a number or a floating tensor of 1 element on "
                f"{head.device} or the CPU, got {temperature.dtype} {tuple(temperature.shape)} on {temperature.device}"
            )
    elif not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise InvalidInput(f"denoise expected a finite temperature >= 0, got {temperature!r}")
    scales = cfg_scale if isinstance(cfg_scale, tuple) else (cfg_scale,)
    for scale in scales:
        if isinstance(scale, torch.Tensor):
            if not _is_near(scale, head) or not (scale.numel() == 1 or scale.numel() == rows):
                raise InvalidInput(
                    f"denoise expected cfg_scale as a number or a floating tensor of 1 or {rows} elements on "
                    f"{head.device}, got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
                )
        elif not isinstance(scale, Real) or not -math.inf < scale < math.inf:
            raise InvalidInput(f"denoise expected a finite cfg_scale, got {scale!r}")
    if isinstance(cfg_scale, tuple):
        if len(cfg_scale) != 2:
            raise InvalidInput(f"denoise expected cfg_scale as one scale or a tuple of two, got {len(cfg_scale)}")
        fits = cond.shape[0] == 3 * rows
    elif isinstance(cfg_scale, torch.Tensor):
        fits = cond.shape[0] == rows or cond.shape[0] == 2 * rows
    else:
        fits = cond.shape[0] == (rows if cfg_scale == 1.0 else 2 * rows)
    if not fits:
        if isinstance(cfg_scale, tuple):
            expected = f"{3 * rows} (fully conditional first)"
        elif isinstance(cfg_scale, torch.Tensor):
            expected = f"{rows} or {2 * rows}"
        else:
            expected = f"{rows}" if cfg_scale == 1.0 else f"{2 * rows} (conditional first)"
        raise InvalidInput(
            f"denoise expected cond to have {expected} rows for cfg_scale {cfg_scale} and the {rows} rows of x_T, "
            f"got {cond.shape[0]}"
        )
    clip = head.schedule.clip
    if clip is not None and clip.ndim == 2 and clip.shape[1] != head.channels:
        raise InvalidInput(
            f"denoise expected a clip with limits for 1 channel or for the head's {head.channels}, got {clip.shape[1]}"
        )
    if not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise InvalidInput(f"denoise expected workspace_bytes as an int > 0, got {workspace_bytes!r}")


def _is_near(value: torch.Tensor, head: DiffusionHead) -> bool:
    """Whether it is floating and where the host or the head's device can read it without the other's waiting."""
    return value.is_floating_point() and (
        value.device == head.device or (value.numel() == 1 and value.device.type == "cpu")
    )


def check_parallel(head, x_T, parallel_tol, guess) -> None:  # noqa: N803
    check_tolerance("denoise", parallel_tol)
    if guess is not None:
        check_tensor("denoise", "guess", guess, head, (x_T.shape[0], head.num_steps, head.channels))


def check_tensor(op: str, name: str, tensor, head: DiffusionHead, shape: tuple) -> None:
    """Check an op's argument. ``shape`` holds sizes, or texts for sizes that are free."""

    def wanted() -> str:
        return f"({', '.join(map(str, shape))})"

    if not isinstance(tensor, torch.Tensor):
        raise WrongType(f"{op} expected {name} as a tensor {wanted()}, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape)
    for size, got in zip(shape, tensor.shape):
        fits = fits and (isinstance(size, str) or size == got)
    if not fits:
        raise InvalidInput(f"{op} expected {name} of shape {wanted()}, got {tuple(tensor.shape)}")
    if tensor.device != head.device:
        raise InvalidInput(f"{op} expected {name} on the head's device {head.device}, got {tensor.device}")
    if not tensor.is_floating_point() or (tensor.dtype == torch.float64 and head.dtype != torch.float64):
        raise WrongDtype(
            f"{op} expected {name} in a floating dtype no wider than the head's {stream_dtype(head.dtype)}, "
            f"got {tensor.dtype}: convert it with {name}.to({stream_dtype(head.dtype)})"
        )


def check_values(**values) -> None:
    """Raise on NaN and infinity where the host can see them; on a device, looking would wait for it."""
    for name, value in values.items():
        if value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, torch.Tensor):
                finite = one.device.type != "cpu" or bool(torch.isfinite(one).all())
            else:
                finite = math.isfinite(one)
            if not finite:
                raise InvalidInput(f"denoise expected finite values in {name}, got NaN or infinity")
