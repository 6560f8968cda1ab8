"""Definition of ``log_density_ratio``."""

from __future__ import annotations

import torch


def log_density_ratio(x, draft, target, relaxation=1.0, sigma="paper", *, dtype=torch.float32):
    """Like :func:`cspd_kernels.log_density_ratio`, computed in ``dtype`` (float32 or float64); (N,)."""
    x, mu_q, mu_p, log_q, log_p, path_q, path_p = (
        v.to(dtype)
        for v in (x, draft.mean, target.mean, draft.log_std, target.log_std, draft.path_log_std, target.path_log_std)
    )
    # With a = (x - mu_p) / sigma_p and b = (x - mu_q) / sigma_q the exponents' difference is
    # (b - a) (b + a) / 2. Where the scales are close, b - a is formed from the small differences
    # themselves, mu_p - mu_q and sigma_p / sigma_q - 1 = expm1(log_p - log_q), so that close models
    # far from x do not cancel.
    log_scale = log_p - log_q
    largest = torch.finfo(dtype).max
    inverse_p, inverse_q = torch.exp(-log_p).clamp(max=largest), torch.exp(-log_q).clamp(max=largest)
    a, b = (x - mu_p) * inverse_p, (x - mu_q) * inverse_q
    close = (mu_p - mu_q) * inverse_q + a * torch.expm1(log_scale)
    difference = torch.where(log_scale.abs() < 0.5, close, b - a)
    if isinstance(relaxation, torch.Tensor):
        relaxation = torch.where(relaxation > 0, relaxation, torch.nan).to(dtype)[:, None]
    exponent = 0.5 * (difference / relaxation) * ((a + b) / relaxation)
    path = path_q - path_p if sigma == "paper" else path_p - path_q
    # Operands that are not finite must not cancel: 0 times them is NaN.
    poison = 0.0 * x + 0.0 * mu_q + 0.0 * mu_p + 0.0 * log_q + 0.0 * log_p
    log_ratio = (exponent - log_scale + poison).sum(dim=1) + (path + 0.0 * path)
    return torch.where(torch.isnan(log_ratio), -torch.inf, log_ratio)
