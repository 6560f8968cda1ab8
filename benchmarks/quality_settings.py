"""What ``benchmarks/quality.py`` compares: every way to speculate and other samplers of the head, beside the target
alone with fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cspd

# The exact criterion and strict verification; a rejected token is redrawn without running out of tries.
EXACT = {"verify": "strict", "criterion": "last_step", "residual": "closed_form", "relaxation": 1.0}


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        kind: "target" or "draft", which draw alone; "target with noise", with noise in its last step. "sampler": the
            target alone with another sampler of its head. "window" (keep all) or "strict". "one step" for its draft.
        steps: autoregressive steps. gamma: steps a window, or a policy; None draws everything alone.
        options: of :class:`cspd.SpecDecodeRunner`.
        quick: whether ``--quick`` runs it, too.
        model: which of a pair's models drafts, or draws alone: "target", "draft", or a width of a one-step draft.
        twin: name of a setting that gives the very same tokens: strict ones depend on neither gamma nor branches. Only
            the time of this one is then measured, on one batch; its figure is its twin's.
    """

    kind: str
    name: str
    steps: int
    gamma: object = None
    options: dict = field(default_factory=dict)
    quick: bool = False
    model: str = "draft"
    twin: str | None = None

    def describe(self) -> dict:
        """Ready for JSON: policies by their ``repr``."""
        plain = (int, float, str, bool, type(None))
        options = {k: v if isinstance(v, plain) else repr(v) for k, v in self.options.items()}
        gamma = self.gamma if isinstance(self.gamma, plain) else repr(self.gamma)
        return {"kind": self.kind, "name": self.name, "steps": self.steps, "gamma": gamma, "options": options}


def settings(steps: int, fewer: tuple[int, ...], one_step: Sequence[str] = (), denoising: int = 40) -> list[Setting]:
    """All rows of a pair that is sampled in ``steps`` steps; the target alone in ``fewer``, too.

    ``one_step``: widths that are stated of its draft of one step, where it has one. ``denoising``: of its heads.
    """
    rows = [Setting("target", f"target, {n} steps", n, quick=n in (steps, fewer[-1])) for n in (steps, *fewer)]
    rows = [replace(row, model="target") for row in rows]
    noisy = {"criterion": EXACT["criterion"]}
    rows += [
        Setting("target with noise", f"target, {steps} steps, noise in the last", steps, None, noisy, True, "target")
    ]
    rows += samplers(steps, denoising)
    rows += [Setting("draft", f"draft, {steps} steps", steps, quick=True)]
    for relaxation in (1, 10, 42):
        for gamma in (4, 8):
            options = {"relaxation": float(relaxation)}
            rows += [Setting("window", f"window, relaxation {relaxation}, gamma {gamma}", steps, gamma, options)]
    one, exact4 = {"relaxation": 1.0}, {**EXACT, "num_candidates": 4}
    context = cspd.ContextRelaxation(least=1.0, most=42.0)
    first, several = "exact, gamma 2", "exact, gamma 2, 4 candidates"
    rows += [
        Setting("window", "window, relaxation 1, gamma 4, closed form", steps, 4, {**one, "residual": "closed_form"}),
        Setting("window", "window, last step, relaxation 1, gamma 4", steps, 4, {**EXACT, "verify": "window"}),
        Setting("window", "window, last step, relaxation 1, gamma 4, 4 candidates", steps, 4,
                {**exact4, "verify": "window"}),
        Setting("window", "window, relaxation by similarity, gamma 4", steps, 4,
                {"relaxation": cspd.SimilarityRelaxation(least=1.0, most=42.0)}),
        Setting("window", "window, relaxation 42, gamma by acceptance", steps, cspd.AdaptiveDraft(bound=0.97, most=16),
                {"relaxation": 42.0}),
        Setting("window", "window, relaxation 42, gamma by entropy", steps, cspd.EntropyDraft(most=8),
                {"relaxation": 42.0}),
        Setting("strict", "strict, relaxation 1, gamma 2", steps, 2, {"verify": "strict", **one}),
        Setting("strict", "strict, relaxation 42, gamma 4", steps, 4, {"verify": "strict", "relaxation": 42.0}),
        Setting("strict", first, steps, 2, EXACT, quick=True),
        Setting("strict", "exact, gamma 4", steps, 4, EXACT, twin=first),
        Setting("strict", "exact, gamma by entropy", steps, cspd.EntropyDraft(most=4), EXACT, twin=first),
        Setting("strict", several, steps, 2, exact4, quick=True),
        Setting("strict", "exact, gamma 4, 4 candidates", steps, 4, exact4, twin=several),
        Setting("strict", "exact, gamma 4, 4 candidates, 2 branches", steps, 4, {**exact4, "branches": 2},
                twin=several, quick=True),
        Setting("strict", "2 branches, gamma 4, relaxation by context", steps, 4,
                {**exact4, "branches": 2, "relaxation": context}),
    ]  # fmt: skip
    for width in one_step:
        own = {} if width == "the target's sigma" else {"target_sigma": True}
        name = f"one-step draft, {width}"
        rows += [
            Setting("one step", f"{name}, exact, gamma 2", steps, 2, {**EXACT, **own}, model=width),
            Setting("one step", f"{name}, window, relaxation 42, gamma 4", steps, 4,
                    {**EXACT, **own, "verify": "window", "relaxation": 42.0}, model=width),
        ]  # fmt: skip
    if one_step:
        rows += [Setting("one step", f"one-step draft alone, {steps} steps", steps, model=one_step[0])]
    return rows


def samplers(steps: int, denoising: int) -> list[Setting]:
    """The target alone with other samplers of its head: fewer denoising steps, annealed ones (DiSA), and DDIM."""
    half, few, least = denoising // 2, denoising // 4, denoising // 8
    chosen = {
        f"{half} denoising steps": {"sampling_steps": half},
        f"{few} denoising steps": {"sampling_steps": few},
        f"{denoising} to {least} denoising steps": {"sampling_steps": (denoising, least)},
        "DDIM": {"sampler": "ddim"},
        "DDIM, eta 1": {"sampler": "ddim", "eta": 1.0},
        f"DDIM, {half} denoising steps": {"sampler": "ddim", "sampling_steps": half},
        f"DDIM, {few} denoising steps": {"sampler": "ddim", "sampling_steps": few},
        f"DDIM, {denoising} to {least} denoising steps": {"sampler": "ddim", "sampling_steps": (denoising, least)},
    }
    return [
        Setting(
            "sampler",
            f"target, {name}",
            steps,
            None,
            options,
            isinstance(options.get("sampling_steps"), tuple),
            "target",
        )
        for name, options in chosen.items()
    ]
