"""Loading MAR checkpoints: safely, and without being told the model's size."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .models import MAR
from .unpickling import plain_values_allowed, why_unreadable

# Attention heads are the one number of a MAR that its weights do not show.
_HEADS = {768: 12, 1024: 16, 1280: 16}
# Channels of the latents that the released checkpoints draw, those of their VAE (KL-16); their patch size is 1.
_RELEASED_CHANNELS = 16
_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What DataParallel, torch.compile, FSDP and a model that is an attribute of another one put in front of all names.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|model)\.)+")
_logger = logging.getLogger("cspd")


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a ``.safetensors`` file or a ``torch.save`` file, without executing anything in it.

    Of a training checkpoint the averaged weights are taken (``model_ema``, else ``model``). A prefix that all names
    have from DDP (``module.``), ``torch.compile`` (``_orig_mod.``), FSDP or a wrapper (``model.``) is dropped, and the
    logger "cspd" is told.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds no state dict of floating weights in their own shapes.
    """
    return _load(Path(path))[0]


def _load(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The weights, and the prefix that their names had."""
    state = _read(path)
    _check(state, path)
    prefix = _common_prefix(state, path)
    if prefix:
        _logger.info("dropped the prefix %s of all names in %s", prefix, path)
    return {name[len(prefix) :]: value for name, value in state.items()}, prefix


def _read(path: Path) -> object:
    """The state dict in the file, or whatever is in its place."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint file, found none at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"expected a safetensors file, could not read {path}: {error}") from error
    try:
        with plain_values_allowed():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"expected a checkpoint of plain tensors, could not read {path}: {why_unreadable(error)}"
        ) from error
    if isinstance(loaded, dict):
        for key in ("model_ema", "model", "state_dict"):
            if isinstance(loaded.get(key), (dict, torch.Tensor)):
                return loaded[key]
    return loaded


def _check(state: object, path: Path) -> None:
    """Raise where the state is none, or holds weights in a form that is not theirs."""
    if isinstance(state, torch.Tensor):
        raise ValueError(f"expected a state dict in {path}, got one tensor of shape {tuple(state.shape)}: {_UNFLATTEN}")
    if not isinstance(state, dict) or not state:
        got = "an empty one" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"expected a state dict, or a checkpoint with model_ema or model, in {path}, got {got}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"expected a state dict, or a checkpoint with model_ema or model, in {path}, got {name!r} with a value "
                f"of type {type(value).__name__}"
            )
        if re.search(r"(^|[._])flat_param", name):
            raise ValueError(f"expected weights in shapes of their own in {path}, got {name}: {_UNFLATTEN}")
        if value.dtype not in _WEIGHTS or value.layout is not torch.strided:
            kind = value.dtype if value.layout is torch.strided else value.layout
            raise ValueError(
                f"expected floating weights in {path}, got {name} of {kind}: quantised, complex and sparse checkpoints "
                "are not read; save the weights in float32, bfloat16 or float16"
            )


_UNFLATTEN = "save a full state dict, as FSDP's StateDictType.FULL_STATE_DICT gives it"


def _common_prefix(state: dict[str, torch.Tensor], path: Path) -> str:
    """What all names begin with, of the prefixes that are known.

    Raises:
        ValueError: some names have such a prefix, and others do not.
    """
    prefixes = {match[0] if (match := _PREFIX.match(name)) else "" for name in state}
    if len(prefixes) > 1:
        some = max(prefixes, key=len)
        other = next(name for name in state if not name.startswith(some))
        raise ValueError(
            f"expected all names in {path} with the prefix {some!r}, or none, got {other} too: save the state dict of "
            "the model alone"
        )
    return prefixes.pop()


def mar_config(
    state: dict[str, torch.Tensor], num_heads: int | None = None, patch_size: int | None = None
) -> dict[str, int | float]:
    """The arguments of :class:`cspd.models.MAR` that fit a state dict (LTH14/mar's names).

    Args:
        patch_size: p, where a token is p x p places of the latents. Weights do not show it; left out, it is 1 for
            tokens of 16 channels, as in all released checkpoints, and where the number of channels has no factor p^2.

    Raises:
        ValueError: a weight is missing or has another shape, the number of attention heads is unknown for this width,
            or the patch size is in doubt.
    """
    width, seq_len = _shape(state, "class_emb.weight")[1], _shape(state, "diffusion_pos_embed_learned", 3)[1]
    channels, side = _shape(state, "z_proj.weight")[1], math.isqrt(seq_len)
    if side**2 != seq_len:
        raise ValueError(f"expected as many tokens as a square has, got {seq_len} from diffusion_pos_embed_learned")
    patch_size = _patch_size(channels) if patch_size is None else patch_size
    if patch_size < 1 or channels % patch_size**2:
        raise ValueError(f"expected a patch size whose square divides the {channels} channels, got {patch_size}")
    config = dict(
        img_size=side * patch_size,
        vae_stride=1,
        patch_size=patch_size,
        vae_embed_dim=channels // patch_size**2,
        class_num=_shape(state, "class_emb.weight")[0],
        encoder_embed_dim=width,
        decoder_embed_dim=_shape(state, "decoder_embed.weight")[0],
        mlp_ratio=_shape(state, "encoder_blocks.0.mlp.fc1.weight")[0] / width,
        buffer_size=_shape(state, "encoder_pos_embed_learned", 3)[1] - seq_len,
        diffloss_w=_shape(state, "diffloss.net.input_proj.weight")[0],
    )
    for name, prefix in (("encoder_depth", "encoder_blocks."), ("decoder_depth", "decoder_blocks."),
                         ("diffloss_d", "diffloss.net.res_blocks.")):  # fmt: skip
        config[name] = len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})
    for name in ("encoder", "decoder"):
        dim = config[f"{name}_embed_dim"]
        if num_heads is None and dim not in _HEADS:
            raise ValueError(f"the number of attention heads of a {name} of width {dim} is unknown: give num_heads")
        config[f"{name}_num_heads"] = num_heads or _HEADS[dim]
    return config


def _shape(state: dict[str, torch.Tensor], name: str, dimensions: int = 2) -> torch.Size:
    if name not in state:
        longer = next((key for key in state if key.endswith(f".{name}")), None)
        hint = f": its names begin with the prefix {longer.removesuffix(name)!r}, drop it" if longer else ""
        raise ValueError(f"expected the state dict of a MAR model, got one without {name!r}{hint}")
    shape = state[name].shape
    if len(shape) != dimensions:
        got = f"{name} of shape {tuple(shape)}"
        raise ValueError(f"expected weights in shapes of their own, got {got}: {_UNFLATTEN}")
    return shape


def _patch_size(channels: int) -> int:
    """1 where that is known."""
    possible = [p for p in range(1, math.isqrt(channels) + 1) if channels % p**2 == 0]
    if channels == _RELEASED_CHANNELS or possible == [1]:
        return 1
    ways = " or ".join(f"{p} ({channels // p**2}-channel latents)" for p in possible)
    raise ValueError(
        f"expected the patch size, which weights do not show, got tokens of {channels} channels: give patch_size= to "
        f"load_mar, or --patch-size to cspd generate, as {ways}"
    )


def load_mar(
    path: str | Path, *, num_heads: int | None = None, patch_size: int | None = None, device="cpu", **options
) -> MAR:
    """A MAR in eval mode from a checkpoint of LTH14/mar; its size is read from the weights.

    Args:
        num_heads, patch_size: what the weights do not show, see :func:`mar_config`.
        options: further arguments of :class:`cspd.models.MAR`, such as ``num_sampling_steps`` (100)
            and ``schedule`` ("cosine").

    Raises:
        FileNotFoundError, ValueError: see :func:`load_state_dict` and :func:`mar_config`.
    """
    state, prefix = _load(Path(path))
    try:
        model = MAR(**{**mar_config(state, num_heads, patch_size), **options})
        if reason := _why_not_its_weights(model.state_dict(), state):
            raise ValueError(reason)
    except ValueError as error:
        dropped = f" (its names had the prefix {prefix!r}, which was dropped)" if prefix else ""
        raise ValueError(f"cannot load {path} as a MAR{dropped}: {error}") from None
    model.load_state_dict(state)
    return model.to(device).eval()


def _why_not_its_weights(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> str | None:
    """The first difference of two state dicts in names and shapes, for people."""
    for names, what in ((expected.keys() - got.keys(), "without"), (got.keys() - expected.keys(), "with an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"expected the state dict of a MAR model, got one {what} {min(names)}{more}"
    for name, value in expected.items():
        if value.shape != got[name].shape:
            return f"expected {name} of shape {tuple(value.shape)}, got {tuple(got[name].shape)}"
    return None
