"""A MAR's sizes, read from the shapes of its weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .errors import CheckpointError
from .weight_files import UNFLATTEN

# Attention heads are the one number of a MAR that its weights do not show, beside the patch size.
_HEADS = {768: 12, 1024: 16, 1280: 16}
# Of the released models, by width and depth of both halves: the name, depth and width of the head.
RELEASED = {(768, 12): ("MAR-B", (6, 1024)), (1024, 16): ("MAR-L", (8, 1280)), (1280, 20): ("MAR-H", (12, 1536))}


def mar_config(
    state: dict[str, torch.Tensor],
    num_heads: int | None = None,
    patch_size: int | None = None,
    vae_stride: int | None = None,
) -> dict[str, Any]:
    """The arguments of :class:`cspd.models.MAR` that fit a state dict (LTH14/mar's names).

    Args:
        patch_size: p, where a token is p x p places of the latents. Weights do not show it. By default it is 1 if the
            number of channels has no factor p^2, or if the weights have the shapes of a released MAR-B, -L or -H.
        vae_stride: pixels of an image per place of its latents, along one side. By default ``vae_stride`` is 1 and
            ``img_size`` counts places of the latents.

    Raises:
        CheckpointError: a weight is missing or has another shape; the number of attention heads is unknown for this
            width; or the patch size is in doubt.
    """
    width, seq_len = shape_of(state, "class_emb.weight")[1], shape_of(state, "diffusion_pos_embed_learned", 3)[1]
    channels, side = shape_of(state, "z_proj.weight")[1], math.isqrt(seq_len)
    if side**2 != seq_len:
        raise CheckpointError(f"expected a square number of tokens, got {seq_len} in diffusion_pos_embed_learned")
    config: dict[str, Any] = dict(
        class_num=shape_of(state, "class_emb.weight")[0],
        encoder_embed_dim=width,
        decoder_embed_dim=shape_of(state, "decoder_embed.weight")[0],
        mlp_ratio=shape_of(state, "encoder_blocks.0.mlp.fc1.weight")[0] / width,
        buffer_size=shape_of(state, "encoder_pos_embed_learned", 3)[1] - seq_len,
        diffloss_w=shape_of(state, "diffloss.net.input_proj.weight")[0],
    )
    for name, prefix in (("encoder_depth", "encoder_blocks."), ("decoder_depth", "decoder_blocks."),
                         ("diffloss_d", "diffloss.net.res_blocks.")):  # fmt: skip
        config[name] = len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
    if patch_size is None:
        released = seq_len == 256 and vae_stride in (None, 16) and _is_released(config)
        patch_size = _patch_size(channels, released)
    if patch_size < 1 or channels % patch_size**2:
        raise CheckpointError(f"expected a patch size whose square divides the {channels} channels, got {patch_size}")
    if vae_stride is not None and vae_stride < 1:
        raise CheckpointError(f"expected vae_stride >= 1, got {vae_stride}")
    config |= dict(
        img_size=side * patch_size * (vae_stride or 1),
        vae_stride=vae_stride or 1,
        patch_size=patch_size,
        vae_embed_dim=channels // patch_size**2,
    )
    for name in ("encoder", "decoder"):
        dim = config[f"{name}_embed_dim"]
        if num_heads is None and dim not in _HEADS:
            raise CheckpointError(
                f"the number of attention heads of the {name} of width {dim} is unknown: pass num_heads"
            )
        config[f"{name}_num_heads"] = num_heads or _HEADS[dim]
    return config


def shape_of(state: dict[str, torch.Tensor], name: str, dimensions: int = 2) -> torch.Size:
    if name not in state:
        longer = next((key for key in state if key.endswith(f".{name}")), None)
        hint = f": its names begin with the prefix {longer.removesuffix(name)!r}, drop it" if longer else ""
        raise CheckpointError(f"expected the state dict of a MAR model, got one without {name!r}{hint}")
    shape = state[name].shape
    if len(shape) != dimensions:
        got = f"{name} of shape {tuple(shape)}"
        raise CheckpointError(f"expected weights in their original shapes, got {got}: {UNFLATTEN}")
    return shape


def size_of(config: dict[str, Any]) -> tuple[str, tuple[int, int]] | None:
    """Name and head of the released model of this width and depth."""
    encoder, decoder = ((config[f"{half}_embed_dim"], config[f"{half}_depth"]) for half in ("encoder", "decoder"))
    return RELEASED.get(encoder) if encoder == decoder else None


def head_of(config: dict[str, Any]) -> tuple[int, int]:
    return config["diffloss_d"], config["diffloss_w"]


def _is_released(config: dict[str, Any]) -> bool:
    """Whether a released model has these sizes, of the head, the classes and the buffer too."""
    size = size_of(config)
    return (
        size is not None and head_of(config) == size[1] and (config["class_num"], config["buffer_size"]) == (1000, 64)
    )


def patch_sizes(channels: int) -> list[int]:
    return [p for p in range(1, math.isqrt(channels) + 1) if channels % p**2 == 0]


def _patch_size(channels: int, released: bool) -> int:
    """1 where that is known. The released models draw the 16 channels of their VAE (KL-16), with patch size 1."""
    possible = patch_sizes(channels)
    if possible == [1] or (released and channels == 16):
        return 1
    ways = " or ".join(f"{p} ({channels // p**2}-channel latents)" for p in possible)
    raise CheckpointError(
        f"expected the patch size, which weights do not show, got tokens of {channels} channels: pass patch_size= "
        f"to load_mar, or --patch-size to cspd generate and cspd convert. It is {ways}"
    )
