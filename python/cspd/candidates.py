"""What the draft proposes for a token, and what is kept of it until the target has looked.

A token has K candidates. With the criterion ``"trajectory"`` each is the end of a chain of its own, whose last step
adds no noise. With ``"last_step"`` a token has one chain, whose last step adds noise, too. Candidate i is then ``mu +
sigma n_i``, where n_i is the noise of step 0, which a chain alone does not use. The target's own sample is made from
the same n_i. Given all other noise, the draft's token and the target's are then two Gaussians. The test compares their
densities, without a term of the path.
"""

from __future__ import annotations

import torch

from cspd_kernels import Denoised, DenoisedInParallel, DiffusionHead
from cspd_kernels.head import stream_dtype

CRITERIA = ("trajectory", "last_step")


def tokens_of(chain: Denoised | DenoisedInParallel, last: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """(N, K, C): the candidates of N tokens.

    ``last``: (N, K, C) noise of the last step. They are then rounded to float32, once: what is judged is what is kept.
    None: K chains a token, whose ends they are.
    """
    if last is None:
        return chain.sample.view(tokens, -1, chain.sample.shape[-1])
    return (chain.mean[:, None] + torch.exp(chain.log_std)[:, None] * last).float()


def with_candidates(chain: Denoised | DenoisedInParallel, x: torch.Tensor, path: bool) -> Denoised:
    """Chains of N tokens, token by token, with their candidates x (N, K, C), as ``accept_reject`` takes them.

    mean and log_std are (N, K, C), or (N, 1, C) where the candidates of a token share its chain. ``path``: whether the
    scales of the steps before the last count.
    """
    mean, log_std, path_log_std = (
        value.view(len(x), -1, *value.shape[1:]) for value in (chain.mean, chain.log_std, chain.path_log_std)
    )
    return Denoised(x, mean, log_std, path_log_std if path else torch.zeros_like(path_log_std))


def first_candidate(chain: Denoised) -> Denoised:
    """(N, ...) of (N, K, ...)."""
    return Denoised(*(value[:, 0] for value in chain))


class Drafted:
    """What the draft has drawn, token by token in the order of drawing: buffers, as a window is judged at once.

    Args:
        batch, length: B, L. head: of the draft. steps: of a trajectory, 0 where none is kept. hidden: Z, 0 likewise.
        chains: of a token. candidates: tokens that are kept beside the chains, 0 where they are the chains' ends.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        head: DiffusionHead,
        steps: int,
        hidden: int,
        chains: int = 1,
        candidates: int = 0,
    ):
        stream = stream_dtype(head.dtype)

        def empty(*shape, dtype=stream):
            return torch.zeros(batch, length, *shape, dtype=dtype, device=head.device)

        self.mean, self.log_std = empty(chains, head.channels), empty(chains, head.channels)
        self.path = empty(chains)
        self.trajectory = empty(chains, steps, head.channels) if steps else None
        self.z = empty(hidden) if hidden else None
        self.x = empty(candidates, head.channels, dtype=torch.float32) if candidates else None

    def write(self, columns: torch.Tensor, drawn, x: torch.Tensor | None = None) -> None:
        """Keep what was drawn (:class:`cspd.window.Drawn`) for these places; x: (N, K, C) candidates."""
        chain = drawn.chain
        for name, value in (("mean", chain.mean), ("log_std", chain.log_std), ("path", chain.path_log_std)):
            _put(getattr(self, name), columns, value)
        if self.z is not None:
            _put(self.z, columns, drawn.z)
        if self.x is not None:
            _put(self.x, columns, x)
        if self.trajectory is not None and chain.trajectory is not None:
            _put(self.trajectory, columns, chain.trajectory)
        elif self.trajectory is not None:
            self.trajectory.index_fill_(1, columns, 0.0)

    def read(self, columns: torch.Tensor) -> tuple[Denoised, torch.Tensor | None, torch.Tensor | None]:
        """Results for the tokens of a window: the chains (B n chains, ...), their trajectories, and z (B, n, Z)."""
        mean, log_std, path, trajectory = (
            None if value is None else value.index_select(1, columns).flatten(0, 2)
            for value in (self.mean, self.log_std, self.path, self.trajectory)
        )
        z = None if self.z is None else self.z.index_select(1, columns)
        return Denoised(mean, mean, log_std, path), trajectory, z

    def tokens(self, columns: torch.Tensor) -> torch.Tensor:
        """(B n, K, C): the candidates of the tokens of a window."""
        return (self.mean if self.x is None else self.x).index_select(1, columns).flatten(0, 1)


def _put(buffer: torch.Tensor, columns: torch.Tensor, value: torch.Tensor) -> None:
    kept = (len(buffer), len(columns), *buffer.shape[2:])
    buffer.index_copy_(1, columns, value.to(buffer.dtype).reshape(kept))
