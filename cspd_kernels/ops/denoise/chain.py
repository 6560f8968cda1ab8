"""One chain's buffers and the order of its work; a backend's chains launch the kernels."""

from __future__ import annotations

import math

import torch

from ...crossover import PERSISTENT_VARIABLE
from ...head import DiffusionHead
from ...late import LateReport
from ...noise import PhiloxNoise, signed_seed


class Tables:
    """What the kernels read of a head besides its weights, uploaded once; and what they report to the host."""

    def __init__(self, head: DiffusionHead):
        s = head.schedule
        upper = s.log_std_upper if head.learned_variance else s.log_std_lower
        columns = [s.x0_x, s.x0_out, s.mean_x0, s.mean_x, upper, s.log_std_lower]
        table = torch.zeros(s.num_steps, 8, dtype=torch.float32, device="cpu")
        for i, column in enumerate(columns):
            table[:, i] = torch.from_numpy(column.copy())
        self.coefficients = to_device(table, head.device)  # (T, 8), float32
        self.clip: torch.Tensor | None = None  # (2, C), float32: the limits of x0
        if s.clip is not None:
            clip = torch.tensor(s.clip, dtype=torch.float32, device="cpu").reshape(2, -1).expand(2, head.channels)
            self.clip = to_device(clip.contiguous(), head.device)
        # (C, W): neighbouring threads make neighbouring columns. A copy, also of one channel: it is written to.
        self.input_weight = head.input_weight.t().clone(memory_format=torch.contiguous_format)
        fields = ("norm_weight", "norm_bias", "weight0", "bias0", "weight1", "bias1")
        addresses = [[getattr(block, field).data_ptr() for field in fields] for block in head.blocks]
        self.addresses = to_device(torch.tensor(addresses, dtype=torch.int64, device="cpu"), head.device)  # (D, 6)
        self.gave_up = LateReport(head.device)

    def refresh(self, head: DiffusionHead) -> None:
        """The copies of the module's own weights, which may have changed."""
        self.input_weight.copy_(head.input_weight.t())

    def check(self) -> None:
        """Raise where an earlier call is known to have failed, once."""
        if self.gave_up.news():
            raise RuntimeError(
                "the persistent denoising kernel of an earlier call gave up waiting for its other blocks, and that "
                f"call's tokens are NaN: another stream may have held the device. Set {PERSISTENT_VARIABLE}=0"
            )


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device; the host does not wait for the copy."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class Chain:
    """The chain of a fixed number of tokens on one head.

    ``load`` copies a call's inputs into the buffers, ``launch`` runs every kernel from them, with the
    same pointers every time, so that a CUDA graph can stand in for it, and ``results`` copies out.
    Rows beyond the call's own are computed and not returned: rows are independent.

    With ``sweeps_of``, a chain of N tokens that keeps the modulations of all T steps, this one is that chain's network
    at all of its steps at once, for sweeps (``parallel_chain``): T N tokens, of which x are the inputs and eps, v and
    eps_u what the network puts out. It reads the other's modulations and has no other inputs of its own.

    A backend adds the buffers of its kernels, ``embed`` and ``run_steps``, to ``start`` what else comes first, for
    sweeps ``evaluate``, ``sweep`` and ``settle``, and to a chain whose kernels may stop waiting for each other an
    ``error`` (1,) int32, 0 unless one did.

    It does not hold the head, whose life ends the chain's.
    """

    error: torch.Tensor | None = None
    memory: torch.Tensor | None = None  # of the modulations
    own = False  # whether steps and sweeps call no library and allocate nothing: then they may be a graph's loop

    def __init__(
        self,
        head: DiffusionHead,
        tokens: int,
        guided: bool,
        noise: torch.Tensor | PhiloxNoise,
        steps: int,
        static: bool,
        sweeps_of: Chain | None = None,
    ):
        """``steps``: whose modulations are alive at a time. ``static``: a tensor of noise is copied, too."""
        device, dtype = head.device, head.dtype
        self.tokens, self.halves, self.steps = tokens, 2 if guided else 1, steps
        # Tokens of a step. Half g of token t has row (t // period * halves + g) * period + t % period.
        self.period = tokens if sweeps_of is None else sweeps_of.tokens
        self.rows = rows = tokens * self.halves
        self.philox, self.static = isinstance(noise, PhiloxNoise), static
        self.dtype = dtype
        self.live: torch.Tensor | None = None  # (1,) int32: where it is 0 the kernels may return at once

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, device=device, dtype=dtype)

        width, channels = head.width, head.channels
        # Of the modulations of ``steps`` steps, and of what they are projected from.
        self.shapes = {
            "embedded": (steps * rows, width),
            "mods": (head.depth, steps * rows, 3 * width),
            "final_mods": (steps * rows, 2 * width),
        }
        # Zeroed: the rows beyond a call's own are computed, too, from whatever lies there.
        self.x = empty(tokens, channels).zero_()
        if sweeps_of is not None:
            self.eps = empty(tokens, channels)
            self.v = empty(tokens, channels) if head.learned_variance else None
            self.eps_u = empty(tokens, channels) if guided else None
            return
        self.cond = empty(self.halves, tokens, head.cond_channels, dtype=dtype).zero_()
        self.scale = empty(tokens).zero_()
        self.temperature = empty(1)
        self.seed = empty(1, dtype=torch.int64)
        self.addresses = empty(tokens if self.philox else 1, dtype=torch.int64).zero_()
        self.noise = self.x
        if static and not self.philox:
            self.noise = empty(head.num_steps, tokens, channels).zero_()
        self.y = empty(rows, width, dtype=dtype)
        self.log_std = empty(tokens, channels)
        self.path = empty(tokens, channels)  # sums over steps
        self.result = self.x
        self._filled: dict[str, float] = {}  # what whole buffers hold

    def buffers(self) -> list[torch.Tensor]:
        """All tensors but the modulations, which may lie in memory that others share."""
        others = vars(self).keys() - self.shapes.keys() - {"memory"}
        return [value for name in others if isinstance(value := getattr(self, name), torch.Tensor)]

    @property
    def memory_bytes(self) -> int:
        """Of the modulations, which lie one after the other."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def keep_modulations_in(self, memory: torch.Tensor) -> None:
        """Where the modulations go: ``memory_bytes`` bytes or more, which nobody else uses while the chain runs."""
        self.memory, values, views = memory, memory[: self.memory_bytes].view(self.dtype), {}
        for name, shape in self.shapes.items():
            views[name], values = values[: math.prod(shape)].view(shape), values[math.prod(shape) :]
        self.read_modulations(**views)

    def read_modulations(self, embedded: torch.Tensor, mods: torch.Tensor, final_mods: torch.Tensor) -> None:
        """Where the modulations are: of this chain, or of the one that it is the network of."""
        self.embedded, self.mods, self.final_mods = embedded, mods, final_mods

    def load(self, cond, x_T, noise, temperature, cfg_scale) -> None:  # noqa: N803
        """Copy the inputs of n <= ``tokens`` tokens into the buffers; never waits for the device."""
        n = len(x_T)
        self.cond[:, :n].copy_(cond.view(self.halves, n, -1))
        self.x[:n].copy_(x_T)
        self._fill("temperature", temperature)
        if isinstance(cfg_scale, torch.Tensor):
            self.scale[:n].copy_(cfg_scale.reshape(-1).expand(n))
            self._filled.pop("scale", None)
        elif cfg_scale is not None:
            self._fill("scale", cfg_scale)
        if self.philox:
            self.addresses[:n].copy_(noise.rows)
            if isinstance(noise.seed, torch.Tensor):
                self.seed.copy_(noise.seed.reshape(1))
                self._filled.pop("seed", None)
            else:
                self._fill("seed", signed_seed(noise.seed))
        elif self.static:
            self.noise[:, :n].copy_(noise)
        else:
            self.noise = noise.contiguous()
        if self.error is not None:
            self.error.zero_()

    def _fill(self, name: str, value: float) -> None:
        """Set a buffer to a number, which most calls of a chain share: a launch less."""
        if self._filled.get(name) != value:
            getattr(self, name).fill_(value)
            self._filled[name] = value

    def launch(self, head: DiffusionHead, tables: Tables) -> None:
        """Every kernel of the chain, from the inputs in the buffers to the results in them."""
        self.start(head)
        for stop in range(head.num_steps, 0, -self.steps):
            begin = max(0, stop - self.steps)
            self.hoist(head, begin, stop)
            self.run_steps(head, tables, begin, stop)

    def results(self, n: int, temperature: float, tables: Tables) -> tuple[torch.Tensor, ...]:
        """Copies of (sample, mean, log_std, path_log_std) of the first n tokens; sample and mean are one tensor."""
        if self.error is not None:
            tables.gave_up.add(self.error)
        log_temperature = math.log(temperature) if temperature > 0 else -math.inf
        mean = self.result[:n].clone()
        return mean, mean, self.log_std[:n] + log_temperature, self.path[:n].sum(1)

    def start(self, head: DiffusionHead) -> None:
        """What comes before the first step's modulations: the projected condition y."""
        torch.addmm(head.cond_bias, self.cond.view(self.rows, -1), head.cond_weight.t(), out=self.y)
        self.path.zero_()

    def hoist(self, head: DiffusionHead, start: int, stop: int) -> None:
        """The modulations of steps start..stop-1: one library product a layer."""
        if self.memory is None:
            self.keep_modulations_in(torch.empty(self.memory_bytes, dtype=torch.uint8, device=head.device))
        self.embed(head, start, stop)
        count = (stop - start) * self.rows
        embedded = self.embedded[:count]
        for b, mods in zip(head.blocks, self.mods):
            torch.addmm(b.mod_bias, embedded, b.mod_weight.t(), out=mods[:count])
        torch.addmm(head.final_mod_bias, embedded, head.final_mod_weight.t(), out=self.final_mods[:count])

    def warm_up(self, head: DiffusionHead) -> None:
        """What of a launch uses the workspaces of libraries."""
        self.hoist(head, head.num_steps - self.steps, head.num_steps)
        self.warm_up_products(head)

    def warm_up_products(self, head: DiffusionHead) -> None:
        """Of the steps."""

    def embed(self, head: DiffusionHead, start: int, stop: int) -> None:
        """``embedded`` [K, rows, W] = silu(time_embedding [K, W] + y [rows, W]) of the K steps start..stop-1."""
        raise NotImplementedError

    def run_steps(self, head: DiffusionHead, tables: Tables, start: int, stop: int) -> None:
        """Reverse steps stop-1..start."""
        raise NotImplementedError

    def evaluate(self, head: DiffusionHead, tables: Tables) -> None:
        """The network of a chain at all of its steps: ``eps``, ``v`` and ``eps_u`` from ``x``."""
        raise NotImplementedError

    def sweep(self, tables: Tables, chain: Chain, state, begin: bool) -> None:
        """The recursion over all steps of every token that has not settled, from what the network puts out; with
        ``begin`` of every token from its noise alone. ``state``: see ``parallel_chain``."""
        raise NotImplementedError

    def settle(self, state, begin: bool) -> None:
        """Which tokens have settled, and whether sweeps go on."""
        raise NotImplementedError
