"""A second pair of models, on woven cloth: 12x12 images by a formula, as 36 tokens of 4 channels (2x2 patches).

A cloth is the sum of two things. Six bands of rows and six of columns, each a patch wide, are light or dark. Threads
are 2x2 squares of one random brightness, on a grid that is shifted by one pixel against the patches. So every thread
inside the image is shared by four tokens. Two of them drawn at once do not know of each other and disagree; one after
the other they would agree. The bands are known after a few tokens, but only to a model that can work them out. On the
digits neither matters: few steps there are nearly as good as many.

The mean and the covariance of a pixel's law follow from the formula, so the Frechet distance is to the exact ones.
The weights are not in the package: ``benchmarks/pairs`` has them, and ``python -m cspd.demo.train --pair cloth``
makes them again.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..frechet import frechet_distance as gaussian_distance
from ..models import MAR
from .pair import load_model
from .quality import statistics

SIDE = 6  # tokens of a row
PIXELS = 2 * SIDE
BAND, THREAD = 0.35, 0.45  # standard deviations

# As in the digits pair a fixed variance; the last step has a sigma of 0.05. A pass of the target costs ten
# times its head, and three times a pass of the draft.
COMMON = dict(
    img_size=PIXELS,
    vae_stride=1,
    patch_size=2,
    vae_embed_dim=1,
    class_num=1,
    buffer_size=2,
    schedule="linear",
    num_sampling_steps=20,
    num_train_steps=40,
    learn_sigma=False,
    attn_dropout=0.0,
    proj_dropout=0.0,
    mask_ratio_min=0.05,
    diffloss_d=2,
    diffloss_w=64,
)
TARGET = dict(
    COMMON,
    encoder_embed_dim=96,
    encoder_depth=3,
    encoder_num_heads=4,
    decoder_embed_dim=96,
    decoder_depth=3,
    decoder_num_heads=4,
)
# The target without four of its six blocks, which the training starts from.
DRAFT = dict(TARGET, encoder_depth=1, decoder_depth=1)


def make_cloth(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(images (n, 1, 12, 12) float32, labels (n,) int64, all 0: there is one class), of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * torch.randint(2, (number, SIDE, 1), generator=generator) - 1
    columns = 2 * torch.randint(2, (number, 1, SIDE), generator=generator) - 1
    threads = THREAD * torch.randn(number, SIDE + 1, SIDE + 1, generator=generator)
    images = _enlarge(BAND * (rows + columns)) + _enlarge(threads)[:, 1:-1, 1:-1]
    return images[:, None], torch.zeros(number, dtype=torch.int64)


def _enlarge(x: torch.Tensor) -> torch.Tensor:
    """(n, h, w) -> (n, 2 h, 2 w): each value a 2x2 square."""
    return x.repeat_interleave(2, 1).repeat_interleave(2, 2)


@cache
def law() -> tuple[np.ndarray, np.ndarray]:
    """Mean (144,) and covariance (144, 144) of the pixels, exact, float64."""
    row, column = (axis.flatten() for axis in np.indices((PIXELS, PIXELS)))

    def same(place: np.ndarray) -> np.ndarray:
        return (place[:, None] == place).astype(np.float64)

    bands = same(row // 2) + same(column // 2)
    threads = same((row + 1) // 2) * same((column + 1) // 2)
    return np.zeros(PIXELS**2), BAND**2 * bands + THREAD**2 * threads


def frechet_distance(images) -> float:
    """Squared Frechet distance of the normal fit to ``images`` from that of the formula, in the 144 pixels.

    The whole covariance has a trace of 64. It is biased upwards for few images: 2,048 real ones have about 0.4.
    The formula's law has directions without any variance (pixels of one thread differ by their bands only), where
    whatever disagreement there is counts in full.

    Args:
        images: (n, 1, 12, 12), tensor or array.
    """
    return gaussian_distance(*statistics(images, PIXELS), *law())


def load_pair(data: str | Path) -> tuple[MAR, MAR]:
    """(target, draft) from ``cloth-target.safetensors`` and ``cloth-draft.safetensors`` in a folder.

    Raises:
        FileNotFoundError, ValueError: as of :func:`cspd.demo.pair.load_model`.
    """
    made_by = "the repository has them in benchmarks/pairs, and `python -m cspd.demo.train --pair cloth` makes them"
    return tuple(
        load_model(config, Path(data) / f"cloth-{name}.safetensors", made_by)
        for name, config in (("target", TARGET), ("draft", DRAFT))
    )
