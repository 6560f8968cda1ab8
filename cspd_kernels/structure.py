"""What a diffusion head must look like to be packed: its parts, its layers, and what its weights may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import FunctionType

import torch
import torch.nn as nn

_NETWORK = (
    "input_proj", "cond_embed", "res_blocks", "time_embed.mlp", "time_embed.frequency_embedding_size",
    "final_layer.norm_final", "final_layer.linear", "final_layer.adaLN_modulation",
)  # fmt: skip
GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not_a_head(module: nn.Module) -> str | None:
    """None when the module has the structure of a diffusion head, else what is missing or different."""
    paths = ["in_channels", "gen_diffusion", *(f"net.{path}" for path in _NETWORK)]
    if missing := [path for path in paths if _find(module, path) is None]:
        return "it lacks " + ", ".join(missing)
    return why_not_a_network(module.net, module.in_channels)


def why_not_a_network(net: nn.Module, channels: int | None = None) -> str | None:
    """None when ``net`` has the structure of a head's network (C ``channels``, if given), else what is different."""
    if missing := [path for path in _NETWORK if _find(net, path) is None]:
        return "it lacks " + ", ".join(f"net.{path}" for path in missing)
    for i, block in enumerate(net.res_blocks):
        missing = [name for name in ("in_ln", "mlp", "adaLN_modulation") if _find(block, name) is None]
        if missing:
            return f"net.res_blocks[{i}] lacks " + ", ".join(missing)
        if not _is_mlp(block.mlp):
            return f"net.res_blocks[{i}].mlp is not Linear, SiLU, Linear"
    if not _is_mlp(net.time_embed.mlp):
        return "net.time_embed.mlp is not Linear, SiLU, Linear"
    return _why_not_layers(net, channels) or why_not_weights(net)


def _why_not_layers(net: nn.Module, channels: int | None) -> str | None:
    width = getattr(net.input_proj, "out_features", 0)
    channels = getattr(net.input_proj, "in_features", 0) if channels is None else channels
    out = getattr(net.final_layer.linear, "out_features", 0)
    sizes = {"net.input_proj": (channels, width), "net.cond_embed": (None, width)}
    sizes["net.final_layer.linear"] = (width, out)
    sizes["net.final_layer.adaLN_modulation[-1]"] = (width, 2 * width)
    features = net.time_embed.frequency_embedding_size
    sizes["net.time_embed.mlp[0]"], sizes["net.time_embed.mlp[2]"] = (features, width), (width, width)
    for i in range(len(net.res_blocks)):
        sizes[f"net.res_blocks[{i}].adaLN_modulation[-1]"] = (width, 3 * width)
        sizes[f"net.res_blocks[{i}].mlp[0]"] = sizes[f"net.res_blocks[{i}].mlp[2]"] = (width, width)
    for name, layer in linears(net):
        if not isinstance(layer, nn.Linear):
            return f"{name} is {kind_of(layer)}, not torch.nn.Linear"
        fan_in, fan_out = sizes[name]
        if layer.out_features != fan_out or fan_in not in (None, layer.in_features):
            got = f"{layer.in_features} -> {layer.out_features}"
            return f"{name} is {got}, expected {fan_in or 'any'} -> {fan_out}"
    if out not in (channels, 2 * channels):
        return f"net.final_layer puts out {out} channels; {channels} (eps) or {2 * channels} (eps, v) are understood"
    epsilons = set()
    for name, norm in norms(net):
        if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (width,):
            return f"{name} is {norm}, not a LayerNorm of width {width}"
        epsilons.add(norm.eps)
    if net.final_layer.norm_final.weight is not None:
        return "net.final_layer.norm_final has affine parameters"
    if len(epsilons) != 1:
        return f"its LayerNorms differ in eps: {sorted(epsilons)}"
    return None


def linears(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer of a network with its name."""
    yield "net.input_proj", net.input_proj
    yield "net.cond_embed", net.cond_embed
    yield "net.final_layer.linear", net.final_layer.linear
    yield "net.final_layer.adaLN_modulation[-1]", _last(net.final_layer.adaLN_modulation)
    yield "net.time_embed.mlp[0]", net.time_embed.mlp[0]
    yield "net.time_embed.mlp[2]", net.time_embed.mlp[2]
    for i, block in enumerate(net.res_blocks):
        yield f"net.res_blocks[{i}].adaLN_modulation[-1]", _last(block.adaLN_modulation)
        yield f"net.res_blocks[{i}].mlp[0]", block.mlp[0]
        yield f"net.res_blocks[{i}].mlp[2]", block.mlp[2]


def norms(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every LayerNorm of a network with its name."""
    for i, block in enumerate(net.res_blocks):
        yield f"net.res_blocks[{i}].in_ln", block.in_ln
    yield "net.final_layer.norm_final", net.final_layer.norm_final


def why_not_weights(net: nn.Module) -> str | None:
    """None when the weights are plain floating tensors in one place, else which are not."""
    devices = set()
    for name, layer in itertools.chain(linears(net), norms(net)):
        for role in ("weight", "bias"):
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
            if tuple(weight.shape) != (shape := _shape(layer, role)):
                return (
                    f"{name}.{role} is of shape {tuple(weight.shape)}, expected {shape}: sharded weights are not read"
                )
            devices.add(weight.device)
    if len(devices) > 1:
        offloaded = ": on the meta device they are offloaded" if torch.device("meta") in devices else ""
        return f"its weights are on several devices, {', '.join(sorted(map(str, devices)))}{offloaded}"
    return None


def _shape(layer: nn.Module, role: str) -> tuple[int, ...]:
    if isinstance(layer, nn.LayerNorm):
        return tuple(layer.normalized_shape)
    return (layer.out_features, layer.in_features)[: 2 if role == "weight" else 1]


def constants(net: nn.Module) -> list:
    """The numbers beside its weights that a network is packed with."""
    return [net.time_embed.frequency_embedding_size, *(norm.eps for _, norm in norms(net))]


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
    plain = {nn.Linear: linears(net), nn.LayerNorm: norms(net)}
    for base, layers in plain.items():
        for name, layer in layers:
            if type(layer).forward is not base.forward:
                return f"{name} is {kind_of(layer)}, whose forward is its own"
    return None


def why_not_as_written(module: nn.Module) -> str | None:
    """None when calling a module runs its class's forward and nothing else, else what else does."""
    if hasattr(module, "_hf_hook"):
        return "was hooked by accelerate, which offloads weights or moves what it is given"
    if hasattr(module, "parametrizations"):
        return "has parametrizations, which compute its weights at every call"
    for what, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        if hooks:
            return f"has a {what} ({_names(hooks)})"
    for name, value in module.__dict__.items():
        own = getattr(type(module), name, None)
        aside = hasattr(nn.Module, name) and name not in ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
        if aside or not isinstance(own, FunctionType):
            continue
        function = compiled_from(value)
        if getattr(function, "__func__", None) is not own or function.__self__ is not module:
            return f"had its {name} replaced (by {getattr(function, '__qualname__', type(function).__name__)})"
    return None


def _names(*hooks: dict) -> str:
    return ", ".join(sorted({getattr(h, "__name__", type(h).__name__) for table in hooks for h in table.values()}))


def compiled_from(function):
    """What ``torch.compile`` was given to make this function; any other function as it is."""
    while (inner := getattr(function, "_torchdynamo_orig_callable", None)) is not None:
        function = inner
        if getattr(function, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
            function = function.__wrapped__  # around what the compiler would otherwise skip, as torch's own layers
    return function


def kind_of(value) -> str:
    """The full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _find(module, path: str):
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _is_mlp(module) -> bool:
    """Linear, SiLU, Linear; what kind of Linear is looked at elsewhere."""
    return isinstance(module, nn.Sequential) and len(module) == 3 and isinstance(module[1], nn.SiLU)


def _last(module):
    """The layer after the SiLU of a modulation, None if it is not SiLU, layer."""
    fits = isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], nn.SiLU)
    return module[1] if fits else None
