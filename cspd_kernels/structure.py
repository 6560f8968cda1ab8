"""What a diffusion head must look like to be packed: its parts, its layers, and what its weights may be."""

from __future__ import annotations

import itertools
from types import FunctionType

import torch
import torch.nn as nn

from .parts import parts_of, torchs_rms
from .spec import HeadSpec, spec_of

GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_LACKS = "it lacks "
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not_a_head(module: nn.Module) -> str | None:
    """None when the module has the structure of a diffusion head, else what is missing or different."""
    missing = [name for name in ("in_channels", "gen_diffusion") if getattr(module, name, None) is None]
    net = getattr(module, "net", None)
    reason = parts_of(net)
    if isinstance(reason, str) and reason.startswith(_LACKS):
        missing.append(reason.removeprefix(_LACKS))
    if missing:
        return _LACKS + ", ".join(missing)
    return why_not_a_network(net, module.in_channels)


def why_not_a_network(net: nn.Module, channels: int | None = None, *, given: bool = False) -> str | None:
    """None when ``net`` has the structure of a head's network (C ``channels``, if given), else what is different.

    Args:
        given: its own module may embed the condition, whatever that is: see :meth:`HeadSpec.given`.
    """
    spec = spec_of(net, channels)
    if isinstance(spec, str):
        return spec
    if spec.condition == "given" and not given:
        cond, name = spec.parts.cond, spec.parts.names[id(spec.parts.cond)]
        if not isinstance(cond, nn.Linear):
            return f"{name} is {kind_of(cond)}, not torch.nn.Linear"
        return f"{name} is {cond.in_features} -> {cond.out_features}, expected any -> {spec.width}"
    return why_not_weights(spec)


def why_not_weights(spec: HeadSpec) -> str | None:
    """None when the weights are plain floating tensors in one place, else which are not."""
    devices = set()
    for name, layer in itertools.chain(spec.linears(), spec.norms()):
        for role in ("weight", "bias", *(() if isinstance(layer, nn.Linear) else ("alpha",))):
            weight = getattr(layer, role, None)
            if weight is None:
                continue
            if role in layer.__dict__:
                more = why_not_as_written(layer) or f"holds its {role} neither as a parameter nor as a buffer"
                return f"{name} {more}"
            if type(weight) not in (torch.Tensor, nn.Parameter):
                return f"{name}.{role} is of {kind_of(weight)}: sharded (DTensor) or quantised weights are not read"
            if weight.dtype not in _FLOATS:
                return f"{name}.{role} is {weight.dtype}: quantised weights are not read"
            if weight.numel() and not weight.is_meta and weight.untyped_storage().nbytes() == 0:
                return f"{name}.{role} has no memory: its values are sharded or offloaded elsewhere"
            if tuple(weight.shape) != (shape := _shape(layer, role, spec)):
                return (
                    f"{name}.{role} is of shape {tuple(weight.shape)}, expected {shape}: sharded weights are not read"
                )
            devices.add(weight.device)
    if len(devices) > 1:
        offloaded = ": on the meta device they are offloaded" if torch.device("meta") in devices else ""
        return f"its weights are on several devices, {', '.join(sorted(map(str, devices)))}{offloaded}"
    return None


def _shape(layer: nn.Module, role: str, spec: HeadSpec) -> tuple[int, ...]:
    if not isinstance(layer, nn.Linear):
        return (spec.width,)
    return (layer.out_features, layer.in_features)[: 2 if role == "weight" else 1]


def why_not_plain(net: nn.Module) -> str | None:
    """None when what the layers compute follows from their weights, else the layer that computes more.

    Methods that were replaced, a forward that a subclass has of its own (LoRA), hooks, also those of
    all modules, weights that are computed at every call (weight_norm, parametrizations, pruning).
    """
    if names := _names(*GLOBAL_HOOKS):
        return f"torch runs a global hook at every module ({names})"
    for name, module in net.named_modules(prefix="net"):
        if (reason := why_not_as_written(module)) is not None:
            return f"{name} {reason}"
    spec = spec_of(net)
    if isinstance(spec, str):
        return spec
    for name, layer in itertools.chain(spec.linears(), spec.norms()):
        base = next((base for base in (nn.Linear, nn.LayerNorm, *torchs_rms()) if isinstance(layer, base)), None)
        if base is not None and type(layer).forward is not base.forward:
            return f"{name} is {kind_of(layer)}, whose forward is its own"
    return None


def why_not_as_written(module: nn.Module) -> str | None:
    """None when calling a module runs its class's forward and nothing else, else what else does."""
    if hasattr(module, "_hf_hook"):
        return "has hooks of accelerate, which offload weights or move inputs"
    if hasattr(module, "parametrizations"):
        return "has parametrizations, which compute its weights at every call"
    for what, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        if hooks:
            return f"has a {what} ({_names(hooks)})"
    for name, value in module.__dict__.items():
        own = compiled_from(getattr(type(module), name, None))
        aside = hasattr(nn.Module, name) and name not in ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
        if aside or not isinstance(own, FunctionType):
            continue
        function = stood_for(value)
        inner = compiled_from(getattr(function, "__func__", function))  # of a class that compiles it, too
        if inner is not compiled_from(own) or getattr(function, "__self__", module) is not module:
            return f"had its {name} replaced (by {getattr(function, '__qualname__', type(function).__name__)})"
    return None


def _names(*hooks: dict) -> str:
    return ", ".join(sorted({getattr(h, "__name__", type(h).__name__) for table in hooks for h in table.values()}))


def compiled_from(function):
    """What ``torch.compile`` was given to make this function; any other function as it is."""
    while (inner := getattr(function, "_torchdynamo_orig_callable", None)) is not None:
        owner = getattr(function, "__self__", None)  # of a method that its class has compiled
        function = inner if owner is None or not isinstance(inner, FunctionType) else inner.__get__(owner)
        if getattr(function, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
            function = function.__wrapped__  # around what the compiler would otherwise skip, as torch's own layers
    return function


def stood_for(function):
    """Like :func:`compiled_from`, and what a method of an object stands in for that has it as ``original(name)``."""
    function = compiled_from(function)
    while getattr(owner := getattr(function, "__self__", None), "stands_in", False):
        function = compiled_from(owner.original(function.__name__))
    return function


def kind_of(value) -> str:
    """The full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
