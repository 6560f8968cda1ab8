"""From settings to pixels: the models of a run, and one batch made with them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..checks import check_run
from ..errors import InvalidInput
from ..reporting import Callback
from ..speculative import SpecDecodeRunner
from .settings import Settings

_MEANS = ("acceptance", "raw_acceptance", "fallback")  # over the drafted tokens
_SUMS = ("drafted", "prefilled", "target_calls", "draft_calls")
_ROUNDS = ("rounds", "steps_per_round", "target_rows", "candidates")  # batches of earlier versions do not tell them


@dataclass(frozen=True)
class Batch:
    """What was made of one batch: B images."""

    number: int
    latents: torch.Tensor  # (B, c, h, w) on the CPU
    pixels: np.ndarray | None  # (B, H, W, 3) uint8; None where they were not wanted
    statistics: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)


class Models:
    """The models of a run.

    Attributes:
        settings: as given, the number of classes, the patch size and the stride filled in.
        classes: how many the models have.
        latent_size: (c, h, w). image_size: (height, width), or None without a VAE.
        loaded: what was loaded, for people.

    Raises:
        FileNotFoundError, ValueError: a checkpoint that cannot be read, models that do not fit together, or settings
            that they cannot run.
    """

    def __init__(self, args, settings: Settings, device: torch.device):
        self.vae = None
        if settings.digits:
            from ..demo.pair import load_pair

            target, draft = (model.to(device) for model in load_pair())
        else:
            from ..checkpoints import load_mar

            options = dict(
                num_sampling_steps=settings.num_sampling_steps, patch_size=args.patch_size, vae_stride=args.vae_stride
            )
            target = load_mar(args.target, device=device, **options)
            draft = load_mar(args.draft, device=device, **options) if args.draft else None
            settings = replace(settings, patch_size=target.patch_size, vae_stride=target.vae_stride)
        if args.vae:
            from ..vae import load_vae

            self.vae = load_vae(args.vae, device=device, dtype=settings.vae_dtype)
            self.vae.check(target)
        parts = {"target": target, "draft": draft, "vae": self.vae}
        self.loaded = {role: text for role, part in parts.items() if (text := getattr(part, "loaded", None))}
        self.classes = min(model.num_classes for model in (target, draft or target))
        self.latent_size = (target.vae_embed_dim, target.seq_h * target.patch_size, target.seq_w * target.patch_size)
        stride = 1 if settings.digits else self.vae.stride if self.vae else None
        self.image_size = stride and tuple(stride * side for side in self.latent_size[1:])
        _check_classes(settings, self.classes)
        if settings.labels is None and settings.classes is None:
            settings = replace(settings, classes=self.classes)
        self.settings = settings
        self._runner = SpecDecodeRunner(
            draft or target,
            target,
            settings.relaxation,
            settings.prefill,
            dtype=getattr(torch, settings.dtype),
            residual=settings.residual,
            target_sigma=settings.target_sigma,
            verify=settings.verify,
            num_candidates=settings.candidates,
            branches=settings.branches,
            criterion=settings.criterion,
            parallel_tol=settings.parallel_tol,
        )
        check_run(
            draft or target,
            target,
            settings.batch_size,
            None,
            settings.temperature,
            settings.cfg,
            settings.seed,
            0,
            None,
        )

    def make(self, number: int, pixels: bool, callback: Callback | None = None) -> Batch:
        """Make a batch, whole. ``pixels``: whether they are wanted. ``callback``: as of the runner."""
        settings, count = self.settings, self.settings.batch_size
        first = number * count
        images = self._runner.run(
            count,
            settings.steps,
            settings.gamma,
            settings.cfg_schedule,
            torch.tensor([settings.label(image) for image in range(first, first + count)]),
            settings.temperature,
            settings.cfg,
            seed=settings.seed,
            first_image=first,
            callback=callback,
        )
        stats = images.stats.to_dict()
        start = time.perf_counter()
        made = self._pixels(images) if pixels else None
        seconds = stats["seconds"] | {"decode": time.perf_counter() - start}
        return Batch(number, images.cpu(), made, {name: stats[name] for name in (*_MEANS, *_SUMS, *_ROUNDS)}, seconds)

    def _pixels(self, latents: torch.Tensor) -> np.ndarray:
        if self.vae is None:
            from ..demo.picture import to_pixels

            return to_pixels(latents).cpu().numpy()[..., None].repeat(3, -1)
        from ..vae import to_uint8

        return to_uint8(self.vae.decode(latents)).numpy()


def _check_classes(settings: Settings, classes: int) -> None:
    labels, wanted = settings.labels, settings.classes
    if wrong := sorted({label for label in labels or [] if not 0 <= label < classes}):
        more = ", ..." if len(wrong) > 5 else ""
        raise InvalidInput(f"expected labels in 0..{classes - 1}, got {', '.join(map(str, wrong[:5]))}{more}")
    if wanted is not None and wanted > classes:
        raise InvalidInput(f"expected --classes at most the model's {classes}, got {wanted}")


def merge_statistics(records: list[dict]) -> tuple[dict, dict]:
    """(statistics, seconds by phase) of many batches: sums, and means over the drafted tokens."""
    statistics: dict = {"batches": len(records)}
    drafted = sum(record["statistics"]["drafted"] for record in records)
    for name in _MEANS:
        values = [(record["statistics"][name], record["statistics"]["drafted"]) for record in records]
        statistics[name] = sum(value * weight for value, weight in values if weight) / drafted if drafted else None
    for name in _SUMS:
        statistics[name] = sum(record["statistics"][name] for record in records)
    statistics |= _rounds([record["statistics"] for record in records])
    seconds: dict = {}
    for record in records:
        for name, value in record["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + value
    return statistics, seconds


def _rounds(records: list[dict]) -> dict:
    """What the runner tells of rounds, of all batches together; None where a batch does not tell it."""
    if not all(name in record for record in records for name in _ROUNDS):
        return dict.fromkeys(_ROUNDS)
    # Every batch moves as many images by as many steps: the mean over all rounds is that of the rounds a step.
    per_round = [record["steps_per_round"] for record in records if record["steps_per_round"]]
    ways = zip(*(record["candidates"] for record in records if record["rounds"]))
    return {
        "rounds": sum(record["rounds"] for record in records),
        "steps_per_round": len(per_round) / sum(1 / steps for steps in per_round) if per_round else None,
        "target_rows": sum(record["target_rows"] for record in records),
        "candidates": [sum(counts) for counts in ways],
    }
