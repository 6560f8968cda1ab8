"""MAR's transformer over packed weights, for the positions that are wanted and nothing else.

It gives the same numbers as :func:`cspd.transformer.conditions`, up to rounding, for less work. The residual stream
takes one pass a branch (:mod:`cspd_kernels.ops.add_norm`). The last layer of the decoder, and what follows, is computed
for the wanted positions alone. The number of known tokens may be a value on the device, with room for more tokens. So
one CUDA graph serves many steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cspd_kernels.head import without_autocast
from cspd_kernels.ops.add_norm import add_norm

from .weights import Block, Weights


@torch.no_grad()
def conditions(
    weights: Weights,
    tokens: torch.Tensor,
    known: torch.Tensor,
    rank: torch.Tensor,
    where: torch.Tensor,
    embedding: torch.Tensor,
    count: torch.Tensor | None = None,
    backend: str | None = None,
    run: Callable | None = None,
    attention: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The conditions z (R, n, Z) of the positions ``where``, in the stream's type.

    With ``attention`` also (B, n) in the stream's type, for the rows with a class. It says how spread out the attention
    of a position is in the decoder's last block. That is the mean over the heads of -sum p_k log p_k / log K. Here p
    are the weights of the K keys of the classes' buffer and of the known tokens, divided by their sum. It is 1 if all
    are equal, 0 if one has it all or is alone (the signal of Drift-AR, arXiv 2603.28049).

    Args:
        tokens: (B, L, C). known: (B, K) int64 positions, the first tokens of the order of drawing.
        rank: (B, L) int64: the place of each position in that order.
        where: (B, n) int64 positions whose conditions are wanted.
        embedding: (R, E) class embeddings, R = B or, with rows of no class behind them, 2 B.
        count: (1,) or, for rows of their own, (B,) int64 on the device: how many of ``known`` are really known; the
            rest is computed and not looked at. None: all of them.
        backend: of ``add_norm``. run: in place of :func:`run_block`.
    """
    with without_autocast(weights.device):
        run = run_block if run is None else run
        if count is not None:
            count = count[:, None]  # (1 or B, 1)
        encoded = _encode(weights, tokens, known, embedding, count, backend, run)
        seen = rank < (known.shape[1] if count is None else count)  # (B, L)
        z, entropy = _decode(weights, encoded, rank, where, seen, backend, run, attention)
        return (z, entropy) if attention else z


def _encode(w: Weights, tokens, known, embedding, count, backend, run) -> torch.Tensor:
    """(R, buffer + K, E) in the operands' type."""
    batch, room = known.shape
    halves = len(embedding) // batch
    tokens = _rows(tokens, known)  # (B, K, C)
    if count is not None:  # whatever lies behind: a key that is not there must be finite all the same
        tokens = tokens.masked_fill((torch.arange(room, device=known.device) >= count)[..., None], 0.0)
    x = w.z_proj(tokens.to(w.dtype)).to(w.stream)  # (B, K, E)
    x = x + w.encoder_position[w.buffer + known]
    buffer = embedding.to(w.stream)[:, None] + w.encoder_position[: w.buffer]
    stream = torch.cat([buffer, x.repeat(halves, 1, 1)], dim=1)
    # MAR's norm in front of the blocks is a stream of its own.
    stream = add_norm(stream, None, *w.z_norm, w.stream, backend=backend)
    mask = None
    if count is not None:
        place = torch.arange(-w.buffer, room, device=known.device)
        # [1 or R, 1, 1, buffer + K], added to the scores: as numbers, or every layer would make numbers of it.
        mask = torch.zeros(len(count), len(place), dtype=w.dtype, device=place.device)
        mask = mask.masked_fill(place >= count, -torch.inf)[:, None, None]
        if halves > 1 and len(count) > 1:
            mask = mask.repeat(halves, 1, 1, 1)
    delta = None
    for block in w.encoder:
        stream, delta = run(block, stream, delta, mask, w.dtype, backend)
    return add_norm(stream, delta, *w.encoder_norm, w.dtype, backend=backend)


def _decode(
    w: Weights, encoded, rank, where, seen, backend, run, attention
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(R, n, Z), and (B, n) where it is asked for."""
    x, halves = w.decoder_embed(encoded), len(encoded) // len(where)  # (R, buffer + K, D)
    room = x.shape[1] - w.buffer
    # Of each position its known token's row, else the mask token's, which is put behind them.
    x = torch.cat([x, w.mask_token.expand(len(x), -1, -1)], dim=1)
    source = torch.where(seen, w.buffer + rank, w.buffer + room).repeat(halves, 1)
    buffer = torch.arange(w.buffer, device=x.device).expand(len(x), -1)
    stream = _rows(x, torch.cat([buffer, source], dim=1)) + w.decoder_position
    where, delta = where.repeat(halves, 1), None
    for block in w.decoder[:-1]:
        stream, delta = run(block, stream, delta, None, w.dtype, backend)
    keys = F.pad(seen, (w.buffer, 0), value=True) if attention else None
    stream, delta, entropy = _last_block(w.decoder[-1], stream, delta, w.buffer + where, w.dtype, backend, keys)
    return add_norm(stream, delta, *w.decoder_norm, w.stream, backend=backend) + w.position[where], entropy


def run_block(b: Block, stream, delta, mask, dtype, backend) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream (R, S, E), in place, with ``delta`` and the attention's branch; the MLP's branch, not added yet."""
    rows, length = stream.shape[:2]
    x = add_norm(stream, delta, *b.norm1, dtype, backend=backend)
    q, k, v = b.qkv(x).view(rows, length, 3, b.heads, -1).permute(2, 0, 3, 1, 4)
    return stream, _mlp(b, stream, b.proj(_attention(q, k, v, mask)), dtype, backend)


def _last_block(b: Block, stream, delta, where, dtype, backend, keys) -> tuple[torch.Tensor, ...]:
    """Like :func:`run_block`, at some positions (R, n) alone. It returns their stream (R, n, D), too.

    And, where ``keys`` (B, S) bool are given, :func:`_entropy` of the first B rows over them; else None.
    """
    rows, length, width = stream.shape
    x = add_norm(stream, delta, *b.norm1, dtype, backend=backend)
    k, v = b.qkv.part(width, 3 * width)(x).view(rows, length, 2, b.heads, -1).permute(2, 0, 3, 1, 4)
    q = b.qkv.part(0, width)(_rows(x, where)).view(rows, where.shape[1], b.heads, -1).transpose(1, 2)
    entropy = None if keys is None else _entropy(q[: len(keys)].to(stream.dtype), k[: len(keys)].to(stream.dtype), keys)
    stream = _rows(stream, where)
    return stream, _mlp(b, stream, b.proj(_attention(q, k, v, None)), dtype, backend), entropy


def _attention(q, k, v, mask) -> torch.Tensor:
    """(R, H, S, E / H) -> (R, S, E)."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return x.reshape(*x.shape[:2], -1)


def _entropy(q, k, keys) -> torch.Tensor:
    """q (B, H, n, E / H), k (B, H, S, E / H), keys (B, S) bool -> (B, n) in [0, 1], the mean over the heads."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    # The least number, not minus infinity: its weight is zero as well, and rows without any key stay finite.
    scores = scores.masked_fill(~keys[:, None, None], torch.finfo(scores.dtype).min)
    largest = keys.sum(dim=1).clamp(min=2).to(scores.dtype).log()
    return (torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1).mean(dim=1) / largest[:, None]).clamp(max=1.0)


def _mlp(b: Block, stream, delta, dtype, backend) -> torch.Tensor:
    x = add_norm(stream, delta, *b.norm2, dtype, backend=backend)
    return b.fc2(b.fc1(x, "gelu"))


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (R, S, E), index (R, n) -> (R, n, E)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
