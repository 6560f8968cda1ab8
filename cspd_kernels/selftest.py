"""Every op of every backend that is there, beside its definition in float64: what ``cspd selftest`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from . import DiffusionHead, PhiloxNoise, Schedule, accept_reject, denoise, evaluate, log_density_ratio
from .backends import BACKENDS, interpreting, why_unavailable
from .cuda_support import emulated
from .ops.accept_reject import reference
from .ops.denoise import Denoised
from .ops.denoise import reference as chain_reference
from .ops.density_ratio.reference import log_density_ratio as ratio_reference
from .ops.evaluate.reference import evaluate as evaluate_reference
from .testing import grouped_inputs, random_chains, random_network, relative_error

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
SWEEPS = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # parallel_tol of the chain in parallel
OK, FAILED, NOT_HERE = "ok", "FAILED", "not here"
_ROUNDING = 1e-5  # a decision this near its random number may come out either way
_UNDECIDED = 0.02  # at most this share of the rows
_ROWS, _CHANNELS = 300, 16  # tokens that are judged
_FEW_ROWS = 16  # in Triton's interpreter, which takes a hundred times as long


@dataclass(frozen=True)
class Check:
    """What came of one check."""

    name: str
    status: str  # "ok", "FAILED" or "not here"
    error: float | None = None  # the largest relative error
    bound: float | None = None
    seconds: float = 0.0
    why: str = ""

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)

    def line(self, width: int = 0) -> str:
        """For people."""
        text = f"{self.name:<{width}}  {self.status:<8}"
        if self.error is not None:
            text += f"  error {self.error:7.1e}, bound {self.bound:7.1e}"
        if self.status != NOT_HERE:
            text += f"  {self.seconds:5.1f} s"
        return f"{text}  {self.why}".rstrip()


class OtherwiseError(Exception):
    """A result that no error measures, such as another decision."""


def checked(name: str, bound: float, measure: Callable[[], float]) -> Check:
    """Measure an error. An exception is a failure too."""
    start, error, why = time.perf_counter(), None, ""
    try:
        error = measure()
    except Exception as exception:  # noqa: BLE001  (one broken op must not hide the others)
        why = " ".join(f"{type(exception).__name__}: {exception}".split())
    status = OK if error is not None and error <= bound else FAILED  # NaN fails
    return Check(name, status, error, bound, time.perf_counter() - start, why)


def places() -> Iterator[tuple[str, torch.device | None, str]]:
    """(backend, the device it runs on here, how): for one that is not here no device, and why."""
    gpu = torch.cuda.is_available()
    on_cpu = {"torch": not gpu, "triton": interpreting(), "cuda": emulated()}
    how = {"torch": "", "triton": "interpreted on the CPU", "cuda": "emulated on the CPU"}
    for backend in BACKENDS:
        if reason := why_unavailable(backend):
            yield backend, None, reason
        else:
            yield backend, torch.device("cpu" if on_cpu[backend] else "cuda"), how[backend] if on_cpu[backend] else ""


def check_ops(quick: bool = False) -> Iterator[Check]:
    """One check for each op, backend and dtype, and one line for each backend that is not here.

    It takes no number from a global generator, and leaves the environment and torch's settings as they are.

    Args:
        quick: float32 alone.
    """
    for backend, device, how in places():
        if device is None:
            yield Check(backend, NOT_HERE, why=how)
            continue
        for dtype in list(BOUNDS)[: 1 if quick else None]:
            short = str(dtype).removeprefix("torch.")
            wrong_here = backend == "triton" and interpreting() and dtype == torch.bfloat16
            for op, (bound, measure) in _measures(backend, device, dtype).items():
                name = f"{backend}: {op}, {short}"
                if wrong_here and op in _PRODUCTS:
                    yield Check(name, NOT_HERE, why="Triton's interpreter computes wrong products of bfloat16")
                else:
                    yield checked(name, bound, measure)


_PRODUCTS = ("denoise step by step", "denoise in parallel", "evaluate")


def _measures(backend: str, device: torch.device, dtype: torch.dtype) -> dict:
    """Of each op: (bound, what measures its error). Ratios and verdicts are float32 whatever the type of x."""
    exact, here = BOUNDS[torch.float32], (backend, device, dtype)
    return {
        "denoise step by step": (BOUNDS[dtype], partial(_denoise, *here, None)),
        "denoise in parallel": (BOUNDS[dtype], partial(_denoise, *here, SWEEPS[dtype])),
        "evaluate": (BOUNDS[dtype], partial(_evaluate, *here)),
        "log_density_ratio": (exact, partial(_log_density_ratio, *here)),
        "accept_reject": (exact, partial(_accept_reject, *here)),
        "candidates": (exact, partial(_candidates, *here)),
    }


# --- the ops of a head ---


def _head(device, dtype, steps=2) -> DiffusionHead:
    """A small head of MAR's kind, with a learned variance, whose every layer has its share in the result."""
    return random_network(Schedule.linear(steps), dtype=dtype, device=device, channels=4, outputs=8)


def _slow(backend) -> bool:
    """Where a network takes long: in Triton's interpreter, and emulated."""
    return (backend == "triton" and interpreting()) or (backend == "cuda" and emulated())


def _denoise(backend, device, dtype, parallel_tol) -> float:
    """Stored and addressed noise, without and with guidance, one token and many."""
    head, errors = _head(device, dtype, steps=2 if _slow(backend) else 12), []
    cases = [(5, 2, (torch.linspace(0, 4, 5, device=device),)), (1, 1, ()), (70, 2, (3.0,))]
    for rows, groups, scales in cases[: 1 if _slow(backend) else None]:
        cond, x_T, noise = grouped_inputs(head, rows, groups, seed=rows)  # noqa: N806
        if groups > 1:
            noise = PhiloxNoise(2**63 + 5, torch.arange(rows, device=device) * 2**33)
        expected = chain_reference.denoise(
            head, cond, x_T, noise, 0.9, tuple(_column(scale) for scale in scales), dtype=torch.float64
        )
        options = dict(temperature=0.9, cfg_scale=scales[0] if scales else 1.0, parallel_tol=parallel_tol)
        actual = denoise(head, cond, x_T, noise, backend=backend, **options)
        errors += map(relative_error, actual, expected)
    return _largest(*errors)


def _evaluate(backend, device, dtype) -> float:
    head, errors = _head(device, dtype), []
    for rows in (1, 7):
        cond, x, _ = grouped_inputs(head, rows, seed=rows)
        timesteps = torch.linspace(0, 900, rows, device=device)
        expected = evaluate_reference(head, x, timesteps, cond, dtype=torch.float64)
        errors.append(relative_error(evaluate(head, x, timesteps, cond, backend=backend), expected))
    return _largest(*errors)


def _column(value):
    return value.double()[:, None] if isinstance(value, torch.Tensor) else value


def _largest(*errors: float) -> float:
    """NaN where one is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


# --- ratios and verdicts ---


def _rows(backend) -> int:
    return _FEW_ROWS if backend == "triton" and interpreting() else _ROWS


def _chains(device, dtype, rows, same_sigma=False):
    """Of models so near that about half of the tokens are accepted."""
    x, draft, target = random_chains(rows, _CHANNELS, 1, shift=1.3 * _CHANNELS**-0.5, scale=0.2 * _CHANNELS**-0.5)
    if same_sigma:
        target = target._replace(log_std=draft.log_std)
    cast = partial(torch.Tensor.to, device=device, dtype=dtype)
    return cast(x), Denoised(*map(cast, draft)), Denoised(*map(cast, target))


def _log_density_ratio(backend, device, dtype) -> float:
    rows, errors = _rows(backend), []
    chains = _chains(device, dtype, rows)
    for relaxation in (1.0, torch.linspace(0.5, 5, rows, device=device)):
        expected = ratio_reference(*chains, relaxation, "paper", dtype=torch.float64)
        actual = log_density_ratio(*chains, relaxation=relaxation, backend=backend)
        errors.append(relative_error(actual, expected))
    return _largest(*errors)


def _accept_reject(backend, device, dtype) -> float:
    """Both ways to redraw."""
    errors = []
    for residual in ("rejection", "closed_form"):
        chains = _chains(device, dtype, _rows(backend), same_sigma=residual == "closed_form")
        errors.append(_verdict(backend, chains, dict(residual=residual)))
    return _largest(*errors)


def _candidates(backend, device, dtype) -> float:
    """Three candidates a token, each of chains of its own."""
    each = _rows(backend), 3
    x, *chains = _chains(device, dtype, each[0] * each[1], same_sigma=True)
    draft, target = (Denoised(*(v.unflatten(0, each) for v in chain)) for chain in chains)
    x = x.unflatten(0, each)
    return _largest(*(_verdict(backend, (x, draft, target), dict(residual=r)) for r in ("rejection", "closed_form")))


def _verdict(backend, chains, options) -> float:
    """The error of tokens and ratios, where all decisions are those of the definition.

    A row is left out where ratios that are off by their rounding would turn one of its decisions.
    """
    x, draft, target = chains
    rows = torch.arange(len(x), device=x.device)
    actual = accept_reject(x, draft, target, seed=7, rows=rows, backend=backend, **options)

    def defined(shift: float):
        moved = draft._replace(path_log_std=draft.path_log_std.double() + shift)
        out = reference.accept_reject(x, moved, target, 7, rows, **options, dtype=torch.float64)
        return type(actual)(*out)

    below, expected, above = (defined(shift) for shift in (-_ROUNDING, 0.0, _ROUNDING))
    fields = [name for name in actual._fields if name in ("accepted", "candidate", "tries")]
    sure = torch.stack([getattr(below, name) == getattr(above, name) for name in fields]).all(0)
    same = torch.stack([getattr(actual, name) == getattr(expected, name) for name in fields]).all(0)
    unsure, other = int((~sure).sum()), int((sure & ~same).sum())
    if unsure > _UNDECIDED * len(sure):
        raise OtherwiseError(f"{unsure} of {len(sure)} rows are within rounding of another decision")
    if other:
        raise OtherwiseError(f"{other} of {len(sure)} rows were decided otherwise than by the definition")
    return _largest(
        relative_error(actual.token[sure], expected.token[sure]), relative_error(actual.log_ratio, expected.log_ratio)
    )
