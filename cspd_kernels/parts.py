"""The parts of a diffusion head's network, found by their names in the code bases that are known: one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn as nn

# By role, in the order in which they are looked for. LTH14/mar's come first, and stand in what is said of a misfit.
NAMES = {
    "input": ("input_proj", "noisy_images_proj"),
    "cond": ("cond_embed", "cond_proj"),
    "time": ("time_embed", "t_embedder", "timestep_proj"),
    "blocks": ("res_blocks", "layers"),
    "modulations": ("ada_ln_blocks",),  # of the network, each shared by blocks that follow each other
    "final": ("final_layer",),
}
# Of a block, and of the last layer. A modulation is SiLU, Linear; or a Linear that the forward gives SiLU's result.
BLOCK = {"norm": ("in_ln", "norm"), "modulation": ("adaLN_modulation",), "modulation behind SiLU": ("linear",)}
FINAL = {
    "norm": ("norm_final", "norm"), "linear": ("linear", "linear_2"), "modulation": ("adaLN_modulation",),
    "modulation behind SiLU": ("ada_ln_modulation", "linear_1"),
}  # fmt: skip
# Of a block: name of the MLP ("" for the block itself), gate, up (None: in one layer with the gate), down.
SWIGLUS = [
    ("ffn", "gate_proj", "up_proj", "down_proj"), ("mlp", "gate_proj", "up_proj", "down_proj"),
    ("ffn", "w1", "w3", "w2"), ("mlp", "w1", "w3", "w2"), ("", "w1", None, "w2"),
]  # fmt: skip
_EPS = ("eps", "variance_epsilon", "rms_norm_eps")
_NORM_WEIGHT = ("weight", "alpha")

Size = tuple[int, str]  # factor and letter: (3, "W")


@dataclass(frozen=True, eq=False)
class BlockParts:
    """One residual block. ``mlp`` holds one layer, or gate and up."""

    norm: nn.Module
    form: str  # "silu" or "swiglu"
    mlp: tuple[nn.Linear, ...]
    down: nn.Linear
    modulation: nn.Linear


@dataclass(frozen=True, eq=False)
class TimeParts:
    """One time embedding."""

    fc0: nn.Linear
    fc1: nn.Linear
    norm: nn.Module | None


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a network by role; ``names`` has the path of each, by its id."""

    input: nn.Linear
    cond: nn.Module
    times: tuple[TimeParts, ...]
    blocks: tuple[BlockParts, ...]
    modulation_of: tuple[int, ...]
    final_norm: nn.Module  # the last layer itself where that holds no norm but its epsilon
    final_modulation: nn.Linear
    final: nn.Linear
    names: dict[int, str]

    def layers(self, cond: bool = True) -> Iterator[tuple[str, nn.Linear, Size, Size]]:
        """Every linear layer once: name, layer, outputs and inputs in the sizes C, Z, W, H, O and F. ``cond``: also the
        condition's."""
        table = [(self.input, (1, "W"), (1, "C"))]
        if cond:
            table.append((self.cond, (1, "W"), (1, "Z")))
        table += [(self.final, (1, "O"), (1, "W")), (self.final_modulation, (2, "W"), (1, "W"))]
        for time in self.times:
            table += [(time.fc0, (1, "W"), (1, "F")), (time.fc1, (1, "W"), (1, "W"))]
        for block in self.blocks:
            fused = 2 if block.form == "swiglu" and len(block.mlp) == 1 else 1
            table.append((block.modulation, (3, "W"), (1, "W")))
            table += [(layer, (fused, "H"), (1, "W")) for layer in block.mlp]
            table.append((block.down, (1, "W"), (1, "H")))
        seen = set()
        for layer, out, into in table:
            if id(layer) not in seen:
                seen.add(id(layer))
                yield self.names[id(layer)], layer, out, into

    def norms(self) -> Iterator[tuple[str, nn.Module]]:
        """Every norm over the residual stream with its name."""
        for block in self.blocks:
            yield self.names[id(block.norm)], block.norm
        yield self.names[id(self.final_norm)], self.final_norm

    def time_norms(self) -> Iterator[tuple[str, nn.Module]]:
        """The norms of the time embeddings."""
        for time in self.times:
            if time.norm is not None:
                yield self.names[id(time.norm)], time.norm


def part_of(net: nn.Module, role: str):
    """The part of a network with a role of :data:`NAMES`, None where it has none."""
    return _any(net, NAMES[role])[1]


def parts_of(net: nn.Module) -> Parts | str:
    """The parts of ``net``, or what is missing or different, in one sentence."""
    found = {role: _any(net, names) for role, names in NAMES.items()}
    final_name, final = found["final"]
    final_norm = _any(final, FINAL["norm"])
    if final_norm[1] is None and norm_eps(final) is not None:
        final_norm = ("", final)
    final_linear, final_modulation = _any(final, FINAL["linear"]), _modulation_of(final, FINAL)
    time_name, time = found["time"]
    pairs = _times(time_name, time)
    missing = [f"net.{found[role][0]}" for role in ("input", "cond", "blocks") if found[role][1] is None]
    if isinstance(pairs, str) and not pairs.startswith("net."):
        missing.append(f"net.{pairs}")
    missing += [
        f"net.{final_name}.{name}" for name, part in (final_norm, final_linear, final_modulation) if part is None
    ]
    if missing:
        return "it lacks " + ", ".join(missing)
    if isinstance(pairs, str):
        return pairs
    names: dict[int, str] = {}

    def named(name: str, module):
        names[id(module)] = name
        return module

    times = tuple(
        TimeParts(
            named(f"{name}{a}", fc0), named(f"{name}{b}", fc1), norm if norm is None else named(f"{name}[3]", norm)
        )
        for name, a, b, fc0, fc1, norm in pairs
    )
    blocks_name, blocks = found["blocks"]
    shared_name, shared = found["modulations"]
    for name, several in ((blocks_name, blocks), (shared_name, shared)):
        if several is not None and not isinstance(several, (nn.ModuleList, nn.Sequential)):
            return f"net.{name} is {type(several).__name__}, not a list of modules"
    if shared is not None and (not len(shared) or len(blocks) % len(shared)):
        return f"net.{shared_name} has {len(shared)} modules, which {len(blocks)} blocks cannot share evenly"
    read, modulation_of = [], []
    for i, block in enumerate(blocks):
        group = None if shared is None else i // (len(blocks) // len(shared))
        part = _block(f"net.{blocks_name}[{i}]", block, named, shared is None)
        if isinstance(part, str):
            return part
        if group is not None:
            part = BlockParts(*part[:-1], named(f"net.{shared_name}[{group}]", shared[group]))
        else:
            part = BlockParts(*part)
        read.append(part)
        modulation_of.append(i if group is None else group)
    first = f"net.{final_name}"
    return Parts(
        input=named(f"net.{found['input'][0]}", found["input"][1]),
        cond=named(f"net.{found['cond'][0]}", found["cond"][1]),
        times=times,
        blocks=tuple(read),
        modulation_of=tuple(modulation_of),
        final_norm=named(f"{first}.{final_norm[0]}".rstrip("."), final_norm[1]),
        final_modulation=_modulation(f"{first}.{final_modulation[0]}", final_modulation[1], FINAL, named),
        final=named(f"{first}.{final_linear[0]}", final_linear[1]),
        names=names,
    )


def _block(name: str, block: nn.Module, named, own: bool) -> tuple | str:
    """Norm, form, mlp, down and, where the block has its ``own``, modulation."""
    norm, modulation = _any(block, BLOCK["norm"]), _modulation_of(block, BLOCK)
    gated = next((names for names in SWIGLUS if _holds(block, names)), None)
    plain = gated is None and getattr(block, "mlp", None) is None
    missing = [
        what for what, lacks in (
            (norm[0], norm[1] is None), ("mlp", plain), (modulation[0], own and modulation[1] is None),
        ) if lacks
    ]  # fmt: skip
    if missing:
        return f"{name} lacks " + ", ".join(missing)
    norm_part = named(f"{name}.{norm[0]}", norm[1])
    if gated is not None:
        mlp, prefix = (block, name) if not gated[0] else (getattr(block, gated[0]), f"{name}.{gated[0]}")
        *inner, down = [named(f"{prefix}.{part}", getattr(mlp, part)) for part in gated[1:] if part is not None]
        layers = "swiglu", tuple(inner), down
    elif is_mlp(block.mlp):
        layers = "silu", (named(f"{name}.mlp[0]", block.mlp[0]),), named(f"{name}.mlp[2]", block.mlp[2])
    else:
        return f"{name}.mlp is not Linear, SiLU, Linear"
    own_part = None
    if own:
        own_part = _modulation(f"{name}.{modulation[0]}", modulation[1], BLOCK, named)
    return norm_part, *layers, own_part


def _times(name: str, time) -> list[tuple] | str:
    """(prefix, name of both layers, both layers, norm or None) of every embedding; or what is missing or wrong."""
    if isinstance(time, nn.ModuleList):
        parts = [_times(f"{name}[{i}]", part) for i, part in enumerate(time)]
        bad = next((part for part in parts if isinstance(part, str)), None if parts else f"{name}[0].mlp")
        return bad if bad is not None else [pair for part in parts for pair in part]
    if getattr(time, "fc1", None) is not None and getattr(time, "fc2", None) is not None:
        return [(f"net.{name}", ".fc1", ".fc2", time.fc1, time.fc2, None)]
    mlp = getattr(time, "mlp", None)
    if mlp is None:
        return f"{name}.mlp"
    normed = isinstance(mlp, nn.Sequential) and len(mlp) == 4 and norm_weight(mlp[3]) is not None
    if not is_mlp(mlp[:3] if normed else mlp):
        return f"net.{name}.mlp is not Linear, SiLU, Linear"
    return [(f"net.{name}.mlp", "[0]", "[2]", mlp[0], mlp[2], mlp[3] if normed else None)]


def _modulation_of(part, names: dict) -> tuple[str, object]:
    return _any(part, names["modulation"] + names["modulation behind SiLU"])


def _modulation(path: str, module, names: dict, named):
    """The Linear of a modulation; None, which is no Linear, where it is not SiLU, Linear."""
    if path.rpartition(".")[2] in names["modulation behind SiLU"]:
        return named(path, module)
    fits = isinstance(module, nn.Sequential) and len(module) == 2 and is_silu(module[0])
    return named(f"{path}[-1]", module[1] if fits else None)


def _holds(block: nn.Module, names: tuple) -> bool:
    mlp = getattr(block, names[0], None) if names[0] else block
    return all(isinstance(getattr(mlp, name, None), nn.Module) for name in names[1:] if name is not None)


def _any(module, names) -> tuple[str, object]:
    """The first of these names under which there is a module; the first name and None where there is none."""
    for name in names:
        if isinstance(part := getattr(module, name, None), nn.Module):
            return name, part
    return names[0], None


def is_silu(module) -> bool:
    """torch's SiLU, or a module of that name."""
    return isinstance(module, nn.SiLU) or "silu" in type(module).__name__.lower()


def is_mlp(module) -> bool:
    """Linear, SiLU, Linear; what kind of Linear is looked at elsewhere."""
    return isinstance(module, nn.Sequential) and len(module) == 3 and is_silu(module[1])


def norm_weight(norm: nn.Module):
    """The factors of a norm, or None."""
    return next((w for name in _NORM_WEIGHT if (w := getattr(norm, name, None)) is not None), None)


def norm_eps(norm) -> float | None:
    """The epsilon of a norm, or of a layer that normalises by a function; None where it says none."""
    return next((float(e) for name in _EPS if isinstance(e := getattr(norm, name, None), (int, float))), None)


def norm_kinds(norm: nn.Module) -> tuple[str, ...]:
    """Which norms a module may be, the likeliest first: a class that is not torch's does not say."""
    if isinstance(norm, nn.LayerNorm):
        return ("layer",)
    if isinstance(norm, torchs_rms()):
        return ("rms",)
    classes = (base for base in type(norm).__mro__ if base is not nn.Module)
    torchs = any(base.__module__.startswith("torch.nn.modules.") for base in classes)
    if torchs or norm_eps(norm) is None:  # torch's others are of groups, of batches
        return ()
    return ("layer",) if getattr(norm, "bias", None) is not None else ("rms", "layer")


def torchs_rms() -> tuple[type, ...]:
    """torch.nn.RMSNorm, where this PyTorch has it."""
    return (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()
