"""``evaluate`` in torch: the condition's part is kept for the next call, and a timestep embedded once for all rows."""

from __future__ import annotations

import torch

from ..denoise.torch_network import embedded, layers_of, modulations_of, network
from .kept import KeptCondition, embed_few


def evaluate(head, x, timesteps, cond, workspace_bytes):
    """As :func:`cspd_kernels.evaluate`."""
    layers = layers_of(head)
    # Kept with the head itself: heads of several schedules share their weights, and this is of none.
    kept = head.shared.setdefault("condition", KeptCondition())
    y = embed_few(head, timesteps) + kept.get(head, cond, lambda: embedded(head, cond))  # [M, W]
    # Shift, scale and gate of every modulation, shift and scale of the last layer, silu(y).
    parts = 3 * len(layers.mods) + 3
    block = max(1, workspace_bytes // (head.width * parts * head.dtype.itemsize))
    out = []
    for start in range(0, max(len(x), 1), block):
        rows = slice(start, start + block)
        block_mods, final_mod = modulations_of(head, layers, y[None, rows])
        out.append(network(head, layers, x[rows], block_mods, final_mod)[0])
    return out[0] if len(out) == 1 else torch.cat(out)
