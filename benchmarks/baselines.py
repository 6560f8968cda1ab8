"""The baselines of the ratios: what users run today, in plain torch."""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn

from cspd.models.diffloss import TimestepEmbedder

IN_ONE_GRAPH = "eager loop in one CUDA graph bfloat16"
PRODUCTS = "library products alone bfloat16"
COMPILED = "torch.compile reduce-overhead"
COMPILED_ON_CPU = "torch.compile"  # the other mode means CUDA graphs
COMPILE_SECONDS = {"cpu": 60.0, "cuda": math.inf}  # of a whole run; what is begun is finished


def eager_denoise(diffloss, cond, x_t, noise, dtype=None):
    """The upstream loop on given noise: one network call a step, every operation its own kernel.

    Args:
        dtype: run under autocast to this type, as upstream's evaluation does; None for none.
    """
    diffusion, x = diffloss.gen_diffusion, x_t
    with torch.no_grad(), torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        for i in reversed(range(diffusion.num_timesteps)):
            t = torch.full((len(x),), int(diffusion.schedule.timesteps[i]), device=x.device)
            mean, log_variance = diffusion.posterior(diffloss.net(x, t, cond), x, i)
            x = mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noise[i]
    return x


class EmbeddingOnDevice(nn.Module):
    """A network's embedding of timesteps whose frequencies are there beforehand: a graph cannot hold the copy of what
    the host makes at every call."""

    def __init__(self, embedder: TimestepEmbedder):
        super().__init__()
        self.mlp, size = embedder.mlp, embedder.frequency_embedding_size
        half, device = size // 2, embedder.mlp[0].weight.device
        self.frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half).to(device)
        self.odd = size % 2

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t[:, None].float() * self.frequencies
        features = torch.cat([torch.cos(angles), torch.sin(angles), angles.new_zeros(len(angles), self.odd)], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def graphable_denoise(diffloss, dtype):
    """The upstream loop as one CUDA graph can hold it, which is what to try first: a function of (cond, x_t, noise).

    The same operations as :func:`eager_denoise`, one kernel each, on weights of ``dtype`` without autocast; the
    timesteps and the embedding's frequencies lie on the device beforehand. x and the update stay float32.
    """
    net = copy.deepcopy(diffloss.net).to(dtype)
    net.time_embed = EmbeddingOnDevice(net.time_embed)
    diffusion = diffloss.gen_diffusion
    timesteps = torch.tensor(diffusion.schedule.timesteps, dtype=torch.int64, device=next(net.parameters()).device)

    def denoise(cond, x_t, noise):
        x, cond = x_t, cond.to(dtype)
        with torch.no_grad():
            for i in reversed(range(diffusion.num_timesteps)):
                mean, log_variance = diffusion.posterior(net(x, timesteps[i].expand(len(x)), cond), x, i)
                x = mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noise[i]
        return x

    return denoise


def compiled_denoise(diffloss, dtype, mode="reduce-overhead"):
    """The same loop with its step under ``torch.compile`` (CUDA graphs inside): a function of (cond, x_t, noise).

    The step's number enters as tensors, so that one compilation serves all steps. The weights have the operands' type
    beforehand, as autocast would convert them at every step of a compiled loop.
    """
    net = copy.deepcopy(diffloss.net).to(dtype)
    diffusion, schedule = diffloss.gen_diffusion, diffloss.gen_diffusion.schedule
    device = next(diffloss.parameters()).device
    names = ("x0_x", "x0_out", "mean_x0", "mean_x", "log_std_upper", "log_std_lower")
    table = torch.tensor(np.stack([getattr(schedule, n) for n in names], 1), dtype=torch.float32, device=device)
    timesteps = torch.tensor(schedule.timesteps, dtype=torch.int64, device=device)

    def step(x, cond, noise, t, row):
        out, channels = net(x, t.expand(len(x)), cond).float(), x.shape[1]
        mean = row[2] * (row[0] * x + row[1] * out[:, :channels]) + row[3] * x
        frac = (out[:, channels:] + 1) / 2
        return mean, mean + torch.exp(frac * row[4] + (1 - frac) * row[5]) * noise

    compiled = torch.compile(step, mode=mode, dynamic=False)

    def denoise(cond, x_t, noise):
        x = x_t
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            for i in reversed(range(diffusion.num_timesteps)):
                torch.compiler.cudagraph_mark_step_begin()
                mean, moved = compiled(x, cond, noise[i], timesteps[i], table[i])
                x = (mean if i == 0 else moved).clone()  # the graph's own memory is used again
        return x

    return denoise


class Compilations:
    """Compiles baselines while a run has time for it: a compilation takes many seconds on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.spent = device, 0.0

    def begin(self) -> None:
        """Forget what was compiled for another size, or the next one compiles to code for any size."""
        if self.spent:
            torch._dynamo.reset()

    def why_not(self) -> str | None:
        """None while there is time, else the reason."""
        if self.spent > (limit := COMPILE_SECONDS[self.device.type]):
            return f"compilations have had their {limit:.0f} seconds"
        if self.device.type == "cpu" and not shutil.which(os.environ.get("CXX") or "g++"):
            return "torch.compile needs a C++ compiler"
        return None

    def compiled(self, name: str, make: Callable[[], Callable], inputs: list[tuple]) -> Callable | None:
        """The function after its first call, which compiles it. None, and a line that says so, where there is no time.

        Raises:
            Exception: of whatever kind: the compiler's own.
        """
        if reason := self.why_not():
            print(f"{name}: not measured, {reason}", flush=True)
            return None
        start = time.perf_counter()
        try:
            function = make()
            function(*inputs[0])
        finally:
            self.spent += time.perf_counter() - start
        return function


def library_products(head, rows):
    """Nothing but the matrix products of a chain, by the library, on operands of the same shapes: a function of no
    arguments. Its time over a chain's is the share of the library's rate that the chain reaches.
    """

    def operand(*shape):
        return torch.randn(shape, device=head.device).to(head.dtype)

    a, s = operand(rows, head.width), operand(head.num_steps * rows, head.width)
    hidden, mods = torch.empty_like(a), s.new_empty(len(s), 3 * head.width)

    def run(*_):
        for block in head.blocks:
            torch.mm(s, block.mod_weight.t(), out=mods)
        for _step in range(head.num_steps):
            for block in head.blocks:
                torch.mm(a, block.weight0.t(), out=hidden)
                torch.mm(a, block.weight1.t(), out=hidden)

    return run


def looped_accept_reject(x, draft, target, max_tries=100):
    """Acceptance-rejection as the released runner does it: whole batches of redraws until every row has one.

    The accept test and the redraw use the formulas of this package (log space). The loop is the released
    one: it draws from the global generator, and the host waits for the device every round.
    """

    def log_ratio(value):
        def density(chain):
            return (-0.5 * ((value - chain.mean) / chain.log_std.exp()) ** 2 - chain.log_std).sum(1)

        return density(target) - density(draft) + draft.path_log_std - target.path_log_std

    accepted = torch.rand(len(x), device=x.device).log() < log_ratio(x)
    token, done = torch.where(accepted[:, None], x, target.sample), accepted.clone()
    for _ in range(max_tries):
        if bool(done.all()):
            break
        proposal = torch.randn_like(target.mean) * target.log_std.exp() + target.mean
        keep = torch.rand(len(x), device=x.device) < 1 - torch.exp(-log_ratio(proposal))
        keep &= ~done
        token[keep] = proposal[keep]
        done |= keep
    return token, accepted
