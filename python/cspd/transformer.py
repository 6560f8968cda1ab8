"""MAR's transformer over tables of indices: which tokens are known, and where conditions are wanted.

The released methods, ``forward_mae_encoder(x, mask, class_embedding)`` and ``forward_mae_decoder(x, mask)``,
pick the known tokens out by a mask. How many there are is then read from the device, and the host waits for it
at every pass. The generation order is known before the first step, and so are the indices: with those nothing
is read. The functions here are of any model with MAR's parts, of this package or of LTH14/mar and
MarkXCloud/CSpD, by the names that its weights have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

from cspd_kernels.head import without_autocast

from .errors import InvalidInput

PARTS = (
    "z_proj", "z_proj_ln", "encoder_pos_embed_learned", "encoder_blocks", "encoder_norm", "decoder_embed", "mask_token",
    "decoder_pos_embed_learned", "decoder_blocks", "decoder_norm", "diffusion_pos_embed_learned", "buffer_size",
)  # fmt: skip

_Method = TypeVar("_Method", bound=Callable[..., torch.Tensor])


def known_of_mask(mask: torch.Tensor) -> torch.Tensor:
    """Mask (B, L), 0 where a token is known -> (B, K) int64 positions of the known ones, ascending.

    K is read from the mask: on a device the host waits for it.

    Raises:
        ValueError: the images do not all have the same number of known tokens.
    """
    masked = mask != 0
    counts = sorted(set((~masked).sum(dim=1).tolist()))
    if len(counts) > 1:
        raise InvalidInput(f"expected a mask with the same number of known tokens in every image, got {counts}")
    return masked.to(torch.uint8).argsort(dim=1, stable=True)[:, : counts[0] if counts else 0]


def encode(model, tokens: torch.Tensor, known: torch.Tensor, class_embedding: torch.Tensor) -> torch.Tensor:
    """tokens (R, L, C), known (R, K) int64, class_embedding (R, E) -> (R, buffer + K, E).

    The class tokens come first, then the known tokens in the order of the table.
    """
    position = model.encoder_pos_embed_learned
    x = model.z_proj(_as_weights(tokens, model.z_proj)) + position[:, model.buffer_size :]
    buffer = class_embedding.to(position.dtype)[:, None] + position[:, : model.buffer_size]
    x = model.z_proj_ln(torch.cat([buffer, _rows(x, known)], dim=1))
    return model.encoder_norm(_run(model, model.encoder_blocks, x))


def decode(model, encoded: torch.Tensor, known: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Encoder output (R, buffer + K, E) and its table -> the conditions z of the positions ``where`` (R, n, Z).

    ``where`` (R, n) int64; None is all positions in their order, n = L.
    """
    x, buffer = model.decoder_embed(encoded), model.buffer_size
    rows, length = len(x), model.diffusion_pos_embed_learned.shape[1]
    masked = model.mask_token.to(x.dtype).expand(rows, length, -1)
    tokens = masked.scatter(1, known[..., None].expand(-1, -1, x.shape[-1]), x[:, buffer:])
    x = torch.cat([x[:, :buffer], tokens], dim=1) + model.decoder_pos_embed_learned
    x = _run(model, model.decoder_blocks, x)[:, buffer:]
    position = model.diffusion_pos_embed_learned
    if where is not None:
        x, position = _rows(x, where), _rows(position.expand(rows, -1, -1), where)
    return model.decoder_norm(x) + position


def conditions(model, tokens, known, class_embedding, where) -> torch.Tensor:
    """The conditions z (R, n, Z) of the positions ``where`` (R, n), given the tokens at ``known`` (R, K).

    Both tables are int64. No value is read on the host, and no shape depends on one.
    """
    return decode(model, encode(model, tokens, known, class_embedding), known, where)


_MASKED_FORMS = set()


def masked_form(method: _Method) -> _Method:
    """Register a method that only turns its mask into a table for :func:`encode` or :func:`decode`: nothing to compare.

    By identity: whatever wraps or replaces it may compute something else.
    """
    _MASKED_FORMS.add(method)
    return method


def follows_masks(model) -> bool:
    """Whether the model's two methods are registered as such."""
    return all(method in _MASKED_FORMS for method in own_methods(model))


def own_methods(model) -> tuple:
    """The functions behind the model's own two methods."""
    return tuple(getattr(m, "__func__", m) for m in (model.forward_mae_encoder, model.forward_mae_decoder))


def conditions_by_masks(model, tokens, mask, class_embedding, where) -> torch.Tensor:
    """Like :func:`conditions`, by the model's own methods and a mask (R, L), which synchronise each time."""
    z = model.forward_mae_decoder(model.forward_mae_encoder(tokens, mask, class_embedding), mask)
    return _rows(z, where)


def why_not_by_tables(model) -> str | None:
    """None where :func:`conditions` computes what the model's own methods do, else what is missing or different.

    As :func:`why_not` compares it.
    """
    missing = [name for name in PARTS if not hasattr(model, name)]
    if missing:
        return "it lacks " + ", ".join(missing)
    if follows_masks(model):
        return None
    return why_not(model, functools.partial(conditions, model))


@torch.no_grad()
def why_not(model, compute: Callable) -> str | None:
    """None where a function of (tokens, known, class embedding, where), as of :func:`conditions`, computes what the
    model's own methods do, else what is different.

    Compared on random tokens with none, some and nearly all of them known, with the weights that the model has
    now, without the caller's autocast. A model whose weights are of a half type runs under autocast of that type.
    It must be in eval mode. Torch's random number generators are as before afterwards.
    """
    weight = model.fake_latent
    if weight.device.type == "meta":
        return "its weights are on the meta device"
    half = weight.dtype in (torch.bfloat16, torch.float16)
    cast = torch.autocast(weight.device.type, weight.dtype) if half else without_autocast(weight.device)
    with torch.inference_mode(False), torch.no_grad(), cast:
        return _difference(model, compute)


def bound(weight: torch.Tensor) -> float:
    """The largest difference that is rounding, relative to the largest value; TF32 products round to three digits."""
    if weight.dtype not in (torch.float32, torch.float64):
        return 2e-2
    try:
        tf32 = weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by an interface that the old one does not know
        tf32 = True
    return 1e-3 if tf32 else 1e-5


def _difference(model, compute: Callable) -> str | None:
    weight = model.fake_latent
    device, length = weight.device, model.seq_len
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    orders = torch.stack([torch.randperm(length, generator=generator, device="cpu") for _ in range(2)]).to(device)
    tokens = random(2, length, model.token_embed_dim)
    embedding = weight.expand(2, -1) + random(2, weight.shape[-1]).to(weight.dtype)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for count in sorted({0, length // 3, length - 1}):
            known, where = orders[:, :count].sort(dim=1).values, orders[:, count:].sort(dim=1).values
            mask = torch.ones(orders.shape, dtype=torch.float32, device=device).scatter_(1, known, 0.0)
            try:
                expected = conditions_by_masks(model, tokens, mask, embedding, where).float()
                actual = compute(tokens, known, embedding, where).float()
            except Exception as error:  # noqa: BLE001  (whatever a fork with other parts raises)
                return f"it cannot be compared ({type(error).__name__}: {error})"
            if actual.shape != expected.shape:
                return f"its conditions are of shape {tuple(expected.shape)}, not {tuple(actual.shape)}"
            difference, scale = float((actual - expected).abs().max()), float(expected.abs().max())
            if not difference <= bound(weight) * scale:
                return f"with {count} tokens known its conditions differ by {difference / scale:.2g} of the largest"
    return None


def _as_weights(x: torch.Tensor, layer) -> torch.Tensor:
    """x in the type of a layer's weights; a quantised layer, whose weights are no tensor, takes it as it is."""
    weight = layer.weight
    return x.to(weight.dtype) if isinstance(weight, torch.Tensor) and weight.is_floating_point() else x


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (R, L, E), index (R, n) -> (R, n, E)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _run(model, blocks, x: torch.Tensor) -> torch.Tensor:
    # Without gradients there is nothing to save, and checkpointing would look at the generators' state.
    checkpointing = getattr(model, "grad_checkpointing", False) and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return x
