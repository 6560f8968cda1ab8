"""One chain's buffers and the order of its work; a backend's chains launch the kernels."""

from __future__ import annotations

import math

import torch

from ...crossover import PERSISTENT_VARIABLE
from ...errors import CallError
from ...head import DiffusionHead
from ...late import LateReport
from ...noise import PhiloxNoise, signed_seed


class Tables:
    """What the kernels read of a head besides its weights, uploaded once; and what they report to the host."""

    def __init__(self, head: DiffusionHead):
        self.coefficients, self.clip = None, None  # of a head that is only evaluated
        if head.schedule is not None:
            self.coefficients = to_device(step_table(head), head.device)  # (T, 8), float32
            clip = clip_table(head)
            self.clip = None if clip is None else to_device(clip, head.device)  # (2, C), float32
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
            raise CallError(
                "the persistent denoising kernel of an earlier call gave up waiting for its other blocks, and that "
                f"call's tokens are NaN: another stream may have held the device. Set {PERSISTENT_VARIABLE}=0"
            )


def step_table(head: DiffusionHead) -> torch.Tensor:
    """(T, 8) float32 on the host: x0_x, x0_out, mean_x0, mean_x, the log std at v = 1 and at v = -1, 0, 0. The two are
    one where the variance is not learned."""
    s = head.schedule
    upper = s.log_std_upper if head.learned_variance else s.log_std_lower
    columns = [s.x0_x, s.x0_out, s.mean_x0, s.mean_x, upper, s.log_std_lower]
    table = torch.zeros(s.num_steps, 8, dtype=torch.float32, device="cpu")
    for i, column in enumerate(columns):
        table[:, i] = torch.from_numpy(column.copy())
    return table


def clip_table(head: DiffusionHead) -> torch.Tensor | None:
    """(2, C) float32 on the host: what x0 of every channel is limited to, low then high; None without limits."""
    if head.schedule.clip is None:
        return None
    clip = torch.tensor(head.schedule.clip, dtype=torch.float32, device="cpu")
    return clip.reshape(2, -1).expand(2, head.channels).contiguous()


def modulations_of(head: DiffusionHead) -> tuple[int, ...]:
    """Which modulation every block takes; kept, as every call asks."""
    made = head.shared.get("modulations")
    if made is None:
        made = head.shared["modulations"] = head.modulation_of
    return made


def to_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device; the host does not wait for the copy."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class Chain:
    """The chain of a fixed number of tokens on one head.

    ``load`` copies a call's inputs into the buffers, ``launch`` runs every kernel from them, and
    ``results`` copies out. The pointers are the same every time, so a CUDA graph can stand in for ``launch``.
    Rows beyond the call's own are computed and not returned: rows are independent.

    ``sweeps_of`` is a chain of N tokens that keeps the modulations of all T steps. This one is then that chain's
    network at all of its steps at once, for sweeps (``parallel_chain``). Its inputs are T N tokens x. Its outputs
    are out [G, T N, C], and v [T N, C] of the first group where the variance is learned. It reads the other's
    modulations and has no other inputs of its own.

    Without noise it is no chain but one call of the network (``ops.evaluate``). Its inputs are x, cond and the time
    embeddings that ``embed_rows`` is given. All that the network puts out is out [1, tokens, O]; v is None.

    A backend adds:

    - the buffers of its kernels, ``embed`` and ``run_steps``, and to ``start`` what else comes first;
    - ``evaluate`` for sweeps and single calls, ``sweep`` and ``settle`` for sweeps;
    - ``error`` (1,) int32 where kernels may stop waiting for each other: 0 unless one did.

    It does not hold the head, whose life ends the chain's.
    """

    error: torch.Tensor | None = None
    memory: torch.Tensor | None = None  # of the modulations
    out: torch.Tensor | None = None  # of the network, where it is evaluated by itself
    v: torch.Tensor | None = None
    reads_copies = True  # whether its kernels read the tables' copies of weights
    own = False  # whether steps and sweeps call no library and allocate nothing: then they may be a graph's loop

    def __init__(
        self,
        head: DiffusionHead,
        tokens: int,
        groups: int,
        noise: torch.Tensor | PhiloxNoise | None,
        steps: int,
        static: bool,
        sweeps_of: Chain | None = None,
    ):
        """``groups``: rows of a token, 1 without guidance. ``steps``: whose modulations are alive at a time.
        ``static``: a tensor of noise is copied, too."""
        device, dtype = head.device, head.dtype
        self.tokens, self.groups, self.steps = tokens, groups, steps
        # Tokens of a step. Group g of token t has row (t // period * groups + g) * period + t % period.
        self.period = tokens if sweeps_of is None else sweeps_of.tokens
        self.rows = rows = tokens * groups
        self.philox, self.static = isinstance(noise, PhiloxNoise), static
        self.dtype = dtype
        self.live: torch.Tensor | None = None  # (1,) int32: where it is 0 the kernels may return at once

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, device=device, dtype=dtype)

        width, channels = head.width, head.channels
        self.modulations = modulations_of(head)
        # Of the modulations of ``steps`` steps, and of what they are projected from.
        self.shapes = {
            "embedded": (steps * rows, width),
            "mods": (len(set(self.modulations)), steps * rows, 3 * width),
            "final_mods": (steps * rows, 2 * width),
        }
        # Zeroed: the rows beyond a call's own are computed, too, from whatever lies there.
        self.x = empty(tokens, channels).zero_()
        if sweeps_of is not None:
            self.out = empty(groups, tokens, channels)
            self.v = empty(tokens, channels) if head.learned_variance else None
            return
        self.cond = empty(groups, tokens, head.cond_channels, dtype=dtype).zero_()
        # Projected, where the head does that.
        self.y = self.cond.view(rows, width) if head.cond_weight is None else empty(rows, width, dtype=dtype)
        self._filled: dict[str | tuple[str, int], float] = {}  # what whole buffers hold
        if noise is None:
            self.out, self.v = empty(groups, tokens, head.outputs), None
            return
        self.scale = empty(max(1, groups - 1), tokens).zero_()
        self.temperature = empty(1)
        self.seed = empty(1, dtype=torch.int64)
        self.addresses = empty(tokens if self.philox else 1, dtype=torch.int64).zero_()
        self.noise = self.x
        if static and not self.philox:
            self.noise = empty(head.num_steps, tokens, channels).zero_()
        self.log_std = empty(tokens, channels)
        self.path = empty(tokens, channels)  # sums over steps
        self.result = self.x

    def buffers(self) -> list[torch.Tensor]:
        """All tensors but the modulations, which may lie in memory that others share."""
        others = vars(self).keys() - self.shapes.keys() - {"memory"}
        return [value for name in others if isinstance(value := getattr(self, name), torch.Tensor)]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the modulations, which lie one after the other."""
        return sum(math.prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize

    def keep_modulations_in(self, memory: torch.Tensor) -> None:
        """Where the modulations go: ``memory_bytes`` bytes or more, which nothing else uses while the chain runs."""
        self.memory, values, views = memory, memory[: self.memory_bytes].view(self.dtype), {}
        for name, shape in self.shapes.items():
            views[name], values = values[: math.prod(shape)].view(shape), values[math.prod(shape) :]
        self.read_modulations(**views)

    def read_modulations(self, embedded: torch.Tensor, mods: torch.Tensor, final_mods: torch.Tensor) -> None:
        """Where the modulations are: in this chain, or in the chain that it is the network of."""
        self.embedded, self.mods, self.final_mods = embedded, mods, final_mods
        self.block_mods = tuple(mods[i] for i in self.modulations)

    def load(self, cond, x_T, noise, temperature, scales) -> None:  # noqa: N803
        """Copy the inputs of n <= ``tokens`` tokens into the buffers; never waits for the device.

        ``temperature`` and each of ``scales``, one less than there are groups: a number or a tensor."""
        n = len(x_T)
        self.cond[:, :n].copy_(cond.view(self.groups, n, -1))
        self.x[:n].copy_(x_T)
        self._fill("temperature", self.temperature, temperature)
        for i, scale in enumerate(scales):
            self._fill(("scale", i), self.scale[i], scale, n)
        if self.philox:
            self.addresses[:n].copy_(noise.rows)
            seed = noise.seed if isinstance(noise.seed, torch.Tensor) else signed_seed(noise.seed)
            self._fill("seed", self.seed, seed)
        elif self.static:
            self.noise[:, :n].copy_(noise)
        else:
            self.noise = noise.contiguous()
        if self.error is not None:
            self.error.zero_()

    def _fill(self, name, buffer: torch.Tensor, value: float | torch.Tensor, n: int | None = None) -> None:
        """Set a buffer to a number, which most calls of a chain share: a launch less. Or its first n elements to a
        tensor of one or of n."""
        if isinstance(value, torch.Tensor):
            part = buffer[:n]
            part.copy_(value.reshape(-1).expand(len(part)))
            self._filled.pop(name, None)
        elif self._filled.get(name) != value:
            buffer.fill_(value)
            self._filled[name] = value

    def launch(self, head: DiffusionHead, tables: Tables) -> None:
        """Every kernel of the chain, from the inputs in the buffers to the results in them."""
        self.start(head)
        for stop in range(head.num_steps, 0, -self.steps):
            begin = max(0, stop - self.steps)
            self.hoist(head, begin, stop)
            self.run_steps(head, tables, begin, stop)

    def results(self, n: int, temperature: float | torch.Tensor, tables: Tables) -> tuple[torch.Tensor, ...]:
        """Copies of (sample, mean, log_std, path_log_std) of the first n tokens; sample and mean are one tensor."""
        if self.error is not None:
            tables.gave_up.add(self.error)
        mean = self.result[:n].clone()
        return mean, mean, self.log_std[:n] + self.log_temperature(temperature), self.path[:n].sum(1)

    def log_temperature(self, temperature: float | torch.Tensor) -> float | torch.Tensor:
        """Logarithm of the call's temperature, which ``load`` has put into the buffer."""
        if isinstance(temperature, torch.Tensor):
            return self.temperature.log()
        return math.log(temperature) if temperature > 0 else -math.inf

    def start(self, head: DiffusionHead) -> None:
        """What comes before the first step's modulations: the projected condition y."""
        self.project(head)
        self.path.zero_()

    def project(self, head: DiffusionHead) -> None:
        """y from the condition, which a head without a projection is given as y."""
        if head.cond_weight is not None:
            torch.addmm(head.cond_bias, self.cond.view(self.rows, -1), head.cond_weight.t(), out=self.y)

    def hoist(self, head: DiffusionHead, start: int, stop: int) -> None:
        """The modulations of steps start..stop-1: one library product a layer, or for all layers that share theirs."""
        self.take_memory(head)
        self.embed(head, start, stop)
        self.modulate(head, (stop - start) * self.rows)

    def take_memory(self, head: DiffusionHead) -> None:
        """Allocate memory for the modulations if none was given."""
        if self.memory is None:
            self.keep_modulations_in(torch.empty(self.memory_bytes, dtype=torch.uint8, device=head.device))

    def modulate(self, head: DiffusionHead, count: int) -> None:
        """The modulations of the first ``count`` rows of ``embedded``."""
        embedded, made = self.embedded[:count], -1
        for b, index in zip(head.blocks, self.modulations):
            if index > made:  # counted as they first appear
                torch.addmm(b.mod_bias, embedded, b.mod_weight.t(), out=self.mods[index, :count])
                made = index
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

    def embed_rows(self, embedding: torch.Tensor) -> None:
        """``embedded`` [rows, W] = silu(embedding + y), of time embeddings [1 or rows, W]: of one call."""
        self.embedded.copy_(torch.nn.functional.silu(embedding + self.y))

    def run_steps(self, head: DiffusionHead, tables: Tables, start: int, stop: int) -> None:
        """Reverse steps stop-1..start."""
        raise NotImplementedError

    def evaluate(self, head: DiffusionHead, tables: Tables) -> None:
        """The network at all rows: ``out`` and ``v`` from ``x`` and the modulations."""
        raise NotImplementedError

    def sweep(self, tables: Tables, chain: Chain, state, begin: bool) -> None:
        """The recursion over all steps of every token that has not settled, from what the network puts out; with
        ``begin`` of every token from its noise alone. ``state``: see ``parallel_chain``."""
        raise NotImplementedError

    def settle(self, state, begin: bool) -> None:
        """Which tokens have settled, and whether sweeps go on."""
        raise NotImplementedError
