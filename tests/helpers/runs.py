"""Runs of ``cspd generate`` that take no time, and what they leave."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from cspd.output import SampleOutput

TEN = ["generate", "--num-images", "10", "--batch-size", "4", "--latents", "--out"]
GOES_ON = "what was written stays; run the same command again to make the rest"


class Runner:
    """Stands in for the runner: an image is a function of the seed and its number; notes what it is asked."""

    runs: list[tuple[int, int, list[int]]] = []

    def __init__(self, draft, target, *rule, **options):
        self.size = (target.vae_embed_dim, target.seq_h * target.patch_size, target.seq_w * target.patch_size)

    def run(self, count, steps, gamma, schedule, labels, temperature, cfg, *, seed, first_image, callback=None):
        Runner.runs.append((count, first_image, labels.tolist()))
        images = torch.stack([self.image(seed, first_image + i) for i in range(count)])
        return SampleOutput.of(images, self.stats)

    def image(self, seed, number):
        return torch.rand(self.size, generator=torch.Generator().manual_seed(1000 * seed + number)) * 2 - 1

    @property
    def stats(self):
        kept = dict(acceptance=0.5, raw_acceptance=0.25, fallback=0.0, drafted=12, prefilled=4)
        kept |= dict(rounds=2, steps_per_round=1.5, target_rows=2, candidates=[6])
        return SimpleNamespace(to_dict=lambda: kept | dict(target_calls=3, draft_calls=2, seconds={"total": 1.0}))


class Vae:
    """Three of four channels, enlarged."""

    channels, stride, loaded = 4, 2, "a VAE for tests"

    def decode(self, latents):
        return latents[:, :3].tanh().repeat_interleave(2, 2).repeat_interleave(2, 3)

    def check(self, model):
        if model.vae_embed_dim != self.channels:
            raise ValueError(f"expected a VAE of {model.vae_embed_dim} channels, got one of {self.channels}")


def contents(folder, kind="png"):
    """The images' bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"0*.{kind}"))}


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def one_line(capsys):
    """The one line on stderr, after the command's name."""
    error = capsys.readouterr().err
    assert error.startswith("cspd generate: ")
    assert error.count("\n") == 1
    return error.removeprefix("cspd generate: ").rstrip("\n")
