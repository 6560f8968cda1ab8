"""One call of a head's network: for samplers whose steps these kernels do not take."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch

from ...backends import implementation, remember
from ...dtypes import stream_dtype, without_autocast
from ...errors import InvalidInput, WrongDtype, WrongType
from ...head import DiffusionHead
from ...library import define
from ..denoise import WORKSPACE_BYTES
from ..denoise.arguments import check_tensor
from ..denoise.finite import check_result, late_overflows


@torch.no_grad()
def evaluate(
    head: DiffusionHead,
    x: torch.Tensor,
    timesteps: torch.Tensor | float,
    cond: torch.Tensor,
    *,
    backend: str | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> torch.Tensor:
    """The network's output, ``net(x, timesteps, cond)``, up to rounding, whatever the backend.

    Inference only: nothing is recorded for autograd. Rows are independent. Non-finite inputs raise on the CPU; on other
    devices they are not looked for (that would synchronise) and spoil only their own row. ``torch.compile`` sees one
    operator. The host never waits for a device.

    Args:
        head: the packed network; it needs no schedule. Its dtype is the GEMM operand type.
        x: (M, C) floating. M = 0 is allowed.
        timesteps: as the network takes them, of any integer or floating type. (M,) or (M, 1); or (M, K) with one column
            for each of K time embeddings whose mean is taken. A number, or a tensor of one element (on the head's
            device or the CPU), is for all rows and embeddings.
        cond: (M, Z) floating; (M, W) for a head whose conditions are given embedded. On the CPU what is made of it is
            kept for the next call with the same values.
        backend: "torch", "triton", "cuda", or None: ``CSPD_BACKEND``, else automatic.
        workspace_bytes: bound on the memory of the modulations.

    Returns:
        (M, O) in the residual stream's type (float32; float64 for a float64 head).

    Raises:
        InvalidInput: an argument does not fit. Nothing has been computed.
        BackendUnavailable: the chosen backend cannot serve. CallError: the arithmetic overflowed (float16).

    Example:
        >>> import torch
        >>> from cspd_kernels import DiffusionHead, evaluate
        >>> from cspd.models import DiffLoss
        >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
        >>> evaluate(head, torch.zeros(3, 4), 2.0, torch.zeros(3, 6)).shape
        torch.Size([3, 8])
    """
    if not isinstance(timesteps, torch.Tensor) and isinstance(timesteps, Real):
        # A product, as torch.compile would compile the caller again for every new float that enters otherwise.
        timesteps = torch.ones((), dtype=torch.float64, device="cpu") * float(timesteps)
    _check(head, x, timesteps, cond, workspace_bytes)
    out: torch.Tensor = _operator(head.handle, x, timesteps, cond, backend, min(workspace_bytes, 2**63 - 1))
    return out


def run(head: Any, x: Any, timesteps: Any, cond: Any, backend: str | None, workspace_bytes: int) -> torch.Tensor:
    """The op: everything that looks at values or at this machine, which a compiler must not see, then a backend.

    A backend is given x (M, C) in the stream's type, and timesteps (M,) or (M, K) on the head's device, expanded where
    one stands for all. It is given the caller's own ``cond``, so that it can recognise it in the next call.
    """
    head = DiffusionHead.of_handle(head)
    for name, value in (("x", x), ("timesteps", timesteps), ("cond", cond)):
        if value.device.type == "cpu" and not bool(torch.isfinite(value).all()):
            raise InvalidInput(f"evaluate expected finite values in {name}, got NaN or infinity")
    overflows = late_overflows(head)
    if timesteps.numel() == 1:
        if timesteps.device != head.device:
            timesteps = torch.full((1,), float(timesteps), dtype=torch.float32, device=head.device)
        timesteps = timesteps.reshape(1).expand(len(x))
    elif timesteps.dim() == 2 and timesteps.shape[1] == 1:
        timesteps = timesteps[:, 0]
    function = remember(
        ("evaluate", head.handle), backend, head.device, lambda: implementation("evaluate", backend, head.device, head)
    )
    with without_autocast(head.device):  # the head's dtype decides, not the caller's autocast
        out = function(head, x.to(stream_dtype(head.dtype)), timesteps, cond, workspace_bytes)
    check_result(head, out, overflows, "evaluate")
    contiguous: torch.Tensor = out.contiguous()
    return contiguous


def _fake(head: Any, x: Any, *arguments: Any) -> torch.Tensor:
    head = DiffusionHead.of_handle(head)
    out: torch.Tensor = x.new_empty((x.shape[0], head.outputs), dtype=stream_dtype(head.dtype))
    return out


_operator = define(
    "evaluate",
    "(int head, Tensor x, Tensor timesteps, Tensor cond, str? backend, int workspace_bytes) -> Tensor",
    run,
    _fake,
)


def _check(head: Any, x: Any, timesteps: Any, cond: Any, workspace_bytes: Any) -> None:
    """Raise on arguments that do not fit, by all that is known without looking at a tensor's values."""
    if not isinstance(head, DiffusionHead):
        raise WrongType(f"evaluate expected a DiffusionHead, got {type(head).__name__}: use DiffusionHead.from_network")
    if not head.time:
        raise InvalidInput(
            "evaluate expected a head with its time embedding, got one without: build it from its module"
        )
    check_tensor("evaluate", "x", x, head, ("M", head.channels))
    check_tensor("evaluate", "cond", cond, head, ("M", head.cond_channels))
    rows = x.shape[0]
    if cond.shape[0] != rows:
        raise InvalidInput(f"evaluate expected cond of as many rows as x, {rows}, got {cond.shape[0]}")
    if not isinstance(timesteps, torch.Tensor):
        raise WrongType(f"evaluate expected timesteps as a tensor or a number, got {type(timesteps).__name__}")
    one, count, dim = timesteps.numel() == 1, len(head.time), timesteps.dim()
    by_row = 1 <= dim <= 2 and timesteps.shape[0] == rows
    if not one and not (by_row and (dim == 1 or timesteps.shape[1] == 1 or timesteps.shape[1] == count)):
        raise InvalidInput(
            f"evaluate expected timesteps as a number or of shape ({rows},), ({rows}, 1) or ({rows}, {count}), got "
            f"{tuple(timesteps.shape)}"
        )
    if timesteps.device != head.device and not (one and timesteps.device.type == "cpu"):
        raise InvalidInput(f"evaluate expected timesteps on the head's device {head.device}, got {timesteps.device}")
    if timesteps.dtype == torch.bool or timesteps.is_complex():
        raise WrongDtype(f"evaluate expected timesteps of an integer or floating type, got {timesteps.dtype}")
    if not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise InvalidInput(f"evaluate expected workspace_bytes as an int > 0, got {workspace_bytes!r}")
