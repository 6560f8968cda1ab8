"""MAR checkpoints: loaded and converted safely, and without being told the model's size."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cspd_kernels.dtypes import as_dtype

from .errors import CheckpointError
from .models import MAR
from .weight_files import (
    MAR_FILE,
    UNFLATTEN,
    Weights,
    check_safetensors,
    find_file,
    read_weights,
    why_not_its_weights,
    write_safetensors,
)

# Attention heads are the one number of a MAR that its weights do not show, beside the patch size.
_HEADS = {768: 12, 1024: 16, 1280: 16}
# Of the released models, by width and depth of both halves: the name, depth and width of the head.
_RELEASED = {(768, 12): ("MAR-B", (6, 1024)), (1024, 16): ("MAR-L", (8, 1280)), (1280, 20): ("MAR-H", (12, 1536))}
_logger = logging.getLogger("cspd")


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a ``.safetensors`` file or a ``torch.save`` file, without executing anything in it.

    From a training checkpoint the averaged weights are taken (``model_ema``, else ``model``). A prefix that all names
    have from DDP (``module.``), ``torch.compile`` (``_orig_mod.``), FSDP or a wrapper (``model.``) is dropped. The
    logger "cspd" says so.

    Raises:
        FileNotFoundError: no such file. CheckpointError: it holds no state dict of floating weights, or not in their
            own shapes.
    """
    return {name: value.clone() for name, value in read_weights(Path(path)).tensors.items()}


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
    width, seq_len = _shape(state, "class_emb.weight")[1], _shape(state, "diffusion_pos_embed_learned", 3)[1]
    channels, side = _shape(state, "z_proj.weight")[1], math.isqrt(seq_len)
    if side**2 != seq_len:
        raise CheckpointError(f"expected a square number of tokens, got {seq_len} in diffusion_pos_embed_learned")
    config: dict[str, Any] = dict(
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


def _shape(state: dict[str, torch.Tensor], name: str, dimensions: int = 2) -> torch.Size:
    if name not in state:
        longer = next((key for key in state if key.endswith(f".{name}")), None)
        hint = f": its names begin with the prefix {longer.removesuffix(name)!r}, drop it" if longer else ""
        raise CheckpointError(f"expected the state dict of a MAR model, got one without {name!r}{hint}")
    shape = state[name].shape
    if len(shape) != dimensions:
        got = f"{name} of shape {tuple(shape)}"
        raise CheckpointError(f"expected weights in their original shapes, got {got}: {UNFLATTEN}")
    return shape


def _size(config: dict[str, Any]) -> tuple[str, tuple[int, int]] | None:
    """Name and head of the released model of this width and depth."""
    encoder, decoder = ((config[f"{half}_embed_dim"], config[f"{half}_depth"]) for half in ("encoder", "decoder"))
    return _RELEASED.get(encoder) if encoder == decoder else None


def _head(config: dict[str, Any]) -> tuple[int, int]:
    return config["diffloss_d"], config["diffloss_w"]


def _is_released(config: dict[str, Any]) -> bool:
    """Whether a released model has these sizes, of the head, the classes and the buffer too."""
    size = _size(config)
    return size is not None and _head(config) == size[1] and (config["class_num"], config["buffer_size"]) == (1000, 64)


def _patch_sizes(channels: int) -> list[int]:
    return [p for p in range(1, math.isqrt(channels) + 1) if channels % p**2 == 0]


def _patch_size(channels: int, released: bool) -> int:
    """1 where that is known. The released models draw the 16 channels of their VAE (KL-16), with patch size 1."""
    possible = _patch_sizes(channels)
    if possible == [1] or (released and channels == 16):
        return 1
    ways = " or ".join(f"{p} ({channels // p**2}-channel latents)" for p in possible)
    raise CheckpointError(
        f"expected the patch size, which weights do not show, got tokens of {channels} channels: pass patch_size= "
        f"to load_mar, or --patch-size to cspd generate and cspd convert. It is {ways}"
    )


def load_mar(
    path: str | Path,
    *,
    num_heads: int | None = None,
    patch_size: int | None = None,
    vae_stride: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> MAR:
    """Load a MAR from a checkpoint of LTH14/mar, in eval mode. Its size is read from the weights.

    The logger "cspd" says what was loaded. ``model.loaded`` keeps the same text, such as "MAR-B, 208 M parameters,
    model_ema, 256 tokens". Memory holds one copy of the weights, on the device.

    Args:
        path: a file of ``torch.save`` or safetensors, or a folder with the checkpoint of a MAR, such as a download from
            a hub.
        num_heads, patch_size, vae_stride: what the weights do not show, see :func:`mar_config`. Many files say patch
            size and stride themselves: training checkpoints in their ``args``, files of ``cspd convert`` in their
            header, hub snapshots in the config.json of ``model.safetensors``. A value that you pass comes first. An
            assumed patch size, that of the released models, gives a warning of the logger "cspd".
        dtype: of the weights, also by name ("bfloat16"). The default is float32.
        options: further arguments of :class:`cspd.models.MAR`, such as ``num_sampling_steps`` (100)
            and ``schedule`` ("cosine"). They are not taken from the file.

    Example:
        >>> import cspd, tempfile, torch
        >>> from pathlib import Path
        >>> from cspd.demo.pair import COMMON, load_pair
        >>> options = {name: COMMON[name] for name in ("schedule", "num_sampling_steps", "learn_sigma")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "digits.pth"
        ...     torch.save(load_pair()[0].state_dict(), path)
        ...     model = cspd.load_mar(path, num_heads=4, patch_size=2, **options)
        >>> model.loaded
        'a MAR of 1.31 M parameters, state dict, 16 tokens, patch size 2'

    Raises:
        FileNotFoundError, CheckpointError: see :func:`load_state_dict` and :func:`mar_config`. Also if a folder holds
            several checkpoints, or a file contradicts its weights.
    """
    dtype = torch.float32 if dtype is None else as_dtype(dtype, "load_mar")
    found = _find(path, None, num_heads, patch_size, vae_stride, options)
    # Copied: a file that is mapped into the model's memory could be changed, or cut short, under its feet.
    form = torch.contiguous_format
    own = {n: v.to(device, dtype, copy=True, memory_format=form) for n, v in found.weights.tensors.items()}
    model: Any = found.model
    model.load_state_dict(own, assign=True)
    model.loaded = found.description()
    _logger.info("loaded %s: %s", found.weights.path, model.loaded)
    return found.model.eval()


def convert(
    path: str | Path,
    output: str | Path,
    *,
    weights: str | None = None,
    patch_size: int | None = None,
    vae_stride: int | None = None,
) -> str:
    """Write the weights of a MAR checkpoint as safetensors. What they do not show goes into the header.

    Args:
        path: as for :func:`load_mar`, which reads ``output`` too.
        weights: the entry to take, such as "model". By default the averaged weights (model_ema) if there are any.
        patch_size, vae_stride: as for :func:`load_mar`. What is not known is not written.

    Returns:
        What was written, for people, as ``model.loaded``.

    Raises:
        OSError: ``output`` cannot be written. What was there stays.
        FileNotFoundError, CheckpointError: see :func:`load_mar`.
    """
    check_safetensors(Path(output))
    found = _find(path, weights, 1, patch_size, vae_stride, {})
    write_safetensors(Path(output), found.weights, found.facts())
    return found.description()


@dataclass(frozen=True)
class _Found:
    """A checkpoint that fits a MAR.

    Attributes:
        config: the model's arguments. model: without memory yet.
        assumed: nobody tells the patch size. strided: somebody tells the stride of the VAE.
    """

    weights: Weights
    config: dict[str, Any]
    model: MAR
    assumed: bool
    strided: bool

    def facts(self) -> dict[str, int]:
        """What is known beside the weights."""
        known = () if self.assumed else ("patch_size", "vae_embed_dim")
        return {name: self.config[name] for name in (*known, *(("vae_stride", "img_size") if self.strided else ()))}

    def description(self) -> str:
        """Such as "MAR-B, 208 M parameters, model_ema, 256 tokens"."""
        count = f"{sum(value.numel() for value in self.weights.tensors.values()) / 1e6:.3g} M parameters"
        what, size, head = f"a MAR of {count}", _size(self.config), _head(self.config)
        if size:
            what = f"{size[0]}{'' if head == size[1] else f' with a head of {head[0]} x {head[1]}'}, {count}"
        patch = self.config["patch_size"]
        grouped = f", patch size {patch}{' assumed' if self.assumed else ''}" if self.assumed or patch > 1 else ""
        return f"{what}, {self.weights.source}, {self.model.seq_len} tokens{grouped}"


def _find(
    path: str | Path,
    entry: str | None,
    num_heads: int | None,
    patch_size: int | None,
    vae_stride: int | None,
    options: dict[str, Any],
) -> _Found:
    """Read a checkpoint and see that it fits; see :func:`load_mar`."""
    weights = read_weights(find_file(Path(path), *MAR_FILE), entry)
    try:
        patch, stride = _told(weights, patch_size, vae_stride)
        config = mar_config(weights.tensors, num_heads, patch, stride)
        told_all = patch_size is None and vae_stride is None and patch is not None and stride is not None
        size = weights.facts.get("img_size", config["img_size"])
        if told_all and size != config["img_size"]:
            raise CheckpointError(
                f"its tokens are those of img_size={config['img_size']} with patch_size={patch} and "
                f"vae_stride={stride}, but according to {weights.told_by} it is {size}: pass patch_size and vae_stride"
            )
        with torch.device("meta"):
            model = MAR(**{**config, **options})
        if reason := why_not_its_weights(model.state_dict(), weights.tensors, "a MAR model"):
            raise CheckpointError(reason)
    except ValueError as error:
        dropped = f" (its names had the prefix {weights.prefix!r}, which was dropped)" if weights.prefix else ""
        raise CheckpointError(f"cannot load {weights.path} as a MAR{dropped}: {error}") from None
    assumed = patch is None and _patch_sizes(config["vae_embed_dim"]) != [1]
    if assumed:
        _logger.warning(
            "%s does not tell its patch size: read with 1, like the released %s. Pass patch_size=1 to confirm it, or "
            "the patch size that it was trained with",
            weights.path,
            _RELEASED[config["encoder_embed_dim"], config["encoder_depth"]][0],
        )
    return _Found(weights, config, model, assumed, stride is not None)


def _told(weights: Weights, patch_size: int | None, vae_stride: int | None) -> tuple[int | None, int | None]:
    """Patch size and stride by the caller, else by the file, else None.

    Raises:
        CheckpointError: the file contradicts its weights, and the caller does not say which is right.
    """
    told = dict(weights.facts)
    for name, asked in (("patch_size", patch_size), ("vae_stride", vae_stride)):
        if asked is not None and told.get(name, asked) != asked:
            _logger.warning(
                "using %s=%d as passed, although %s says %d in %s",
                name,
                asked,
                weights.path,
                told[name],
                weights.told_by,
            )
    if patch_size is None and "vae_embed_dim" in told:
        channels = _shape(weights.tensors, "z_proj.weight")[1]
        fitting = [p for p in _patch_sizes(channels) if channels == told["vae_embed_dim"] * p**2]
        if not fitting or told.setdefault("patch_size", fitting[0]) != fitting[0]:
            says = ", ".join(f"{name}={told[name]}" for name in ("vae_embed_dim", "patch_size") if name in told)
            raise CheckpointError(
                f"its tokens have {channels} channels, but according to {weights.told_by} {says}: pass patch_size"
            )
    stride = told.get("vae_stride") if vae_stride is None else vae_stride
    return (told.get("patch_size") if patch_size is None else patch_size), stride
