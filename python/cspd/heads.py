"""Finding diffusion heads in a model, and keeping their packed form up to date."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead
from cspd_kernels.head import call_dtype, why_not_a_head
from cspd_kernels.ops.denoise.reference import network


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
        elif hasattr(module, "net") or type(module).__name__ == "DiffLoss":
            near.append(f"\n  {name or '(the model itself)'} ({type(module).__name__}): {reason}")
    if not heads:
        raise ValueError(
            f"no diffusion head found in {type(model).__name__}. Looked for modules with in_channels, gen_diffusion "
            "and a net of input_proj, time_embed, cond_embed, res_blocks and final_layer (DiffLoss of LTH14/mar)."
            + (" These came near:" + "".join(near) if near else " No module came near.")
        )
    return heads


class HeadCache:
    """The packed head of one module, packed again exactly when its weights or schedule changed.

    A change is seen by the parameters' storage, type, device and version counter. Writes through
    ``parameter.data`` bypass the counter and are not seen where the packed weights are a copy
    (operands of another type than the weights): call ``cspd.patch`` again after such writes.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._packed: dict[torch.dtype, tuple[tuple, DiffusionHead]] = {}

    def __getstate__(self) -> dict:
        return {"module": self.module, "_packed": {}}  # copies and pickles pack their own

    def get(self, dtype: torch.dtype | None = None) -> DiffusionHead:
        """The head with operands of ``dtype``; None follows autocast, else the weights' type."""
        weight = self.module.net.input_proj.weight
        dtype = dtype or call_dtype(weight.device, weight.dtype)
        print_ = self._fingerprint()
        packed = self._packed.get(dtype)
        if packed is None or print_ is None or packed[0] != print_:
            self._packed = {k: v for k, v in self._packed.items() if v[0] == print_}
            packed = self._packed[dtype] = (print_, DiffusionHead.from_module(self.module, dtype=dtype))
        return packed[1]

    def _fingerprint(self) -> tuple | None:
        """None where changes cannot be told: inference tensors keep no version counter."""
        parameters = list(self.module.net.parameters())
        if any(p.is_inference() for p in parameters):
            return None
        schedule = self.module.gen_diffusion
        return (id(schedule), *((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters))


@torch.no_grad()
def verify_network(name: str, module: nn.Module) -> None:
    """Compare the module's own network with the definition on two random rows.

    A fork may keep the names and change the arithmetic (another embedding, another activation);
    this turns a silently wrong image into an error.

    Raises:
        ValueError: the outputs differ, or the network cannot be called as ``net(x, t, c)``.
    """
    weight = module.net.input_proj.weight
    if weight.device.type == "meta":
        return
    # In reduced precision the comparison would be loose, and released code cannot run there at all.
    head = DiffusionHead.from_module(module, dtype=torch.float32)
    net = module.net if weight.dtype == torch.float32 else copy.deepcopy(module.net).float()
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(2, n, generator=generator).to(weight.device) for n in (head.channels, head.cond_channels))
    step = head.num_steps // 2
    t = torch.full((2,), int(head.schedule.timesteps[step]), device=weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        y = head.time_embedding[step] + nn.functional.linear(c, head.cond_weight, head.cond_bias)
        expected = network(head, x, y)
        try:
            actual = net(x, t, c)
        except Exception as error:
            raise ValueError(f"{name}: its network cannot be called as net(x, t, c): {error}") from error
    difference = float((actual - expected).abs().max())
    # Loose enough for TF32 matrix products, tight enough for any change of the formula.
    if not difference <= 1e-2 * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{name} ({type(module).__name__}) has the parts of a MAR diffusion head but computes something else: its "
            f"output differs by {difference:.3g} on random rows. It is not supported; leave it unpatched."
        )
