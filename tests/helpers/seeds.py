"""Seeds as tensors."""

from __future__ import annotations

import torch

SEEDS = [0, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1]
BAD_SEED_TENSORS = [  # and how an error names them
    (torch.tensor([1], dtype=torch.int32), r"torch.int32 \(1,\) on cpu"),
    (torch.tensor(1.0), r"torch.float32 \(\) on cpu"),
    (torch.tensor(True), r"torch.bool \(\) on cpu"),
    (torch.tensor([1, 2]), r"torch.int64 \(2,\) on cpu"),
    (torch.empty(0, dtype=torch.int64), r"torch.int64 \(0,\) on cpu"),
    (torch.empty(1, dtype=torch.int64, device="meta"), r"torch.int64 \(1,\) on meta"),
]


def seed_tensor(seed: int, device="cpu") -> torch.Tensor:
    """(1,) int64 with the 64 bits of a seed."""
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=device)
