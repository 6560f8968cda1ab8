"""The digits draft with a head of one step: ``python -m cspd.demo.train --drift`` makes ``drift.safetensors``.

The head (:class:`cspd.models.drift.DriftLoss`) takes the hidden states of the shipped draft, whose transformer it
shares. It is drawn towards tokens of the target's own head, for the target's hidden state at the same place. There are
32 of them for each of 12,288 places in real digits, of which 0 to 15 tokens are known. So it learns from the target (a
distillation): the data have one token for a condition, and a field between samples needs more.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise

from ..errors import CheckpointError
from ..models import MAR
from ..models.drift import DriftLoss
from ..whole.passes import conditions
from ..whole.weights import Weights
from .pair import DATA, DRAFT, TARGET, load_pair

FILE = "drift.safetensors"
CHANNELS = TARGET["vae_embed_dim"] * TARGET["patch_size"] ** 2
HEAD = (CHANNELS, DRAFT["decoder_embed_dim"], 3, 128)  # target channels, z channels, depth, width
PLACES, TOKENS = 12288, 32
BATCH, SAMPLES = 64, 16  # conditions of a step, and tokens and samples of each
RATE, LEAST = 2e-3, 0.02  # LEAST: a mean distance of pixels below which a condition counts as certain
LABEL_DROP = 0.1


@dataclass(frozen=True)
class Places:
    """N places of images: what the draft knows there, and what the target would draw."""

    z: torch.Tensor  # (N, Z) the draft's hidden state
    entropy: torch.Tensor  # (N,) of its attention
    tokens: torch.Tensor  # (N, M, C) the target's

    def __getitem__(self, index) -> Places:
        return Places(self.z[index], self.entropy[index], self.tokens[index])

    def __len__(self) -> int:
        return len(self.z)


@torch.no_grad()
def places(images, labels, target: MAR, draft: MAR, number: int = PLACES, seed: int = 0) -> Places:
    """``number`` places, as many for each number of known tokens; images (n, 1, 8, 8), labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    tokens, head, found = target.patchify(images), DiffusionHead.from_module(target.diffloss), []
    weights, length = [Weights(model, torch.float32) for model in (draft, target)], tokens.shape[1]
    each = number // length
    for known in range(length):
        chosen = torch.randint(len(tokens), (each,), generator=generator)
        order = torch.rand(each, length, generator=generator).argsort(1)
        drop = torch.rand(each, 1, generator=generator) < LABEL_DROP
        z = []
        for model, packed in zip((draft, target), weights):
            embedding = torch.where(drop, model.fake_latent, model.class_emb(labels[chosen]))
            where = order[:, known : known + 1]
            z.append(
                conditions(packed, tokens[chosen], order[:, :known], order.argsort(1), where, embedding, attention=True)
            )
        (own, entropy), (theirs, _) = z
        repeated = theirs[:, 0].repeat_interleave(TOKENS, dim=0)
        noise = PhiloxNoise(seed, torch.arange(len(repeated)) + known * each * TOKENS)
        drawn = denoise(head, repeated, noise.x_T(CHANNELS), noise).sample.view(each, TOKENS, CHANNELS)
        found.append(Places(own[:, 0], entropy[:, 0], drawn))
    return Places(*(torch.cat([getattr(part, name) for part in found]) for name in ("z", "entropy", "tokens")))


def train_drift(seen: Places, steps: int, seed: int = 0, echo=print) -> DriftLoss:
    """The head, trained on all but each eighth place, its width measured on those. In eval mode, averaged weights."""
    torch.manual_seed(seed)
    held = torch.arange(len(seen)) % 8 == 0
    train, test = seen[~held], seen[held]
    low, high = (float(train.entropy.quantile(q)) for q in (0.05, 0.95))
    head = DriftLoss(*HEAD, entropies=(low, high)).train()
    optimizer = torch.optim.AdamW(head.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / 100, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, k / steps))))
    )
    average, start = (
        {name: value.detach().clone() for name, value in head.net.state_dict().items()},
        time.perf_counter(),
    )
    for step in range(1, steps + 1):
        batch = train[torch.randint(len(train), (BATCH,))]
        loss = head(batch.tokens[:, torch.randperm(TOKENS)[:SAMPLES]], batch.z, batch.entropy)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        with torch.no_grad():
            for name, value in head.net.state_dict().items():
                average[name].lerp_(value, 1 - min(0.998, step / (step + 10)))
        if step % 500 == 0 or step == steps:
            echo(f"drift step {step}/{steps}: {time.perf_counter() - start:.0f} s")
    head.net.load_state_dict(average)
    head.eval()
    measured = measure(head, test)
    head.set_extra_state((measured["width"], low, high, head.least))
    echo("on places that it was not trained on: " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
    return head


@torch.no_grad()
def measure(head: DriftLoss, seen: Places) -> dict[str, float]:
    """How near the head's samples are to the target's tokens of the same places.

    ``width``: root mean square of a token of the target about a sample of the head, per channel. ``energy``: the energy
    distance of the two sets of a place, 0 where they have one law; ``energy of the mean``: of the target's mean token
    in the samples' place. ``spread``: mean distance of two samples over that of two of the target's tokens.
    """
    n, count, channels = seen.tokens.shape
    noise = torch.randn(n, count, channels, generator=torch.Generator().manual_seed(0))
    noise = noise * head.initial_scale(seen.entropy)[:, None, None]
    t = torch.zeros(n * count, dtype=torch.int64)
    made = head.net(noise.flatten(0, 1), t, seen.z.repeat_interleave(count, dim=0)).view(n, count, channels)

    def within(x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x, x).sum((1, 2)) / (count * (count - 1))

    def energy(x: torch.Tensor, own: torch.Tensor) -> float:
        return float((2 * torch.cdist(x, seen.tokens).mean((1, 2)) - own - within(seen.tokens)).mean())

    mean = seen.tokens.mean(1, keepdim=True).expand_as(seen.tokens)
    return {
        "width": float((made - seen.tokens).square().mean().sqrt()),
        "energy": energy(made, within(made)),
        "energy of the mean": energy(mean, torch.zeros(n)),
        "spread": float(within(made).mean() / within(seen.tokens).mean()),
    }


def load_drift(data: str | Path = DATA, width: float | None = None) -> MAR:
    """The shipped draft with the head of one step, in eval mode on the CPU.

    ``diffloss.std`` is the width of the Gaussian that is stated of its tokens: the measured one, or ``width``. Any is
    exact in a draft, whose tokens are drawn with it. The measured one covers all that the target might draw, and is so
    wide that next to nothing is accepted; the sigma of the target's last step accepts most.

    Raises:
        FileNotFoundError, ValueError: its weights are missing, or are others.
    """
    path = Path(data) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"the one-step head's weights {path} do not exist: reinstall the package, or make them with "
            "`python -m cspd.demo.train --drift`"
        )
    _, draft = load_pair(data)
    head = DriftLoss(*HEAD)
    try:
        head.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold the weights of the one-step head: {error}") from error
    if width is not None:
        head.set_extra_state((width, *head.entropies, head.least))
    draft.diffloss = head.eval()
    return draft
