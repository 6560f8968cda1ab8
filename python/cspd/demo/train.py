"""Train the demo's pair and write its three files: ``python -m cspd.demo.train --out DIR``.

The target learns scikit-learn's handwritten digits; the draft is distilled from the target. One
CPU thread and fixed seeds, so the same versions on the same kind of processor give the same files.
It takes about 55 minutes on an idle core, most of them for the draft.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save

from ..files import check_output, write_file
from ..models import MAR
from ..order import mask_of
from .pair import DATA, DRAFT, TARGET, load_model
from .quality import statistics

BATCH = 64
EMA_DECAY = 0.998
TARGET_RATE = 1e-3
DRAFT_RATES = (2e-3, 1e-3, 1e-3)  # of its cycles: a rate that falls and starts again gets further than a longer one
LABEL_DROP = 0.1
# One loss step needs a fair number of diffusion draws even where only a few tokens are masked.
DRAWS_PER_IMAGE = 16


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits (n, 1, 8, 8) float32 in [-1, 1] and their labels (n,) int64."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SystemExit(
            "python -m cspd.demo.train needs scikit-learn for its digits: install the extra `dev`, "
            "or `pip install scikit-learn`"
        ) from error
    digits = load()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.as_tensor(digits.target, dtype=torch.int64)


def conditions(model: MAR, tokens, mask, labels, drop) -> torch.Tensor:
    """The decoder's output (B, L, Z) for tokens (B, L, C), mask (B, L), labels (B,); ``drop`` (B, 1) drops labels."""
    embedding = torch.where(drop, model.fake_latent, model.class_emb(labels))
    return model.forward_mae_decoder(model.forward_mae_encoder(tokens, mask, embedding), mask)


class Batches:
    """Random batches with random orders, and a masked count that visits 1..L equally often.

    Sampling draws about one token a step, so every count matters alike; MAR's own distribution of
    counts, made for 64 steps of many tokens, hardly ever trains the last ones.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, model: MAR):
        self.tokens, self.labels = model.patchify(images), labels
        self.counts: list[int] = []

    def next(self):
        """tokens (B, L, C), mask (B, L), labels (B,), drop (B, 1), and the rows (R,) of B L to draw noise for."""
        length = self.tokens.shape[1]
        if not self.counts:
            self.counts = (torch.randperm(length) + 1).tolist()
        masked = self.counts.pop()
        chosen = torch.randint(len(self.tokens), (BATCH,))
        mask = mask_of(torch.rand(BATCH, length).argsort(1), masked)
        rows = mask.flatten().nonzero()[:, 0].repeat(max(1, round(DRAWS_PER_IMAGE / masked)))
        return self.tokens[chosen], mask, self.labels[chosen], torch.rand(BATCH, 1) < LABEL_DROP, rows


def target_loss(model: MAR, batch) -> torch.Tensor:
    """MAR's diffusion loss on the masked tokens."""
    tokens, mask, labels, drop, rows = batch
    z = conditions(model, tokens, mask, labels, drop)
    return model.diffloss(tokens.flatten(0, 1)[rows], z.flatten(0, 1)[rows])


def draft_loss(model: MAR, batch, target: MAR) -> torch.Tensor:
    """Distance of the draft's noise estimate from the target's, on the same noisy tokens.

    It is what acceptance depends on: the density ratio compares the means that follow from it. The
    draft is only ever run at the steps of the sampling schedule, so it learns those.
    """
    tokens, mask, labels, drop, rows = batch
    with torch.no_grad():
        z_target = conditions(target, tokens, mask, labels, drop).flatten(0, 1)[rows]
    z = conditions(model, tokens, mask, labels, drop).flatten(0, 1)[rows]
    x0 = tokens.flatten(0, 1)[rows]
    schedule = model.diffloss.gen_diffusion.schedule
    i = torch.randint(schedule.num_steps, (len(rows),))
    # Half of the rows among the later half of the steps only: the estimates near x_T, which is nearly
    # all noise, are easy, and their errors hardly reach the sample.
    i = torch.where(torch.rand(len(rows)) < 0.5, i // 2, i)
    acp = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32)[i, None]
    x = acp.sqrt() * x0 + (1 - acp).sqrt() * torch.randn_like(x0)
    t = torch.tensor(schedule.timesteps)[i]
    with torch.no_grad():
        wanted = target.diffloss.net(x, t, z_target)
    return (model.diffloss.net(x, t, z) - wanted).square().mean()


def train(name: str, model: MAR, batches: Batches, loss_of, steps: int, rate: float) -> dict[str, torch.Tensor]:
    """Minimise ``loss_of(model, batch)`` with AdamW; returns the averaged weights (contiguous, float32)."""
    # In eval mode: there is no dropout, and labels are dropped by the batch, alike for both models.
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = min(200, max(1, steps // 10))
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, k / steps)))),
    )
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    start, running = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of(model, batches.next())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        running += loss.item()
        if step % 200 == 0 or step == steps:
            mean = running / ((step - 1) % 200 + 1)
            print(f"{name} step {step}/{steps}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            running = 0.0
    model.load_state_dict(average)
    return {key: value.contiguous() for key, value in average.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cspd.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the three files (default: the package's own)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of the target")
    parser.add_argument("--draft-steps", type=int, default=10000, help="optimizer steps of each of the draft's cycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-target", action="store_true", help="distil the draft from the target that is in --out")
    args = parser.parse_args(arguments)
    images, labels = load_digits()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("reference", "target", "draft"):
        check_output(args.out / f"{name}.safetensors", "--out")
    # More threads would split the sums differently, and the files would depend on the machine's cores.
    torch.set_num_threads(1)

    mean, covariance = (torch.from_numpy(array) for array in statistics(images))
    write_file(args.out / "reference.safetensors", save({"mean": mean, "covariance": covariance}))
    if args.keep_target:
        target = load_model(TARGET, args.out / "target.safetensors")
    else:
        torch.manual_seed(args.seed)
        target = MAR(**TARGET)
        weights = train("target", target, Batches(images, labels, target), target_loss, args.steps, TARGET_RATE)
        write_file(args.out / "target.safetensors", save(weights))
    # Seeded again, so that the draft is the same whether or not the target was trained just now.
    torch.manual_seed(args.seed + 1)
    draft = MAR(**DRAFT)
    loss_of = partial(draft_loss, target=target)
    for cycle, rate in enumerate(DRAFT_RATES):
        if cycle:
            torch.manual_seed(args.seed + 1 + cycle)  # a cycle can be repeated from the weights before it
        weights = train("draft", draft, Batches(images, labels, draft), loss_of, args.draft_steps, rate)
    write_file(args.out / "draft.safetensors", save(weights))


if __name__ == "__main__":
    main()
