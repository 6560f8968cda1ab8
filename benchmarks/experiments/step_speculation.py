"""Lossless speculation of steps by one head: rounds (network calls that follow each other) per token beside sweeps.

``python benchmarks/experiments/step_speculation.py [--quick] [--json FILE]``. A round guesses the next L steps, asks
the network at all L inputs in one call, and accepts a prefix. Every step is drawn from the law of the sequential chain,
but the token is not the sequential chain's for the same noise: only its distribution is. No guidance.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from subjects import Chain, heads, parser, write

from cspd_kernels import Schedule
from cspd_kernels.ops.denoise import reference

LENGTHS = (4, 8, 16, None)  # None: all steps, as many rows of the network as a sweep has
GUESSES = ("frozen", "linear", "reused")
TOLERANCES = (1e-3, 1e-5)


def log_density(x, mean, log_std):
    """(R,) up to a constant."""
    return (-0.5 * ((x - mean) * torch.exp(-log_std)) ** 2 - log_std).sum(-1)


def couple(x, mean, log_std, guess_mean, guess_log_std, generator):
    """(x', accepted): x' is distributed as N(mean, std) if x is as N(guess_mean, guess_std); equal as often as can be.

    All (R, C), accepted (R,). Accepted with probability min(1, p(x) / q(x)). A rejected row that has one std
    for both is reflected. With e = (guess_mean - mean) / std at length 1, the guess's normal z becomes z - 2 (e.z) e.
    With two stds it is drawn from p until 1 - min(1, q/p) accepts, which is the residual's law.
    """

    def uniform(rows):
        return torch.rand(rows, generator=generator).clamp_min(1e-38).log()

    ratio = log_density(x, mean, log_std) - log_density(x, guess_mean, guess_log_std)
    if not bool(torch.isfinite(ratio).all()):
        raise FloatingPointError("couple: densities that are not finite")
    accepted = uniform(len(x)) <= ratio
    apart = (guess_mean - mean) * torch.exp(-log_std)
    e = apart / apart.norm(dim=1, keepdim=True).clamp_min(1e-30)
    z = (x - guess_mean) * torch.exp(-guess_log_std)
    result = torch.where(accepted[:, None], x, mean + torch.exp(log_std) * (z - 2 * (e * z).sum(1, keepdim=True) * e))
    left = (~accepted & (log_std != guess_log_std).any(1)).nonzero()[:, 0]
    while len(left):
        m, s, gm, gs = (v[left] for v in (mean, log_std, guess_mean, guess_log_std))
        drawn = m + torch.exp(s) * torch.randn(m.shape, generator=generator)
        ratio = log_density(drawn, gm, gs) - log_density(drawn, m, s)
        taken = uniform(len(left)) >= ratio
        result[left[taken]] = drawn[taken]
        left = left[~taken]
    return result, accepted


class Speculated(NamedTuple):
    x: torch.Tensor  # (N, C) the tokens
    rounds: torch.Tensor  # (N,)
    calls: torch.Tensor  # (N,) rows of the network asked for


def speculate(chain, x_T: torch.Tensor, length: int, guess: str, generator) -> Speculated:  # noqa: N803
    """Tokens of a chain by rounds of ``length`` guessed steps.

    Guesses of x0 at a step:

    - "frozen": the last true one;
    - "linear": that and its secant in x through the last two true ones, limited to [0, 1];
    - "reused": what the network said in the round before at its guess for the same step, and frozen beyond.

    The guess of the variance is the last true one's place between its bounds.
    """
    tokens, channels, steps = len(x_T), chain.channels, chain.steps
    now, step = x_T.clone(), torch.full((tokens,), steps - 1)  # the exact input of the next step
    x0, place = torch.zeros(tokens, channels), torch.zeros(tokens, channels)
    last_x, before_x, before_x0 = x_T, x_T, x0
    said = torch.full((steps, tokens, channels), math.nan)
    rounds, calls = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64)
    while bool((step >= 0).any()):
        active = (step >= 0).nonzero()[:, 0]
        slope = ((x0 - before_x0) / (last_x - before_x)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        inputs, means, stds, at = [now], [], [], [step]
        for _ in range(length):
            x, s = inputs[-1], at[-1].clamp(min=0)
            guessed = x0
            if guess == "linear":
                guessed = x0 + slope * (x - last_x)
            elif guess == "reused":
                old = said[s, torch.arange(tokens)]
                guessed = torch.where(old.isnan(), x0, old)
            means.append(chain.mean_x0[s, None] * guessed + chain.mean_x[s, None] * x)
            stds.append(place * chain.upper[s, None] + (1 - place) * chain.lower[s, None])
            z = torch.randn(tokens, channels, generator=generator)
            inputs.append(means[-1] + torch.exp(stds[-1]) * z)
            at.append(at[-1] - 1)
        rows, asked = torch.stack(inputs[:length]), torch.stack(at[:length])
        wanted = asked >= 0
        which = wanted.nonzero()[:, 1]
        true_x0, true_std = torch.zeros_like(rows), torch.zeros_like(rows)
        true_x0[wanted], true_std[wanted] = chain.evaluate(rows[wanted], asked[wanted], which)
        said[:] = math.nan
        said[asked[wanted], which] = true_x0[wanted]
        rounds[active] += 1
        calls += wanted.sum(0)
        going = step >= 0
        for ahead in range(length):
            r = (going & (step >= 0)).nonzero()[:, 0]
            if not len(r):
                break
            s = step[r, None]
            before_x, before_x0 = _put(before_x, r, last_x), _put(before_x0, r, x0)
            last_x, x0 = _put(last_x, r, now), _put(x0, r, true_x0[ahead])
            mean = chain.mean_x0[s] * x0[r] + chain.mean_x[s] * now[r]
            if chain.learned_variance:
                u, w = chain.upper[s], chain.lower[s]
                place[r] = torch.where(u > w, (true_std[ahead][r] - w) / (u - w).clamp_min(1e-30), 0)
            drawn, accepted = couple(
                inputs[ahead + 1][r], mean, true_std[ahead][r], means[ahead][r], stds[ahead][r], generator
            )
            final = s == 0  # no noise: the mean is the token
            now = now.clone()
            now[r] = torch.where(final, mean, drawn)
            step[r] -= 1
            going[r[~accepted]] = False
    return Speculated(now, rounds, calls)


def _put(to: torch.Tensor, rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    to = to.clone()
    to[rows] = source[rows]
    return to


class ToyChain:
    """Tokens of one channel from N(centre, width^2), and the exact x0 of every step: the chain's marginal is known.

    ``varies``: the variance of a step depends on its input, as a learned one does; no marginal is known then.
    """

    channels = 1

    def __init__(self, steps: int = 20, centre: float = 0.7, width: float = 0.5, varies: bool = False):
        s = Schedule.linear(steps, variance="fixed_small")
        self.steps, self.learned_variance = s.num_steps, varies
        self.mean_x0, self.mean_x = (torch.tensor(v, dtype=torch.float32) for v in (s.mean_x0, s.mean_x))
        self.upper = torch.tensor(s.log_std_lower, dtype=torch.float32)
        self.lower = self.upper - 1 if varies else self.upper
        keep = s.alphas_cumprod
        gain = np.sqrt(keep) * width**2 / (keep * width**2 + 1 - keep)
        self.gain = torch.tensor(gain, dtype=torch.float32)
        self.offset = torch.tensor(centre - gain * np.sqrt(keep) * centre, dtype=torch.float32)

    def evaluate(self, x, step, token):
        f = torch.sigmoid(3 * x) if self.learned_variance else torch.ones_like(x)
        log_std = f * self.upper[step, None] + (1 - f) * self.lower[step, None]
        return self.gain[step, None] * x + self.offset[step, None], log_std

    def marginal(self) -> tuple[float, float]:
        """(mean, std) of a token, from x_T ~ N(0, 1)."""
        mean, variance = 0.0, 1.0
        for i in reversed(range(self.steps)):
            c1, c2, gain = float(self.mean_x0[i]), float(self.mean_x[i]), float(self.gain[i])
            mean = (c1 * gain + c2) * mean + c1 * float(self.offset[i])
            variance = (c1 * gain + c2) ** 2 * variance + (math.exp(2 * float(self.upper[i])) if i else 0)
        return mean, math.sqrt(variance)


def sequential(chain, x_T: torch.Tensor, generator) -> torch.Tensor:  # noqa: N803
    """Tokens step by step, noise from the generator."""
    x, token = x_T, torch.arange(len(x_T))
    for i in reversed(range(chain.steps)):
        x0, log_std = chain.evaluate(x, torch.full((len(x),), i), token)
        x = chain.mean_x0[i] * x0 + chain.mean_x[i] * x
        if i:
            x = x + torch.exp(log_std) * torch.randn(x.shape, generator=generator)
    return x


def lossless(tokens: int, varies: bool, length: int, guess: str, seed: int = 0) -> tuple[float, Speculated]:
    """(p of a Kolmogorov-Smirnov test that a toy's speculated tokens have the law of the sequential ones, these).

    Against the exact normal; where the variance varies, two samples.
    """
    chain, generator = ToyChain(varies=varies), torch.Generator().manual_seed(seed)
    x_T = torch.randn(tokens, 1, generator=generator)  # noqa: N806
    made = speculate(chain, x_T, length, guess, generator)
    if not varies:
        return float(stats.kstest(made.x[:, 0].double().numpy(), "norm", args=chain.marginal()).pvalue), made
    others = sequential(chain, torch.randn(tokens, 1, generator=generator), generator)
    return float(stats.ks_2samp(made.x[:, 0].numpy(), others[:, 0].numpy()).pvalue), made


def two_samples(head, cond, tokens: int, length: int, seed: int = 0) -> float:
    """Smallest p over the channels, times their number: tokens of the first condition, speculated and step by step."""
    chain, generator = Chain(head, cond[:1].expand(tokens, -1)), torch.Generator().manual_seed(seed)
    x_T, others = torch.randn(2, tokens, chain.channels, generator=generator)  # noqa: N806
    made = speculate(chain, x_T, length, "frozen", generator).x
    others = sequential(chain, others, generator)
    return min(1.0, chain.channels * min(stats.ks_2samp(a.numpy(), b.numpy()).pvalue for a, b in zip(made.T, others.T)))


def sweeps_of(head, cond, generator) -> dict:
    """Sweeps of every token until it settles by the package's rule, at each tolerance: (mean, largest)."""
    x_T = torch.randn(len(cond), head.channels, generator=generator)  # noqa: N806
    noise = torch.randn(head.num_steps, *x_T.shape, generator=generator)
    counts = {
        t: reference.denoise_in_parallel(head, cond, x_T, noise, 1.0, None, t)[4].double() for t in TOLERANCES
    }  # fmt: skip
    return {f"{t:.0e}": (float(c.mean()), int(c.max())) for t, c in counts.items()}


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    rows, tokens = [], 500 if arguments.quick else 20_000
    for varies, length in itertools.product((False, True), (8,) if arguments.quick else (8, ToyChain().steps)):
        for guess in GUESSES:
            p, made = lossless(tokens, varies, length, guess)
            kind = "exact marginal" if not varies else "two samples, variance varies"
            rounds = float(made.rounds.double().mean())
            rows.append({"toy": kind, "guess": guess, "length": length, "tokens": tokens, "p": p, "rounds": rounds})
            print(
                f"toy, {kind:<30}{guess:<8} L={length:<4}p {p:.3f}  {rounds:.1f} rounds of {ToyChain().steps} steps",
                flush=True,
            )
    for name, head, cond in heads(arguments.quick):
        chain = Chain(head, cond)
        sweeps = sweeps_of(head, cond, torch.Generator().manual_seed(3))
        shown = ", ".join(f"{mean:.1f} (at most {most}) at {t}" for t, (mean, most) in sweeps.items())
        print(f"{name}: sweeps until settled {shown}", flush=True)
        rows.append({"head": name, "method": "sweeps", "sweeps": sweeps})
        count, length = 50 if arguments.quick else 500, 16
        p = two_samples(head, cond, count, length)
        rows.append({"head": name, "method": "two samples", "length": length, "tokens": count, "p": p})
        print(f"  two samples of {count} tokens of a condition, L={length}: p {p:.3f}", flush=True)
        for guess in GUESSES:
            for length in LENGTHS[:1] if arguments.quick else (length or chain.steps for length in LENGTHS):
                generator = torch.Generator().manual_seed(4)
                x_T = torch.randn(chain.tokens, chain.channels, generator=generator)  # noqa: N806
                made = speculate(chain, x_T, length, guess, generator)
                counts, asked = made.rounds.double(), float(made.calls.double().mean())
                row = {"mean": float(counts.mean()), "most": int(counts.max()), "least": int(counts.min())}
                rows.append({"head": name, "method": guess, "length": length, "network rows": asked, "rounds": row})
                print(
                    f"  {guess:<8} L={length:<3} rounds {row['mean']:6.1f} ({row['least']}..{row['most']})", flush=True
                )
    write(arguments.json, "step speculation", rows)


if __name__ == "__main__":
    main()
