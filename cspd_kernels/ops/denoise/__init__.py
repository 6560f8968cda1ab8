"""The denoising chain: T reverse steps of the diffusion head for a batch of independent tokens."""

from __future__ import annotations

import itertools
import math
from numbers import Real
from typing import NamedTuple

import torch

from ...backends import prefers_parallel, remembered_chain
from ...head import DiffusionHead, stream_dtype, without_autocast
from ...noise import PhiloxNoise, signed_seed
from .finite import check_result, late_overflows
from .parallel import AUTO, ROUNDING, Parallel, check_tolerance, switched_off

WORKSPACE_BYTES = 256 << 20

# One coarse op for the whole chain: torch.compile, fake tensors and dispatch modes see a single opaque call. A
# Library, not custom_op, which costs several times as much a call. The head travels as its handle: passing its
# tensors, up to a hundred, would take longer than the rest of the call, they never change, and what backends derive
# from a head hangs on the object.
#
# It captures and replays CUDA graphs of its own, in memory that outlives the call: not for torch.compile's graphs.
#
# Imported again in one process, these modules have heads and handles of their own: they get an operator of their own,
# beside that of the modules before them, which objects of theirs still call.
_operators = torch.ops.cspd_kernels
_name = next(
    name
    for name in itertools.chain(["denoise"], (f"denoise_{count}" for count in itertools.count(2)))
    if not hasattr(_operators, name)
)
_TAGS = (torch.Tag.pt2_compliant_tag, *([torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []))
_library = torch.library.Library("cspd_kernels", "FRAGMENT")
_library.define(
    f"{_name}(int head, Tensor cond, Tensor x_T, Tensor? noise, Tensor? rows, SymInt seed, float temperature, "
    "Tensor? cfg_scale, str? backend, int workspace_bytes, float? parallel_tol=None, Tensor? guess=None, "
    "Tensor? seeds=None, Tensor? second_scale=None, Tensor? temperatures=None) -> "
    "(Tensor mean, Tensor log_std, Tensor path_log_std, Tensor sweeps, Tensor trajectory)",
    tags=_TAGS,
)
_operator = getattr(_operators, _name).default


class Denoised(NamedTuple):
    """What a chain leaves behind, in the residual stream's type (float32; float64 for a float64 head).

    The last step adds no noise, so ``sample`` and ``mean`` are one tensor. With mean, log_std and path_log_std the
    density of a chain against another one is known (:func:`cspd_kernels.log_density_ratio`).
    """

    sample: torch.Tensor  # (N, C)
    mean: torch.Tensor  # (N, C) mean of the last step
    log_std: torch.Tensor  # (N, C) log standard deviation of the last step, log(temperature) included
    path_log_std: torch.Tensor  # (N,) sum over steps T-1..1 and channels of log std, without the temperature

    sweeps = trajectory = None  # not known; no fields, which callers unpack


class DenoisedInParallel(NamedTuple):
    """As :class:`Denoised`, of a call whose ``parallel_tol`` is a number."""

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
    temperature: float | torch.Tensor = 1.0,
    cfg_scale: float | torch.Tensor | tuple = 1.0,
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
            of N (one a token, on the head's device), for which the host never waits: guidance is then
            on exactly when cond has 2N rows. Or a tuple of two of either, (s0, s1), with cond as three groups of N
            rows, fully conditional first: ``out = out_2 + s1 (out_1 - out_2) + s0 (out_0 - out_1)``. In a function
            under ``torch.compile`` PyTorch 2.4 takes numbers, also a temperature, for constants: it compiles again
            for every other one, eight times at most. It does not for a tensor.
        backend: "torch", "triton", "cuda", or None: ``CSPD_BACKEND``, else automatic.
        workspace_bytes: bound on the memory of the hoisted modulations.
        parallel_tol: how the T steps are made. None: one after the other. A number in (0, 1): all at once, in sweeps
            (docs/parallel.md), until no channel of a row's trajectory changes by more than this between two sweeps,
            relative to the row's largest value; the tokens are those of the sequential chain to about as much, and
            a row that does not settle is made by that chain. "auto": in sweeps to the arithmetic's own rounding
            (float32: 1e-6; bfloat16 and float16: 1e-3) where that was measured to be faster, else one after the other;
            the environment's ``CSPD_PARALLEL=0`` keeps it from sweeps. On a GPU the torch backend waits for the device
            after every sweep, and refuses a number while a CUDA graph is captured; the kernels wait once, in the
            first such call of a process.
        guess: (N, T, C) floating: with sweeps, a first guess of the inputs of all steps, such as the ``trajectory`` of
            a similar chain from the same x_T and noise. It changes how many sweeps there are, not what they lead to.

    Returns:
        :class:`Denoised`; :class:`DenoisedInParallel` where ``parallel_tol`` is a number.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been computed.
        RuntimeError: the chosen backend cannot serve.

    Source: LTH14/mar ``diffusion/gaussian_diffusion.py`` (p_sample), arXiv 2406.11838 section 3.2; two scales as in
    arXiv 2211.09800 (eq. 3).
    """
    _check(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes)
    _check_parallel(head, x_T, parallel_tol, guess)
    # The ints of an op are signed, of 64 bits.
    workspace_bytes = min(workspace_bytes, 2**63 - 1)
    stored, rows, seed, seeds = noise, None, 0, None
    if isinstance(noise, PhiloxNoise):
        stored, rows = None, noise.rows
        if isinstance(noise.seed, torch.Tensor):
            seeds = noise.seed
        else:
            seed = signed_seed(noise.seed)
    second, temperatures = None, None
    if isinstance(cfg_scale, tuple):
        cfg_scale, second = map(_traced, cfg_scale)
    elif isinstance(cfg_scale, torch.Tensor) or cfg_scale != 1.0:
        cfg_scale = _traced(cfg_scale)
    else:
        cfg_scale = None
    if isinstance(temperature, torch.Tensor) or torch.compiler.is_compiling():
        temperature, temperatures = 1.0, _traced(temperature)
    tolerance = -1.0 if isinstance(parallel_tol, str) else parallel_tol
    mean, log_std, path_log_std, *more = _operator(
        head.handle, cond, x_T, stored, rows, seed, float(temperature), cfg_scale, backend, workspace_bytes,
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
    head, cond, x_T, noise, rows, seed, temperature, cfg_scale, backend, workspace_bytes,  # noqa: N803
    parallel_tol=None, guess=None, seeds=None, second_scale=None, temperatures=None,
):  # fmt: skip
    """The op: everything that looks at values or at this machine, which a compiler must not see, then a backend.

    Noise is ``noise`` (T, N, C) or, where that is None, addressed by ``rows`` and the seed: ``seeds``, a tensor of one
    element, or, where that is None, ``seed`` modulo 2**64. Guidance is on exactly when cond has more rows than x_T, by
    ``cfg_scale`` and, of three groups of rows, ``second_scale``. ``temperatures``, a tensor of one element, is the
    temperature where it is not None. ``parallel_tol`` is -1 for "auto".
    """
    head = DiffusionHead.of_handle(head)
    stream = stream_dtype(head.dtype)
    scales = tuple(_number(scale) for scale in (cfg_scale, second_scale) if scale is not None)
    _check_values(x_T=x_T, cond=cond, noise=noise, cfg_scale=scales, guess=guess)
    if temperatures is not None:
        temperature = _number(temperatures)
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(stream).reshape(1)
        elif not 0 <= temperature < math.inf:
            raise ValueError(f"denoise expected a finite temperature >= 0, got {temperature!r}")
    overflows = late_overflows(head)
    guided = len(cond) != len(x_T)
    automatic = parallel_tol is not None and parallel_tol < 0
    if automatic:
        parallel_tol = automatic_tolerance(head, len(x_T), guided, backend)
    function = remembered_chain(backend, head, len(x_T), guided, parallel_tol is not None)
    seed = seed % 2**64 if seeds is None else seeds
    noise = PhiloxNoise(seed, rows) if noise is None else noise.to(stream)
    if not guided:
        scales = ()
    scales = tuple(s.to(stream).reshape(-1, 1) if isinstance(s, torch.Tensor) else s for s in scales)  # [1 or N, 1]
    parallel = None
    if parallel_tol is not None:
        parallel = Parallel(parallel_tol, None if guess is None else guess.to(stream))
    with without_autocast(head.device):  # the head's dtype decides, not the caller's autocast
        _, *out = function(head, cond, x_T.to(stream), noise, temperature, scales, workspace_bytes, parallel)
    check_result(head, out[0], overflows)
    if parallel is None or automatic:  # as fake tensors have it, which do not know what is faster
        out[3:] = [x_T.new_empty(0, dtype=torch.int32), out[0].new_empty(0)]
    return tuple(value.contiguous() for value in out)


def _number(value: torch.Tensor) -> float | torch.Tensor:
    """A tensor of one element on the CPU as its number."""
    return float(value) if value.numel() == 1 and value.device.type == "cpu" else value


def automatic_tolerance(head: DiffusionHead, tokens: int, guided: bool, backend: str | None) -> float | None:
    """What ``parallel_tol="auto"`` stands for: a number, or None where the sequential chain is taken."""
    return ROUNDING[head.dtype] if not switched_off() and prefers_parallel(backend, head, tokens, guided) else None


def _fake(head, cond, x_T, *arguments):  # noqa: N803
    # The arguments of ``run`` behind x_T, those with a default left out where they have it.
    head, tolerance = DiffusionHead.of_handle(head), next(iter(arguments[7:]), None)
    mean = x_T.new_empty(x_T.shape, dtype=stream_dtype(head.dtype))
    known = tolerance is not None and tolerance >= 0
    sweeps = x_T.new_empty(x_T.shape[0] if known else 0, dtype=torch.int32)
    trajectory = mean.new_empty((x_T.shape[0], head.num_steps, head.channels) if known else (0,))
    return mean, torch.empty_like(mean), mean.new_empty(mean.shape[:1]), sweeps, trajectory


_library.impl(_name, run, "CompositeExplicitAutograd")
torch.library.register_fake(f"cspd_kernels::{_name}", _fake, lib=_library)


def _check(head, cond, x_T, noise, temperature, cfg_scale, workspace_bytes) -> None:  # noqa: N803
    """Raise on arguments that do not fit, by all that is known without looking at a tensor's values.

    Numbers are compared one by one, and nothing else is done with them until an error is certain: a number that is
    formatted or given to the math module is a constant for torch.compile, which compiles its caller again for the
    next one, and `in` does not find a size that it holds as a symbol.
    """
    if not isinstance(head, DiffusionHead):
        raise TypeError(f"denoise expected a DiffusionHead, got {type(head).__name__}: use DiffusionHead.from_module")
    _check_tensor("x_T", x_T, head, ("N", head.channels))
    rows = x_T.shape[0]
    _check_tensor("cond", cond, head, ("N, 2N or 3N", head.cond_channels))
    if isinstance(noise, PhiloxNoise):
        if noise.rows.shape[0] != rows or noise.rows.device != head.device:
            raise ValueError(
                f"denoise expected PhiloxNoise of {rows} rows on {head.device}, got {len(noise)} on {noise.rows.device}"
            )
    else:
        _check_tensor("noise", noise, head, (head.num_steps, rows, head.channels))
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1 or not _is_near(temperature, head):
            raise ValueError(
                "denoise expected temperature as a number or a floating tensor of 1 element on "
                f"{head.device} or the CPU, got {temperature.dtype} {tuple(temperature.shape)} on {temperature.device}"
            )
    elif not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(f"denoise expected a finite temperature >= 0, got {temperature!r}")
    scales = cfg_scale if isinstance(cfg_scale, tuple) else (cfg_scale,)
    for scale in scales:
        if isinstance(scale, torch.Tensor):
            if not _is_near(scale, head) or not (scale.numel() == 1 or scale.numel() == rows):
                raise ValueError(
                    f"denoise expected cfg_scale as a number or a floating tensor of 1 or {rows} elements on "
                    f"{head.device}, got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
                )
        elif not isinstance(scale, Real) or not -math.inf < scale < math.inf:
            raise ValueError(f"denoise expected a finite cfg_scale, got {scale!r}")
    if isinstance(cfg_scale, tuple):
        if len(cfg_scale) != 2:
            raise ValueError(f"denoise expected cfg_scale as one scale or a tuple of two, got {len(cfg_scale)}")
        fits = cond.shape[0] == 3 * rows
    elif isinstance(cfg_scale, torch.Tensor):
        fits = cond.shape[0] == rows or cond.shape[0] == 2 * rows
    else:
        fits = cond.shape[0] == (rows if cfg_scale == 1.0 else 2 * rows)
    if not fits:
        if isinstance(cfg_scale, tuple):
            expected = f"{3 * rows} (fully conditional first)"
        elif isinstance(cfg_scale, torch.Tensor):
            expected = f"{rows} or {2 * rows}"
        else:
            expected = f"{rows}" if cfg_scale == 1.0 else f"{2 * rows} (conditional first)"
        raise ValueError(
            f"denoise expected cond to have {expected} rows for cfg_scale {cfg_scale} and the {rows} rows of x_T, "
            f"got {cond.shape[0]}"
        )
    clip = head.schedule.clip
    if clip is not None and clip.ndim == 2 and clip.shape[1] != head.channels:
        raise ValueError(
            f"denoise expected a schedule with a clip of one limit or of {head.channels}, the head's channels, got "
            f"{clip.shape[1]}"
        )
    if not isinstance(workspace_bytes, int) or workspace_bytes <= 0:
        raise ValueError(f"denoise expected workspace_bytes as an int > 0, got {workspace_bytes!r}")


def _is_near(value: torch.Tensor, head: DiffusionHead) -> bool:
    """Whether it is floating and where the host or the head's device can read it without the other's waiting."""
    return value.is_floating_point() and (
        value.device == head.device or (value.numel() == 1 and value.device.type == "cpu")
    )


def _check_parallel(head, x_T, parallel_tol, guess) -> None:  # noqa: N803
    check_tolerance("denoise", parallel_tol)
    if guess is not None:
        _check_tensor("guess", guess, head, (x_T.shape[0], head.num_steps, head.channels))


def _check_tensor(name: str, tensor, head: DiffusionHead, shape: tuple) -> None:
    """``shape`` holds a size or, as text, what may stand there."""

    def wanted() -> str:
        return f"({', '.join(map(str, shape))})"

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"denoise expected {name} as a tensor {wanted()}, got {type(tensor).__name__}")
    fits = all(isinstance(size, str) or size == got for size, got in zip(shape, tensor.shape))
    if tensor.dim() != len(shape) or not fits:
        raise ValueError(f"denoise expected {name} of shape {wanted()}, got {tuple(tensor.shape)}")
    if tensor.device != head.device:
        raise ValueError(f"denoise expected {name} on the head's device {head.device}, got {tensor.device}")
    if not tensor.is_floating_point() or (tensor.dtype == torch.float64 and head.dtype != torch.float64):
        raise ValueError(
            f"denoise expected {name} floating and no wider than the head's arithmetic ({stream_dtype(head.dtype)}), "
            f"got {tensor.dtype}: convert it with {name}.to({stream_dtype(head.dtype)})"
        )


def _check_values(**values) -> None:
    """Raise on NaN and infinity where the host can see them; on a device, looking would wait for it."""
    for name, value in (
        (n, v) for n, several in values.items() for v in (several if isinstance(several, tuple) else (several,))
    ):
        if isinstance(value, torch.Tensor):
            finite = value.device.type != "cpu" or bool(torch.isfinite(value).all())
        else:
            finite = value is None or math.isfinite(value)
        if not finite:
            raise ValueError(f"denoise expected finite values in {name}, got NaN or infinity")
