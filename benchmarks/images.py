"""What makes images: the released-like loop, the same under ``torch.compile``, and this package's ways."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

import cspd
from cspd.models import mar, mar_base, mar_huge, mar_large
from cspd.order import plan_steps
from cspd_kernels.testing import randomize_

from baselines import EmbeddingOnDevice

MODELS = {"b": mar_base, "l": mar_large, "h": mar_huge}
NAMES = {"b": "MAR-B", "l": "MAR-L", "h": "MAR-H"}
SHORT_HEAD = 10  # steps of the denoising that a head is cut to, to see what its others cost


@dataclass(frozen=True)
class Case:
    """Images of one size."""

    model: str
    steps: int
    batch: int
    cfg: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{NAMES[self.model]} {self.steps} steps batch {self.batch} cfg {self.cfg:g}"

    def labels(self, model: nn.Module) -> torch.Tensor:
        return (207 + torch.arange(self.batch, device=model.fake_latent.device)) % model.num_classes

    def autocast(self, device: torch.device) -> torch.autocast:
        half = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype if half else torch.bfloat16, enabled=half)


def build(name: str, device: torch.device, **options) -> nn.Module:
    """A model with random weights: time does not depend on their values."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name](**options)
    return randomize_(model, seed=1).to(device).eval()


def short_of(model: nn.Module, name: str) -> nn.Module:
    """The same weights with a head of few denoising steps."""
    short = build(name, model.fake_latent.device, num_sampling_steps=str(SHORT_HEAD))
    short.load_state_dict(model.state_dict())
    return short


@dataclass
class Contender:
    """``images(case, seed)`` with the name that rows show."""

    name: str
    images: Callable[[Case, int], torch.Tensor]
    model: nn.Module | None = None  # whose ``sample_tokens`` it is; None for a runner
    warm_ups: int = 1  # whole images, beyond the first call; 0 where there is nothing to capture
    skips: bool = False  # may run some of the steps alone
    splits: bool = False  # its transformer and its head are called from Python, one after the other

    def __call__(self, case: Case, seed: int, every: int = 1) -> torch.Tensor:
        device = self.device
        torch.manual_seed(seed)
        np.random.seed(seed)
        with torch.no_grad(), case.autocast(device), every_nth_step(every):
            return self.images(case, seed)

    @property
    def device(self) -> torch.device:
        return self.model.fake_latent.device


def of_model(name: str, model: nn.Module, **options) -> Contender:
    def images(case: Case, seed: int) -> torch.Tensor:
        return model.sample_tokens(case.batch, case.steps, cfg=case.cfg, labels=case.labels(model))

    return Contender(name, images, model, **options)


def eager(model: nn.Module) -> Contender:
    """The released loop: every operation a kernel, every step from Python."""
    return of_model("eager loop", model, warm_ups=0, skips=True, splits=True)


def compiled(model: nn.Module, dtype: torch.dtype) -> Contender:
    """The same loop with its blocks and its head's network under ``torch.compile``.

    The blocks in the default mode, for any number of known tokens; the network in "reduce-overhead", which keeps a CUDA
    graph for each number of rows. Linear layers hold weights of the operands' type: autocast inside of compiled code
    would convert them at every call.
    """
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    net = model.diffloss.net
    net.time_embed = EmbeddingOnDevice(net.time_embed)
    blocks = [*model.encoder_blocks, *model.decoder_blocks]
    for layer in (layer for part in (*blocks, net) for layer in part.modules() if isinstance(layer, nn.Linear)):
        layer.to(dtype)
    for block in blocks:
        block.compile(dynamic=True)
    network = torch.compile(net.forward, mode="reduce-overhead", dynamic=True)

    def forward(*arguments):
        torch.compiler.cudagraph_mark_step_begin()
        return network(*arguments)

    net.forward = forward
    return of_model("torch.compile", model, skips=True, splits=True, warm_ups=2)


def patched(model: nn.Module) -> Contender:
    return of_model("patched", cspd.patch(copy.deepcopy(model)), warm_ups=captures(model), skips=True, splits=True)


def has_whole() -> bool:
    return "whole" in inspect.signature(cspd.patch).parameters


def whole(model: nn.Module, name: str = "whole", **options) -> Contender:
    return of_model(name, cspd.patch(copy.deepcopy(model), whole=True, **options), warm_ups=captures(model))


def captures(model: nn.Module) -> int:
    """Graphs are made in the first calls of a size."""
    return 2 if model.fake_latent.device.type == "cuda" else 0


def run_by(name: str, runner: cspd.SpecDecodeRunner, gamma: int = 1) -> Contender:
    model = runner.target_model

    def images(case: Case, seed: int) -> torch.Tensor:
        labels = case.labels(model)
        return runner.run(case.batch, case.steps, gamma, cfg=case.cfg, labels=labels, seed=seed)

    return Contender(name, images, model, warm_ups=captures(model))


def alone(target: nn.Module, dtype: torch.dtype) -> Contender:
    """The target without a draft, by the runner: what speculation is measured against."""
    return run_by("target alone", cspd.SpecDecodeRunner(target, target, prefill=1.0, dtype=dtype))


def speculative(draft: nn.Module, target: nn.Module, dtype: torch.dtype, gamma: int) -> tuple[Contender, object]:
    """(contender, runner), the runner for its statistics."""
    runner = cspd.SpecDecodeRunner(draft, target, dtype=dtype)
    return run_by(f"speculative gamma {gamma}", runner, gamma), runner


def chosen(steps: list, every: int) -> list:
    """Every n-th of an image's steps, from early ones to late ones."""
    return steps[every // 2 :: every]


@contextlib.contextmanager
def every_nth_step(every: int) -> Iterator[None]:
    """The model's own loop draws every n-th step alone: the others' tokens stay 0, and known."""

    @functools.wraps(plan_steps)
    def some(*arguments):
        return chosen(plan_steps(*arguments), every)

    with mock.patch.object(mar, "plan_steps", some):
        yield


def share_of(case: Case, seq_len: int, every: int) -> float:
    """How many times the steps that ``every`` leaves an image has."""
    steps = plan_steps(seq_len, case.steps, case.cfg, "linear")
    return len(steps) / len(chosen(steps, every))
