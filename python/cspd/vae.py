"""Pictures from latents: the decoder of MAR's VAE (KL-16), run by diffusers' ``AutoencoderKL``.

The released ``kl16.ckpt`` has the names of latent-diffusion's autoencoder; diffusers has the same layers under others.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cspd_kernels.dtypes import as_dtype

from .devices import usable_device
from .errors import CheckpointError, InvalidInput, MissingPackage
from .weight_files import (
    VAE_FILE,
    Weights,
    check_safetensors,
    check_weights,
    find_file,
    read_unchecked,
    why_not_its_weights,
    write_safetensors,
)

# By what MAR multiplies the latents of its VAE before it learns to draw them (LTH14/mar, engine_mar.py).
SCALE = 0.2325
_MARKER = VAE_FILE[0]
_GROUPS = 32  # of all its GroupNorms
_logger = logging.getLogger("cspd")


class Vae:
    """Latents as a MAR draws them to pictures.

    Attributes:
        channels: of the latents. stride: pixels of a picture per place of its latents, along one side.
        dtype, device: where and in what it decodes. loaded: what it is, for people.
    """

    def __init__(self, autoencoder: Any, channels: int, stride: int, loaded: str):
        self.autoencoder, self.channels, self.stride, self.loaded = autoencoder, channels, stride, loaded
        weight = next(autoencoder.parameters())
        self.dtype, self.device = weight.dtype, weight.device

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, chunk: int = 8) -> torch.Tensor:
        """Pictures (B, 3, h stride, w stride), float32 about [-1, 1], of latents (B, c, h, w) on any device.

        Args:
            latents: what ``sample_tokens`` returns, which is the VAE's own latents times 0.2325.
            chunk: how many pictures of 256 x 256 are decoded at a time, which bounds the memory. Larger pictures come
                in smaller chunks, of at least one.

        Raises:
            InvalidInput: the latents have another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise InvalidInput(f"expected latents (B, {self.channels}, h, w), got shape {tuple(latents.shape)}")
        if chunk < 1:
            raise InvalidInput(f"expected chunk >= 1, got {chunk}")
        height, width = (side * self.stride for side in latents.shape[2:])
        count = max(1, min(chunk, chunk * 256**2 // max(1, height * width)))
        images = torch.empty(len(latents), 3, height, width, device=self.device)
        with torch.autocast(self.device.type, enabled=False):  # the decoder's type is this object's, not the caller's
            for start in range(0, len(latents), count):
                part = latents[start : start + count].to(self.device, torch.float32) / SCALE
                images[start : start + count] = self.autoencoder.decode(part.to(self.dtype), return_dict=False)[0]
        return images

    def check(self, model: nn.Module) -> None:
        """Raise if a MAR's latents are not this VAE's.

        Raises:
            InvalidInput: other channels, or another stride than the model was trained for, if that is known.
        """
        channels, stride = (getattr(model, name, None) for name in ("vae_embed_dim", "vae_stride"))
        if channels not in (None, self.channels):
            raise InvalidInput(
                f"expected a VAE of {channels} channels, as in the model's latents (its patch size is "
                f"{getattr(model, 'patch_size', 1)}), got one of {self.channels}: {self.loaded}"
            )
        if stride not in (None, 1, self.stride):  # 1: of a model that was made in places of its latents
            raise InvalidInput(
                f"expected a VAE of stride {stride}, as in the model, got one of {self.stride}: {self.loaded}"
            )


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32) -> Vae:
    """The decoder in a checkpoint of MAR's VAE: ``kl16.ckpt``, the same in safetensors, or a folder that holds one.

    Its sizes are read from the weights. The encoder is not loaded. Nothing in the file is executed.

    Args:
        dtype: what it decodes in, float32 or bfloat16, also by name.

    Raises:
        MissingPackage: diffusers is not installed. FileNotFoundError: no such file. CheckpointError: no such VAE in it.

    Example:
        >>> vae = cspd.load_vae("kl16.ckpt", device="cuda", dtype="bfloat16")  # doctest: +SKIP
        >>> pictures = vae.decode(cspd.sample_tokens(model, 8, cfg=3.0))  # doctest: +SKIP
    """
    dtype = as_dtype(dtype, "load_vae", (torch.float32, torch.bfloat16))
    device = usable_device(device, "load_vae expected a device")
    autoencoder_class = _autoencoder_class()
    path = _file(path)
    state = vae_weights(path).tensors
    try:
        config = decoder_config(state)
        with torch.device("meta"):
            autoencoder = autoencoder_class(**config)
        autoencoder.encoder = autoencoder.quant_conv = None
        form = torch.contiguous_format
        renamed = {
            name: value.to(device, dtype, copy=True, memory_format=form) for name, value in to_diffusers(state).items()
        }
        if reason := why_not_its_weights(autoencoder.state_dict(), renamed, "a VAE of LTH14/mar (diffusers' names)"):
            raise CheckpointError(reason)
    except ValueError as error:
        raise CheckpointError(f"cannot load {path} as a VAE: {error}") from None
    autoencoder.load_state_dict(renamed, assign=True)
    channels, stride = config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)
    loaded = _description(config, state)
    _logger.info("loaded %s: %s", path, loaded)
    return Vae(autoencoder.eval().requires_grad_(False), channels, stride, loaded)


def _autoencoder_class() -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise MissingPackage(
            f'pictures need diffusers, which cannot be imported ({error}): pip install "cspd-kernels[vae]"'
        ) from error
    return AutoencoderKL


def vae_weights(path: Path, parts: tuple[str, ...] = ("decoder", "post_quant_conv")) -> Weights:
    """The weights of these parts of a VAE in a file, under the released names. A prefix of all of them is dropped.

    What else is in the file, such as a discriminator, is not looked at.

    Raises:
        FileNotFoundError: no such file. ValueError: there are none.
    """
    found = read_unchecked(path)
    state = found.tensors if isinstance(found.tensors, dict) else {}
    marked = [str(name) for name in state if str(name).endswith(_MARKER)]
    if len(marked) != 1:
        raise CheckpointError(f"expected one VAE in {path}, with a weight {_MARKER}, found {len(marked)}")
    prefix = marked[0].removesuffix(_MARKER)
    own = re.compile(re.escape(prefix) + rf"(?=(?:{'|'.join(parts)})\.)")
    state = {own.sub("", name, count=1): value for name, value in state.items() if own.match(str(name))}
    if any(name.startswith("decoder.up_blocks.") for name in state):
        raise CheckpointError(
            f"expected a VAE with the names of LTH14/mar's kl16.ckpt in {path}, got the names of diffusers"
        )
    check_weights(state, path)
    return replace(found, tensors=state, prefix=prefix)


def convert(path: str | Path, output: str | Path) -> str:
    """Write the encoder and decoder in a checkpoint of MAR's VAE as safetensors, under the same names.

    Returns:
        What was written, for people.

    Raises:
        OSError: ``output`` cannot be written; what was there stays. FileNotFoundError, ValueError: no such file, or no
            such VAE in it.
    """
    check_safetensors(Path(output))
    found = vae_weights(_file(path), ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    text = _description(decoder_config(found.tensors), found.tensors)
    write_safetensors(Path(output), found, {})
    return text


def _file(path: str | Path) -> Path:
    return find_file(Path(path), *VAE_FILE)


def _description(config: dict[str, Any], state: dict[str, torch.Tensor]) -> str:
    channels, stride = config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)
    name = "KL-16" if (channels, stride) == (16, 16) else "a VAE"
    count = sum(value.numel() for name, value in state.items() if name.startswith("decoder.")) / 1e6
    return f"{name}, decoder of {count:.3g} M parameters, {channels} channels, stride {stride}"


def decoder_config(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of ``AutoencoderKL`` that fit a decoder's weights (released names).

    Raises:
        ValueError: a weight is missing or has another shape.
    """

    def shape(name: str) -> torch.Size:
        if name not in state or state[name].ndim != 4:
            raise CheckpointError(f"expected the decoder of a VAE, got one without a convolution {name}")
        return state[name].shape

    levels = 1 + max((int(found[1]) for name in state if (found := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    widths = [shape(f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    blocks = len({name.split(".")[4] for name in state if name.startswith("decoder.up.0.block.")})
    channels = shape("post_quant_conv.weight")[1]
    if channels != shape(_MARKER)[1]:
        raise CheckpointError(
            f"expected as many channels in the latents as the decoder takes, got {channels} and {shape(_MARKER)[1]}"
        )
    if any(width % _GROUPS for width in widths):
        raise CheckpointError(f"expected widths that are multiples of {_GROUPS}, got {widths}")
    attends = [f"decoder.up.{level}.attn.0.q.weight" in state for level in reversed(range(levels))]
    return dict(
        in_channels=3,
        out_channels=shape("decoder.conv_out.weight")[0],
        block_out_channels=tuple(widths),
        layers_per_block=blocks - 1,
        latent_channels=channels,
        norm_num_groups=_GROUPS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=tuple("AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in attends),
    )


# Released names and diffusers', in a decoder; what is not here is the same in both.
_PARTS = (
    ("decoder.norm_out.", "decoder.conv_norm_out."),
    ("decoder.mid.block_1.", "decoder.mid_block.resnets.0."),
    ("decoder.mid.block_2.", "decoder.mid_block.resnets.1."),
    ("decoder.mid.attn_1.", "decoder.mid_block.attentions.0."),
    (".block.", ".resnets."),
    (".attn.", ".attentions."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A decoder's weights under diffusers' names: its levels are counted from the other end, and the matrices of its
    attention are no convolutions.
    """
    levels = 1 + max((int(found[1]) for name in state if (found := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}", name)
        for old, new in _PARTS:
            name = name.replace(old, new)
        if found := re.search(r"(.*\.attentions\.\d+\.)(\w+)(\.\w+)$", name):
            name = f"{found[1]}{_ATTENTION.get(found[2], found[2])}{found[3]}"
            value = value[..., 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        renamed[name] = value
    return renamed


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as bytes (B, H, W, 3) on the CPU, rounded as MAR's own sampling script does.

    That is ``round(clip((x + 1) / 2 * 255, 0, 255))``, halves to the even number.

    Raises:
        ValueError: other shapes; values that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InvalidInput(f"expected images (B, 3, H, W), got shape {tuple(images.shape)}")
    values = images.detach().to("cpu", torch.float32)
    if not torch.isfinite(values).all():
        raise InvalidInput("expected finite images, got NaN or infinite values")
    return ((values + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
