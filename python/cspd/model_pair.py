"""A runner's two models, packed for its runs."""

from __future__ import annotations

import torch

from cspd_kernels import DiffusionHead

from .check_heads import sampled
from .checks import check_initial_scale
from .diffusions import Tables
from .heads import HeadCache, unwrapped
from .order import Step
from .run_state import Model, class_embedding
from .sampling import OWN, Sampling
from .whole.chosen import ChosenTransformer, training
from .whole.transformers import ByMasks, ByTables, ByWeights


class ModelPair:
    """The draft and the target: whatever of them is packed is looked at again at every run.

    Attributes:
        models: by their roles, "draft" and "target"; so all that follows.
    """

    def __init__(self, draft, target, backend: str | None, sampling: Sampling = OWN):
        self.models = {"draft": draft, "target": target}
        self._sampling = sampling
        self._caches: dict[str, HeadCache] = {}
        self._diffusions: dict[str, Tables] = {}
        self._chosen = {"draft": ChosenTransformer(draft, "the draft", backend)}
        same = target is draft
        self._chosen["target"] = self._chosen["draft"] if same else ChosenTransformer(target, "the target", backend)
        for transformer in self._chosen.values():
            if not training(transformer.model):
                transformer.compare()

    def transformers(self, dtype: torch.dtype | None) -> dict[str, ByWeights | ByTables | ByMasks]:
        """The transformers of the models as they are now; on a device the host may wait if code has changed."""
        return {role: transformer.get(dtype) for role, transformer in self._chosen.items()}

    def heads(self, dtype: torch.dtype | None, planned: list[Step], steps: int) -> list[dict[str, DiffusionHead]]:
        """As their weights, their networks and their schedules are now: of each of the planned steps, out of ``steps``,
        where they anneal, else of all of them."""
        return [
            {role: self._head(role, dtype, step.index, steps) for role in self.models}
            for step in (planned if self._sampling.anneals else planned[:1])
        ]

    def of_run(self, heads, transformers, bsz: int, labels: torch.Tensor | None, guided: bool) -> dict[str, Model]:
        """What a run of ``bsz`` images needs of them; labels on the models' device.

        Raises:
            ValueError: a head scales its first noise by an attention that its transformer does not show.
        """
        models = {}
        for role, model in self.models.items():
            embedding = class_embedding(model, bsz, labels, guided)
            scale = getattr(model.diffloss, "initial_scale", None)
            models[role] = Model(type(model).__name__, heads[role], transformers[role], embedding, scale)
        check_initial_scale(models)
        return models

    def packed(self) -> list[ByWeights]:
        """Whose weights are kept."""
        return [packed for transformer in self._chosen.values() for packed in transformer.packed()]

    def lines(self) -> list[str]:
        """For people: the role, the class and the size of each."""
        sizes = {role: sum(value.numel() for value in _parameters(model)) for role, model in self.models.items()}
        return [f"{role}: {type(self.models[role]).__name__}, {n / 1e6:.3g} M parameters" for role, n in sizes.items()]

    def _head(self, role: str, dtype: torch.dtype | None, step: int, steps: int) -> DiffusionHead:
        diffloss = self.models[role].diffloss
        net, _ = unwrapped(diffloss.net)
        if role not in self._caches or self._caches[role].net is not net:
            self._caches[role] = HeadCache(net)
        if role not in self._diffusions or self._diffusions[role].diffusion is not diffloss.gen_diffusion:
            self._diffusions[role] = Tables(diffloss.gen_diffusion)
        return self._caches[role].get(sampled(self._sampling, self._diffusions[role].schedule(), step, steps), dtype)


def _parameters(model) -> list[torch.Tensor]:
    return list(model.parameters()) if hasattr(model, "parameters") else []
