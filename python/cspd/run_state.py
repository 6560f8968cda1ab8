"""What the steps of a run work on: its models, its plan and the buffers that they write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from cspd_kernels import DiffusionHead
from cspd_kernels.ops.denoise import automatic_tolerance
from cspd_kernels.ops.denoise.parallel import AUTO

from .candidates import Drafted
from .entropy_draft import EntropyDraft
from .order import Pass, Plan
from .policies import Window
from .whole.noise import PhiloxSource, TableSource
from .whole.transformers import ByMasks, ByTables, ByWeights


@dataclass(frozen=True)
class Model:
    """What a run needs of one of its models."""

    name: str
    head: DiffusionHead
    transformer: ByWeights | ByTables | ByMasks
    embedding: torch.Tensor  # (B or 2 B, E): of the classes, then, under guidance, of no class
    initial_scale: Callable[[torch.Tensor], torch.Tensor] | None = None  # of x_T, by the entropy of the attention


def class_embedding(model, bsz: int, labels: torch.Tensor | None, guided: bool) -> torch.Tensor:
    """(B or 2 B, E): of labels (B,) or, without, of no class; under guidance of no class again behind."""
    none = model.fake_latent.repeat(bsz, 1)
    embedding = none if labels is None else model.class_emb(labels)
    return torch.cat([embedding, none]) if guided else embedding


# Of a strict run, with a row for each image.
_BUFFERS = ("tokens", "outcome", "probability", "at", "entropy", "previous_target_z")


@dataclass
class RunState:
    """What the steps of one run share. All tensors are on the models' device; the buffers are written in place."""

    tokens: torch.Tensor  # (B, L, C) float32 buffer: grows step by step
    plan: Plan
    target: Model
    noise: PhiloxSource | TableSource
    temperature: float
    backend: str | None
    parallel_tol: float | str | None  # of both heads, as in denoise
    draft: Model | None = None  # None where the target is alone, with all that follows
    prefilled: int = 0  # how many of the plan's steps are the target's alone
    outcome: torch.Tensor | None = None  # (B, L) int8 buffer: what became of each token, as in RunStats
    probability: torch.Tensor | None = None  # (B, L) float32 buffer: of acceptance, as in RunStats
    relaxation: float | torch.Tensor | Callable[[Window], torch.Tensor] = 1.0  # a tensor has one per position, (L,)
    rule: dict = field(default_factory=dict)  # options of accept_reject: sigma, max_tries, residual, target_sigma
    drafted: Drafted | None = None
    previous_target_z: torch.Tensor | None = None  # (B, Z) buffer for policies: of the target's last token
    candidates: int = 1  # K of every drafted token
    criterion: str = "trajectory"  # one of :data:`cspd.candidates.CRITERIA`
    at: torch.Tensor | None = None  # (B,) int64 buffer: each image's next step of the plan, of strict runs
    ends: EntropyDraft | None = None  # what ends a window by the draft's attention
    annealed: tuple[dict[str, Model], ...] = ()  # of each of the plan's steps, by role, where their heads differ
    entropy: torch.Tensor | None = None  # (B,) buffer of its state, of strict runs; in windows it is the host's

    @property
    def chains(self) -> int:
        """Chains of a drafted token, and as many when the target looks at it."""
        return self.candidates if self.criterion == "trajectory" else 1

    def go_to(self, step: int) -> None:
        """Take the heads of one of the plan's steps: those of a window are of its first one."""
        for role, model in self.annealed[step].items() if self.annealed else ():
            setattr(self, role, model)

    def make_room(self) -> None:
        """Make room for what the draft will draw, if it draws anything."""
        steps = self.plan.steps[self.prefilled :]
        if not steps:
            return
        sizes = {len(self.tokens) * (step.before - step.after) * self.chains for step in steps}
        # Of annealed steps there are trajectories of several lengths, which are not kept.
        sweeps = not self.annealed and any(tolerance_of(self, self.draft.head, size) is not None for size in sizes)
        hidden = self.draft.head.cond_channels if callable(self.relaxation) else 0
        self.drafted = Drafted(
            *self.tokens.shape[:2], self.draft.head, self.draft.head.num_steps if sweeps else 0, hidden,
            self.chains, 0 if self.criterion == "trajectory" else self.candidates,
        )  # fmt: skip

    def of_images(self, index: torch.Tensor) -> RunState:
        """The state of some of the images (n,) int64 of a strict run, as a copy; :meth:`take_back` has the way back."""

        def of(value: torch.Tensor | None) -> torch.Tensor | None:
            return None if value is None else value[index]

        def of_model(model: Model) -> Model:
            embedding = model.embedding.view(-1, len(self.tokens), model.embedding.shape[-1])[:, index].flatten(0, 1)
            return replace(model, embedding=embedding)

        return replace(
            self,
            plan=self.plan.of_images(index),
            noise=self.noise.of_images(index),
            draft=of_model(self.draft),
            target=of_model(self.target),
            **{name: of(getattr(self, name)) for name in _BUFFERS},
        )

    def take_back(self, part: RunState, index: torch.Tensor) -> None:
        """Write what became of some of the images."""
        for name in _BUFFERS:
            mine, theirs = getattr(self, name), getattr(part, name)
            if mine is None and theirs is not None:  # made by the first round of all images
                setattr(self, name, theirs)
            elif mine is not None:
                mine[index] = theirs

    def write(self, plan: Pass, tokens: torch.Tensor) -> None:
        """Put (B n, C) tokens at the positions of a pass."""
        tokens = tokens.to(self.tokens.dtype).view(*plan.where.shape, -1)
        self.tokens.scatter_(1, plan.where[..., None].expand_as(tokens), tokens)

    def remember(self, z: torch.Tensor) -> None:
        """Keep the hidden state of the last of the tokens (B, n, Z) that the target looked at, for a policy."""
        if not callable(self.relaxation):
            return
        if self.previous_target_z is None:
            self.previous_target_z = z[:, -1].clone()
        else:
            self.previous_target_z.copy_(z[:, -1])


def tolerance_of(state: RunState, head: DiffusionHead, tokens: int) -> float | None:
    """``parallel_tol`` of a head's call, "auto" resolved: a trajectory comes back only where a number is asked for."""
    if state.parallel_tol != AUTO:
        return state.parallel_tol
    return automatic_tolerance(head, tokens, 2 if state.plan.guided else 1, state.backend)
