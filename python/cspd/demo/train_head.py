"""Train the demo's head of 100 steps and write its file: ``python -m cspd.demo.train_head --out DIR``.

It learns the digits' tokens under the conditions of the shipped pair's target. One CPU thread and a fixed seed, so the
same versions on the same kind of processor give the same file. It takes about five minutes on an idle core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save

from ..files import check_output, write_file
from ..models import DiffLoss
from .head import FILE, draw, new_head
from .pair import DATA, load_pair
from .train import load_digits

BATCH = 128
RATE = 3e-3
POSITIONS = 2  # of a digit, in one batch


def train(steps: int, seed: int) -> DiffLoss:
    """The head after so many steps of AdamW, the rate rising to ``RATE`` and falling again."""
    images, labels = load_digits()
    model = load_pair()[0]
    tokens = model.patchify(images)
    torch.manual_seed(seed)
    head = new_head()
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0)
    ramp = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    start, running = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        chosen = torch.randint(len(tokens), (BATCH,))
        known = int(torch.randint(model.seq_len - POSITIONS + 1, ()))
        with torch.no_grad():
            z, x = draw(model, tokens[chosen], labels[chosen], known, POSITIONS)
        loss = head(x, z)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        running += loss.item()
        if step % 200 == 0 or step == steps:
            mean = running / ((step - 1) % 200 + 1)
            print(f"head step {step}/{steps}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            running = 0.0
    return head


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cspd.demo.train_head", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the file (default: the package's own)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    check_output(args.out / FILE, "--out")
    torch.set_num_threads(1)  # more would split the sums differently
    weights = {name: value.half().contiguous() for name, value in train(args.steps, args.seed).state_dict().items()}
    write_file(args.out / FILE, save(weights))


if __name__ == "__main__":
    main()
