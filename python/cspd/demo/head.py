"""A head of 100 steps with learned variance, as the released models have, for the tokens of the demo's pair.

The pair's own heads have 40 steps and a fixed variance (see ``pair``). This one takes the conditions of the pair's
target and draws the same tokens; how many sweeps a trained head needs (``docs/parallel.md``) is counted on it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..models import MAR, DiffLoss
from ..transformer import conditions
from .pair import DATA, TARGET, load_pair
from .run import STEPS, generate

FILE = "head100.safetensors"
CHANNELS = TARGET["vae_embed_dim"] * TARGET["patch_size"] ** 2
# Target channels, z channels, depth, width, sampling steps: the training has 1,000 of them.
HEAD = (CHANNELS, TARGET["decoder_embed_dim"], 3, 192, "100")
KNOWN = (0, 4, 10)  # tokens of the 16, where a condition is taken


def new_head() -> DiffLoss:
    """The head with random weights."""
    return DiffLoss(*HEAD, schedule="linear")


def load_head(data: str | Path = DATA, images: int = 64) -> tuple[DiffLoss, torch.Tensor]:
    """(the head in eval mode, float32, on the CPU; conditions (3 images, Z) float32 as of :func:`held_out`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's tensors are not those of the head.
    """
    path = Path(data) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"the demo's weights {path} do not exist: reinstall the package, or make them with "
            "`python -m cspd.demo.train_head`"
        )
    head = new_head()
    try:
        head.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not hold the weights of the demo's head: {error}") from error
    target = load_pair(data)[0]
    return head.eval(), held_out(target, *digits(target, images))


@torch.no_grad()
def digits(model: MAR, images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (images, L, C) that the model draws for the classes in turn, and labels: no real ones are shipped."""
    labels = torch.arange(images) % model.num_classes
    return model.patchify(generate(model, model, labels, STEPS, None, seed)[0]), labels


@torch.no_grad()
def held_out(model: MAR, tokens: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Conditions (3 B, Z) of one unknown position a digit, where 0 tokens are known, then 4, then 10.

    tokens (B, L, C), labels (B,). The positions depend on the seed alone, not on the model.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([draw(model, tokens, labels, known, 1, generator)[0] for known in KNOWN])


def draw(model, tokens, labels, known: int, wanted: int, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditions (B wanted, Z) and true tokens (B wanted, C) of random positions, given ``known`` random others.

    tokens (B, L, C), labels (B,), generator a ``torch.Generator`` or None, torch's own.
    """
    order = torch.stack([torch.randperm(model.seq_len, generator=generator) for _ in tokens])
    where = order[:, known : known + wanted]
    z = conditions(model, tokens, order[:, :known].sort(1).values, model.class_emb(labels), where)
    return z.flatten(0, 1), tokens.gather(1, where[..., None].expand(-1, -1, tokens.shape[-1])).flatten(0, 1)
