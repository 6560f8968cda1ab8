"""Finding diffusion heads in a model, and keeping their packed form up to date."""

from __future__ import annotations

import copy
import logging
import operator
from itertools import chain

import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead
from cspd_kernels.head import call_dtype, why_not_a_head, without_autocast
from cspd_kernels.ops.denoise.reference import network
from cspd_kernels.testing import randomize_

_logger = logging.getLogger("cspd")


def find_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Every diffusion head in the module tree by name, found by structure.

    Raises:
        ValueError: there is none; the message lists what was looked for and what came near.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module that holds a diffusion head, got {type(model).__name__}")
    heads, near = {}, []
    for name, module in model.named_modules():
        reason = why_not_a_head(module)
        if reason is None:
            heads[name] = module
        elif hasattr(getattr(module, "net", None), "res_blocks") or type(module).__name__ == "DiffLoss":
            near.append(f"\n  {name or '(the model itself)'} ({type(module).__name__}): {reason}")
    if not heads:
        raise ValueError(
            f"no diffusion head found in {type(model).__name__}. Looked for modules with in_channels, gen_diffusion "
            "and a net of input_proj, time_embed, cond_embed, res_blocks and final_layer (DiffLoss of LTH14/mar)."
            + (" These came near:" + "".join(near) if near else " No module came near.")
        )
    if near:
        _logger.warning(
            "only some of the heads of %s can be served; these cannot:%s", type(model).__name__, "".join(near)
        )
    return heads


class HeadCache:
    """The packed head of one module, packed again exactly when its weights or schedule changed.

    A change is seen by the modules and parameters themselves and by the parameters' storage, type,
    shape and version counter. Writes through ``parameter.data`` bypass the counter and are not seen
    where the packed values are not the parameters themselves (operands of another type, the time
    embedding): call ``cspd.patch`` again after such writes.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._packed: dict[torch.dtype, tuple[_Source, DiffusionHead]] = {}

    def __getstate__(self) -> dict:
        return {"module": self.module, "_packed": {}}  # copies and pickles pack their own

    def get(self, dtype: torch.dtype | None = None) -> DiffusionHead:
        """The head with operands of ``dtype``; None follows autocast, else the weights' type."""
        if dtype is None:
            weight = self.module.net.input_proj.weight
            dtype = call_dtype(weight.device, weight.dtype)
        if dtype not in self._packed or not self._packed[dtype][0].is_current(self.module):
            self._packed = {k: v for k, v in self._packed.items() if v[0].is_current(self.module)}
            self._packed[dtype] = (_Source(self.module), DiffusionHead.from_module(self.module, dtype=dtype))
        return self._packed[dtype][1]


class _Source:
    """What a head was packed from.

    It is asked at every call, and walking the module tree would take longer than everything else the
    host does there: the tables that the modules keep their children in are remembered and compared
    instead. It holds the members, the tensors and the schedule, so that no new one can take the place
    of an old one in memory and be mistaken for it; an address then tells the device, too.
    """

    def __init__(self, module: nn.Module):
        self.net, self.schedule = module.net, _schedule(module)
        self.tables = [table for m in self.net.modules() for table in (m._modules, m._parameters) if table]
        self.members = list(chain.from_iterable(map(dict.values, self.tables)))
        self.parameters = list(self.net.parameters())
        self.tensors = [p.detach() for p in self.parameters]
        # Inference tensors keep no version counter: their changes cannot be told.
        self.trackable = not any(p.is_inference() for p in self.parameters)
        self.state = self._state() if self.trackable else None

    def is_current(self, module: nn.Module) -> bool:
        if not self.trackable or module.net is not self.net or _schedule(module) is not self.schedule:
            return False
        members = list(chain.from_iterable(map(dict.values, self.tables)))
        same = len(members) == len(self.members) and all(map(operator.is_, members, self.members))
        return same and self._state() == self.state

    def _state(self) -> list[tuple]:
        return [(p.data_ptr(), p._version, p.dtype, p.shape) for p in self.parameters]


def _schedule(module: nn.Module):
    return getattr(module.gen_diffusion, "schedule", module.gen_diffusion)


@torch.no_grad()
def verify_network(name: str, module: nn.Module) -> None:
    """Compare the module's own network with the definition, on random rows at two timesteps.

    A fork may keep the names and change the arithmetic (another embedding, another order); this
    turns a silently wrong image into an error. The comparison runs on a copy whose constant
    parameters are made random: a freshly built head puts out zeros whatever it computes. Only the
    network is compared, not the sampling loop around it.

    Raises:
        ValueError: the outputs differ, or the network cannot be called as ``net(x, t, c)``.
    """
    device = module.net.input_proj.weight.device
    if device.type == "meta":
        return
    twin = _Twin(copy.deepcopy(module.net).float().eval(), module.in_channels, module.gen_diffusion)
    randomize_(twin, seed=0, scale=0.3)
    head = DiffusionHead.from_module(twin, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, c = (
        torch.randn(2, n, generator=generator, device="cpu").to(device) for n in (head.channels, head.cond_channels)
    )
    for step in {0, head.num_steps // 2}:
        t = torch.full((2,), int(head.schedule.timesteps[step]), device=device)
        with without_autocast(device):
            y = head.time_embedding[step] + nn.functional.linear(c, head.cond_weight, head.cond_bias)
            expected = network(head, x, y)
            try:
                actual = twin.net(x, t, c)
            except Exception as error:
                raise ValueError(f"{name}: its network cannot be called as net(x, t, c): {error}") from error
        difference, scale = float((actual - expected).abs().max()), float(expected.abs().max())
        # Wide enough for TF32 matrix products.
        if not difference <= 1e-2 * scale:
            raise ValueError(
                f"{name} ({type(module).__name__}) has the parts of a MAR diffusion head but computes something else: "
                f"its output differs by {difference / scale:.2g} of the largest value on random rows. It is not "
                "supported; leave it unpatched."
            )


class _Twin(nn.Module):
    """A head around a copied network."""

    def __init__(self, net: nn.Module, in_channels: int, gen_diffusion):
        super().__init__()
        self.net, self.in_channels, self.gen_diffusion = net, in_channels, gen_diffusion
