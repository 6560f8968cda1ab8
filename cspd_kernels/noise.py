"""Counter-based random numbers: Philox 4x32-10, the same in every backend.

A number is a pure function of (seed; row, index, channel). Nothing is stored, and a token's noise
does not depend on its batch. Draft and target share noise by sharing addresses.

A seed is an int in [0, 2^64), or a tensor of one int64 element on the rows' device. The tensor holds
the seed's 64 bits, so a seed from 2^63 on is the negative number seed - 2^64. The host never reads a
tensor. A CUDA graph that was captured with one is replayed with what it holds then.

Layout of one Philox call, four 32-bit words in and out::

    key     = (seed low 32, seed high 32)
    counter = (row low 32, row high 32, index, stream << 24 | channel // 4)

    stream 0  noise of reverse step ``index``          word k -> channel 4 g + k
    stream 1  x_T                       (index 0)      likewise
    stream 2  uniform of try ``index`` of accept_reject (try 0 is the accept test), word 0
    stream 3  proposal of try ``index`` of accept_reject, channels as above
    stream 4  generation order          (index 0), word 0 is the sort key of (image, position)

Candidate i of a token, where it has several, has the address of the token + i ``CANDIDATE_STRIDE``. Addresses wrap
around at 64 bits; those of tokens that lie a multiple of the stride apart would meet.

Words become uniforms in (0, 1] by ``float32(word) 2^-32 + 2^-33``; words (0, 1) and (2, 3) become
two normals each by Box-Muller: ``sqrt(-2 ln u_0) (cos, sin)(2 pi u_1)``.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch

from .errors import InvalidInput

Word: TypeAlias = int | torch.Tensor
STREAM_STEP, STREAM_X_T, STREAM_UNIFORM, STREAM_PROPOSAL, STREAM_ORDER = range(5)
CANDIDATE_STRIDE = 1 << 48  # of addresses, between the candidates of a token
_MASK = 0xFFFFFFFF


def philox_4x32(key: tuple[Any, Any], counter: tuple[Any, Any, Any, Any]) -> tuple[torch.Tensor, ...]:
    """Philox 4x32-10 in int64 arithmetic: four counter words -> four random words, all in [0, 2^32).

    Args:
        key: two 32-bit words, ints or int64 tensors. counter: four int64 tensors that broadcast together
            and with the key, or ints (at least one tensor).
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The 64-bit products may wrap around as signed numbers; both halves come out right all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def words(seed: Word, rows: torch.Tensor, index: Word, group: Word, stream: int) -> tuple[torch.Tensor, ...]:
    """The four words at an address; ``rows``, ``index`` and ``group`` broadcast."""
    if isinstance(seed, torch.Tensor):
        seed = seed.reshape(())  # no axis of the result
    key = (seed & _MASK, (seed >> 32) & _MASK)
    # Ints stay ints: turning one into a tensor on a device would wait for it.
    return philox_4x32(key, (rows & _MASK, (rows >> 32) & _MASK, index, group | (stream << 24)))


def _uniform(words: torch.Tensor) -> torch.Tensor:
    return words.float() * 2.0**-32 + 2.0**-33


def uniforms(seed: Word, rows: torch.Tensor, index: Word) -> torch.Tensor:
    """Uniforms in (0, 1], float32, of the tries ``index`` of accept_reject; ``rows`` and ``index`` broadcast."""
    return _uniform(words(seed, rows, index, 0, STREAM_UNIFORM)[0])


def normals(seed: Word, rows: torch.Tensor, index: Word, channels: int, stream: int) -> torch.Tensor:
    """Standard normals, float32, of shape broadcast(rows, index) + (channels,)."""
    group = torch.arange((channels + 3) // 4, device=rows.device)
    if isinstance(index, torch.Tensor):
        index = index[..., None]
    u = [_uniform(word) for word in words(seed, rows[..., None], index, group, stream)]
    pairs = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(radius))
        angle = (2.0 * math.pi) * angle
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(-2)[..., :channels]


def check_seed(seed: object, device: torch.device | None = None) -> int | torch.Tensor:
    """A seed as an int in [0, 2^64) or, where its ``device`` is named, a tensor there; or one clear error.

    A tensor's value is not looked at: any 64 bits are a seed.
    """
    if device is not None and isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise InvalidInput(f"expected a seed tensor to be of one int64 element on {device}, got {_described(seed)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        or_tensor = "" if device is None else " or a tensor of one int64 element"
        got = _described(seed) if isinstance(seed, torch.Tensor) else repr(seed)
        raise InvalidInput(f"expected seed to be an int in [0, 2**64){or_tensor}, got {got}")
    return seed


def signed_seed(seed: int) -> int:
    """The int64 with a seed's 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def check_rows(rows: object, device: torch.device | None = None) -> torch.Tensor:
    """Row addresses (N,) int64, or one clear error."""
    if not isinstance(rows, torch.Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise InvalidInput(f"expected rows to be an int64 tensor of shape (N,), got {got}")
    if device is not None and rows.device != device:
        raise InvalidInput(f"expected rows on {device}, got {rows.device}: move them with rows.to({str(device)!r})")
    return rows


class PhiloxNoise:
    """The noise of N denoising chains, addressed rather than stored.

    Args:
        seed: int in [0, 2^64); or a tensor of one int64 element on the device of ``rows``, its 64 bits. It is kept, not
            copied, and the host never reads it: a CUDA graph is replayed with what it holds then.
        rows: (N,) int64, the address of each chain; equal addresses give equal noise.
        channels: C; may be left to :meth:`x_T` or to :func:`cspd_kernels.denoise`, which know it.

    Example:
        >>> import torch
        >>> from cspd_kernels import PhiloxNoise
        >>> noise = PhiloxNoise(seed=7, rows=torch.tensor([0, 1, 0]), channels=4)
        >>> noise
        PhiloxNoise(seed=7, rows=<3 on cpu>, channels=4)
        >>> x_T = noise.x_T()
        >>> x_T.shape, torch.equal(x_T[0], x_T[2])
        (torch.Size([3, 4]), True)
        >>> torch.equal(noise[1:2].x_T(), x_T[1:2])  # a row's noise does not depend on its batch
        True
    """

    def __init__(self, seed: int | torch.Tensor, rows: torch.Tensor, channels: int | None = None):
        self.rows = check_rows(rows)
        self.seed = check_seed(seed, rows.device)
        self.channels = channels

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        # Printing a tensor's value would wait for the device.
        seed = f"<on {self.seed.device}>" if isinstance(self.seed, torch.Tensor) else self.seed
        return f"PhiloxNoise(seed={seed}, rows=<{len(self)} on {self.rows.device}>, channels={self.channels})"

    def __getitem__(self, index: slice | torch.Tensor) -> PhiloxNoise:
        """The noise of some of the rows."""
        return PhiloxNoise(self.seed, self.rows[index], self.channels)

    def x_T(self, channels: int | None = None) -> torch.Tensor:  # noqa: N802  (the mathematics' name)
        """(N, C) float32 standard normals: the starting point of every chain.

        Example:
            >>> import torch
            >>> from cspd_kernels import PhiloxNoise
            >>> PhiloxNoise(7, torch.arange(3)).x_T(channels=4).shape
            torch.Size([3, 4])
        """
        return normals(self.seed, self.rows, 0, self._channels(channels), STREAM_X_T)

    def step(self, i: int, channels: int | None = None) -> torch.Tensor:
        """(N, C) float32 standard normals of reverse step i.

        Example:
            >>> import torch
            >>> from cspd_kernels import PhiloxNoise
            >>> noise = PhiloxNoise(7, torch.arange(3), channels=4)
            >>> torch.equal(noise.step(2), noise.steps(0, 5)[2])
            True
        """
        return normals(self.seed, self.rows, i, self._channels(channels), STREAM_STEP)

    def steps(self, start: int, stop: int, channels: int | None = None) -> torch.Tensor:
        """(stop - start, N, C): the noise of the steps start..stop-1 at once.

        Example:
            >>> import torch
            >>> from cspd_kernels import PhiloxNoise
            >>> PhiloxNoise(7, torch.arange(3), channels=4).steps(0, 5).shape
            torch.Size([5, 3, 4])
        """
        index = torch.arange(start, stop, device=self.rows.device)[:, None]
        return normals(self.seed, self.rows, index, self._channels(channels), STREAM_STEP)

    def _channels(self, channels: int | None) -> int:
        if self.channels is None:
            self.channels = channels
        known = self.channels if channels is None else channels
        if known is None:
            raise InvalidInput("PhiloxNoise expected the number of channels, got none: call step(i, channels)")
        return known
