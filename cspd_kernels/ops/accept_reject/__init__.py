"""Batched acceptance-rejection: keep a draft token, or redraw it from the modified distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...backends import implementation
from ...noise import check_rows, check_seed
from ..denoise import Denoised
from ..density_ratio import check


class Verdict(NamedTuple):
    """What became of each token."""

    token: torch.Tensor  # (N, C) float32
    accepted: torch.Tensor  # (N,) bool
    tries: torch.Tensor  # (N,) int32: 0 accepted, k the k-th proposal was kept, -1 fell back to target.sample
    log_ratio: torch.Tensor  # (N,) float32, as the accept test used it (relaxation included)


@torch.no_grad()
def accept_reject(
    x: torch.Tensor,
    draft: Denoised,
    target: Denoised,
    *,
    seed: int,
    rows: torch.Tensor | None = None,
    relaxation: float | torch.Tensor = 1.0,
    sigma: str = "paper",
    max_tries: int = 100,
    backend: str | None = None,
) -> Verdict:
    """Accept draft tokens x by the density ratio of aligned chains, or redraw them.

    Accepted when ``log u_0 <= log r``, with log r of :func:`cspd_kernels.log_density_ratio` at the
    given relaxation: always, where log r >= 0. Rejected: for k = 1..max_tries draw
    ``y ~ N(mu_p, sigma_p^2)`` and keep it with probability ``max(0, 1 - 1 / r_1(y))``, r_1 without
    relaxation: the modified distribution, proportional to ``max(0, p - q)`` along the chain's last
    step. A row that keeps none takes ``target.sample``, the target's own aligned draw. There is no
    zero row and no NaN as long as x and target.sample hold none.

    Random numbers are addressed by (seed; row, try), see :mod:`cspd_kernels.noise`: a token's fate
    depends on neither its batch nor the backend (outside a rounding band of the comparisons).

    Args:
        x, draft, target, relaxation, sigma, backend: as in :func:`cspd_kernels.log_density_ratio`;
            target.sample (N, C) too.
        seed: int in [0, 2^64). rows: (N,) int64 addresses, default 0..N-1.
        max_tries: >= 0.

    Returns:
        :class:`Verdict`.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Wang et al. 2024, arXiv 2411.11925 (acceptance-rejection sampling of the modified
    distribution); Leviathan et al. 2023, arXiv 2211.17192 for the modified distribution itself.
    """
    relaxation = check("accept_reject", x, draft, target, relaxation, sigma)
    check_seed(seed)
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    check_rows(rows, x.device)
    if len(rows) != len(x):
        raise ValueError(f"accept_reject expected rows of shape ({len(x)},) to match x, got ({len(rows)},)")
    if isinstance(max_tries, bool) or not isinstance(max_tries, int) or max_tries < 0:
        raise ValueError(f"accept_reject expected max_tries as an int >= 0, got {max_tries!r}")
    run = implementation("accept_reject", backend, x.device)
    return Verdict(*run(x.float(), draft, target, seed, rows, relaxation, sigma, max_tries))
