"""Loading MAR checkpoints: safely, and without being told the model's size."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .models import MAR

# Attention heads are the one number of a MAR that its weights do not show.
_HEADS = {768: 12, 1024: 16, 1280: 16}


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a ``.safetensors`` file or a ``torch.save`` file, without executing anything in it.

    Of a training checkpoint the averaged weights are taken (``model_ema``, else ``model``).

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file, found none at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"expected a safetensors file, could not read {path}: {error}") from error
    try:
        with _namespaces_allowed():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"expected a checkpoint of plain tensors, could not read {path}: {reason}") from error
    for key in ("model_ema", "model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise ValueError(f"expected a state dict, or a checkpoint with model_ema or model, in {path}")
    return loaded


@contextlib.contextmanager
def _namespaces_allowed():
    """Released checkpoints carry their training arguments; a Namespace holds plain values only."""
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            yield
        return
    before = torch.serialization.get_safe_globals()  # torch 2.4
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def mar_config(state: dict[str, torch.Tensor], num_heads: int | None = None) -> dict:
    """The arguments of :class:`cspd.models.MAR` that fit a state dict (LTH14/mar's names), patch size 1.

    Raises:
        ValueError: a weight is missing, or the number of attention heads is unknown for this width.
    """
    try:
        width, seq_len = state["class_emb.weight"].shape[1], state["diffusion_pos_embed_learned"].shape[1]
        config = dict(
            img_size=math.isqrt(seq_len),
            vae_stride=1,
            vae_embed_dim=state["z_proj.weight"].shape[1],
            class_num=state["class_emb.weight"].shape[0],
            encoder_embed_dim=width,
            decoder_embed_dim=state["decoder_embed.weight"].shape[0],
            mlp_ratio=state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
            buffer_size=state["encoder_pos_embed_learned"].shape[1] - seq_len,
            diffloss_w=state["diffloss.net.input_proj.weight"].shape[0],
        )
    except KeyError as error:
        raise ValueError(f"expected the state dict of a MAR model, got one without {error}") from None
    for name, prefix in (("encoder_depth", "encoder_blocks."), ("decoder_depth", "decoder_blocks."),
                         ("diffloss_d", "diffloss.net.res_blocks.")):  # fmt: skip
        config[name] = len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
    for name in ("encoder", "decoder"):
        dim = config[f"{name}_embed_dim"]
        if num_heads is None and dim not in _HEADS:
            raise ValueError(f"the number of attention heads of a {name} of width {dim} is unknown: give num_heads")
        config[f"{name}_num_heads"] = num_heads or _HEADS[dim]
    return config


def load_mar(path: str | Path, *, num_heads: int | None = None, device="cpu", **options) -> MAR:
    """A MAR in eval mode from a checkpoint of LTH14/mar; its size is read from the weights.

    Args:
        options: further arguments of :class:`cspd.models.MAR`, such as ``num_sampling_steps`` (100)
            and ``schedule`` ("cosine").
    """
    state = load_state_dict(path)
    model = MAR(**{**mar_config(state, num_heads), **options})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(f"{path} does not hold the weights of a MAR: {' '.join(lines)[:300]}") from None
    return model.to(device).eval()
