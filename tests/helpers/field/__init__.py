"""Miniatures of the heads of other code bases: how each is made, how its code base calls it, how it is to be served.

Written from what those code bases compute, in sizes that a test can afford, with random weights of which none is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from foreign import CHANNELS, COND, WIDTH, made

from . import diffusion_heads as by_diffusion
from . import diffusion_networks as networks
from . import flow_heads as by_flow
from . import other_networks as other
from . import vibevoice
from .schedulers import DPMSolverMultistepScheduler

ROWS = 5
LOOP, NETWORK, OWN, REFUSED = "loop", "network", "own code", "refused"
PLAIN = ({"temperature": 0.8}, {"cfg": 2.5}, {"cfg": torch.tensor([2.0]), "rows": 33}, {"rows": 1})


@dataclass(frozen=True)
class Case:
    """A head of the field.

    Attributes:
        make: the model with its random weights.
        call: ``call(model, **options)``: the tokens that the callers of its code base keep.
        calls: options of the calls to compare.
        net: path of its network.
        served: by default of :func:`cspd.patch`: LOOP by one call of the kernels, NETWORK in its own loop with
            evaluations by the kernels, OWN code (``why``), or REFUSED (``why``).
        why: a part of the one sentence that is told.
        alone: whether its network can be served without its loop, too: it is given x, t and c of one row each.
    """

    make: Callable[[], nn.Module]
    call: Callable[..., torch.Tensor]
    calls: tuple[dict, ...] = PLAIN
    net: str = "net"
    served: str = LOOP
    why: str = ""
    alone: bool = True

    def network(self, model: nn.Module) -> nn.Module:
        """The network of a model."""
        return model.get_submodule(self.net)


def conditions(*shape: int) -> torch.Tensor:
    """z (..., Z), the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def as_mar(model, rows=ROWS, cfg=1.0, shape=(COND,), **options) -> torch.Tensor:
    """Called with conditional and unconditional rows where it is guided; the first half is kept."""
    guided = not (isinstance(cfg, (int, float)) and cfg == 1.0)
    return model.sample(conditions(rows * (1 + guided), *shape), cfg=cfg, **options)[:rows]


def always_guided(model, rows=ROWS, index=3.0, **options) -> torch.Tensor:
    index = torch.full((2 * rows, 1), index) if isinstance(index, float) else index
    return model.sample(conditions(2 * rows, COND), index=index, **options)[:rows]


def with_index(model, rows=ROWS, cfg=1.0, index=3.0, **options) -> torch.Tensor:
    both = rows * (1 + (cfg != 1.0))
    return as_mar(model, rows, cfg, index=torch.full((both, 1), index), **options)


def of_batch(model, batch=2, cfg=1.0, **options) -> torch.Tensor:
    """z (B, frames, Z)."""
    both = batch * (1 + (cfg != 1.0))
    return model.sample(conditions(both, 12, COND), cfg=cfg, **options)[:batch]


def of_shape(model, shape=(2, 3), **options) -> torch.Tensor:
    return model.sample(conditions(*shape, COND), **options)


def next_step(model, rows=4, cfg=1.0, cfg2=1.0, **options) -> torch.Tensor:
    groups = 1 + (cfg > 1) + (cfg2 > 1)
    return model.sample(c=conditions(rows * groups, COND), cfg=cfg, cfg2=cfg2, num_sampling_steps=6, **options)


def bit_dance(model, rows=ROWS, cfg=1.0, double=False) -> torch.Tensor:
    """All rows that come back are used: at 1.0 the unconditional ones are samples of their own."""
    return model.sample(conditions(rows * (2 if cfg > 1 or double else 1), COND), cfg, num_sampling_steps=6)


def speech(model, rows=1, **options) -> torch.Tensor:
    c = conditions(2 * rows, WIDTH)
    return model.sample_speech_tokens(c[:rows], c[rows:], **options)


def hub_speech(model, rows=1, cfg=1.3) -> torch.Tensor:
    c = conditions(2 * rows, WIDTH)
    return model._sample_audio_latent(c[:rows], c[rows:], DPMSolverMultistepScheduler(), 5, cfg)


def pocket(model, rows=1, **options) -> torch.Tensor:
    return model(conditions(rows, 2, CHANNELS), **options)


def orthus(model, scales=()) -> torch.Tensor:
    return model(conditions(1 + len(scales), 1, COND), *scales)


@torch.no_grad()
def unrecorded(model, rows=ROWS, additive=False, **options) -> torch.Tensor:
    """Of heads whose own code autograd would record."""
    if not additive:
        return as_mar(model, rows, **options)
    return model.sample_additive_cfg(*conditions(3, rows, COND), **options)


def _case(kind, call=as_mar, calls=PLAIN, net="net", served=LOOP, why="", alone=True, **changes) -> Case:
    return Case(partial(made, kind, **changes), call, calls, net, served, why, alone)


_d, _n, _f, _o, _v = by_diffusion, networks, by_flow, other, vibevoice
_INDEXED = ({"temperature": 0.8}, {"cfg": 2.5, "index": 9.0}, {"rows": 1})
_DISA = ({}, {"step": 63}, {"step": 30, "cfg": torch.tensor([2.0]), "temperature": 0.9}, {"step": 5, "ar_num_iter": 16})
_POOLED = tuple({**call, "shape": (4, COND)} for call in PLAIN)
_VIBE = {"net": "model.prediction_head", "served": NETWORK}
_HUB, _POCKET, _ORTHUS = ({**_VIBE, "net": net} for net in ("model.diffusion_head", "flow_net", "mlp_head"))
_ONE = tuple({**call, "shape": (1, COND)} for call in PLAIN)

FIELD: dict[str, Case] = {
    "hart": _case(_d.Hart, calls=({}, {"cfg": 1.5}, {"cfg": 0.0, "temperature": 0.7}, {"cfg": torch.tensor([0.7])})),
    "mar-audio": _case(_d.ClippedHead),
    "towards": _case(_d.Towards),
    "towards, clipped": _case(_d.Towards, clip_denoised=True),
    "towards, noise, clipped": _case(_d.Towards, predict_xstart=False, clip_denoised=True),
    "uva": _case(_d.UvaImage, calls=({"text_latents": torch.zeros(2, 3)}, {"cfg": torch.tensor([1.5])})),
    "uva, actions": _case(_d.UvaAction, of_batch, ({"temperature": 0.95}, {"cfg": 2.0}, {"batch": 1})),
    "disa": _case(_d.Disa, calls=_DISA),
    "disa, ddim": _case(_d.Disa, calls=_DISA, sampler="DDIM"),
    "arinar": _case(_d.ArinarModel, net="diffloss.net"),
    "arinar, ddim": _case(_d.ArinarModel, net="diffloss.net", use_ddim=True),
    "arinar, groups": _case(_d.ArHead, served=NETWORK),
    "far": _case(_n.Far, always_guided, (*_INDEXED, {"cfg": 1.0}, {"index": None}), alone=False),
    "freqpolicy": _case(_n.Freqpolicy, with_index, _INDEXED, alone=False),
    "motiongpt3": _case(_n.MotionGpt3, calls=_POOLED, alone=False),
    "motiongpt3, linear": _case(_n.MotionGpt3, calls=_ONE, pooled=False),
    "detok": _case(_n.Detok),
    "calm": _case(_n.Calm, of_shape, ({}, {"shape": (5,)}, {"shape": (2, 3, 1), "temperature": 0.7}, {"shape": ()})),
    "himar": _case(_d.Himar),
    "mardm": _case(_d.MardmDdpm, calls=({"temperature": 1, "cfg": 4}, {"temperature": 1, "cfg": 1})),
    "nextstep": _case(
        _f.FlowMatchingHead, next_step,
        ({}, {"cfg": 3.0}, {"cfg": 3.0, "cfg2": 1.5}, {"cfg": 1.0, "cfg2": 1.5}, {"cfg": 2.0, "noise_repeat": 4},
         {"cfg": 2.0, "timesteps_shift": 0.5}, {"rows": 34, "last_step_size": 0.1, "noise_repeat": 2}),
    ),
    "mardm, flow": _case(_f.DiffMLPs_SiT, served=NETWORK),
    "flow_mar": _case(_f.FlowLoss, unrecorded, PLAIN[1:3]),
    "msa-t2m": _case(_f.RectifiedFlowHead, unrecorded, (*PLAIN, {"additive": True}, {"additive": True, "rows": 1})),
    "bitdance": _case(_o.DiffHead, bit_dance, ({}, {"cfg": 3.0}, {"double": True}, {"cfg": 2.0, "rows": 33})),
    "bitdance, shifted": _case(_o.DiffHead, bit_dance, ({}, {"cfg": 3.0}), time_shift=2.5),
    "bitdance, compiled": _case(_o.DiffHead, bit_dance, ({"cfg": 3.0},), network=_o.CompiledEncoder, alone=False),
    "vibevoice": _case(_v.VibeVoice, speech, ({}, {"cfg_scale": 1.3, "rows": 3}), **_VIBE),
    "vibevoice, sde": _case(_v.VibeVoice, speech, ({"cfg_scale": 1.5}, {"rows": 3}), **_VIBE, sde=True),
    "vibevoice, hub": _case(_v.HubVibeVoice, hub_speech, ({}, {"cfg": 1.0, "rows": 3}), **_HUB),
    "pocket-tts": _case(_o.FlowLMModel, pocket, ({}, {"rows": 3, "temp": 0.3}, {"lsd_decode_steps": 4}), **_POCKET),
    "orthus": _case(_o.Orthus, orthus, ({}, {"scales": (5.0,)}, {"scales": (4.0, 1.5)}), **_ORTHUS),
    "xar": _case(_n.AttentionHead, calls=({},), served=REFUSED, why="res_blocks"),
}  # fmt: skip
