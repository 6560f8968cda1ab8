"""``accept_reject`` in torch, several tries at a time.

On the CPU only the rows still undecided are worked on. On a device their number is unknown without
waiting for it, so all rows go through all candidates and tries, in blocks that bound the memory.
"""

from __future__ import annotations

import torch

from ...noise import uniforms
from ..denoise import Denoised
from .candidates import chosen_of, judge, one_of, take, with_candidates
from .reference import closed_form, keep, propose

_BLOCK_ELEMENTS = 1 << 24  # of (rows, tries, channels) at once: 64 MiB a temporary


@torch.no_grad()
def accept_reject(x, draft, target, seed, rows, relaxation, sigma, max_tries, residual="rejection", *, compact=None):
    """Like :func:`cspd_kernels.accept_reject`; ``compact`` says whether to pick out the undecided rows."""
    compact = x.device.type == "cpu" if compact is None else compact
    x, draft, target, relaxation, named = with_candidates(x, draft, target, relaxation)
    candidate, log_c, log_ratio = judge(x, draft, target, seed, rows, relaxation, sigma, compact=compact)
    draft, target = one_of(draft, 0), one_of(target, 0)
    accepted = candidate >= 0
    token = torch.where(accepted[:, None], chosen_of(x, candidate), target.sample.float())
    tries = torch.where(accepted, 0, -1).to(torch.int32)
    pending = (~accepted).nonzero()[:, 0] if compact else None
    max_tries = min(max_tries, 1) if residual == "closed_form" else max_tries
    first, width = 1, 4 if compact else max_tries
    while first <= max_tries and (pending is None or len(pending)):
        count = len(x) if pending is None else len(pending)
        size = min(width, max_tries + 1 - first, max(1, _BLOCK_ELEMENTS // max(1, count * x.shape[2])))
        part = slice(None) if pending is None else pending
        chains = take(draft, part), take(target, part)
        if residual == "closed_form":
            proposal, found = closed_form(*chains, seed, rows[part], sigma, log_c[part])
            at = torch.ones_like(tries[part])
        else:
            found, at, proposal = _redraw(*chains, seed, rows[part], sigma, log_c[part], first, size)
        found &= tries[part] == -1
        token[part] = torch.where(found[:, None], proposal, token[part])
        tries[part] = torch.where(found, at, tries[part])
        if pending is not None:
            pending = pending[~found]
        first, width = first + size, width * 4
    return (token, accepted, candidate, tries, log_ratio) if named else (token, accepted, tries, log_ratio[:, 0])


def _repeat(field, size):
    """[n, ...] -> [n size, ...]: every row ``size`` times in a row."""
    return field[:, None].expand(-1, size, *field.shape[1:]).flatten(0, 1)


def _redraw(draft, target, seed, rows, sigma, log_c, first, size):
    """Tries first..first+size-1 of n rows: (found [n], the first kept try [n] int32, its proposal [n, C])."""
    n, channels = target.mean.shape
    k = torch.arange(first, first + size, device=rows.device)[None, :]  # [1, K]
    wide = [Denoised(*(_repeat(field, size) for field in chain)) for chain in (draft, target)]
    k, address = k.expand(n, -1).flatten(), _repeat(rows, size)  # [n K]
    proposal = propose(wide[1], seed, address, k)
    kept = keep(proposal, *wide, sigma, uniforms(seed, address, k), _repeat(log_c, size)).view(n, size)
    at = kept.to(torch.int32).argmax(dim=1)
    proposal = proposal.view(n, size, channels).gather(1, at[:, None, None].expand(-1, 1, channels))[:, 0]
    return kept.any(dim=1), (first + at).to(torch.int32), proposal
