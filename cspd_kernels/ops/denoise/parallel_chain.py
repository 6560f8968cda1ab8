"""A chain of few tokens in parallel over its steps, on a device: sweeps until all has settled, no wait of the host."""

from __future__ import annotations

import torch

from ...conditional import run_if, run_while
from ...head import DiffusionHead
from .chain import Chain, Tables
from .reference import most_sweeps


class Sweeps:
    """What sweeps over T steps of N tokens leave to the next one; see ``reference.sweeps``."""

    def __init__(self, head: DiffusionHead, network: Chain, tokens: int, guessed: bool):
        device, shape = head.device, (head.num_steps, tokens, head.channels)

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(shape, device=device, dtype=dtype)

        self.steps, self.limit, self.guessed = head.num_steps, most_sweeps(head.num_steps), guessed
        self.x = network.x.view(shape)  # inputs of all steps
        # The inputs of a sweep ago, and x0 there of every group, before guidance and limits.
        self.before, self.x0 = zeros(*shape), zeros(network.groups, *shape)
        # Results, without the temperature; path is a sum over steps. Largest change and size of a channel's values.
        self.mean, self.log_std, self.path, self.change, self.size = zeros(5, *shape[1:]).unbind()
        # Of the tokens: whether they have settled, after how many sweeps.
        self.settled, self.sweeps = zeros(2, tokens, dtype=torch.int32).unbind()
        self.tolerance = zeros(1)
        self.count = zeros(1, dtype=torch.int32)  # tokens of the call; the others count as settled
        # Sweeps done; whether there is to be another; whether a token has not settled.
        self.done, self.live, self.left = (zeros(1, dtype=torch.int32) for _ in range(3))


class ParallelChain:
    """A chain of N tokens by sweeps, with the interface of :class:`Chain`.

    ``chain`` is the sequential chain. It holds the call's inputs and the modulations of all steps, and makes the tokens
    that do not settle. ``network`` is its network at all steps at once.
    """

    def __init__(self, kind: type[Chain], head, tokens: int, groups: int, noise, static: bool, guessed: bool):
        self.chain = kind(head, tokens, groups, noise, head.num_steps, static)
        self.network = kind(head, tokens * head.num_steps, groups, noise, 1, static, sweeps_of=self.chain)
        self.state = Sweeps(head, self.network, tokens, guessed)
        self.chain.live, self.network.live = self.state.left, self.state.live
        self._filled: dict[str, float] = {}

    def buffers(self) -> list[torch.Tensor]:
        own = [value for value in vars(self.state).values() if isinstance(value, torch.Tensor)]
        return self.chain.buffers() + self.network.buffers() + own

    @property
    def memory(self) -> torch.Tensor | None:
        return self.chain.memory

    @property
    def memory_bytes(self) -> int:
        return self.chain.memory_bytes

    def keep_modulations_in(self, memory: torch.Tensor) -> None:
        self.chain.keep_modulations_in(memory)
        self.network.read_modulations(self.chain.embedded, self.chain.mods, self.chain.final_mods)

    def load(self, cond, x_T, noise, temperature, scales, tolerance, guess) -> None:  # noqa: N803
        """Like :meth:`Chain.load`; ``guess`` (n, T, C) or None."""
        self.chain.load(cond, x_T, noise, temperature, scales)
        if guess is not None:
            self.state.x[:, : len(x_T)].copy_(guess.movedim(1, 0))
        for name, value in (("tolerance", tolerance), ("count", len(x_T))):
            if self._filled.get(name) != value:
                getattr(self.state, name).fill_(value)
                self._filled[name] = value

    def launch(self, head: DiffusionHead, tables: Tables) -> None:
        chain, network, state = self.chain, self.network, self.state
        if chain.memory is None:
            self.keep_modulations_in(torch.empty(self.memory_bytes, dtype=torch.uint8, device=head.device))

        def body() -> None:
            network.evaluate(head, tables)
            network.sweep(tables, chain, state, begin=False)
            network.settle(state, begin=False)

        if chain.reads_copies:
            tables.refresh(head)
        chain.start(head)
        chain.hoist(head, 0, head.num_steps)
        network.sweep(tables, chain, state, begin=True)
        network.settle(state, begin=True)
        run_while(state.live, body, state.limit, own=network.own)
        run_if(state.left, lambda: chain.run_steps(head, tables, 0, head.num_steps), own=chain.own)

    def warm_up(self, head: DiffusionHead) -> None:
        self.chain.warm_up(head)
        self.network.warm_up_products(head)

    def results(self, n: int, temperature: float | torch.Tensor, tables: Tables) -> tuple[torch.Tensor, ...]:
        """(sample, mean, log_std, path_log_std, sweeps, inputs of all steps (n, T, C)) of the first n tokens."""
        chain, state = self.chain, self.state
        settled = state.settled[:n] != 0
        mean, log_std, path = (
            torch.where(settled[:, None], ours[:n], theirs[:n])
            for ours, theirs in ((state.mean, chain.x), (state.log_std, chain.log_std), (state.path, chain.path))
        )
        sweeps = torch.where(settled, state.sweeps[:n], state.sweeps[:n] + state.steps)
        return (
            mean,
            mean,
            log_std + chain.log_temperature(temperature),
            path.sum(1),
            sweeps,
            state.x[:, :n].movedim(0, 1).contiguous(),
        )
