"""Batched acceptance-rejection: keep a draft token, or redraw it from the modified distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...backends import remembered, untraced
from ...errors import InvalidInput
from ...noise import check_rows, check_seed
from ..denoise import Denoised
from ..density_ratio import check

RESIDUALS = ("rejection", "closed_form")
MOST_CANDIDATES = 16
_MOST_TRIES = 2**31 - 1024  # kernels count tries in 32 bits, some beyond the last
_SAME_LOG_STD = 1e-5  # two sigmas nearer than this are one


class Verdict(NamedTuple):
    """What became of each token.

    Example:
        >>> import torch
        >>> from cspd_kernels import Denoised, accept_reject
        >>> zeros = torch.zeros(3, 2)
        >>> draft = Denoised(zeros, zeros, zeros, torch.zeros(3))  # N(0, 1) in 2 channels, 3 tokens
        >>> target = Denoised(zeros + 1, zeros + 1, zeros, torch.zeros(3))  # N(1, 1)
        >>> verdict = accept_reject(zeros + 1, draft, target, seed=0)
        >>> verdict.accepted, verdict.tries
        (tensor([True, True, True]), tensor([0, 0, 0], dtype=torch.int32))
    """

    token: torch.Tensor  # (N, C) float32
    accepted: torch.Tensor  # (N,) bool
    tries: torch.Tensor  # (N,) int32: 0 accepted, k the k-th proposal was kept, -1 fell back to target.sample
    log_ratio: torch.Tensor  # (N,) float32, as the accept test used it (relaxation included)


class CandidateVerdict(NamedTuple):
    """What became of each token that had several candidates.

    Example:
        >>> import torch
        >>> from cspd_kernels import Denoised, accept_reject
        >>> zeros = torch.zeros(3, 1, 2)
        >>> draft = Denoised(zeros, zeros, zeros, torch.zeros(3, 1))  # N(0, 1) in 2 channels, 3 tokens
        >>> target = Denoised(zeros + 1, zeros + 1, zeros, torch.zeros(3, 1))  # N(1, 1)
        >>> x = torch.tensor([-9.0, 9.0]).expand(3, 2)[..., None].expand(3, 2, 2)  # two candidates a token
        >>> accept_reject(x, draft, target, seed=0).candidate
        tensor([1, 1, 1], dtype=torch.int32)
    """

    token: torch.Tensor  # (N, C) float32
    accepted: torch.Tensor  # (N,) bool: any of the candidates
    candidate: torch.Tensor  # (N,) int32: which one, -1 none
    tries: torch.Tensor  # (N,) int32: 0 accepted, k the k-th proposal was kept, -1 fell back to target.sample
    log_ratio: torch.Tensor  # (N, K) float32, of every candidate, as the accept test used it (relaxation included)


@untraced
def accept_reject(
    x: torch.Tensor,
    draft: Denoised,
    target: Denoised,
    *,
    seed: int | torch.Tensor,
    rows: torch.Tensor | None = None,
    relaxation: float | torch.Tensor = 1.0,
    sigma: str = "paper",
    max_tries: int = 100,
    residual: str = "rejection",
    target_sigma: bool = False,
    backend: str | None = None,
) -> Verdict | CandidateVerdict:
    """Accept draft tokens x by the density ratio of aligned chains, or redraw them.

    Accepted when ``log u_0 <= log r``, with log r of :func:`cspd_kernels.log_density_ratio` at the
    given relaxation: always, where log r >= 0. A rejected token is redrawn from the modified
    distribution, proportional to ``max(0, p - q)`` along the chain's last step, which ``residual``
    does in one of two ways:

    ``"rejection"``
        For k = 1..max_tries draw ``y ~ N(mu_p, sigma_p^2)`` and keep it with probability
        ``max(0, 1 - 1 / r_1(y))``, r_1 without relaxation. The closer the models, the more tries.
    ``"closed_form"``
        Where both models have the same sigma (a fixed variance), log r_1 is linear in y. The
        modified distribution then differs from the target's Gaussian only along ``mu_p - mu_q``.
        That component is drawn by inverting its distribution function, one try for every row.

    A row that keeps none, or whose closed form lies entirely more than six sigma beyond the target's
    mean, takes ``target.sample``, the target's own aligned draw. There is no zero row and no NaN as
    long as x and target.sample hold none.

    A token may have several candidates, x (N, K, C): they are tried in order, and the first one accepted is the
    token. Candidate 0 as above; a later one, with ``r_i`` its ratio, when ``u_i <= (r_i - c_i)_+ / Z_i``. Here
    ``(e^delta p - c_i q)_+``, of total mass Z_i, is what the rejections before it have left to be drawn, delta the
    difference of the path terms, and ``c_1 = 1``, ``c_{i+1} = c_i + Z_i``. After K rejections the token is redrawn
    from ``(e^delta p - c_K q)_+`` of candidate 0's chains.

    Candidates may differ in nothing but the last step's noise. Each model then has one mean for all of them, both have
    one sigma, and there is no path term and no relaxation. Then the token has the target's distribution, as with one
    candidate, except for rows that take ``target.sample``. The probability that any of them is accepted is
    ``1 - Z(c_K)``. Candidates with chains of their own are compared as trajectories, as one is: a surrogate. With more
    than one candidate both models need the same sigma, or ``target_sigma``: Z is computed with the target's.

    Random numbers are addressed by (seed; row, try), see :mod:`cspd_kernels.noise`: a token's fate
    depends on neither its batch nor the backend (outside a rounding band of the comparisons).

    Args:
        x, draft, target, relaxation, sigma, backend: as in :func:`cspd_kernels.log_density_ratio`;
            target.sample (N, C) too. With K candidates a token, 1 to 16: x (N, K, C), every field of the chains
            (N, K, ...) or, where the candidates share it, (N, 1, ...), relaxation a number, (N,) or (N, K).
        seed: int in [0, 2^64); or a tensor of one int64 element on the device of x, with the seed's 64 bits. The host
            never reads that tensor: a CUDA graph is replayed with what it holds then.
        rows: (N,) int64 addresses, default 0..N-1. Candidate i's uniform is that of row
            + i :data:`cspd_kernels.noise.CANDIDATE_STRIDE`, so rows of one call should not lie multiples of that apart.
        max_tries: >= 0; the closed form takes one of them.
        residual: "rejection" or "closed_form", as above.
        target_sigma: use the target's sigma for the draft, too, in the closed form and in the masses Z of several
            candidates. Ratios, and the tries of ``"rejection"``, use each model's own. Without it the two ``log_std``
            must be equal where the closed form or Z is computed. This is checked on the CPU only, as the check would
            wait for a GPU; there the target's sigma is used.

    Returns:
        :class:`Verdict`; of x (N, K, C) :class:`CandidateVerdict`.

    Raises:
        InvalidInput: an argument does not fit. BackendUnavailable: the chosen backend cannot serve.

    Example:
        >>> import torch
        >>> from cspd_kernels import Denoised, accept_reject
        >>> zeros = torch.zeros(3, 2)
        >>> draft = Denoised(zeros, zeros, zeros, torch.zeros(3))  # N(0, 1) in 2 channels, 3 tokens
        >>> target = Denoised(zeros + 1, zeros + 1, zeros, torch.zeros(3))  # N(1, 1)
        >>> x = torch.tensor([[-9.0, -9.0], [0.5, 0.5], [1.0, 1.0]])
        >>> verdict = accept_reject(x, draft, target, seed=0)
        >>> verdict.accepted
        tensor([False,  True,  True])
        >>> torch.equal(verdict.token[1:], x[1:])
        True

    Source: Wang et al. 2024, arXiv 2411.11925 (acceptance-rejection sampling of the modified
    distribution). Leviathan et al. 2023, arXiv 2211.17192 for the modified distribution itself.
    arXiv 2606.13426 and 2501.05370 for equal covariances (docs/method.md derives the closed form). Several
    candidates: SpecInfer, arXiv 2305.09781, and arXiv 2402.14160, with a recursion of our own for Gaussians.
    """
    relaxation = check("accept_reject", x, draft, target, relaxation, sigma, several=True)
    candidates = x.shape[1] if x.dim() == 3 else 1
    if not 0 < candidates <= MOST_CANDIDATES:
        raise InvalidInput(f"accept_reject expected 1 to {MOST_CANDIDATES} candidates a token, got {candidates}")
    n, device = x.shape[0], x.device
    check_seed(seed, device)
    if rows is None:
        rows = torch.arange(n, device=device)
    check_rows(rows, device)
    if rows.shape[0] != n:
        raise InvalidInput(f"accept_reject expected rows of shape ({n},) to match x, got ({rows.shape[0]},)")
    if isinstance(max_tries, bool) or not isinstance(max_tries, int) or max_tries < 0:
        raise InvalidInput(f"accept_reject expected max_tries as an int >= 0, got {max_tries!r}")
    _check_residual(draft, target, residual, target_sigma, candidates)
    run = remembered("accept_reject", backend, x)
    verdict = run(x, draft, target, seed, rows, relaxation, sigma, min(max_tries, _MOST_TRIES), residual)
    return Verdict(*verdict) if x.dim() == 2 else CandidateVerdict(*verdict)


def check_method(who: str, residual: object, target_sigma: object, candidates: int = 1) -> None:
    """Raise where a way to redraw does not exist."""
    if residual not in RESIDUALS:
        raise InvalidInput(f"{who} expected residual one of {RESIDUALS}, got {residual!r}")
    if not isinstance(target_sigma, bool) or (target_sigma and residual != "closed_form" and candidates == 1):
        raise InvalidInput(
            f"{who} expected target_sigma as a bool, True only with residual='closed_form' or several candidates, "
            f"got {target_sigma!r} with residual={residual!r}"
        )


def _check_residual(draft: Denoised, target: Denoised, residual: str, target_sigma: bool, candidates: int) -> None:
    check_method("accept_reject", residual, target_sigma, candidates)
    if residual == "rejection" and candidates == 1:
        return
    if not target_sigma and target.log_std.device.type == "cpu":
        difference = (draft.log_std.float() - target.log_std.float()).abs()  # NaN where both are -inf: temperature 0
        if (difference > _SAME_LOG_STD).any():
            what, otherwise = "residual='closed_form'", ", or residual='rejection'"
            if candidates > 1:
                what, otherwise = f"{candidates} candidates a token", ", or one candidate and residual='rejection'"
            raise InvalidInput(
                f"accept_reject expected draft and target with the same log_std for {what}, got values "
                f"that differ by up to {float(difference[~difference.isnan()].max()):.2g}: pass target_sigma=True to "
                f"compute with the target's{otherwise}"
            )
