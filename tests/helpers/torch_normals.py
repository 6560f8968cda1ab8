"""PyTorch's normals on a CUDA device in NumPy, from the published algorithm, and a generator to draw them with."""

from __future__ import annotations

import numpy as np
import torch

THREADS = 256
_MASK = np.uint64(0xFFFFFFFF)


def philox(key, counter):
    """Philox 4x32-10: (low, high) and four arrays of words (uint64) to four arrays."""
    low, high = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        left, right = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (right >> np.uint64(32)) ^ c1 ^ np.uint64(low), right & _MASK
        c2, c3 = (left >> np.uint64(32)) ^ c3 ^ np.uint64(high), left & _MASK
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def curand_normal4(seed: int, subsequence: np.ndarray, position: int) -> np.ndarray:
    """(4, ...): curand_init(seed, subsequence, 4 position), then curand_normal4, float64 from float32 uniforms."""
    zero = np.zeros_like(subsequence)
    counter = (zero + np.uint64(position % 2**32), zero + np.uint64(position >> 32), subsequence, zero)
    words = [w.astype(np.float32).astype(np.float64) for w in philox((seed % 2**32, seed >> 32), counter)]
    two_pi = np.float64(np.float32(6.2831855))
    normals = []
    for x, y in (words[:2], words[2:]):
        u, angle = np.float32(x * 2.0**-32 + 2.0**-33), np.float32(y * (2.0**-32 * two_pi) + 2.0**-33 * two_pi)
        radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
        normals += [radius * np.sin(angle.astype(np.float64)), radius * np.cos(angle.astype(np.float64))]
    return np.stack(normals)


def normal_(numel: int, seed: int, offset: int, most_blocks: int) -> tuple[np.ndarray, int]:
    """The values of one call of ``normal_`` on so many values, and by how much it moves the generator's offset."""
    assert offset % 4 == 0
    if numel == 0:
        return np.zeros(0), 0
    threads = THREADS * min(-(-numel // THREADS), most_blocks)
    out, rounds = np.full(numel, np.nan), 0
    subsequence = np.arange(threads, dtype=np.uint64)
    for start in range(0, numel, 4 * threads):
        four = curand_normal4(seed, subsequence, offset // 4 + rounds).ravel()
        out[start : start + 4 * threads] = four[: numel - start]
        rounds += 1
    return out, 4 * rounds


class StandIn:
    """What a generator of a device offers; ``fill`` draws as PyTorch's kernels do on one with so many blocks."""

    def __init__(self, seed: int, offset: int, most_blocks: int):
        self.seed, self.offset, self.most_blocks = seed, offset, most_blocks
        self.device = torch.device("cpu")

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset

    def normal(self, numel: int) -> torch.Tensor:
        """float32."""
        values, moved = normal_(numel, self.seed, self.offset, self.most_blocks)
        self.offset += moved
        return torch.from_numpy(values.astype(np.float32))

    def fill(self, out: torch.Tensor, first: torch.dtype, newest_first: bool) -> None:
        for i, to in enumerate(reversed(out.unbind()) if newest_first else out.unbind()):
            values = self.normal(to.numel()).view(to.shape)
            to.copy_(values.to(first) if i == 0 else values)
