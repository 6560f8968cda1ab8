"""Masked autoregressive image model (MAR), state-dict compatible with LTH14/mar.

Li et al. 2024, "Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838.
``MAR.sample_tokens`` is the eager baseline of the benchmark of whole images: it draws the same random
numbers in the same order as the released code, on any device.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..order import known_of, mask_of, plan_steps, positions, to_device
from ..transformer import conditions, decode, encode, known_of_mask, masked_form
from .diffloss import DiffLoss
from .vit import Block


class MAR(nn.Module):
    """Encoder over the known tokens, decoder over all of them, diffusion head per token.

    Args:
        img_size, vae_stride, patch_size, vae_embed_dim: an image has
            L = (img_size / vae_stride / patch_size)^2 tokens of C = vae_embed_dim patch_size^2 channels.
        diffloss_d, diffloss_w, num_sampling_steps, schedule, num_train_steps, learn_sigma:
            the head (see :class:`DiffLoss`).
        buffer_size: how many class tokens stand before the sequence.

    Example:
        >>> import torch
        >>> from cspd.models import MAR
        >>> model = MAR(
        ...     img_size=4, vae_stride=1, vae_embed_dim=3, class_num=10, buffer_size=2, diffloss_d=1, diffloss_w=8,
        ...     num_sampling_steps=5, encoder_embed_dim=8, encoder_depth=1, encoder_num_heads=2, decoder_embed_dim=8,
        ...     decoder_depth=1, decoder_num_heads=2,
        ... )
        >>> loss = model(torch.zeros(2, 3, 4, 4), torch.tensor([3, 7]))
        >>> loss.shape, model.seq_len
        (torch.Size([]), 16)
    """

    loaded: str  # of :func:`cspd.load_mar`: what the file held

    def __init__(
        self,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        buffer_size: int = 64,
        diffloss_d: int = 3,
        diffloss_w: int = 1024,
        num_sampling_steps: int | str = "100",
        diffusion_batch_mul: int = 4,
        grad_checkpointing: bool = False,
        schedule: str = "cosine",
        num_train_steps: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        self.img_size = img_size
        self.vae_stride = vae_stride
        self.vae_embed_dim = vae_embed_dim
        self.patch_size = patch_size
        self.seq_h = self.seq_w = img_size // vae_stride // patch_size
        self.seq_len = self.seq_h * self.seq_w
        self.token_embed_dim = vae_embed_dim * patch_size**2
        self.buffer_size = buffer_size
        self.grad_checkpointing = grad_checkpointing
        self.mask_ratio_min = mask_ratio_min
        self.label_drop_prob = label_drop_prob
        self.num_classes = class_num
        self.diffusion_batch_mul = diffusion_batch_mul

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * 0.02)

        def blocks(depth: int, dim: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, heads, mlp_ratio, attn_dropout, proj_dropout) for _ in range(depth))

        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.fake_latent = parameter(1, encoder_embed_dim)  # the class embedding of "no class"
        self.z_proj = nn.Linear(self.token_embed_dim, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.encoder_pos_embed_learned = parameter(1, self.seq_len + buffer_size, encoder_embed_dim)
        self.encoder_blocks = blocks(encoder_depth, encoder_embed_dim, encoder_num_heads)
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.mask_token = parameter(1, 1, decoder_embed_dim)
        self.decoder_pos_embed_learned = parameter(1, self.seq_len + buffer_size, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.diffusion_pos_embed_learned = parameter(1, self.seq_len, decoder_embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = DiffLoss(
            target_channels=self.token_embed_dim,
            z_channels=decoder_embed_dim,
            depth=diffloss_d,
            width=diffloss_w,
            num_sampling_steps=num_sampling_steps,
            grad_checkpointing=grad_checkpointing,
            schedule=schedule,
            num_train_steps=num_train_steps,
            learn_sigma=learn_sigma,
        )

    def patchify(self, x: torch.Tensor) -> torch.Tensor:
        """(B, c, h, w) -> (B, L, C).

        Example:
            >>> import torch
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> tokens = model.patchify(torch.zeros(2, 1, 8, 8))
            >>> tokens.shape, model.unpatchify(tokens).shape
            (torch.Size([2, 16, 4]), torch.Size([2, 1, 8, 8]))
        """
        batch, c, h, w = x.shape
        p = self.patch_size
        x = x.reshape(batch, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, (h // p) * (w // p), c * p * p)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, c, h, w).

        Example:
            >>> import torch
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> model.unpatchify(torch.zeros(2, 16, 4)).shape
            torch.Size([2, 1, 8, 8])
        """
        p, c = self.patch_size, self.vae_embed_dim
        x = x.reshape(-1, self.seq_h, self.seq_w, c, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, c, self.seq_h * p, self.seq_w * p)

    def sample_orders(self, bsz: int) -> torch.Tensor:
        """(B, L) random generation orders from numpy's global generator, as the released code draws them.

        Example:
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> orders = model.sample_orders(2)
            >>> orders.shape, orders.sort(dim=1).values[0].tolist() == list(range(16))
            (torch.Size([2, 16]), True)
        """
        orders = np.tile(np.arange(self.seq_len), (bsz, 1))
        for order in orders:
            np.random.shuffle(order)
        return to_device(torch.from_numpy(orders), self.mask_token.device)

    def random_masking(self, x: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
        """Training mask (B, L); its ratio is a normal (1, 0.25) truncated to [mask_ratio_min, 1].

        Example:
            >>> import torch
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> orders = model.sample_orders(2)
            >>> mask = model.random_masking(torch.zeros(2, 16, 4), orders)
            >>> mask.shape, bool(mask.mean() >= model.mask_ratio_min)
            (torch.Size([2, 16]), True)
        """
        normal: Any = torch.distributions.Normal(1.0, 0.25)
        low = float(normal.cdf(torch.tensor(self.mask_ratio_min)))
        ratio = float(normal.icdf(low + (0.5 - low) * torch.rand(())))
        return mask_of(orders, math.ceil(x.shape[1] * ratio))

    def _drop_labels(self, class_embedding: torch.Tensor) -> torch.Tensor:
        """In training mode, replace some rows of (B, E) by that of no class, by the CPU's generator."""
        if not self.training:
            return class_embedding
        drop = (torch.rand(len(class_embedding), 1) < self.label_drop_prob).to(class_embedding)
        return drop * self.fake_latent + (1 - drop) * class_embedding

    @masked_form
    def forward_mae_encoder(self, x: torch.Tensor, mask: torch.Tensor, class_embedding: torch.Tensor) -> torch.Tensor:
        """x (B, L, C), mask (B, L), class_embedding (B, E) -> (B, buffer + known, E).

        Every image must have the same number of known tokens. On a device the host waits for that number;
        :func:`cspd.transformer.encode`, given it, does not.

        Example:
            >>> import torch
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> mask = torch.ones(2, 16)
            >>> mask[:, :3] = 0  # three tokens are known
            >>> z = model.forward_mae_encoder(torch.zeros(2, 16, 4), mask, model.class_emb(torch.tensor([3, 7])))
            >>> z.shape[1] == model.buffer_size + 3
            True
        """
        return encode(self, x, known_of_mask(mask), self._drop_labels(class_embedding))

    @masked_form
    def forward_mae_decoder(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encoder output and mask (B, L) -> the conditions z of all positions (B, L, Z).

        Example:
            >>> import torch
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> mask = torch.ones(2, 16)
            >>> z = model.forward_mae_encoder(torch.zeros(2, 16, 4), mask, model.class_emb(torch.tensor([3, 7])))
            >>> model.forward_mae_decoder(z, mask).shape[:2]
            torch.Size([2, 16])
        """
        return decode(self, x, known_of_mask(mask))

    def forward(self, imgs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Training loss of a batch of images (B, c, h, w) with labels (B,)."""
        x = self.patchify(imgs)
        target = x.detach()
        mask = self.random_masking(x, self.sample_orders(x.shape[0]))
        z = self.forward_mae_decoder(self.forward_mae_encoder(x, mask, self.class_emb(labels)), mask)
        rows = mask.flatten().bool()  # the loss counts masked tokens only
        repeat = self.diffusion_batch_mul
        return self.diffloss(target.flatten(0, 1)[rows].repeat(repeat, 1), z.flatten(0, 1)[rows].repeat(repeat, 1))

    @torch.no_grad()
    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: torch.Tensor | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> torch.Tensor:
        """Generate bsz images (B, c, h, w) in ``num_iter`` steps; labels (B,) int64 or None for no class.

        Example:
            >>> import torch
            >>> from cspd.demo.pair import load_pair
            >>> model, _ = load_pair()
            >>> model.sample_tokens(2, num_iter=4, labels=torch.tensor([3, 7])).shape
            torch.Size([2, 1, 8, 8])
        """
        guided = cfg != 1.0
        device = self.mask_token.device
        tokens = torch.zeros(bsz, self.seq_len, self.token_embed_dim, device=device)
        orders = self.sample_orders(bsz)
        embedding = self.class_emb(labels) if labels is not None else self.fake_latent.repeat(bsz, 1)
        if guided:
            embedding = torch.cat([embedding, self.fake_latent.repeat(bsz, 1)])
        for step in tqdm(plan_steps(self.seq_len, num_iter, cfg, cfg_schedule), disable=not progress):
            index = positions(orders, step.before, step.after)
            known = known_of(orders, step.before)
            x, known, both = (torch.cat([v, v]) if guided else v for v in (tokens, known, index))
            # [B or 2B, n, Z] -> rows, image by image, conditional images first
            z = conditions(self, x, known, self._drop_labels(embedding), both).flatten(0, 1)
            drawn = self.diffloss.sample(z, temperature, step.cfg)[: index.numel()]
            drawn = drawn.reshape(*index.shape, -1)
            tokens = tokens.scatter(1, index[..., None].expand_as(drawn), drawn)
        return self.unpatchify(tokens)


def _build(defaults: dict[str, Any], kwargs: dict[str, Any]) -> MAR:
    return MAR(**{**defaults, **kwargs})


def _size(dim: int, depth: int, heads: int, head_depth: int, head_width: int) -> dict[str, Any]:
    return dict(
        encoder_embed_dim=dim,
        encoder_depth=depth,
        encoder_num_heads=heads,
        decoder_embed_dim=dim,
        decoder_depth=depth,
        decoder_num_heads=heads,
        diffloss_d=head_depth,
        diffloss_w=head_width,
    )


def mar_base(**kwargs: Any) -> MAR:
    """MAR-B, 208 M parameters with its published head (D=6, W=1024).

    Example:
        >>> import torch
        >>> from cspd.models import mar_base
        >>> with torch.device("meta"):  # without memory
        ...     model = mar_base()
        >>> round(sum(p.numel() for p in model.parameters()) / 1e6), model.seq_len
        (208, 256)
    """
    return _build(_size(768, 12, 12, 6, 1024), kwargs)


def mar_large(**kwargs: Any) -> MAR:
    """MAR-L, 479 M parameters with its published head (D=8, W=1280).

    Example:
        >>> import torch
        >>> from cspd.models import mar_large
        >>> with torch.device("meta"):  # without memory
        ...     model = mar_large(num_sampling_steps=50)
        >>> round(sum(p.numel() for p in model.parameters()) / 1e6), model.diffloss.gen_diffusion.num_timesteps
        (478, 50)
    """
    return _build(_size(1024, 16, 16, 8, 1280), kwargs)


def mar_huge(**kwargs: Any) -> MAR:
    """MAR-H, 943 M parameters with its published head (D=12, W=1536).

    Example:
        >>> import torch
        >>> from cspd.models import mar_huge
        >>> with torch.device("meta"):  # without memory
        ...     model = mar_huge()
        >>> round(sum(p.numel() for p in model.parameters()) / 1e6)
        942
    """
    return _build(_size(1280, 20, 16, 12, 1536), kwargs)
