"""Train a pair of the demo and write its files: ``python -m cspd.demo.train [--pair NAME] --out DIR``.

The target learns scikit-learn's handwritten digits, or the cloth of a formula; the draft is distilled from the
target. One CPU thread and fixed seeds, so the same versions on the same kind of processor give the same files.
The digits take about 55 minutes on an idle core, most of them for the draft; the cloth takes about 17.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save

from ..files import check_output, write_file
from ..models import MAR
from ..order import mask_of
from . import cloth, drift
from .pair import DATA, DRAFT, TARGET, load_model, load_pair
from .quality import statistics

BATCH = 64
EMA_DECAY = 0.998
LABEL_DROP = 0.1
DRIFT_STEPS = 3000
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


def few_of_each(images: torch.Tensor, labels: torch.Tensor, each: int = 4) -> bytes:
    """The first ``each`` digits of every class as a safetensors file, classes in turn: pixels 0..16, and labels."""
    places = [(labels == label).nonzero()[:each, 0] for label in range(10)]
    chosen = torch.stack(places, dim=1).flatten()
    tensors = {
        "images": ((images[chosen, 0] + 1) * 8).round().to(torch.uint8),
        "labels": labels[chosen].to(torch.uint8),
    }
    source = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI, doi:10.24432/C50P49"
    return save(tensors, {"source": source, "licence": "CC BY 4.0"})


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


def target_loss(model: MAR, batch, probe: nn.Module | None = None) -> torch.Tensor:
    """MAR's diffusion loss on the masked tokens.

    ``probe``, a linear layer, adds the squared error of its reading of z: the transformer learns from that much
    sooner than through the head and its noise. It is thrown away afterwards.
    """
    tokens, mask, labels, drop, rows = batch
    z = conditions(model, tokens, mask, labels, drop)
    loss = model.diffloss(tokens.flatten(0, 1)[rows], z.flatten(0, 1)[rows])
    return loss if probe is None else loss + (probe(z) - tokens)[mask > 0].square().mean()


def draft_loss(model: MAR, batch, target: MAR, match: float = 0.0) -> torch.Tensor:
    """Distance of the draft's noise estimate from the target's, on the same noisy tokens.

    It is what acceptance depends on: the density ratio compares the means that follow from it. The
    draft is only ever run at the steps of the sampling schedule, so it learns those.

    ``match`` weighs the squared distance of the conditions z themselves, for models whose z are alike.
    """
    tokens, mask, labels, drop, rows = batch
    with torch.no_grad():
        z_target = conditions(target, tokens, mask, labels, drop)
    z = conditions(model, tokens, mask, labels, drop)
    apart = match * (z - z_target)[mask > 0].square().mean() if match else 0.0
    z, z_target = z.flatten(0, 1)[rows], z_target.flatten(0, 1)[rows]
    x0 = tokens.flatten(0, 1)[rows]
    schedule = model.diffloss.gen_diffusion.schedule
    i = torch.randint(schedule.num_steps, (len(rows),))
    # Half of the rows among the later half of the steps only: the estimates near x_T, which is nearly
    # all noise, are easy, and their errors hardly reach the sample.
    i = torch.where(torch.rand(len(rows)) < 0.5, i // 2, i)
    acp = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32)[i, None]
    x = acp.sqrt() * x0 + (1 - acp).sqrt() * torch.randn_like(x0)
    t = torch.tensor(schedule.timesteps, dtype=torch.int64)[i]
    with torch.no_grad():
        wanted = target.diffloss.net(x, t, z_target)
    return (model.diffloss.net(x, t, z) - wanted).square().mean() + apart


def train(
    name: str, model: MAR, batches: Batches, loss_of, steps: int, rate: float, probe: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Minimise ``loss_of(model, batch)`` with AdamW; returns the averaged weights (contiguous, float32).

    ``probe``: another module whose parameters the loss has.
    """
    # In eval mode: there is no dropout, and labels are dropped by the batch, alike for both models.
    model.eval()
    parameters = [*model.parameters(), *(probe.parameters() if probe is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
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


def lay_out(model: MAR) -> None:
    """Start the position embeddings from waves over the rows and the columns: who is whose neighbour is learnt sooner.

    Half of the channels for each, sines and cosines of wavelengths from two tokens to twice a side.
    """
    side = model.seq_h
    for position in (
        model.encoder_pos_embed_learned,
        model.decoder_pos_embed_learned,
        model.diffusion_pos_embed_learned,
    ):
        frequency = torch.linspace(math.pi * 0.95, math.pi / (2 * side), position.shape[-1] // 4)
        wave = torch.arange(side)[:, None] * frequency
        wave = 0.5 * torch.cat([wave.sin(), wave.cos()], dim=1)
        both = torch.cat([wave[:, None].expand(-1, side, -1), wave.expand(side, -1, -1)], dim=2)
        position.data[0, -(side**2) :] = both.flatten(0, 1)


@dataclass(frozen=True)
class Recipe:
    """How a pair is made."""

    images: Callable[[], tuple[torch.Tensor, torch.Tensor]]  # and their labels
    target: dict
    draft: dict
    prefix: str  # of its files' names
    steps: int  # of the target
    rate: float
    draft_steps: int  # of each of the draft's cycles
    draft_rates: tuple[float, ...]  # of its cycles: a rate that falls and starts again gets further than a longer one
    probe: bool = False  # of the target: see target_loss and lay_out
    pruned: bool = False  # the draft starts as the target without its other blocks, and its z are matched, too
    half: bool = False  # weights are stored in float16
    reference: bool = False  # statistics of the data are stored, too, and a few images


RECIPES = {
    "digits": Recipe(
        load_digits, TARGET, DRAFT, "", steps=4000, rate=1e-3, draft_steps=10000, draft_rates=(2e-3, 1e-3, 1e-3),
        reference=True,
    ),
    "cloth": Recipe(
        partial(cloth.make_cloth, 30000), cloth.TARGET, cloth.DRAFT, "cloth-", steps=3000, rate=2e-3,
        draft_steps=2000, draft_rates=(2e-3, 2e-3), probe=True, pruned=True, half=True,
    ),
}  # fmt: skip


def train_target(recipe: Recipe, steps: int, seed: int) -> tuple[MAR, dict[str, torch.Tensor]]:
    """The target and its weights, as they are stored."""
    torch.manual_seed(seed)
    target, probe = MAR(**recipe.target), None
    if recipe.probe:
        lay_out(target)
        probe = nn.Linear(recipe.target["decoder_embed_dim"], target.token_embed_dim)
    loss_of = partial(target_loss, probe=probe)
    weights = train("target", target, Batches(*recipe.images(), target), loss_of, steps, recipe.rate, probe)
    if recipe.half:
        weights = {key: value.half() for key, value in weights.items()}
        target.load_state_dict(weights)  # the draft learns from what will be loaded
    return target, weights


def prune(target: MAR, draft: MAR) -> None:
    """Start a draft of the same widths as the target's first encoder blocks and last decoder blocks, and all else."""
    weights, skipped = target.state_dict(), len(target.decoder_blocks) - len(draft.decoder_blocks)

    def source(name: str) -> str:
        part, _, rest = name.partition(".")
        if part != "decoder_blocks":
            return name
        block, _, rest = rest.partition(".")
        return f"{part}.{int(block) + skipped}.{rest}"

    draft.load_state_dict({name: weights[source(name)] for name in draft.state_dict()})


def train_draft(recipe: Recipe, target: MAR, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The weights of the draft, distilled from the target."""
    # Seeded again, so that the draft is the same whether or not the target was trained just now.
    torch.manual_seed(seed + 1)
    draft = MAR(**recipe.draft)
    if recipe.pruned:
        prune(target, draft)
    images, labels = recipe.images()
    loss_of = partial(draft_loss, target=target, match=0.1 if recipe.pruned else 0.0)
    for cycle, rate in enumerate(recipe.draft_rates):
        if cycle:
            torch.manual_seed(seed + 1 + cycle)  # a cycle can be repeated from the weights before it
        weights = train("draft", draft, Batches(images, labels, draft), loss_of, steps, rate)
    return weights


def _drift(out: Path, steps: int, seed: int) -> None:
    check_output(out / drift.FILE, "--out")
    target, draft = load_pair()
    head = drift.train_drift(drift.places(*load_digits(), target, draft, seed=seed), steps, seed)
    write_file(out / drift.FILE, save({k: v.contiguous() for k, v in head.state_dict().items()}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cspd.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--pair", choices=list(RECIPES), default="digits")
    parser.add_argument("--out", type=Path, help="folder of the files (default: for the digits, the package's own)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the target")
    parser.add_argument("--draft-steps", type=int, help="optimizer steps of each of the draft's cycles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drift", action="store_true", help="train the digits draft's head of one step, nothing else")
    parser.add_argument("--keep-target", action="store_true", help="distil the draft from the target that is in --out")
    args = parser.parse_args(arguments)
    recipe = RECIPES[args.pair]
    if args.out is None and args.pair != "digits":
        parser.error(f"expected --out with --pair {args.pair}: its files are not in the package")
    out = args.out or DATA
    out.mkdir(parents=True, exist_ok=True)
    if args.drift:
        if args.pair != "digits":
            parser.error(f"expected --drift with the digits alone, got --pair {args.pair}")
        torch.set_num_threads(1)
        return _drift(out, DRIFT_STEPS if args.steps is None else args.steps, args.seed)
    paths = {name: out / f"{recipe.prefix}{name}.safetensors" for name in ("reference", "digits", "target", "draft")}
    for path in paths.values():
        check_output(path, "--out")
    # More threads would split the sums differently, and the files would depend on the machine's cores.
    torch.set_num_threads(1)

    def number(given: int | None, usual: int) -> int:
        return usual if given is None else given

    def write(name: str, weights: dict[str, torch.Tensor]) -> None:
        write_file(paths[name], save({k: v.half() if recipe.half else v for k, v in weights.items()}))

    if recipe.reference:
        mean, covariance = (torch.from_numpy(array) for array in statistics(recipe.images()[0]))
        write_file(paths["reference"], save({"mean": mean, "covariance": covariance}))
        write_file(paths["digits"], few_of_each(*recipe.images()))
    if args.keep_target:
        target = load_model(recipe.target, paths["target"])
    else:
        target, weights = train_target(recipe, number(args.steps, recipe.steps), args.seed)
        write("target", weights)
    write("draft", train_draft(recipe, target, number(args.draft_steps, recipe.draft_steps), args.seed))


if __name__ == "__main__":
    main()
