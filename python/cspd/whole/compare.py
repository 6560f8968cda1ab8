"""Is it MAR's loop? A model's own ``sample_tokens`` against ours, with a stand-in for its head."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.head import stream_dtype

from ..calls import draw_steps
from ..diffusions import NotServedError
from ..models import MAR, DiffLoss, GaussianDiffusion
from ..order import Plan, by_token, plan_steps
from ..verify import tolerance
from ..window import class_embedding
from .transformers import ByWeights

# (images, steps, guidance, its schedule, whether there are labels): few, as each step is two passes of each loop.
_CASES = ((1, 2, 1.0, "linear", False), (2, 3, 2.5, "linear", True), (1, 2, 2.5, "constant", True))
_TEMPERATURE = 0.9


@torch.no_grad()
def where_it_starts(module: nn.Module, head: DiffusionHead) -> str:
    """Compare a head's own ``sample`` with the noise that we draw and the kernels, with and without guidance.

    Args:
        head: packed from the module, in the type of its weights.

    Returns:
        Where x_T is drawn: "cpu" or "device". The random number generators are as before.

    Raises:
        NotServedError: its tokens differ either way.
    """
    if type(module) is DiffLoss and type(module.gen_diffusion) is GaussianDiffusion:
        return "cpu"
    failure = ""
    for first_on in ("cpu", "device") if head.device.type == "cuda" else ("cpu",):
        reasons = [_sample_differs(module, head, cfg, first_on) for cfg in (1.0, 2.5)]
        if not any(reasons):
            return first_on
        failure = failure or next(filter(None, reasons))
    raise NotServedError(failure)


def _sample_differs(module, head: DiffusionHead, cfg: float, first_on: str) -> str | None:
    device, guided, n = head.device, cfg != 1.0, 2
    rows = 2 * n if guided else n
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, head.cond_channels, generator=generator, device="cpu").to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            with _here_instead(device):
                expected = module.sample(z, _TEMPERATURE, cfg)[:n].float()
        except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
            return f"its head's sample does not run here to be compared with ({type(error).__name__}: {error})"
        theirs = _states(device)
        torch.manual_seed(0)
        x = torch.randn(n, head.channels, device="cpu" if first_on == "cpu" else device)
        wide = torch.promote_types(torch.float32, module.net.input_proj.weight.dtype)
        noise = draw_steps(head.num_steps, (rows, head.channels), x.dtype, wide, device, "torch")[:, :n]
        if not all(map(torch.equal, theirs, _states(device))):
            return "its head's sample draws other random numbers"
        stream = stream_dtype(head.dtype)
        actual = denoise(
            head, z.to(stream), x.to(device, stream), noise.to(stream), temperature=_TEMPERATURE, cfg_scale=cfg,
            backend="torch", parallel_tol=None,
        ).sample.float()  # fmt: skip
    difference = float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= tolerance(module.net):
        return f"its head's tokens differ by {difference:.2g} of the largest value at guidance {cfg}"
    return None


def _states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@torch.no_grad()
def why_not_its_loop(model: nn.Module, transformer: ByWeights) -> str | None:
    """None where a model's own ``sample_tokens`` draws what ours does, else what differs.

    Both run on a copy that shares the weights, with a head that turns conditions into tokens by itself and writes down
    what it was asked. Random number generators are as before afterwards.
    """
    if type(model).sample_tokens is MAR.sample_tokens:
        return None
    numbers = np.random.get_state()
    try:
        with torch.random.fork_rng([model.fake_latent.device] if model.fake_latent.is_cuda else []):
            for case in _CASES:
                if (reason := _difference(model, transformer, *case)) is not None:
                    return reason
    finally:
        np.random.set_state(numbers)
    return None


def _difference(
    model, transformer, images: int, num_iter: int, cfg: float, schedule: str, labelled: bool
) -> str | None:
    device = model.fake_latent.device
    labels = torch.arange(images, device=device) if labelled else None
    twin, head = copy.copy(model), _Head(model.token_embed_dim)
    twin._modules = {**model._modules, "diffloss": head}
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with _here_instead(device):
            expected = type(model).sample_tokens(
                twin, images, num_iter=num_iter, cfg=cfg, cfg_schedule=schedule, labels=labels, temperature=_TEMPERATURE
            )
    except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
        return f"its own sample_tokens does not run here to be compared with ({type(error).__name__}: {error})"
    theirs, head.asked = head.asked, []
    np.random.seed(0)
    orders = torch.from_numpy(np.stack([_shuffled(model.seq_len) for _ in range(images)])).to(device)
    steps, guided = plan_steps(model.seq_len, num_iter, cfg, schedule), cfg != 1.0
    plan = Plan(orders, torch.arange(images, device=device), steps, guided, by_token(steps, device))
    tokens = torch.zeros(images, model.seq_len, model.token_embed_dim, device=device)
    embedding = class_embedding(model, images, labels, guided)
    for i in range(len(steps)):
        step = plan.step(i)
        z = transformer.conditions(tokens, step, embedding).flatten(0, 1)
        drawn = head.sample(z, _TEMPERATURE, step.cfg_scale)[: step.where.numel()].view(*step.where.shape, -1)
        tokens.scatter_(1, step.where[..., None].expand_as(drawn), drawn.to(tokens.dtype))
    actual = model.unpatchify(tokens)
    at = f"at {num_iter} steps, guidance {cfg} ({schedule})"
    if len(theirs) != len(head.asked) or not all(map(_same, theirs, head.asked)):
        return f"its loop asks its head for something else {at}"
    if expected.shape != actual.shape:
        return f"its images are of shape {tuple(expected.shape)} {at}, not {tuple(actual.shape)}"
    scale = float(expected.float().abs().max())
    difference = float((expected.float() - actual.float()).abs().max())
    bound = 1e-3 if model.fake_latent.dtype in (torch.float32, torch.float64) else 5e-2
    if not difference <= bound * scale:
        return f"its images differ by {difference / scale:.2g} of the largest value {at}"
    return None


def _shuffled(length: int) -> np.ndarray:
    order = np.arange(length)
    np.random.shuffle(order)
    return order


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= 1e-4 * max(1.0, abs(b)) for a, b in zip(one, other, strict=True))


class _Head(nn.Module):
    """Tokens that follow from the conditions, the temperature and the guidance, and a list of what it was asked."""

    def __init__(self, channels: int):
        super().__init__()
        self.in_channels, self.channels = channels, channels
        self.asked: list[tuple[float, ...]] = []

    def sample(self, z: torch.Tensor, temperature=1.0, cfg=1.0) -> torch.Tensor:
        scale = float(cfg.flatten()[0]) if isinstance(cfg, torch.Tensor) else float(cfg)
        self.asked.append((float(len(z)), float(temperature), scale))
        x = z.float()[:, torch.arange(self.channels, device=z.device) % z.shape[1]]
        if scale != 1.0:
            conditional, rest = x.chunk(2)
            x = (rest + scale * (conditional - rest)).repeat(2, 1)
        return torch.tanh(x) * temperature


class _HereInstead(TorchFunctionMode):
    """Released code says ``.cuda()``: where the model is on the CPU, tensors stay there. For this thread alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


def _here_instead(device: torch.device) -> contextlib.AbstractContextManager:
    return _HereInstead() if device.type == "cpu" else contextlib.nullcontext()
