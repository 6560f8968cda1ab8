"""``denoise`` in torch by sweeps over all steps at once, as ``reference.sweeps`` defines them.

The network runs for the steps and the tokens that still change. Tokens leave when they settle. Steps leave, from the
noise end on, when their inputs no longer change by more than rounding. The recursion is solved for what changes. With
``Y = X + d`` and ``F_i`` the step from the inputs X_i it is affine::

    d_i-1 = (F_i(X_i) - X_i-1) + (mean_x0[i] slope_i + mean_x[i]) d_i,        d_T-1 = 0,   Y_i-1 = F_i(X_i) + (...) d_i

which is composed in pairs, then pairs of pairs: some thirty operations in place of one after another for each step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import CallError
from .parallel import Parallel
from .reference import guided, limited, limits_of, log_of, most_sweeps
from .torch_network import embedded, layers_of, modulations, network
from .workspace import of_rows


def in_parallel(
    head, cond, x_T, noise, temperature, scales, parallel: Parallel, finish: Callable  # noqa: N803
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """cond [G, N, Z], x_T [N, C] -> the fields of Denoised.

    Args:
        finish: the chain step by step, ``finish(head, cond, x_T, noise, temperature, scales, steps_at_once)``, of
            the tokens that do not settle.
    """
    if x_T.is_cuda and torch.cuda.is_current_stream_capturing():
        raise CallError(
            "denoise expected parallel_tol=None with backend='torch' in a CUDA graph of the caller's, got "
            f"{parallel.tolerance}: its sweeps synchronise. Use backend='triton' or 'cuda', or pass parallel_tol=None"
        )
    rows, steps, channels = len(x_T), head.num_steps, head.channels
    limit = most_sweeps(steps)
    state = _Sweeps(head, cond, x_T, noise, temperature, scales, parallel)
    mean, log_std, path = (torch.empty_like(x_T) for _ in range(3))
    sweeps = torch.full((rows,), limit + steps, dtype=torch.int32, device=x_T.device)
    trajectory = x_T.new_empty(steps, rows, channels)
    for count in range(1, limit + 1):
        settled = state.sweep()
        if any_settled := count == limit or bool(settled.any()):
            done = state.index if count == limit else state.index[settled]
            keep = slice(None) if count == limit else settled
            mean[done], log_std[done] = state.mean[keep], state.log_std[0][keep]
            path[done], trajectory[:, done] = state.log_std[1:].sum(0)[keep], state.x[:, keep]
            sweeps[done[settled] if count == limit else done] = count
        if any_settled and not state.keep(~settled):
            break
    if len(left := state.index):
        own = noise[:, left] if isinstance(noise, torch.Tensor) else noise[left]
        made = finish(head, cond[:, left], x_T[left], own, temperature, of_rows(scales, left), 1)
        mean[left], log_std[left] = made[1], made[2]
    log_std, path = log_std + log_of(temperature), path.sum(1)
    if len(left):
        log_std[left], path[left] = made[2], made[3]
    return mean, mean, log_std, path, sweeps, trajectory.movedim(0, 1)


class _Sweeps:
    """The tokens that have not settled: [steps, tokens, channels], index 0 the last step taken."""

    def __init__(self, head, cond, x_T, noise, temperature, scales, parallel):  # noqa: N803
        self.head, self.layers, self.tolerance, self.steps = head, layers_of(head), parallel.tolerance, head.num_steps
        self.index = torch.arange(len(x_T), device=x_T.device)
        self.scales, self.limits = scales, limits_of(head, x_T)
        self.x0_x, self.x0_out, self.mean_x0, self.mean_x, self.upper, self.lower = _tables(head, x_T)
        y = embedded(head, cond)  # [G, N, W]
        self.block_mods, self.final_mods = modulations(head, self.layers, y, 0, self.steps)
        z = noise if isinstance(noise, torch.Tensor) else noise.steps(0, self.steps, head.channels).to(x_T.dtype)
        self.noise = temperature * z
        self.noise[0] = 0
        self.mean, self.before, self.x0, self.count = None, None, None, 0
        self.open = self.steps  # steps below it are computed; the others have settled, for every token here
        self.log_std = self.lower.expand(z.shape).clone()
        if parallel.guess is None:
            nothing = torch.zeros_like(z)
            self.x, self.mean = self._moved(nothing, nothing, nothing, x_T)
        else:
            self.x = torch.cat([parallel.guess.movedim(1, 0)[:-1], x_T[None]])

    def sweep(self) -> torch.Tensor:
        """(tokens,) which of them have settled."""
        n = self.open
        x = self.x[:n]
        out = network(self.head, self.layers, x, [mods[:, :n] for mods in self.block_mods], self.final_mods[:, :n])
        first = torch.stack([out[0][..., : self.head.channels], *out[1:]])  # [G, n, N, C]
        if self.head.learned_variance:
            f = (out[0][..., self.head.channels :] + 1) / 2
            self.log_std[:n] = f * self.upper[:n] + (1 - f) * self.lower[:n]
        x0 = self.x0_x[:n] * x + self.x0_out[:n] * first
        slope = torch.zeros_like(x0)
        if self.before is not None:
            moved = x - self.before[:n]
            secant = (x0 - self.x0[:, :n]) / moved
            slope = torch.where((secant > 0) & (moved != 0), secant.clamp(max=1), 0)
        self.before, self.x0 = x, x0
        x0, slope = limited(guided(x0, self.scales), guided(slope, self.scales), self.limits)
        moved, mean = self._moved(x, x0, slope, x[-1])
        self.count += 1
        change, size = (moved - x).abs(), torch.cat([moved, self.x[n:], mean[None]]).abs().amax((0, 2))
        largest = change.amax((0, 2))
        if self.mean is not None:
            largest = torch.maximum(largest, (mean - self.mean).abs().amax(1))
        near = (largest <= self.tolerance * size) & (self.count > 1)
        settled = torch.isfinite(size) & (near | (self.count >= self.steps))
        # The noise end of the steps that do not change any more: the first of them never does. Beside values on the way
        # from there alone: those behind may still be as wrong as can be.
        so_far = moved.abs().amax(2).flip(0).cummax(0).values.flip(0)
        change = change.amax(2)
        still = ((change <= torch.finfo(x.dtype).eps * so_far) & torch.isfinite(change)).all(1)
        still[-1] = True
        self.open = max(1, n - int(still.flip(0).long().cumprod(0).sum()))
        self.x = torch.cat([moved[: self.open], x[self.open :], self.x[n:]])
        self.mean = mean
        return settled

    def _moved(self, x, x0, slope, start) -> tuple[torch.Tensor, torch.Tensor]:
        """(Y [n, N, C] from Y[n - 1] = start, mean of the last step): the recursion with x0 linear around x."""
        n, mean_x0, mean_x = len(x), self.mean_x0[: len(x)], self.mean_x[: len(x)]
        to = mean_x0 * x0 + mean_x * x + torch.exp(self.log_std[:n]) * self.noise[:n]  # from the inputs x
        factor = (mean_x0 * slope + mean_x).flip(0)
        to, apart = to.flip(0), torch.zeros_like(x)  # from here on the noise end comes first
        if n > 1:
            r, a = to[:-1] - x.flip(0)[1:], factor[:-1]
            r = torch.cat([r[:1] + a[:1] * (start - x[-1]), r[1:]])
            distance = 1
            while distance < n - 1:
                r = torch.cat([r[:distance], r[distance:] + a[distance:] * r[:-distance]])
                a = torch.cat([a[:distance], a[distance:] * a[:-distance]])
                distance *= 2
            apart = torch.cat([(start - x[-1])[None], r])
        else:
            apart = (start - x[-1])[None]
        moved = to + factor * apart
        return torch.cat([start[None], moved[:-1]]).flip(0), moved[-1]

    def keep(self, which: torch.Tensor) -> bool:
        """Drop the others; whether any is left."""
        self.index = self.index[which]
        if not len(self.index):
            return False
        kept = {}
        for i, shared in enumerate(self.head.modulation_of):  # one by one: the memory of two sets is not to be had
            if shared not in kept:
                kept[shared] = self.block_mods[i][:, :, :, which]
            self.block_mods[i] = kept[shared]
        self.final_mods = self.final_mods[:, :, :, which]
        self.scales = of_rows(self.scales, which)
        self.noise, self.log_std, self.x, self.before = (
            v[:, which] for v in (self.noise, self.log_std, self.x, self.before)
        )
        self.x0, self.mean = self.x0[:, :, which], self.mean[which]
        return True


def _tables(head, like: torch.Tensor) -> list[torch.Tensor]:
    """x0_x, x0_out, mean_x0, mean_x, and the log std at v = 1 and at v = -1, [T, 1, 1] each."""
    s = head.schedule
    tables = (s.x0_x, s.x0_out, s.mean_x0, s.mean_x, s.log_std_upper, s.log_std_lower)
    return [torch.tensor(t, dtype=like.dtype, device=like.device)[:, None, None] for t in tables]
