"""The log density ratio of two aligned denoising chains that meet in the same token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch

from ...backends import remembered, untraced
from ...errors import InvalidInput, WrongType
from ..denoise import Denoised

SIGMAS = ("paper", "released")
_FIELDS = ("mean", "log_std", "path_log_std")
_FIELDS_AND_SAMPLE = (*_FIELDS, "sample")


@untraced
def log_density_ratio(
    x: torch.Tensor,
    draft: Denoised,
    target: Denoised,
    *,
    relaxation: float | torch.Tensor = 1.0,
    sigma: str = "paper",
    backend: str | None = None,
) -> torch.Tensor:
    """log p(Y_p) / q(Y_q) of the target's and the draft's trajectory under the same noise, (N,) float32.

    Both chains are denoised with the same x_T and noise, so the noise factors of the two path
    densities cancel. What is left is the last step's Gaussians and the scales of the steps before::

        log r = sum_c [log N(x; mu_p, sigma_p) - log N(x; mu_q, sigma_q)] + (L_q - L_p)

    with mu, log sigma = ``mean``, ``log_std`` and L = ``path_log_std``, p the target, q the draft.
    The squared residuals are divided by ``relaxation``^2. Two trajectories that meet in x are
    compared, not two marginal densities: a surrogate, not an exact likelihood ratio.

    Finite inputs give no NaN; very distant ones may give -inf or inf. A row that cannot be judged
    (its inputs are not finite, a temperature of 0, a relaxation that is not > 0) is -inf, so that it
    is never accepted.

    Args:
        x: (N, C) floating, the draft's tokens.
        draft, target: :class:`Denoised` of the same N rows (mean, log_std (N, C), path_log_std (N,)).
        relaxation: > 0, a number or one per token (N,). 1 is the formula; the released code's
            ``inner_temperature`` is 42.
        sigma: ``"paper"`` as above; ``"released"`` with the path term's sign turned, L_p - L_q, as in
            the released code (MarkXCloud/CSpD ``spec_decode_runner.py``), for comparison.
        backend: as in :func:`cspd_kernels.denoise`; "cuda" copies operands that are not contiguous float32.

    Raises:
        InvalidInput: an argument does not fit. BackendUnavailable: the chosen backend cannot serve.

    Example:
        >>> import torch
        >>> from cspd_kernels import Denoised, log_density_ratio
        >>> zeros = torch.zeros(3, 2)
        >>> draft = Denoised(zeros, zeros, zeros, torch.zeros(3))  # N(0, 1) in 2 channels, 3 tokens
        >>> target = Denoised(zeros + 1, zeros + 1, zeros, torch.zeros(3))  # N(1, 1)
        >>> x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
        >>> log_density_ratio(x, draft, target)
        tensor([-1.,  0.,  1.])

    Source: Wang et al. 2024, arXiv 2411.11925 (denoising trajectory alignment).
    """
    relaxation = check("log_density_ratio", x, draft, target, relaxation, sigma)
    run = remembered("log_density_ratio", backend, x)
    ratio: torch.Tensor = run(x, draft, target, relaxation, sigma)
    return ratio


def check(
    op: str, x: Any, draft: Any, target: Any, relaxation: Any, sigma: Any, several: bool = False
) -> float | torch.Tensor:
    """Raise on arguments that do not fit; return the relaxation as a number or as (N,) float32.

    With ``several``, x may be (N, K, C), K candidates a token. Fields that have one candidate are those of all. A
    relaxation that is a tensor is then returned with an axis of one or K candidates.
    """
    shapes = "(N, C) or (N, K, C)" if several else "(N, C)"
    if not isinstance(x, torch.Tensor) or x.dim() not in ((2, 3) if several else (2,)) or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InvalidInput(f"{op} expected x as a floating tensor {shapes}, got {got}")
    # A shape that fits, and the one of a field that all candidates share.
    shape, device = x.shape, x.device
    shared = shape if x.dim() == 2 else (shape[0], 1, shape[2])
    for name, chain in (("draft", draft), ("target", target)):
        # Of a rejected row without a kept proposal, the token is the target's sample.
        for field in _FIELDS if name == "draft" or op != "accept_reject" else _FIELDS_AND_SAMPLE:
            value: Any = getattr(chain, field, None)
            wanted: tuple[tuple[int, ...], ...] = shape, shared
            if field == "path_log_std":
                wanted = shape[:-1], shared[:-1]
            if not (
                isinstance(value, torch.Tensor)
                and (value.shape == wanted[0] or value.shape == wanted[1])
                and value.is_floating_point()
                and value.device == device
            ):
                raise _misfit(op, f"{name}.{field}", value, wanted, device, chain)
    if sigma not in SIGMAS:
        raise InvalidInput(f"{op} expected sigma one of {SIGMAS}, got {sigma!r}")
    if isinstance(relaxation, torch.Tensor):
        wanted = shape[:1], shape[:-1]
        if relaxation.shape not in wanted or not relaxation.is_floating_point() or relaxation.device != x.device:
            raise InvalidInput(
                f"{op} expected relaxation as a number or a floating tensor {_either(wanted)} on {x.device}, "
                f"got {relaxation.dtype} {tuple(relaxation.shape)} on {relaxation.device}"
            )
        each = relaxation.float()
        if each.device.type == "cpu" and not ((each > 0) & torch.isfinite(each)).all():
            raise InvalidInput(f"{op} expected every relaxation finite and > 0 in float32, got values that are not")
        return each[:, None] if each.dim() < x.dim() - 1 else each
    if not isinstance(relaxation, Real) or not 0 < float(relaxation) < math.inf:
        raise InvalidInput(f"{op} expected a finite relaxation > 0, got {relaxation!r}")
    return float(relaxation)


def _either(shapes: Iterable[Sequence[int]]) -> str:
    return " or ".join(dict.fromkeys(str(tuple(shape)) for shape in shapes))


def _misfit(op: str, field: str, value: Any, shapes: Any, device: torch.device, chain: Any) -> Exception:
    """What is wrong with a field of a chain, such as ``draft.mean``."""
    if not isinstance(value, torch.Tensor):
        name, field = field.split(".")
        return WrongType(f"{op} expected {name} as a Denoised with a tensor {field}, got {type(chain).__name__}")
    if value.shape not in map(torch.Size, shapes) or not value.is_floating_point():
        return InvalidInput(
            f"{op} expected {field} floating of shape {_either(shapes)} to match x, "
            f"got {value.dtype} {tuple(value.shape)}"
        )
    return InvalidInput(f"{op} expected {field} on the device of x, {device}, got {value.device}")
