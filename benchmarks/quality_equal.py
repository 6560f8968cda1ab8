"""What plain decoding with fewer steps costs at the quality that a row has: its honest alternative."""

from __future__ import annotations

from itertools import pairwise


def plain_cost(figure: float, curve: list[tuple[float, float]]) -> float:
    """Cost at which the target alone reaches a quality figure, between its measured steps.

    Linear between neighbours of ``curve``. Beyond its ends: the cost at the end, as no measured step is better, or
    none is cheaper.

    Args:
        figure: the lower, the better. curve: (figure, cost) of the target alone, at two numbers of steps or more.
    """
    best = sorted(curve, key=lambda point: point[1])
    # A dearer point that is no better is nobody's choice.
    kept: list[tuple[float, float]] = []
    for point in best:
        if not kept or point[0] < kept[-1][0]:
            kept.append(point)
    if figure >= kept[0][0]:
        return kept[0][1]
    for (worse, cheap), (better, dear) in pairwise(kept):
        if figure >= better:
            return cheap + (dear - cheap) * (worse - figure) / (worse - better)
    return kept[-1][1]


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows with ``plain_seconds`` and ``plain_calls`` of equal quality, and how many times less this row takes."""
    alone = [row for row in rows if row["kind"] == "target"]
    for row in rows:
        for cost, name in (("seconds", "seconds"), ("target_calls", "calls")):
            curve = [(r["figure"], r[cost]) for r in alone]
            plain = plain_cost(row["figure"], curve)
            row[f"plain_{name}"] = plain
            row[f"{name}_ratio"] = plain / row[cost] if row[cost] else None
    return rows
