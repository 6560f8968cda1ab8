"""What a state of a model comes to, put on before it is patched or after: served, its own code, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn as nn
from small_models import sample as sample_images
from small_models import small_mar

import cspd
import cspd.head_patch
from cspd.diffusions import diffusions_of
from cspd.loop import LoopHook
from cspd.standins import StandIn
from cspd_kernels.testing import relative_error


@dataclass
class Outcome:
    """Of one state: ``what`` is served, own, refused or fails (as its own code does)."""

    what: str
    error: float = 0.0
    told: list[str] = field(default_factory=list)


def sample(model: nn.Module) -> torch.Tensor:
    return sample_images(model, num_iter=2)


def model_in(seed: int = 0, **changes) -> nn.Module:
    return small_mar(seed, schedule="linear", **changes).requires_grad_(False)


def after(change: Callable[[nn.Module], nn.Module | None], sample=sample, **options) -> Outcome:
    """Patch, sample, change, sample twice; then the same once more after ``unpatch``."""
    model, twin = model_in(), model_in()
    cspd.patch(model, **options)
    sample(model)
    model, twin = changed(change, model), changed(change, twin)
    outcome = _calls(model, twin, sample)
    _undone(model, twin, sample)
    return outcome


def before(change: Callable[[nn.Module], nn.Module | None], sample=sample, **options) -> Outcome:
    """Change, patch, sample twice; then the same once more after ``unpatch``."""
    model, twin = changed(change, model_in()), changed(change, model_in())
    own(model, sample)  # so that what is compiled is
    was, messages = everything(model), []
    with listening(messages):
        try:
            cspd.patch(model, **options)
        except (ValueError, TypeError, RuntimeError) as error:
            assert not cspd.is_patched(model)
            assert everything(model) == was
            return Outcome("refused", told=[str(error)])
    outcome = _calls(model, twin, sample, messages)
    _undone(model, twin, sample)
    assert everything(model) == was
    return outcome


def changed(change: Callable, model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    new = change(model)
    return new if hasattr(new, "sample_tokens") else model


def _calls(model: nn.Module, twin: nn.Module, sample, messages: list[str] | None = None) -> Outcome:
    expected, failure = own(twin, sample)
    messages = [] if messages is None else messages
    for _ in range(2):
        with listening(messages), served_calls() as served:
            actual, error = own(model, sample)
    assert len(set(messages)) == len(messages), f"told twice: {messages}"
    if failure is not None:
        assert type(error) is type(failure), f"its own code raises {failure!r}, patched it raises {error!r}"
        return Outcome("fails", told=messages)
    assert error is None, f"its own code runs, patched it raises {error!r}"
    difference = relative_error(actual, expected)
    assert difference < 1e-5, f"{difference}; {len(served)} calls were served; told: {messages}"
    if served:
        return Outcome("served", difference, messages)
    assert difference == 0
    assert messages, "its own code ran, and nobody was told"
    return Outcome("own", difference, messages)


def _undone(model: nn.Module, twin: nn.Module, sample) -> None:
    expected, failure = own(twin, sample)
    cspd.unpatch(model)
    assert not cspd.is_patched(model)
    with served_calls() as served:
        actual, error = own(model, sample)
    assert not served
    held = [value for part in [*model.modules(), *diffusions_of(model).values()] for value in vars(part).values()]
    assert not [v for v in held if isinstance(getattr(v, "__self__", None), (LoopHook, StandIn))]
    assert type(error) is type(failure)
    assert failure is not None or torch.equal(actual, expected)


def rows(model: nn.Module) -> torch.Tensor:
    """Tokens by the head alone, for heads of another type than the model around them."""
    weight = next(p for p in model.diffloss.parameters() if p.is_floating_point())
    z = torch.randn(3, 32, generator=torch.Generator().manual_seed(5)).to(weight.dtype)
    torch.manual_seed(0)
    return model.diffloss.sample(z, 0.9)


def own(model: nn.Module, sample=sample) -> tuple[torch.Tensor | None, Exception | None]:
    """(tokens, None) of a model, or (None, what it raised)."""
    try:
        tokens = sample(model)
        return (torch.ones(tokens.shape) if tokens.is_meta else tokens), None
    except Exception as error:  # noqa: BLE001  (of whatever kind its own code raises)
        return None, error


class served_calls:  # noqa: N801
    """The calls that patches serve in a ``with`` block."""

    def __enter__(self) -> list:
        calls, run = [], cspd.head_patch.run_call

        def counted(call, *args, **kwargs):
            calls.append(call)
            return run(call, *args, **kwargs)

        self.patch = mock.patch.object(cspd.head_patch, "run_call", counted)
        self.patch.__enter__()
        return calls

    def __exit__(self, *error) -> None:
        self.patch.__exit__(*error)


class listening(logging.Handler):  # noqa: N801
    """Warnings of the logger "cspd" in a ``with`` block, added to a list."""

    def __init__(self, messages: list[str]):
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("cspd").addHandler(self)
        return self.messages

    def __exit__(self, *_) -> None:
        logging.getLogger("cspd").removeHandler(self)


def everything(model: nn.Module) -> dict[str, object]:
    """All that a patch might change in a model: what modules and diffusion objects hold, by path and identity."""
    held = {}
    for name, part in [*model.named_modules(), *diffusions_of(model).items()]:
        held |= {f"{name}.{key}": id(value) for key, value in vars(part).items()}
        if isinstance(part, nn.Module):
            tables = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
            held |= {f"{name}.{table}.{k}": id(v) for table in tables for k, v in vars(part)[table].items()}
        held[f"{name}: class"] = type(part)
    return held
