"""The weights of a MAR's transformer in the type of its matrix products, taken once and kept up to date."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn

from cspd_kernels.head import stream_dtype
from cspd_kernels.live import copier
from cspd_kernels.products import Product

from ..errors import UnsupportedModel
from ..transformer import PARTS


class Norm(NamedTuple):
    """LayerNorm with affine parameters, in the stream's type."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Block(NamedTuple):
    """A pre-norm transformer block: attention, then an MLP with an exact GELU, each with a residual."""

    norm1: Norm
    qkv: Product
    proj: Product
    norm2: Norm
    fc1: Product
    fc2: Product
    heads: int


class Weights:
    """What :func:`cspd.whole.passes.conditions` reads of a model.

    Operands of the matrix products are of ``dtype``; what touches the residual stream is of the stream's type (float32,
    float64 for float64), as under autocast. What needs no conversion is shared with the model; the rest is copied here,
    and :meth:`refresh` copies again what may have changed. On a CPU the products pack their own weights.

    Raises:
        ValueError: the model is not built of such parts; the message says where.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        missing = [name for name in PARTS if not hasattr(model, name)]
        if missing:
            raise UnsupportedModel("it lacks " + ", ".join(missing))
        self.dtype, self.stream = dtype, stream_dtype(dtype)
        self.device = model.mask_token.device
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sources: list[torch.Tensor] = []
        self._products: list[Product] = []
        self.buffer, self.length = int(model.buffer_size), model.diffusion_pos_embed_learned.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            self.z_proj, self.z_norm = self._linear(model.z_proj), self._norm(model.z_proj_ln)
            self.encoder_position = self._take(model.encoder_pos_embed_learned, self.stream)[0]  # (buffer + L, E)
            self.encoder = [self._block(block, f"encoder_blocks.{i}") for i, block in enumerate(model.encoder_blocks)]
            self.encoder_norm, self.decoder_embed = self._norm(model.encoder_norm), self._linear(model.decoder_embed)
            self.mask_token = self._take(model.mask_token, dtype).view(1, 1, -1)
            self.decoder_position = self._take(model.decoder_pos_embed_learned, self.stream)[0]  # (buffer + L, D)
            self.decoder = [self._block(block, f"decoder_blocks.{i}") for i, block in enumerate(model.decoder_blocks)]
            self.decoder_norm = self._norm(model.decoder_norm)
            self.position = self._take(model.diffusion_pos_embed_learned, self.stream)[0]  # (L, D)
        if not self.encoder or not self.decoder:
            raise UnsupportedModel("it has no blocks")
        read = {source.data_ptr() for source in self._sources}
        others = {id(p) for name in ("class_emb", "diffloss") for p in getattr(model, name).parameters()}
        others.add(id(model.fake_latent))
        if more := [n for n, p in model.named_parameters() if id(p) not in others and p.data_ptr() not in read]:
            raise UnsupportedModel(f"it has more parameters: {', '.join(more)}")
        self._layout = _layout(model)
        self._copy = copier(self._copies, self.device) if self._copies else None

    @property
    def bytes(self) -> int:
        """Bytes of the copies."""
        copies = sum(packed.numel() * packed.element_size() for packed, _ in self._copies)
        return copies + sum(product.bytes for product in self._products)

    def is_current(self, model: nn.Module) -> bool:
        """Whether the model's weights still lie where they lay, in their types and shapes."""
        return _layout(model) == self._layout

    def refresh(self) -> None:
        """Bring the copies up to date; the host does not wait for a device."""
        if self._copy is not None:
            self._copy()
        if self.device.type == "cpu":
            for product in self._products:
                product.look()

    def _take(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        source = self._source(weight)
        packed = source.to(dtype).contiguous()
        if packed.data_ptr() != source.data_ptr():
            self._copies.append((packed, source))
        return packed

    def _source(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.is_meta:
            raise UnsupportedModel("its weights are on the meta device: offloaded, or not loaded yet")
        self._sources.append(weight.detach())
        return self._sources[-1]

    def _linear(self, layer) -> Product:
        if type(layer) is not nn.Linear:
            raise UnsupportedModel(f"a layer is a {type(layer).__name__}, not a Linear")
        weight, bias = (
            None if v is None else self._source(v) if self.device.type == "cpu" else self._take(v, self.dtype)
            for v in (layer.weight, layer.bias)
        )
        self._products.append(Product(weight, bias, self.dtype))
        return self._products[-1]

    def _norm(self, layer) -> Norm:
        if type(layer) is not nn.LayerNorm or layer.weight is None or layer.bias is None:
            raise UnsupportedModel(f"a norm is a {type(layer).__name__}, not a LayerNorm with weight and bias")
        return Norm(self._take(layer.weight, self.stream), self._take(layer.bias, self.stream), float(layer.eps))

    def _block(self, block, name: str) -> Block:
        before = len(self._sources)
        try:
            packed = Block(
                self._norm(block.norm1), self._linear(block.attn.qkv), self._linear(block.attn.proj),
                self._norm(block.norm2), self._linear(block.mlp.fc1), self._linear(block.mlp.fc2),
                int(block.attn.num_heads),
            )  # fmt: skip
        except AttributeError as error:
            raise UnsupportedModel(f"{name} is not a block of attention and MLP ({error})") from None
        read = {source.data_ptr() for source in self._sources[before:]}
        if more := [n for n, p in block.named_parameters() if p.numel() and p.data_ptr() not in read]:
            raise UnsupportedModel(f"{name} has more than an attention and an MLP: {', '.join(more)}")
        return packed


def _layout(model: nn.Module) -> list[tuple]:
    """Where a model's weights lie, except its head's."""
    weights = [weight for name, weight in model.named_parameters() if not name.startswith("diffloss.")]
    weights += [getattr(model, name) for name in PARTS if isinstance(getattr(model, name), torch.Tensor)]
    return [(weight.data_ptr(), weight.dtype, weight.shape, weight.stride()) for weight in weights]
