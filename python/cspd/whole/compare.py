"""Is it MAR's loop? A model's own ``sample_tokens`` against ours, with a stand-in for its head."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.head import stream_dtype, without_autocast
from cspd_kernels.parts import part_of

from ..diffusions import NotServedError
from ..loop import LoopHook, own_loops
from ..made_calls import draw_steps
from ..models import DiffLoss, GaussianDiffusion
from ..order import Plan, by_token, plan_steps
from ..run_state import class_embedding
from ..standins import StandIn
from ..transformer import bound
from ..verify import tolerance
from .chosen import is_ours
from .transformers import ByWeights

# (images, steps, guidance, its schedule, whether there are labels): few, as each step is two passes of each loop.
_CASES = (
    (1, 2, 1.0, "linear", False),
    (2, 3, 2.5, "linear", True),
    (1, 2, 2.5, "constant", True),
    (1, 2, 0.5, "linear", False),
)
_TEMPERATURE = 0.9


def where_it_starts(module: nn.Module, net: nn.Module, head: DiffusionHead) -> str:
    """Compare a head's own ``sample`` with the noise that we draw and the kernels, with and without guidance.

    Args:
        net: its network, without wrappers. head: packed from it, in the type of its weights.

    Returns:
        Where x_T is drawn: "cpu" or "device". The random number generators are as before.

    Raises:
        NotServedError: its tokens differ either way.
    """
    ours = type(module) is DiffLoss and type(module.gen_diffusion) is GaussianDiffusion
    if ours and not any(hasattr(type(value), name) for value in (module, module.gen_diffusion) for name in own(value)):
        return "cpu"
    failure = ""
    for first_on in ("cpu", "device") if head.device.type == "cuda" else ("cpu",):
        with _undisturbed(head.device):
            reasons = [_sample_differs(module, net, head, cfg, first_on) for cfg in (1.0, 2.5)]
        if not any(reasons):
            return first_on
        failure = failure or next(filter(None, reasons))
    raise NotServedError(failure)


def own(value) -> dict[str, object]:
    """Functions that were set on an instance, except this package's own."""
    return {
        name: function
        for name, function in vars(value).items()
        if callable(function) and not isinstance(function, (nn.Module, type))
        and not isinstance(getattr(function, "__self__", None), (StandIn, LoopHook))
    }  # fmt: skip


def _sample_differs(module, net, head: DiffusionHead, cfg: float, first_on: str) -> str | None:
    device, guided, n = head.device, cfg != 1.0, 2
    rows = 2 * n if guided else n
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, head.cond_channels, generator=generator, device="cpu").to(device)
    _seed(device)
    try:
        with _here_instead(device), _cast(part_of(net, "input").weight), own_loops():
            expected = module.sample(z, _TEMPERATURE, cfg)[:n].float()
    except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
        return f"its head's sample does not run here, so it cannot be compared ({type(error).__name__}: {error})"
    theirs = _states(device)
    _seed(device)
    x = torch.randn(n, head.channels, device="cpu" if first_on == "cpu" else device)
    wide = torch.promote_types(torch.float32, part_of(net, "input").weight.dtype)
    noise = draw_steps(head.num_steps, (rows, head.channels), x.dtype, wide, device, "torch")[:, :n]
    if not all(map(torch.equal, theirs, _states(device))):
        return "its head's sample draws other random numbers"
    stream = stream_dtype(head.dtype)
    actual = denoise(
        head, z.to(stream), x.to(device, stream), noise.to(stream), temperature=_TEMPERATURE, cfg_scale=cfg,
        backend="torch", parallel_tol=None,
    ).sample.float()  # fmt: skip
    difference = float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= tolerance(net):
        return f"its head's tokens differ by {difference:.2g} of the largest value at guidance {cfg}"
    return None


def _generators(device: torch.device) -> list[torch.Generator]:
    """Torch's default ones of the CPU and of a device; seeding all would also seed those of other devices."""
    return [torch.default_generator, *([torch.cuda.default_generators[device.index]] if device.type == "cuda" else [])]


def _states(device: torch.device) -> list[torch.Tensor]:
    numbers = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    position = torch.tensor([np.random.get_state()[2]])
    return [*(generator.get_state() for generator in _generators(device)), numbers, position]


def _seed(device: torch.device) -> None:
    np.random.seed(0)
    for generator in _generators(device):
        generator.manual_seed(0)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Nothing of the caller's modes has a part in a comparison, and random number generators are as before
    afterwards. In between they are seeded: another thread that draws from them meanwhile sees that."""
    numbers, python = np.random.get_state(), random.getstate()
    states = [(generator, generator.get_state()) for generator in _generators(device)]
    try:
        with torch.inference_mode(False), torch.no_grad(), without_autocast(device):
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(python)
        for generator, state in states:
            generator.set_state(state)


def _cast(weight: torch.Tensor) -> contextlib.AbstractContextManager:
    """What a model's own code needs where its weights are of a half type: autocast of that type."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(weight.device.type, weight.dtype) if half else contextlib.nullcontext()


def why_not_its_loop(model: nn.Module, transformer: ByWeights) -> str | None:
    """None where a model's own ``sample_tokens`` draws what ours does, else what differs.

    Both run on a copy that shares the weights, with a head that turns conditions into tokens by itself and writes down
    what it was asked. Random number generators are as before afterwards.
    """
    if is_ours(model):
        return None
    with _undisturbed(model.fake_latent.device):
        reasons = (_difference(model, transformer, *case) for case in _CASES)
        return next((reason for reason in reasons if reason is not None), None)


def _difference(
    model, transformer, images: int, num_iter: int, cfg: float, schedule: str, labelled: bool
) -> str | None:
    device = model.fake_latent.device
    labels = torch.arange(images, device=device) if labelled else None
    twin, head = copy.copy(model), _Head(model.token_embed_dim, transformer.weights.position.shape[-1])
    twin._modules = {**model._modules, "diffloss": head.to(device)}
    _seed(device)
    try:
        with _here_instead(device), _cast(model.fake_latent):
            expected = type(model).sample_tokens(
                twin, images, num_iter=num_iter, cfg=cfg, cfg_schedule=schedule, labels=labels, temperature=_TEMPERATURE
            )
    except Exception as error:  # noqa: BLE001  (whatever a fork's code raises)
        return f"its own sample_tokens does not run here, so it cannot be compared ({type(error).__name__}: {error})"
    theirs, states, head.asked = head.asked, _states(device), []
    _seed(device)
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
        return f"its loop calls its head with other arguments {at}"
    if not all(map(torch.equal, states, _states(device))):
        return f"its loop draws other random numbers {at}"
    if expected.shape != actual.shape:
        return f"its images are of shape {tuple(expected.shape)} {at}, not {tuple(actual.shape)}"
    scale = float(expected.float().abs().max())
    difference = float((expected.float() - actual.float()).abs().max())
    if not difference <= bound(model.fake_latent) * scale:
        return f"its images differ by {difference / scale:.2g} of the largest value {at}"
    return None


def _shuffled(length: int) -> np.ndarray:
    order = np.arange(length)
    np.random.shuffle(order)
    return order


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= 1e-4 * max(1.0, abs(b)) for a, b in zip(one, other))


class _Head(nn.Module):
    """Tokens that follow from all of a condition, the temperature and the guidance, and a list of what it was asked.

    It draws as a head does, so that what a loop draws before and after comes in the same order.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(hidden, channels, generator=generator, dtype=torch.float32, device="cpu") / hidden**0.5
        self.in_channels = channels
        self.register_buffer("weight", weight)
        self.asked: list[tuple[float, ...]] = []

    def sample(self, z: torch.Tensor, temperature=1.0, cfg=1.0) -> torch.Tensor:
        scales = sorted(set(cfg.flatten().tolist())) if isinstance(cfg, torch.Tensor) else [float(cfg)]
        self.asked.append((float(len(z)), float(temperature), *scales))
        scale = scales[0]
        noise = torch.randn(1, device="cpu").to(z.device)
        x = z.float() @ self.weight
        if scale != 1.0:
            conditional, rest = x.chunk(2)
            x = (rest + scale * (conditional - rest)).repeat(2, 1)
        return torch.tanh(x) * temperature + 0.1 * noise


class _HereInstead(TorchFunctionMode):
    """Released code says ``.cuda()``: where the model is on the CPU, tensors stay there. For this thread alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


def _here_instead(device: torch.device) -> contextlib.AbstractContextManager:
    return _HereInstead() if device.type == "cpu" else contextlib.nullcontext()
