"""``evaluate`` in torch: the condition's part is kept for the next call, and a timestep embedded once for all rows."""

from __future__ import annotations

import torch

from ..denoise.torch_network import embedded, layers_of, modulations_of, network, plain_layers_of
from .kept import KeptCondition, embed_few

# Rows up to which a head that follows its module multiplies in float32 with its weights as they are: looking for
# changes in what was made of them takes as long as so few rows' products. In half precision packing gains less.
_FEW = 8


def evaluate(head, x, timesteps, cond, workspace_bytes):
    """Like :func:`cspd_kernels.evaluate`."""
    if head.watched and (head.dtype.itemsize == 2 or len(x) <= _FEW):
        layers, c = plain_layers_of(head), embedded(head, cond)
    else:
        layers = layers_of(head)
        # Heads of several schedules share their weights, and so what is kept.
        c = head.shared.setdefault("condition", KeptCondition()).get(head, cond, lambda: embedded(head, cond))
    y = embed_few(head, timesteps) + c  # [M, W]
    # Shift, scale and gate of every modulation, shift and scale of the last layer, silu(y).
    parts = 3 * len(layers.mods) + 3
    block = max(1, workspace_bytes // (head.width * parts * head.dtype.itemsize))
    out = []
    for start in range(0, max(len(x), 1), block):
        rows = slice(start, start + block)
        block_mods, final_mod = modulations_of(head, layers, y[None, rows])
        out.append(network(head, layers, x[rows], block_mods, final_mod)[0])
    return out[0] if len(out) == 1 else torch.cat(out)
