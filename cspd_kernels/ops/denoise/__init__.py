"""The denoising chain: T reverse steps of the diffusion head for a batch of independent tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch

from ...backends import prefers_parallel, remembered_chain
from ...errors import InvalidInput
from ...head import DiffusionHead, stream_dtype, without_autocast
from ...library import define
from ...noise import PhiloxNoise, signed_seed
from .arguments import check, check_parallel, check_values
from .finite import check_result, late_overflows
from .parallel import AUTO, ROUNDING, Parallel, switched_off

Scale: TypeAlias = float | torch.Tensor
WORKSPACE_BYTES = 256 << 20

# One coarse op for the whole chain.
_SCHEMA = (
    "(int head, Tensor cond, Tensor x_T, Tensor? noise, Tensor? rows, SymInt seed, float temperature, "
    "Tensor? cfg_scale, str? backend, int workspace_bytes, float? parallel_tol=None, Tensor? guess=None, "
    "Tensor? seeds=None, Tensor? second_scale=None, Tensor? temperatures=None) -> "
    "(Tensor mean, Tensor log_std, Tensor path_log_std, Tensor sweeps, Tensor trajectory)"
)


class Denoised(NamedTuple):
    """What a chain leaves behind, in the residual stream's type (float32; float64 for a float64 head).

    The last step adds no noise, so ``sample`` and ``mean`` are one tensor. With mean, log_std and path_log_std the
    density of a chain against another one is known (:func:`cspd_kernels.log_density_ratio`).

    Example:
        >>> import torch
        >>> from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
        >>> from cspd.models import DiffLoss
        >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
        >>> noise = PhiloxNoise(7, torch.arange(3))
        >>> out = denoise(head, torch.zeros(3, 6), torch.zeros(3, 4), noise, parallel_tol=None)
        >>> {name: tuple(value.shape) for name, value in out._asdict().items()}
        {'sample': (3, 4), 'mean': (3, 4), 'log_std': (3, 4), 'path_log_std': (3,)}
    """

    sample: torch.Tensor  # (N, C)
    mean: torch.Tensor  # (N, C) mean of the last step
    log_std: torch.Tensor  # (N, C) log standard deviation of the last step, log(temperature) included
    path_log_std: torch.Tensor  # (N,) sum over steps T-1..1 and channels of log std, without the temperature

    @property
    def sweeps(self) -> None:
        """Not known; no field, which callers unpack."""

    @property
    def trajectory(self) -> None:
        """Not known, either."""


class DenoisedInParallel(NamedTuple):
    """Like :class:`Denoised`, from a call whose ``parallel_tol`` is a number.

    Example:
        >>> import torch
        >>> from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
        >>> from cspd.models import DiffLoss
        >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
        >>> noise = PhiloxNoise(7, torch.arange(3))
        >>> out = denoise(head, torch.zeros(3, 6), torch.zeros(3, 4), noise, parallel_tol=1e-4)
        >>> out.sweeps.shape, out.trajectory.shape
        (torch.Size([3]), torch.Size([3, 5, 4]))
    """

    sample: torch.Tensor
    mean: torch.Tensor
    log_std: torch.Tensor
    path_log_std: torch.Tensor
    sweeps: torch.Tensor  # (N,) int32 network calls that followed each other: the row's sweeps, and T more for a row
    # that did not settle and was made step by step
    trajectory: torch.Tensor  # (N, T, C) inputs of all steps after the last sweep, to guess another chain's


@torch.no_grad()
def denoise(
    head: DiffusionHead,
    cond: torch.Tensor,
    x_T: torch.Tensor,  # noqa: N803  (the mathematics' name)
    noise: torch.Tensor | PhiloxNoise,
    *,
    temperature: Scale = 1.0,
    cfg_scale: Scale | tuple[Scale, Scale] = 1.0,
    backend: str | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    parallel_tol: float | str | None = AUTO,
    guess: torch.Tensor | None = None,
) -> Denoised | DenoisedInParallel:
    """Run the whole reverse chain; same noise in, same tokens out, up to rounding, whatever the backend.

    For i = T-1..0, with out and v the first and the second C channels of the network's output, and the tables of
    ``head.schedule``::

        out  = out_u + cfg_scale (out_c - out_u)                  with guidance; v is the conditional row's
        x0   = x0_x[i] x + x0_out[i] out                          limited to the schedule's clip, where it has one
        mean = mean_x0[i] x0 + mean_x[i] x
        log_std = f log_std_upper[i] + (1 - f) log_std_lower[i],  f = (v + 1) / 2, not clamped
        log_std = log_std_lower[i]                                where the variance is not learned
        x   <- mean + [i > 0] temperature exp(log_std) noise[i]

    Which sampler that is, :class:`cspd_kernels.Schedule` says. A step without noise has a log_std of -inf.

    Inference only: nothing is recorded for autograd. Rows are independent. Non-finite inputs raise
    on the CPU; on other devices they are not looked for (that would synchronise) and spoil only
    their own row. ``torch.compile`` sees one operator (``fullgraph`` too); it compiles the caller
    again for another head or parallel_tol, not for another seed, scale, temperature or N. A CUDA graph of the
    caller's that holds the call needs the head as long as it is replayed. A replay reads the tensors on the device
    anew, a seed, a temperature and a cfg_scale too; numbers, and those on the CPU, stay those of the capture.

    Args:
        head: the packed network; its dtype is the GEMM operand type.
        cond: (N, Z) floating, or (2N, Z) with the conditional rows first when cfg_scale is not 1, or (3N, Z) when it
            is two scales.
        x_T: (N, C) floating, the starting points. N = 0 is allowed.
        noise: (T, N, C) floating, indexed by step (noise[0] adds nothing), or a PhiloxNoise of N rows.
        temperature: >= 0, a number or a floating tensor of one element (on the head's device or the CPU), for which
            the host never waits; scales the noise of every step. At 0 the chain is deterministic and log_std is -inf.
        cfg_scale: guidance. A number; or a tensor of one element (on the head's device or the CPU) or
            of N (one a token, on the head's device). The host never waits for a tensor: guidance is then
            on exactly when cond has 2N rows. Or a tuple of two of either, (s0, s1), with cond as three groups of N
            rows, fully conditional first: ``out = out_2 + s1 (out_1 - out_2) + s0 (out_0 - out_1)``. In a function
            under ``torch.compile`` PyTorch 2.4 takes numbers, also a temperature, for constants: it compiles again
            for every other one, eight times at most. It does not for a tensor.
        backend: "torch", "triton", "cuda", or None: ``CSPD_BACKEND``, else automatic.
        workspace_bytes: bound on the memory of the hoisted modulations.
        parallel_tol: how the T steps are made.

            - None: one after the other.
            - A number in (0, 1): all at once, in sweeps (docs/parallel.md). They end when no channel of a row's
              trajectory changes by more than this between two sweeps, relative to the row's largest value. The tokens
              are those of the sequential chain to about as much. A row that does not settle is made by that chain.
            - "auto": in sweeps to the arithmetic's own rounding where that was measured to be faster, else one after
              the other. Rounding is 1e-6 in float32, and 1e-3 in bfloat16 and float16. ``CSPD_PARALLEL=0`` in the
              environment keeps it from sweeps.

            On a GPU the torch backend waits for the device after every sweep, and refuses a number while a CUDA graph
            is captured. The kernels wait once, in the first such call of a process.
        guess: (N, T, C) floating: with sweeps, a first guess of the inputs of all steps, such as the ``trajectory`` of
            a similar chain from the same x_T and noise. It changes how many sweeps there are, not what they lead to.

    Returns:
        :class:`Denoised`; :class:`DenoisedInParallel` where ``parallel_tol`` is a number.

    Raises:
        InvalidInput: an argument does not fit. Nothing has been computed.
        BackendUnavailable: the chosen backend cannot serve. CallError: the arithmetic overflowed (float16).

    Example:
        >>> import torch
        >>> from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
        >>> from cspd.models import DiffLoss
        >>> head = DiffusionHead.from_module(DiffLoss(4, 6, 2, 8, num_sampling_steps=5))
        >>> noise = PhiloxNoise(7, torch.arange(3), channels=4)
        >>> cond = torch.zeros(3, 6)
        >>> tokens = denoise(head, cond, noise.x_T(), noise).sample
        >>> tokens.shape
        torch.Size([3, 4])
        >>> alone = denoise(head, cond[:1], noise[:1].x_T(), noise[:1]).sample
        >>> torch.allclose(alone, tokens[:1])
        True

    Source: LTH14/mar ``diffusion/gaussian_diffusion.py`` (p_sample), arXiv 2406.11838 section 3.2; two scales as in
    arXiv 2211.09800 (eq. 3).
    """
    check(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes)
    check_parallel(head, x_T, parallel_tol, guess)
    # The ints of an op are signed, of 64 bits.
    workspace_bytes = min(workspace_bytes, 2**63 - 1)
    stored: torch.Tensor | None = None
    rows, seed, seeds = None, 0, None
    if isinstance(noise, torch.Tensor):
        stored = noise
    else:
        rows = noise.rows
        if isinstance(noise.seed, torch.Tensor):
            seeds = noise.seed
        else:
            seed = signed_seed(noise.seed)
    scale, second, temperatures = None, None, None
    if isinstance(cfg_scale, tuple):
        scale, second = map(_traced, cfg_scale)
    elif isinstance(cfg_scale, torch.Tensor) or cfg_scale != 1.0:
        scale = _traced(cfg_scale)
    if isinstance(temperature, torch.Tensor) or torch.compiler.is_compiling():
        temperature, temperatures = 1.0, _traced(temperature)
    tolerance = -1.0 if isinstance(parallel_tol, str) else parallel_tol
    mean, log_std, path_log_std, *more = _operator(
        head.handle, cond, x_T, stored, rows, seed, float(temperature), scale, backend, workspace_bytes,
        tolerance, guess, seeds, second, temperatures,
    )  # fmt: skip
    # Two fields, one tensor: an op must not return it twice.
    if tolerance is None or tolerance < 0:
        return Denoised(mean, mean, log_std, path_log_std)
    return DenoisedInParallel(mean, mean, log_std, path_log_std, *more)


def _traced(number: float | torch.Tensor) -> torch.Tensor:
    """As a tensor: a product, as torch.compile would compile the caller again for every new float that enters."""
    if isinstance(number, torch.Tensor):
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * float(number)


def run(
    head: Any, cond: Any, x_T: Any, noise: Any, rows: Any, seed: Any, temperature: Any, cfg_scale: Any,  # noqa: N803
    backend: str | None, workspace_bytes: int, parallel_tol: float | None = None, guess: Any = None, seeds: Any = None,
    second_scale: Any = None, temperatures: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The op: everything that looks at values or at this machine, which a compiler must not see, then a backend.

    Noise is ``noise`` (T, N, C) or, where that is None, addressed by ``rows`` and the seed. The seed is ``seeds``, a
    tensor of one element, or, where that is None, ``seed`` modulo 2**64. Guidance is on exactly when cond has more
    rows than x_T, by ``cfg_scale`` and, of three groups of rows, ``second_scale``. ``temperatures``, a tensor of one
    element, is the temperature where it is not None. ``parallel_tol`` is -1 for "auto".
    """
    head = DiffusionHead.of_handle(head)
    stream = stream_dtype(head.dtype)
    groups = len(cond) // len(x_T) if len(x_T) else 1
    scales: tuple[Scale, ...] = ()
    if cfg_scale is not None:
        scales = (_number(cfg_scale, stream),)
        if second_scale is not None:
            scales = (*scales, _number(second_scale, stream))
    check_values(x_T=x_T, cond=cond, noise=noise, guess=guess, cfg_scale=scales)
    if temperatures is not None:
        temperature = _number(temperatures, stream)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature[0]  # (1,)
        elif not 0 <= temperature < math.inf:
            raise InvalidInput(f"denoise expected a finite temperature >= 0, got {temperature!r}")
    overflows = late_overflows(head)
    automatic = parallel_tol is not None and parallel_tol < 0
    if automatic:
        parallel_tol = automatic_tolerance(head, len(x_T), groups, backend)
    function = remembered_chain(backend, head, len(x_T), groups, parallel_tol is not None)
    seed = seed % 2**64 if seeds is None else seeds
    noise = PhiloxNoise(seed, rows) if noise is None else noise.to(stream)
    scales = scales if len(cond) != len(x_T) else ()
    parallel = None
    if parallel_tol is not None:
        parallel = Parallel(parallel_tol, None if guess is None else guess.to(stream))
    with without_autocast(head.device):  # the head's dtype decides, not the caller's autocast
        _, *out = function(head, cond, x_T.to(stream), noise, temperature, scales, workspace_bytes, parallel)
    check_result(head, out[0], overflows)
    if parallel is None or automatic:  # as fake tensors have it, which do not know what is faster
        out[3:] = [x_T.new_empty(0, dtype=torch.int32), out[0].new_empty(0)]
    return tuple(value.contiguous() for value in out)


def _number(value: torch.Tensor, stream: torch.dtype) -> float | torch.Tensor:
    """A tensor of one element on the CPU as its number; others of 1 or N elements as (1 or N, 1) of a type."""
    if value.numel() == 1 and value.device.type == "cpu":
        return float(value)
    return value.to(stream).reshape(-1, 1)


def automatic_tolerance(head: DiffusionHead, tokens: int, groups: int, backend: str | None) -> float | None:
    """What ``parallel_tol="auto"`` stands for: a number, or None where the sequential chain is taken."""
    return ROUNDING[head.dtype] if not switched_off() and prefers_parallel(backend, head, tokens, groups) else None


def _fake(head: Any, cond: Any, x_T: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:  # noqa: N803
    # The arguments of ``run`` behind x_T, those with a default left out where they have it.
    head, tolerance = DiffusionHead.of_handle(head), next(iter(arguments[7:]), None)
    mean = x_T.new_empty(x_T.shape, dtype=stream_dtype(head.dtype))
    known = tolerance is not None and tolerance >= 0
    sweeps = x_T.new_empty(x_T.shape[0] if known else 0, dtype=torch.int32)
    trajectory = mean.new_empty((x_T.shape[0], head.num_steps, head.channels) if known else (0,))
    return mean, torch.empty_like(mean), mean.new_empty(mean.shape[:1]), sweeps, trajectory


_operator = define("denoise", _SCHEMA, run, _fake)
