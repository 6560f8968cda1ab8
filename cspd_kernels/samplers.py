"""The tables of a :class:`cspd_kernels.Schedule`, one function a sampler; index 0 is the last step taken.

The formulas and their sources are with the schedule's methods.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InvalidInput, NotAModel, UnsupportedModel

VARIANCES = ("learned", "fixed_small", "fixed_large")
PREDICTIONS = ("epsilon", "x0", "v", "velocity")
# Names of a diffusion object's tables and of ours.
_THEIRS = {
    "sqrt_recip_alphas_cumprod": "recip",
    "sqrt_recipm1_alphas_cumprod": "recipm1",
    "posterior_mean_coef1": "mean_x0",
    "posterior_mean_coef2": "mean_x",
    "posterior_log_variance_clipped": "log_posterior",
}
_MEANS = {"EPSILON": "epsilon", "START_X": "x0", "V": "v", "V_PREDICTION": "v", "VELOCITY": "v"}
_VARIANCES = {"FIXED_SMALL": "fixed_small", "FIXED_LARGE": "fixed_large"}


def table(timesteps, x0_x, x0_out, mean_x0, mean_x, log_std) -> dict[str, Any]:
    """The columns of a schedule whose variance is not learned."""
    return {
        "timesteps": np.asarray(timesteps), "x0_x": np.asarray(x0_x), "x0_out": np.asarray(x0_out),
        "mean_x0": np.asarray(mean_x0), "mean_x": np.asarray(mean_x), "log_std_lower": np.asarray(log_std),
    }  # fmt: skip


def check_betas(betas: np.ndarray) -> np.ndarray:
    """Raise where they are none."""
    if betas.ndim != 1 or betas.size == 0:
        raise InvalidInput(f"Schedule expected betas of shape (T,) with T >= 1, got {betas.shape}")
    if not np.all((betas > 0) & (betas <= 1)):  # false for NaN too
        raise InvalidInput("Schedule expected every beta in (0, 1], got values outside")
    return betas


def posterior(betas: np.ndarray) -> dict[str, Any]:
    """What follows from betas: cumulative products, the posterior's mean and its log variance."""
    acp = np.cumprod(1.0 - betas)
    before = np.append(1.0, acp[:-1])
    variance = betas * (1.0 - before) / (1.0 - acp)
    # That of the last step is 0; its neighbour's stands in for it (with one step there is none, and beta does).
    variance[0] = variance[1] if betas.size > 1 else betas[0]
    with np.errstate(divide="ignore"):
        recip = 1.0 / acp
    return {
        "alphas_cumprod": acp,
        "recip": np.sqrt(recip),
        "recipm1": np.sqrt(recip - 1.0),
        "mean_x0": betas * np.sqrt(before) / (1.0 - acp),
        "mean_x": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - acp),
        "log_posterior": np.log(variance),
    }


def ancestral(betas: np.ndarray, variance: str, prediction: str) -> dict[str, Any]:
    """The tables of ``Schedule.diffusion``, except the timesteps."""
    known = posterior(betas)
    acp, small, large = known["alphas_cumprod"], 0.5 * known["log_posterior"], 0.5 * np.log(betas)
    if prediction == "epsilon":
        # beta = 1 destroys the signal: x0 would be divided by zero.
        if acp[-1] <= 0:
            raise InvalidInput("Schedule expected a positive cumulative product of 1 - betas, got 0: lower the betas")
        x0_x, x0_out = known["recip"], -known["recipm1"]
    elif prediction == "x0":
        x0_x, x0_out = np.zeros_like(acp), np.ones_like(acp)
    elif prediction == "v":
        x0_x, x0_out = np.sqrt(acp), -np.sqrt(1.0 - acp)
    else:
        raise InvalidInput(f"Schedule.diffusion expected prediction 'epsilon', 'x0' or 'v', got {prediction!r}")
    if variance == "learned":
        upper, lower = large, small
    else:
        upper = lower = np.append(small[:1], large[1:]) if variance == "fixed_large" else small
    return {
        "x0_x": x0_x, "x0_out": x0_out, "mean_x0": known["mean_x0"], "mean_x": known["mean_x"],
        "log_std_upper": upper, "log_std_lower": lower, "alphas_cumprod": acp,
    }  # fmt: skip


def ddim(betas: np.ndarray, acp: np.ndarray, eta: float) -> dict[str, Any]:
    """What ``Schedule.ddim`` changes of a diffusion's columns."""
    before = np.append(1.0, acp[:-1])
    # acp / acp_prev is 1 - beta, which is exact where acp is 0, too.
    variance = eta**2 * (1.0 - before) / (1.0 - acp) * betas
    towards = np.sqrt(np.maximum(1.0 - before - variance, 0.0) / (1.0 - acp))
    stated = variance.copy()
    stated[0] = variance[1] if betas.size > 1 else eta**2 * betas[0]
    with np.errstate(divide="ignore"):
        log_std = 0.5 * np.log(stated)
    return {
        "mean_x0": np.sqrt(before) - towards * np.sqrt(acp), "mean_x": towards, "log_std_upper": log_std,
        "log_std_lower": log_std,
    }  # fmt: skip


def euler(times, data_at: float, prediction: str, timesteps) -> dict[str, Any]:
    """The tables of ``Schedule.euler``."""
    now, share, size, timesteps = _flow("euler", times, data_at, None, timesteps)
    r = size / (1.0 - share)
    return table(timesteps, *_data(now, data_at, prediction), r, 1.0 - r, np.full(len(r), -np.inf))


def euler_maruyama(times, data_at: float, sizes, prediction: str, timesteps) -> dict[str, Any]:
    """The tables of ``Schedule.euler_maruyama``."""
    now, share, size, timesteps = _flow("euler_maruyama", times, data_at, sizes, timesteps)
    r = size / (1.0 - share)
    mean_x0, mean_x = (1.0 + share) * r, 1.0 - 2.0 * r
    mean_x0[0], mean_x[0] = r[0], 1.0 - r[0]
    log_std = 0.5 * np.log(2.0 * (1.0 - share) * size)
    log_std[0] = log_std[1] if len(log_std) > 1 else log_std[0]
    return table(timesteps, *_data(now, data_at, prediction), mean_x0, mean_x, log_std)


def _flow(method: str, times, data_at: float, sizes, timesteps):
    """(time, share of data, size > 0, timestep) of every step, the last one taken first."""
    times = np.array(times, dtype=np.float64)
    if data_at not in (0, 1):
        raise InvalidInput(f"Schedule.{method} expected data_at 0 or 1, got {data_at!r}")
    if times.ndim != 1 or len(times) < (2 if sizes is None else 1) or not np.isfinite(times).all():
        raise InvalidInput(
            f"Schedule.{method} expected finite times of shape (T+1,) with T >= 1, from noise to data, got {times}"
        )
    shares = times if data_at == 1 else 1.0 - times
    if sizes is None:
        share, sizes = shares[:-1], np.diff(shares)
    else:
        sizes = np.array(sizes, dtype=np.float64)
        share = shares[: sizes.size]
        if sizes.shape not in (shares.shape, shares[1:].shape) or not np.isfinite(sizes).all():
            raise InvalidInput(f"Schedule.{method} expected finite sizes of shape (T,) beside times, got {sizes}")
    if not np.all(sizes > 0) or not np.all((share >= 0) & (share < 1)) or np.any(np.diff(share) <= 0):
        raise InvalidInput(
            f"Schedule.{method} expected times that go from noise, at {1 - data_at:g}, to data, at {data_at:g}, with "
            f"no step that begins at data, got {times}"
        )
    now = times[: len(share)]
    timesteps = now if timesteps is None else np.array(timesteps, dtype=np.float64)
    if timesteps.shape != now.shape:
        raise InvalidInput(f"Schedule.{method} expected timesteps of shape {now.shape}, got {timesteps.shape}")
    return now[::-1], share[::-1], sizes[::-1], timesteps[::-1]


def _data(now: np.ndarray, data_at: float, prediction: str) -> tuple[np.ndarray, np.ndarray]:
    """x0_x and x0_out of a flow."""
    if prediction == "velocity":
        return np.ones_like(now), data_at - now
    if prediction == "x0":
        return np.zeros_like(now), np.ones_like(now)
    raise InvalidInput(f"a flow's Schedule expected prediction 'velocity' or 'x0', got {prediction!r}")


def read(obj) -> tuple[np.ndarray, np.ndarray | None, str, str]:
    """(betas, timesteps, variance, prediction) of a diffusion object, for ``Schedule.from_diffusion``, which see."""
    if isinstance(obj, (list, tuple)):
        raise NotAModel(
            f"Schedule.from_diffusion expected one diffusion object, got a {type(obj).__name__} of {len(obj)}: "
            "choose one of them"
        )
    betas = getattr(obj, "betas", None)
    if betas is None:
        raise NotAModel(
            "Schedule.from_diffusion expected a Gaussian diffusion object, with betas, got "
            f"{type(obj).__name__} without betas: the kernels do not compute this kind of sampler"
        )
    mean_type = getattr(getattr(obj, "model_mean_type", None), "name", "EPSILON")
    if mean_type not in _MEANS:
        raise UnsupportedModel(
            f"Schedule.from_diffusion expected a network that predicts one of {', '.join(_MEANS)}, got {mean_type}"
        )
    betas = check_betas(np.asarray(betas, dtype=np.float64))
    tables = posterior(betas)
    for theirs, ours in _THEIRS.items():
        values = getattr(obj, theirs, None)
        if values is not None and not np.allclose(values, tables[ours], rtol=1e-6, atol=1e-12):
            raise UnsupportedModel(
                f"Schedule.from_diffusion expected {theirs} to follow from betas, but {type(obj).__name__} has another "
                "table"
            )
    timesteps = getattr(obj, "timestep_map", None)
    variance = _VARIANCES.get(getattr(getattr(obj, "model_var_type", None), "name", None), "learned")
    return betas, None if timesteps is None else np.asarray(timesteps), variance, _MEANS[mean_type]
