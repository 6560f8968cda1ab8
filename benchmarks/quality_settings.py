"""What ``benchmarks/quality.py`` compares: every way to speculate, beside the target alone with fewer steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import cspd

# The exact criterion and strict verification; a rejected token is redrawn without running out of tries.
EXACT = {"verify": "strict", "criterion": "last_step", "residual": "closed_form", "relaxation": 1.0}


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        kind: "target" or "draft", which draw alone; "window" (keep all) or "strict"; "one step" for its draft.
        steps: autoregressive steps. gamma: steps a window, or a policy; None draws everything alone.
        options: of :class:`cspd.SpecDecodeRunner`.
        quick: whether ``--quick`` runs it, too.
    """

    kind: str
    name: str
    steps: int
    gamma: object = None
    options: dict = field(default_factory=dict)
    quick: bool = False

    @property
    def draft(self) -> str:
        """Which of a pair's models drafts, or draws alone."""
        if self.kind == "target":
            return "target"
        return "one_step" if self.kind == "one step" else "draft"

    def describe(self) -> dict:
        """Ready for JSON: policies by their ``repr``."""
        plain = (int, float, str, bool, type(None))
        options = {k: v if isinstance(v, plain) else repr(v) for k, v in self.options.items()}
        gamma = self.gamma if isinstance(self.gamma, plain) else repr(self.gamma)
        return {"kind": self.kind, "name": self.name, "steps": self.steps, "gamma": gamma, "options": options}


def settings(steps: int, fewer: tuple[int, ...], one_step: bool) -> list[Setting]:
    """All rows of a pair that is sampled in ``steps`` steps; the target alone in ``fewer``, too."""
    rows = [Setting("target", f"target, {n} steps", n, quick=n in (steps, fewer[-1])) for n in (steps, *fewer)]
    rows += [Setting("draft", f"draft, {steps} steps", steps, quick=True)]
    for relaxation in (1, 10, 42):
        for gamma in (4, 8):
            options = {"relaxation": float(relaxation)}
            rows += [Setting("window", f"window, relaxation {relaxation}, gamma {gamma}", steps, gamma, options)]
    one = {"relaxation": 1.0}
    context = cspd.ContextRelaxation(least=1.0, most=42.0)
    rows += [
        Setting("window", "window, relaxation 1, gamma 4, closed form", steps, 4, {**one, "residual": "closed_form"}),
        Setting("window", "window, relaxation 1, gamma 4, 4 candidates", steps, 4, {**one, "num_candidates": 4}),
        Setting("window", "window, relaxation by similarity, gamma 4", steps, 4,
                {"relaxation": cspd.SimilarityRelaxation(least=1.0, most=42.0)}),
        Setting("window", "window, relaxation 42, gamma by acceptance", steps, cspd.AdaptiveDraft(bound=0.97, most=16),
                {"relaxation": 42.0}),
        Setting("window", "window, relaxation 42, gamma by entropy", steps, cspd.EntropyDraft(most=8),
                {"relaxation": 42.0}),
        Setting("strict", "strict, relaxation 1, gamma 4", steps, 4, {"verify": "strict", **one}),
        Setting("strict", "strict, relaxation 42, gamma 4", steps, 4, {"verify": "strict", "relaxation": 42.0}),
        Setting("strict", "exact, gamma 2", steps, 2, EXACT),
        Setting("strict", "exact, gamma 4", steps, 4, EXACT, quick=True),
        Setting("strict", "exact, gamma 4, 4 candidates", steps, 4, {**EXACT, "num_candidates": 4}),
        Setting("strict", "exact, gamma 4, tree of 2 branches", steps, 4,
                {**EXACT, "num_candidates": 4, "branches": 2}, quick=True),
        Setting("strict", "exact, gamma by entropy", steps, cspd.EntropyDraft(most=8), EXACT),
        Setting("strict", "tree of 2 branches, relaxation by context", steps, 4,
                {**EXACT, "num_candidates": 4, "branches": 2, "relaxation": context}),
    ]  # fmt: skip
    if one_step:
        loose = {**EXACT, "target_sigma": True, "relaxation": 42.0}
        rows += [
            Setting("one step", f"one-step draft alone, {steps} steps", steps),
            Setting("one step", "one-step draft, exact, gamma 4", steps, 4, {**EXACT, "target_sigma": True}),
            Setting("one step", "one-step draft, window, relaxation 42, gamma 4", steps, 4,
                    {**loose, "verify": "window"}),
        ]  # fmt: skip
    return rows
