"""One description of a diffusion head's network, read from its structure: sizes, norms, MLPs, modulations, times.

Every network of the kind is the same few lines, which differ in names and in details::

    y = silu(mean_k time_k(t_k) + cond)
    h = input(x)
    h += gate * mlp(norm(h) (1 + scale) + shift)   for every block, (shift, scale, gate) = modulation(y)
    out = final(norm(h) (1 + scale) + shift),                              (shift, scale) = modulation(y)

Names are found through one table (:mod:`cspd_kernels.parts`). They do not show what a forward does with its parts: in
which order it cuts a modulation, or whether it scales the time. :func:`specs_of` lists first what is known of a code
base by its names, and then what else it may be. Whoever needs to be sure compares numbers.

Sources: LTH14/mar (arXiv 2406.11838), stepfun-ai/NextStep-1, shallowdream204/BitDance, microsoft/VibeVoice,
kyutai-labs/pocket-tts, Jiawei-Yang/DeTok.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn

from .parts import Parts, Size, norm_eps, norm_kinds, parts_of, torchs_rms

PACKED_ORDER = ("shift", "scale", "gate")
_ORDERS = (
    PACKED_ORDER, ("scale", "shift", "gate"), ("shift", "gate", "scale"), ("scale", "gate", "shift"),
    ("gate", "shift", "scale"), ("gate", "scale", "shift"),
)  # fmt: skip
# What is known of a forward by a name in its network, where it differs from LTH14/mar's.
KNOWN = {"ada_ln_blocks": {"modulation": ("scale", "shift", "gate"), "scale": 1000.0}}  # BitDance


@dataclass(frozen=True)
class TimeSpec:
    """A time embedding: sinusoidal features, Linear, SiLU, Linear, and a norm where there is one.

    The features of t are ``cos(scale t f_j)`` and ``sin(scale t f_j)``, ``f_j = max_period ** (-j / (size // 2))``.
    The norm "variance" is ``x weight / sqrt(eps + var(x))`` with the unbiased variance about the mean, of an x that is
    not centred (pocket-tts); "rms" has the mean square there.
    """

    size: int = 256
    scale: float = 1.0
    max_period: float = 10000.0
    cosines_first: bool = True
    norm: str | None = None
    norm_eps: float = 0.0


@dataclass(frozen=True)
class HeadSpec:
    """What a head's network computes, as plain data, and the modules that it computes it with (``parts``)."""

    channels: int  # C
    outputs: int  # O: C, or 2C with a variance; the first ones where the network keeps no more of its last layer's
    width: int  # W
    hidden: int  # H, of the blocks' MLPs
    depth: int  # D
    cond_channels: int  # Z; W where the condition is given embedded
    norm: str  # "layer", or "rms", which has no offset
    norm_eps: float
    mlp: str  # "silu": Linear, SiLU, Linear; "swiglu": down(silu(gate(h)) * up(h))
    modulation: tuple[str, ...]  # order of the rows of a block's modulation
    gate_first: bool  # of a layer that holds gate and up
    modulation_of: tuple[int, ...]  # by block, which modulation it uses
    condition: str  # "linear"; "given": the caller embeds it, (N, W)
    times: tuple[TimeSpec, ...]
    parts: Parts = field(repr=False, compare=False)

    @property
    def final_modulation(self) -> tuple[str, ...]:
        """Order of the rows of the last layer's modulation: the blocks', without the gate."""
        return tuple(name for name in self.modulation if name != "gate")

    @property
    def shared_modulation(self) -> bool:
        """Whether several blocks use one modulation."""
        return len(set(self.modulation_of)) < self.depth

    def given(self) -> HeadSpec:
        """The same network from behind its condition's embedding, which is given as (N, W)."""
        return replace(self, condition="given", cond_channels=self.width)

    def sizes(self) -> dict[str, int]:
        """Sizes by the letters that :meth:`layers` uses."""
        return {
            "C": self.channels, "O": self.parts.final.out_features, "W": self.width, "H": self.hidden,
            "Z": self.cond_channels, "F": self.times[0].size,
        }  # fmt: skip

    def layers(self) -> Iterator[tuple[str, nn.Linear, Size, Size]]:
        """Every linear layer that is packed: name, layer, outputs and inputs."""
        return self.parts.layers(cond=self.condition == "linear")

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Every linear layer that is packed, with its name."""
        return ((name, layer) for name, layer, *_ in self.layers())

    def norms(self) -> Iterator[tuple[str, nn.Module]]:
        """Every norm with its name, those of time embeddings too."""
        return itertools.chain(self.parts.norms(), self.parts.time_norms())

    def torchs_norms(self) -> list[nn.Module]:
        """The norms of torch's own classes, whose numbers are their own; what other classes hold is for them to say."""
        return [norm for _, norm in self.norms() if isinstance(norm, (nn.LayerNorm, *torchs_rms()))]


def spec_of(net: nn.Module, channels: int | None = None) -> HeadSpec | str:
    """The likeliest of :func:`specs_of`, or why there is none."""
    specs = specs_of(net, channels)
    return specs if isinstance(specs, str) else specs[0]


def specs_of(net: nn.Module, channels: int | None = None) -> list[HeadSpec] | str:
    """What ``net`` may compute, the likeliest first; or why it is no such network, in one sentence.

    Args:
        channels: C, where it is known.
    """
    parts = parts_of(net)
    if isinstance(parts, str):
        return parts
    # What is no Linear of the width: whatever it is, its module embeds the condition.
    given = not isinstance(parts.cond, nn.Linear) or parts.cond.out_features != _features(parts.input, "out")
    sizes = _sizes(parts, channels, given)
    if isinstance(sizes, str):
        return sizes
    norms = _norms(parts, sizes["W"])
    if isinstance(norms, str):
        return norms
    (kinds, eps), blocks = norms, parts.blocks
    known = next((values for name, values in KNOWN.items() if getattr(net, name, None) is not None), {})
    choices = {
        "norm": kinds,
        "modulation": _first(known.get("modulation"), _ORDERS),
        "gate_first": (True, False) if any(b.form == "swiglu" and len(b.mlp) == 1 for b in blocks) else (True,),
        "scale": _first(known.get("scale"), (1.0, 1000.0)),
        "cosines_first": (True, False),
        "time_norm": _time_norms(parts.times[0].norm),
        "outputs": tuple(range(sizes["O"], 0, -sizes["C"])),
    }

    def spec(norm, modulation, gate_first, scale, cosines_first, time_norm, outputs) -> HeadSpec:
        times = [
            TimeSpec(
                time.fc0.in_features, scale, 10000.0, cosines_first, time_norm,
                0.0 if time_norm is None else norm_eps(time.norm),
            )
            for time in parts.times
        ]  # fmt: skip
        return HeadSpec(
            channels=sizes["C"], outputs=outputs, width=sizes["W"], hidden=sizes["H"], depth=len(blocks),
            cond_channels=sizes["W"] if given else sizes["Z"], norm=norm, norm_eps=eps,
            mlp=blocks[0].form if blocks else "silu", modulation=modulation, gate_first=gate_first,
            modulation_of=parts.modulation_of, condition="given" if given else "linear", times=tuple(times),
            parts=parts,
        )  # fmt: skip

    # Those that differ in the least from what is expected come first.
    indices = itertools.product(*(range(len(values)) for values in choices.values()))
    ordered = sorted(indices, key=lambda index: (sum(map(bool, index)), index))
    return [spec(*(values[i] for values, i in zip(choices.values(), index))) for index in ordered]


def _first(expected, values: tuple) -> tuple:
    return values if expected is None else (expected, *(value for value in values if value != expected))


def _time_norms(norm: nn.Module | None) -> tuple:
    """Which norms one at the end of a time embedding may be, the likeliest first."""
    if norm is None:
        return (None,)
    return ("rms",) if norm_kinds(norm) == ("rms",) else ("variance", "rms")


def _features(layer, side: str) -> int:
    return getattr(layer, f"{side}_features", 0)


def _sizes(parts: Parts, channels: int | None, given: bool) -> dict[str, int] | str:
    """The sizes by letter, or which layer does not fit."""
    channels = _features(parts.input, "in") if channels is None else channels
    sizes = {"C": channels, "W": _features(parts.input, "out"), "O": _features(parts.final, "out")}
    sizes["Z"] = _features(parts.cond, "in")
    sizes["H"] = _features(parts.blocks[0].down, "in") if parts.blocks else sizes["W"]
    sizes["F"] = _features(parts.times[0].fc0, "in")
    forms = {block.form for block in parts.blocks} | {len(block.mlp) for block in parts.blocks}
    if len(forms) > 2:
        return "its blocks hold MLPs of several forms"
    for name, layer, out, into in parts.layers(cond=not given):
        if not isinstance(layer, nn.Linear):
            return f"{name} is {_kind(layer)}, not torch.nn.Linear"
        (m, rows), (n, columns) = out, into
        expected = n * sizes[columns], m * sizes[rows]
        if (layer.in_features, layer.out_features) != expected:
            return f"{name} is {layer.in_features} -> {layer.out_features}, expected {expected[0]} -> {expected[1]}"
    if sizes["O"] not in (channels, 2 * channels):
        understood = f"{channels} (eps) or {2 * channels} (eps, v) are understood"
        return f"net.final_layer puts out {sizes['O']} channels; {understood}"
    if len({time.norm is None for time in parts.times}) > 1:
        return "some of its time embeddings end in a norm and some do not"
    return sizes


def _norms(parts: Parts, width: int) -> tuple[tuple[str, ...], float] | str:
    """(which norms they may be, their epsilon), or which of them does not fit."""
    kinds, epsilons = None, set()
    for name, norm in parts.norms():
        shape = getattr(norm, "normalized_shape", None)
        found = norm_kinds(norm) if shape is None or tuple(shape) == (width,) else ()
        kinds = found if kinds is None else tuple(kind for kind in kinds if kind in found)
        if not kinds:
            what = " ".join(str(norm).split())
            return f"{name} is {what}, not a LayerNorm of width {width} or an RMSNorm, the same in every block"
        eps = norm_eps(norm)
        epsilons.add(torch.finfo(torch.float32).eps if eps is None else eps)
    if getattr(parts.final_norm, "weight", None) is not None and norm_kinds(parts.final_norm):
        return f"{parts.names[id(parts.final_norm)]} has affine parameters"
    if len(epsilons) != 1:
        return f"its LayerNorms differ in eps: {sorted(epsilons)}"
    for name, norm in parts.time_norms():
        if "rms" not in norm_kinds(norm) or norm_eps(norm) is None:
            return f"{name} is {_kind(norm)}, not a norm without an offset that says its eps"
    return kinds, epsilons.pop()


def _kind(value) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
