"""The demo's two models: class-conditional 8x8 digits as 16 tokens of 4 channels (2x2 patches).

Pixels lie in [-1, 1] (``value / 8 - 1`` of the 0..16 of scikit-learn's handwritten digits).
Labels are 0..9.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..models import MAR

DATA = Path(__file__).parent / "data"

# Both models share the tokens, the classes and the reverse diffusion: a drafted token's noises are
# run through the target's head step by step, so the schedules must be the same. The variance is
# fixed and the last step's wide (sigma 0.03): with learned variances the trajectory term of the
# density ratio, and with a narrow last step the distance of the two means, would reject tokens whose
# difference cannot be seen, and a redrawn token does not know the others of its window.
COMMON = dict(
    img_size=8,
    vae_stride=1,
    patch_size=2,
    vae_embed_dim=1,
    class_num=10,
    buffer_size=4,
    schedule="linear",
    num_sampling_steps=40,
    num_train_steps=100,
    learn_sigma=False,
    attn_dropout=0.0,
    proj_dropout=0.0,
    mask_ratio_min=0.05,
)
TARGET = dict(
    COMMON,
    encoder_embed_dim=96,
    encoder_depth=3,
    encoder_num_heads=4,
    decoder_embed_dim=96,
    decoder_depth=3,
    decoder_num_heads=4,
    diffloss_d=3,
    diffloss_w=176,
)
DRAFT = dict(
    COMMON,
    encoder_embed_dim=72,
    encoder_depth=2,
    encoder_num_heads=2,
    decoder_embed_dim=72,
    decoder_depth=2,
    decoder_num_heads=2,
    diffloss_d=2,
    diffloss_w=112,
)


def load_model(
    config: dict, path: str | Path, remedy: str = "reinstall the package, or make them with `python -m cspd.demo.train`"
) -> MAR:
    """A model of ``config`` with the weights of a safetensors file, in eval mode on the CPU, in float32.

    ``remedy`` says what to do where there is no file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's tensors are not those of the configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the demo's weights {path} do not exist: {remedy}")
    model = MAR(**config)
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold the weights of the demo's configuration: {error}") from error
    return model.eval()


def load_pair(data: str | Path = DATA) -> tuple[MAR, MAR]:
    """(target, draft) from ``target.safetensors`` and ``draft.safetensors`` in ``data``, in eval mode on the CPU."""
    return load_model(TARGET, Path(data) / "target.safetensors"), load_model(DRAFT, Path(data) / "draft.safetensors")


@contextlib.contextmanager
def one_thread():
    """One CPU thread for the digits pair, unless OMP_NUM_THREADS says otherwise; the caller's number afterwards.

    Its tensors are so small that more threads gain nothing, and on a busy machine they wait for each other, spinning.
    """
    before = torch.get_num_threads()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
