"""Triangular Anderson acceleration (ParaTAA, arXiv 2402.09970) beside the package's sweeps, in sweeps to an accuracy.

``python benchmarks/experiments/anderson.py [--quick] [--json FILE]``. All start from the same inputs with the same
noise: those of a chain whose x0 is 0. A sweep is one call of the network for all steps. No guidance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from subjects import Chain, heads, parser, write

from cspd_kernels.ops.denoise import reference

ACCURACIES = (1e-2, 1e-3, 1e-4, 1e-5)
ORDERS, MEMORIES, RIDGES = (8, None), (2, 5), (1e-6,)  # order None: all steps
MOST = 40


def inputs_of_nothing(chain: Chain, x_T: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """U (T+1, N, C) of a chain whose x0 is 0: U[i+1] is the input of step i, U[0] the token."""
    U = torch.stack([x_T] * (chain.steps + 1))  # noqa: N806
    for i in reversed(range(chain.steps)):
        U[i] = chain.mean_x[i] * U[i + 1]
        U[i] += torch.exp(chain.lower[i]) * noise[i] if i else 0
    return U


def fixed_point(chain: Chain, U: torch.Tensor, noise: torch.Tensor, order: int, frozen: str) -> torch.Tensor:  # noqa: N803
    """F (T, N, C): U[i] from U[i + order] (or U[T]) by ``order`` steps, with what the network says at U.

    What is held fixed in these steps is x0, or the noise estimate as in the paper.
    """
    steps, tokens, _ = noise.shape
    index = torch.arange(steps).repeat_interleave(tokens)
    x0, log_std = chain.evaluate(U[1:].flatten(0, 1), index, torch.arange(tokens).repeat(steps))
    x0, log_std = x0.view_as(noise), log_std.view_as(noise)
    x0_x, mean_x0, mean_x = (v[:, None, None] for v in (chain.x0_x, chain.mean_x0, chain.mean_x))
    last = (torch.arange(steps) > 0)[:, None, None]
    fixed = mean_x0 * (x0 if frozen == "x0" else x0 - x0_x * U[1:]) + last * torch.exp(log_std) * noise
    rate = mean_x if frozen == "x0" else mean_x + mean_x0 * x0_x
    F = U[torch.arange(steps).add(order).clamp(max=steps)]  # noqa: N806
    for ahead in reversed(range(order)):  # row i takes step i + ahead
        rows = steps - ahead
        if rows > 0:
            F[:rows] = rate[ahead:] * F[:rows] + fixed[ahead:]
    return F


def anderson(
    chain: Chain, x_T: torch.Tensor, noise: torch.Tensor, order: int, memory: int, ridge: float, frozen: str = "x0"  # noqa: N803
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The tokens (N, C) after every sweep.

    With R = F(U) - U, and dU, dR the differences of the last ``memory`` sweeps (one column each), row i becomes::

        U[i] + R[i] - (dU[i] + dR[i]) gamma_i,    gamma_i = (A_i + ridge tr(A_i)/m I)^-1 b_i
        A_i = sum over j >= i of dR[j]^T dR[j],   b_i = sum over j >= i of dR[j]^T R[j]

    so no row depends on a later step's. A token has coefficients of its own. The rows that the sweeps so far have made
    exact take no correction, nor does the first after them. So it ends after T sweeps at the latest. This is the
    paper's safeguard, which goes by a tolerance there. The ridge is relative to the residuals, which shrink by orders.
    """
    U, history = inputs_of_nothing(chain, x_T, noise), []  # noqa: N806
    for sweep in itertools.count():
        R = fixed_point(chain, U, noise, order, frozen) - U[:-1]  # noqa: N806
        history = [*history, (U[:-1].clone(), R)][-memory - 1 :]
        correction = torch.zeros_like(R)
        if len(history) > 1:
            dU, dR = (torch.stack([b - a for a, b in itertools.pairwise(v)]).double() for v in zip(*history))  # noqa: N806
            below = [torch.einsum("aijc,bijc->ijab", dR, dR), torch.einsum("aijc,ijc->ija", dR, R.double())]
            A, b = (v.flip(0).cumsum(0).flip(0) for v in below)  # noqa: N806
            size = A.diagonal(dim1=-2, dim2=-1).mean(-1)
            A = A + (ridge * size + 1e-30)[..., None, None] * torch.eye(len(dR), dtype=A.dtype)  # noqa: N806
            gamma = torch.linalg.solve(A, b)
            correction = torch.einsum("aijc,ija->ijc", dU + dR, gamma).to(R.dtype)
            correction[max(0, chain.steps - sweep - 1) :] = 0
        U[:-1] += R - correction
        yield U[0]


def shipped(head, cond, x_T, noise, slopes: bool) -> Iterator[torch.Tensor]:  # noqa: N803
    return (sweep.mean for sweep in reference.sweeps(head, cond, x_T, noise, 1.0, None, slopes=slopes))


@torch.no_grad()
def needed(tokens: Iterator[torch.Tensor], exact: torch.Tensor, most: int) -> list[int | None]:
    """Sweeps until every token is within each accuracy of the exact ones, relative to their largest value.

    It must stay so until all accuracies have been met for three sweeps. None: not in ``most``.
    """
    off, scale = [], exact.abs().max()
    for x in itertools.islice(tokens, most):
        off.append(float(((x - exact).abs().max() / scale).nan_to_num(torch.inf)))
        if len(off) >= 3 and max(off[-3:]) <= min(ACCURACIES):
            break
    late = [1 + max((i for i, error in enumerate(off, 1) if error > accuracy), default=0) for accuracy in ACCURACIES]
    return [count if count <= len(off) else None for count in late]


def methods(chain: Chain, head, cond, x_T, noise, quick: bool) -> Iterator[tuple[str, dict, Iterator]]:  # noqa: N803
    yield "secant (shipped)", {}, shipped(head, cond, x_T, noise, True)
    yield "Picard", {}, shipped(head, cond, x_T, noise, False)
    for frozen in ("x0", "eps"):
        orders, memories, ridges = ((None,), (2,), (1e-6,)) if quick else (ORDERS, MEMORIES, RIDGES)
        for order, memory, ridge in itertools.product(orders, memories, ridges):
            options = dict(order=order or chain.steps, memory=memory, ridge=ridge, frozen=frozen)
            yield f"Anderson, {frozen}", options, anderson(chain, x_T, noise, **options)


def best_of(rows: list[dict]) -> dict:
    """The setting that reaches most of the accuracies, and then in the fewest sweeps, the tightest first."""
    return min(rows, key=lambda row: [MOST + 1 if n is None else n for n in reversed(row["sweeps"])])


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    results, shown = [], " / ".join(f"{a:.0e}" for a in ACCURACIES)
    print(f"{'head':<42}{'method':<18}{'sweeps to ' + shown:<42}setting")
    for name, head, cond in heads(arguments.quick):
        chain, generator = Chain(head, cond), torch.Generator().manual_seed(3)
        x_T = torch.randn(chain.tokens, chain.channels, generator=generator)  # noqa: N806
        noise = torch.randn(chain.steps, chain.tokens, chain.channels, generator=generator)
        exact = reference.denoise(head, cond, x_T, noise, 1.0, None)[0]
        groups: dict[str, list[dict]] = {}
        most = min(MOST, chain.steps)
        for method, options, tokens in methods(chain, head, cond, x_T, noise, arguments.quick):
            sweeps = needed(tokens, exact, most)
            groups.setdefault(method, []).append({"head": name, "method": method, **options, "sweeps": sweeps})
        for method, rows in groups.items():
            best = best_of(rows)
            best["best setting"] = True
            cells = " / ".join("-" if n is None else str(n) for n in best["sweeps"])
            setting = ", ".join(f"{k} {best[k]}" for k in ("order", "memory", "ridge") if k in best)
            print(f"{name:<42}{method:<18}{cells:<42}{setting}", flush=True)
            results += rows
        write(arguments.json, "anderson", results, accuracies=ACCURACIES, most=MOST)


if __name__ == "__main__":
    main()
