"""Tokens that are NaN or infinite because of the head: an error that says so, in place of tokens."""

from __future__ import annotations

import weakref
from dataclasses import fields

import torch

from ...errors import CallError, InvalidInput
from ...head import Block, DiffusionHead
from ...late import LateReport

_OVERFLOW = (
    "{op} overflowed: {call} tokens are NaN or infinite, and this head's operands are float16, which ends at 65504. "
    "Use bfloat16, which has float32's range (dtype=torch.bfloat16, or autocast with it), or float32"
)
_late: weakref.WeakKeyDictionary[DiffusionHead, LateReport] = weakref.WeakKeyDictionary()


def late_overflows(head: DiffusionHead) -> LateReport | None:
    """Where a float16 head on a device counts its calls that overflowed; None for other heads.

    Raises:
        RuntimeError: an earlier call is known to have overflowed.
    """
    if head.dtype != torch.float16 or head.device.type != "cuda":
        return None
    report = _late.get(head)
    if report is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # its memory cannot be made here
        report = _late[head] = LateReport(head.device)
    if not torch.cuda.is_current_stream_capturing() and report.news():
        raise CallError(_OVERFLOW.format(op="the head", call="an earlier call's"))
    return report


def check_result(head: DiffusionHead, tokens: torch.Tensor, overflows: LateReport | None, op: str = "denoise") -> None:
    """Look at a call's tokens, on the CPU now, on a device when it gets so far.

    Finite inputs and weights may diverge under a steep schedule in any type; that is left to the caller.

    Raises:
        RuntimeError: float16 overflowed. ValueError: the head's weights are not finite.
    """
    if overflows is not None:
        overflows.add(~torch.isfinite(tokens).all())
    if tokens.device.type != "cpu" or bool(torch.isfinite(tokens).all()):
        return
    tensors = [getattr(head, f.name) for f in fields(head)]
    tensors += [getattr(block, f.name) for block in head.blocks for f in fields(Block)]
    tensors += [weight for time in head.time for weight in time.tensors()]  # of a head that is only evaluated
    weights = all(bool(torch.isfinite(v).all()) for v in tensors if isinstance(v, torch.Tensor))
    if head.dtype == torch.float16:
        raise CallError(_OVERFLOW.format(op=op, call="this call's"))
    if not weights:
        raise InvalidInput(f"{op} expected finite weights in the head, got NaN or infinity: its tokens would be NaN")
