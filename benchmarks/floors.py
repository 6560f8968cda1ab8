"""The floor of a call: the least time that this device could take, from rates measured in the same run.

    floor = max(bytes / rate of memory, operations / rate of matrix products)

Bytes and operations are counted from the sizes:

- **A chain step by step.** The weights of the blocks and of the two layers at the ends are read once a step. Those of
  the modulations and of the condition are read once a call. So are the tokens' conditions, their noise and results.
- **A chain in sweeps.** The same, with a sweep in place of a step. Sweep k computes all steps but the first k - 1.
- **evaluate.** Every weight is read once, but for the condition's, which the op may keep from the call before.
- **One block.** The weights of its two products and the modulations are read once. The residual stream may stay on
  the chip from one block to the next.
- **log_density_ratio, accept_reject.** Every value that decides is read once, and every result written once. A sigma
  that draft and target share is one value.
- **Operations** are those of the matrix products alone, two for a multiplication with its addition.

The floor holds no launch, no wait, no activation function, no random number and no value that may stay on the chip. It
assumes that weights are read again at every step. A kernel that kept a whole head on the chip could be below it.

The rate of memory is the faster of a copy and a sum by PyTorch. Their size is that of what a call reads again and
again, rounded down to a power of two: less memory is never slower. So a head that fits a cache is counted at the rate
of that cache. What is read once comes from memory on a GPU, as the benchmarks empty the cache first. The rate of
products is that of one large square product of the same type, by the fastest library. Both are the best of several
runs, as a floor must not be too high.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from cspd_kernels import DiffusionHead
from cspd_kernels.products import Product

from common import captured

MIB = 1 << 20
SMALLEST, LARGEST = {"cpu": 1 * MIB, "cuda": 32 * MIB}, 256 * MIB  # sizes that rates are measured at, in powers of two
SQUARE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product
TIMES, REPEATS = 9, {"cpu": 3, "cuda": 10}  # the best of so many times, of so many calls each


@dataclass(frozen=True)
class Work:
    """What a call cannot do without."""

    bytes: float
    operations: float  # of matrix products
    dtype: torch.dtype  # of their operands
    among: float  # bytes of what is read over and over, by which the rate of memory is chosen
    once: bool = True  # whether a call reads it only once: on a GPU, with an empty cache, it comes from memory


@dataclass(frozen=True)
class Floor:
    seconds: float
    of: str  # "bytes" or "products": which of the two it is


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of distinct tensors."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors if t is not None}.values())


def step_weights(head: DiffusionHead) -> list[torch.Tensor]:
    """What a step reads: the blocks without their modulations, and the layers at both ends."""
    blocks = [t for b in head.blocks for t in (b.norm_weight, b.norm_bias, b.weight0, b.bias0, b.weight1, b.bias1)]
    return [head.input_weight, head.input_bias, *blocks, head.final_weight, head.final_bias]


def modulation_weights(head: DiffusionHead) -> list[torch.Tensor]:
    blocks = [t for b in head.blocks for t in (b.mod_weight, b.mod_bias)]
    return [*blocks, head.final_mod_weight, head.final_mod_bias]


def products(tensors: Iterable[torch.Tensor]) -> int:
    """Operations of one row with every matrix."""
    return 2 * sum(t.numel() for t in {id(t): t for t in tensors}.values() if t.dim() == 2)


def chain_work(head: DiffusionHead, tokens: int, groups: int = 1, sweeps: int | None = None) -> Work:
    """Of ``denoise``: all steps one after the other, or so many sweeps over all of them.

    Args:
        groups: rows of a token, 2 under guidance.
    """
    steps, width, rows = head.num_steps, head.channels, groups * tokens
    weights, modulations = step_weights(head), modulation_weights(head)
    condition = [head.cond_weight, head.cond_bias]
    passes = steps if sweeps is None else sweeps
    evaluations = steps if sweeps is None else sum(max(steps - k, 0) for k in range(sweeps))
    values = rows * head.cond_channels + tokens * (width * (steps + 3) + 1)  # conditions, noise, x, the result's fields
    once, again = bytes_of([*modulations, *condition, head.time_embedding]), bytes_of(weights)
    operations = rows * (evaluations * products(weights) + steps * products(modulations))
    if head.cond_weight is not None:
        operations += rows * products([head.cond_weight])
    return Work(once + passes * again + 4 * values, operations, head.dtype, again, once=False)


def evaluate_work(head: DiffusionHead, rows: int) -> Work:
    """Of ``evaluate``."""
    time_layers = [tensor for embedding in head.time for tensor in embedding.tensors()]
    weights = [*step_weights(head), *modulation_weights(head), *time_layers]
    values = rows * (head.channels + head.outputs + head.width + 1)
    return Work(bytes_of(weights) + 4 * values, rows * products(weights), head.dtype, bytes_of(weights))


def block_work(head: DiffusionHead, rows: int) -> Work:
    """Of one block, where all blocks of a head run one after the other."""
    block = head.blocks[0]
    own = bytes_of([block.weight0, block.weight1])
    values = rows * head.width * 3 * block.weight0.element_size()  # shift, scale and gate
    return Work(own + values, rows * products([block.weight0, block.weight1]), head.dtype, own * head.depth)


def ratio_work(tokens: int, channels: int) -> Work:
    """Of ``log_density_ratio``: x, two means, two log sigmas, two path terms, one result."""
    return _judged(4 * tokens * (5 * channels + 3))


def verdict_work(tokens: int, channels: int, shared_sigma: bool = False) -> Work:
    """Of ``accept_reject``: what the ratio reads and the address, then token, flag, tries and ratio."""
    read, written = 4 * ((4 if shared_sigma else 5) * channels + 2) + 8, 4 * channels + 1 + 4 + 4
    return _judged(tokens * (read + written))


def _judged(moved: float) -> Work:
    return Work(moved, 0, torch.float32, 2 * moved)  # two sets of inputs take turns


class Rates:
    """Rates of one device, each measured when it is first asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.measured: dict[str, float] = {}  # for the result file

    def floor(self, work: Work) -> Floor:
        """The larger of the two times."""
        times = {"bytes": work.bytes / self.bandwidth(self._size(work))}
        if work.operations:
            times["products"] = work.operations / self.throughput(work.dtype)
        of = max(times, key=times.get)
        return Floor(times[of], of)

    def _size(self, work: Work) -> int:
        size = LARGEST if work.once and self.device.type == "cuda" else work.among
        power = 1 << max(1, round(size)).bit_length() - 1
        return min(max(power, SMALLEST[self.device.type]), LARGEST)

    @functools.cache  # noqa: B019  (one object a run)
    def bandwidth(self, size: int) -> float:
        """Bytes a second, read and written, of so many bytes over and over."""
        source, total = torch.randn(size // 4, device=self.device), torch.empty((), device=self.device)
        half = source[: size // 8]
        target = torch.empty_like(half)
        seconds = min(self._seconds(lambda: target.copy_(half)), self._seconds(lambda: torch.sum(source, 0, out=total)))
        return self._keep(f"bytes a second, {size // MIB} MiB", size / seconds)

    @functools.cache  # noqa: B019
    def throughput(self, dtype: torch.dtype) -> float:
        """Operations a second of a square product, as PyTorch is set: float32 without TF32 unless it is switched on.

        On a CPU oneDNN's product of a packed weight is tried too. It can be twice as fast as the plain one.
        """
        n = SQUARE[self.device.type]
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = self._seconds(lambda: torch.mm(a, b.t(), out=out))
        if self.device.type == "cpu":
            packed = Product(b, None)
            seconds = min(seconds, self._seconds(lambda: packed(a)))
        return self._keep(f"operations a second, {str(dtype).removeprefix('torch.')} products", 2 * n**3 / seconds)

    def _keep(self, name: str, rate: float) -> float:
        self.measured[name] = rate
        return rate

    def _seconds(self, function: Callable[[], object]) -> float:
        """Of one call, the best of several times."""
        repeats = REPEATS[self.device.type]

        def several() -> None:
            for _ in range(repeats):
                function()

        if self.device.type != "cuda":
            several()
            return min(self._wall(several) for _ in range(TIMES)) / repeats
        replay = captured(several, self.device)
        replay()
        return min(self._on_the_device(replay) for _ in range(TIMES)) / repeats

    @staticmethod
    def _wall(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def _on_the_device(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        function()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3
