"""What the experiments share: heads with conditions, their chains in pieces, and the file of results."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cspd.demo.pair import load_pair
from cspd.models import DiffLoss
from cspd.transformer import conditions
from cspd_kernels import DiffusionHead
from cspd_kernels.ops.denoise import reference
from cspd_kernels.testing import randomize_

sys.path.append(str(Path(__file__).parent.parent))  # the folder of benchmarks
from rows import write_results

RESULTS = Path(__file__).parent.parent / "results" / "experiments-cpu.json"
KNOWN = (0, 4, 10)  # so many tokens of 16 are known where a condition is taken


class Chain:
    """A head's chain without guidance, at temperature 1, in float32: one step is
    ``x <- mean_x0[i] x0(x) + mean_x[i] x + exp(log_std(x)) z``. Tables are (T,)."""

    def __init__(self, head: DiffusionHead, cond: torch.Tensor):
        s = head.schedule
        self.head, self.steps, self.channels, self.tokens = head, head.num_steps, head.channels, len(cond)
        self.c = F.linear(cond, head.cond_weight, head.cond_bias)
        upper = s.log_std_upper if head.learned_variance else s.log_std_lower
        self.x0_x, self.x0_out, self.mean_x0, self.mean_x, self.upper, self.lower = (
            torch.tensor(v, dtype=torch.float32)
            for v in (s.x0_x, s.x0_out, s.mean_x0, s.mean_x, upper, s.log_std_lower)
        )
        self.learned_variance = head.learned_variance

    @torch.no_grad()
    def evaluate(self, x: torch.Tensor, step: torch.Tensor, token: torch.Tensor):
        """(x0, log_std) of rows x (R, C), each of a step and a token (R,), in one call of the network."""
        out = reference.network(self.head, x, self.head.time_embedding[step] + self.c[token])
        eps = out[:, : self.channels]
        f = (out[:, self.channels :] + 1) / 2 if self.learned_variance else torch.ones_like(x)
        log_std = f * self.upper[step, None] + (1 - f) * self.lower[step, None]
        return self.x0_x[step, None] * x + self.x0_out[step, None] * eps, log_std


def heads(quick: bool) -> Iterator[tuple[str, DiffusionHead, torch.Tensor]]:
    """(name, head, conditions); quick: the smallest and one of random weights, few conditions each."""
    images = 2 if quick else 8
    models = dict(zip(("digits target, 40 steps", "digits draft, 40 steps"), load_pair()))
    target = models["digits target, 40 steps"]
    torch.manual_seed(0)
    np.random.seed(0)  # the orders of tokens
    labels = torch.arange(images) % 10
    with torch.no_grad():
        tokens = target.patchify(target.sample_tokens(images, num_iter=target.seq_len, labels=labels))
        for name, model in list(models.items())[1 if quick else 0 :]:
            yield name, DiffusionHead.from_module(model.diffloss), _conditions(model, tokens, labels)
    if not quick and (trained := _head_of_100_steps()) is not None:
        yield trained
    for schedule in ("linear",) if quick else ("linear", "cosine"):
        steps = 20 if quick else 100
        torch.manual_seed(1)
        module = randomize_(DiffLoss(4, 32, 3, 64, str(steps), schedule=schedule), seed=2).eval()
        cond = torch.randn(len(KNOWN) * images, 32)
        yield f"random weights, {schedule}, {steps} steps", DiffusionHead.from_module(module), cond


def _conditions(model, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(3 images, Z): of one unknown token of every image, given none, some and most of the others."""
    rows = []
    for known in KNOWN:
        order = torch.stack([torch.randperm(model.seq_len) for _ in tokens])
        given, where = order[:, :known].sort(1).values, order[:, known : known + 1]
        rows.append(conditions(model, tokens, given, model.class_emb(labels), where).flatten(0, 1))
    return torch.cat(rows)


def _head_of_100_steps():
    """The demo's trained head with learned variance; None where the package has none."""
    try:
        module, cond = importlib.import_module("cspd.demo.head").load_head(images=8)
    except (ImportError, FileNotFoundError):
        return None
    return "digits head, learned variance, 100 steps", DiffusionHead.from_module(module), cond


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small heads and few tokens: whether it runs")
    parser.add_argument("--json", type=Path, help=f"write the rows here (committed: {RESULTS.name})")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    return parser


def write(path: Path | None, experiment: str, rows: list[dict], **settings) -> None:
    """The rows of an experiment and its settings; those of the others in the file stay."""
    if path is None:
        return
    before = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    others = [row for row in before["rows"] if row["experiment"] != experiment]
    both = before.get("settings", {}) | {experiment: settings}
    write_results(path, others + [{"experiment": experiment, **row} for row in rows], settings=both)
    print(f"wrote {path}")
