"""MAR checkpoints: loaded and converted safely, and without being told the model's size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cspd_kernels.dtypes import as_dtype

from .errors import CheckpointError
from .mar_sizes import head_of, mar_config, patch_sizes, shape_of, size_of
from .models import MAR
from .weight_files import (
    MAR_FILE,
    Weights,
    check_safetensors,
    find_file,
    read_weights,
    why_not_its_weights,
    write_safetensors,
)

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
            header, hub snapshots in the config.json of ``model.safetensors``. A value that you pass takes precedence.
            An assumed patch size, that of the released models, gives a warning of the logger "cspd".
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
        assumed: the patch size is not known. strided: the stride of the VAE is known.
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
        what, size, head = f"a MAR of {count}", size_of(self.config), head_of(self.config)
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
    weights = read_weights(find_file(Path(path), *MAR_FILE), entry, mar=True)
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
    assumed = patch is None and patch_sizes(config["vae_embed_dim"]) != [1]
    if assumed:
        _logger.warning(
            "%s does not tell its patch size: read with 1, like the released %s. Pass patch_size=1 to confirm it, or "
            "the patch size that it was trained with",
            weights.path,
            (size_of(config) or ("model",))[0],
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
        channels = shape_of(weights.tensors, "z_proj.weight")[1]
        fitting = [p for p in patch_sizes(channels) if channels == told["vae_embed_dim"] * p**2]
        if not fitting or told.setdefault("patch_size", fitting[0]) != fitting[0]:
            says = ", ".join(f"{name}={told[name]}" for name in ("vae_embed_dim", "patch_size") if name in told)
            raise CheckpointError(
                f"its tokens have {channels} channels, but according to {weights.told_by} {says}: pass patch_size"
            )
    stride = told.get("vae_stride") if vae_stride is None else vae_stride
    return (told.get("patch_size") if patch_size is None else patch_size), stride
