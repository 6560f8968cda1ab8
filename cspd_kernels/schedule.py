"""The noise schedule of the reverse diffusion, as the float64 tables every backend reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

_VARIANCES = ("learned", "fixed_small", "fixed_large")
# Names of a diffusion object's tables and of ours.
_TABLES = {
    "sqrt_recip_alphas_cumprod": "sqrt_recip_acp",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_acp",
    "posterior_mean_coef1": "coef1",
    "posterior_mean_coef2": "coef2",
    "posterior_log_variance_clipped": "log_posterior",
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """Coefficients of the T reverse steps, float64 on the host, index 0 the last step taken.

    With ``acp`` the cumulative product of ``1 - betas`` and ``acp_prev`` the one before it::

        x0   = sqrt_recip_acp x - sqrt_recipm1_acp eps
        mean = coef1 x0 + coef2 x
        logvar = f log_beta + (1 - f) log_posterior,   f = (v + 1) / 2       (learned variance)
        logvar = fixed_log_variance                                          (fixed variance)

    Source: Ho et al. 2020 (arXiv 2006.11239, eq. 6-7 and 15) and Nichol & Dhariwal 2021
    (arXiv 2102.09672, eq. 15 for the learned variance, eq. 17 for the cosine schedule,
    section 4 for respacing).

    Attributes:
        betas: (T,) in (0, 1], after respacing.
        timesteps: (T,) int64, what the time embedding of the network receives at each step.
        variance: ``"learned"``, ``"fixed_small"`` or ``"fixed_large"``.
        width: of a :meth:`one_step` schedule, else None.
    """

    betas: np.ndarray
    timesteps: np.ndarray
    variance: str = "learned"
    width: float | None = None

    def __post_init__(self):
        betas = np.array(self.betas, dtype=np.float64)
        timesteps = np.array(self.timesteps, dtype=np.int64)
        if betas.ndim != 1 or betas.size == 0:
            raise ValueError(f"Schedule expected betas of shape (T,) with T >= 1, got {betas.shape}")
        if not np.all((betas > 0) & (betas <= 1)):  # false for NaN too
            raise ValueError("Schedule expected every beta in (0, 1], got values outside")
        if timesteps.shape != betas.shape:
            raise ValueError(f"Schedule expected timesteps of shape {betas.shape}, got {timesteps.shape}")
        if self.variance not in _VARIANCES:
            raise ValueError(f"Schedule expected variance one of {_VARIANCES}, got {self.variance!r}")
        tables = self._one_step(betas) if self.width is not None else self._diffusion(betas)
        for name, table in {"betas": betas, "timesteps": timesteps, **tables}.items():
            table.setflags(write=False)
            object.__setattr__(self, name, table)

    def _diffusion(self, betas: np.ndarray) -> dict[str, np.ndarray]:
        """The tables that follow from betas."""
        acp = np.cumprod(1.0 - betas)
        # beta = 1 destroys the signal: x0 would be divided by zero.
        if acp[-1] <= 0:
            raise ValueError("Schedule expected a positive cumulative product of 1 - betas, got 0: lower the betas")
        acp_prev = np.append(1.0, acp[:-1])
        posterior = betas * (1.0 - acp_prev) / (1.0 - acp)
        # The posterior variance of the last step is 0; its neighbour's stands in for it (with one
        # step there is no neighbour, and beta does).
        posterior[0] = posterior[1] if betas.size > 1 else betas[0]
        large = betas.copy()
        large[0] = posterior[0]
        return {
            "sqrt_recip_acp": np.sqrt(1.0 / acp),
            "sqrt_recipm1_acp": np.sqrt(1.0 / acp - 1.0),
            "coef1": betas * np.sqrt(acp_prev) / (1.0 - acp),
            "coef2": (1.0 - acp_prev) * np.sqrt(1.0 - betas) / (1.0 - acp),
            "log_beta": np.log(betas),
            "log_posterior": np.log(posterior),
            "fixed_log_variance": np.log(large if self.variance == "fixed_large" else posterior),
            "alphas_cumprod": acp,
        }

    def _one_step(self, betas: np.ndarray) -> dict[str, np.ndarray]:
        """The tables of :meth:`one_step`: beta is 1, and nothing follows from it."""
        if betas.tolist() != [1.0] or not 0 < self.width < math.inf:
            raise ValueError(
                f"Schedule expected a finite width > 0 of one step with beta 1, got width {self.width!r} and betas "
                f"{betas.tolist()}"
            )
        log_variance = 2.0 * math.log(self.width)
        values = {
            "sqrt_recip_acp": 0.0, "sqrt_recipm1_acp": -1.0, "coef1": 1.0, "coef2": 0.0, "log_beta": log_variance,
            "log_posterior": log_variance, "fixed_log_variance": log_variance, "alphas_cumprod": 0.0,
        }  # fmt: skip
        return {name: np.array([value]) for name, value in values.items()}

    @property
    def num_steps(self) -> int:
        """T, the number of reverse steps."""
        return len(self.betas)

    def last(self, steps: int) -> Schedule:
        """The last ``steps`` of the steps taken, or all where there are no more.

        One step alone has no neighbour whose posterior variance could stand in for its own, 0: its beta does.
        """
        return replace(self, betas=self.betas[:steps], timesteps=self.timesteps[:steps])

    def __repr__(self) -> str:
        if self.width is not None:
            return f"Schedule.one_step({self.width!r})"
        return f"Schedule(num_steps={self.num_steps}, variance={self.variance!r})"

    @classmethod
    def from_diffusion(cls, obj) -> Schedule:
        """Read an existing (respaced) diffusion object, such as ``DiffLoss.gen_diffusion``.

        Needs ``obj.betas`` (T,); reads ``timestep_map``, ``model_mean_type`` and ``model_var_type``
        where they exist. The tables follow from the betas in float64, as in the object itself.

        Raises:
            TypeError: the object has no betas, or is a list of objects.
            ValueError: the network predicts something other than the noise (epsilon), or a table of the
                object does not follow from its betas.
        """
        obj = getattr(obj, "schedule", obj)
        if isinstance(obj, cls):
            return obj
        if isinstance(obj, (list, tuple)):
            raise TypeError(
                f"Schedule.from_diffusion expected one diffusion object, got a {type(obj).__name__} of {len(obj)}: "
                "choose one of them"
            )
        betas = getattr(obj, "betas", None)
        if betas is None:
            raise TypeError(
                "Schedule.from_diffusion expected a Gaussian diffusion object, with betas, got "
                f"{type(obj).__name__} without: another kind of sampler, which these kernels do not compute"
            )
        mean_type = getattr(getattr(obj, "model_mean_type", None), "name", "EPSILON")
        if mean_type != "EPSILON":
            raise ValueError(f"Schedule.from_diffusion expected a network that predicts EPSILON, got {mean_type}")
        var_type = getattr(getattr(obj, "model_var_type", None), "name", "LEARNED_RANGE")
        variance = {"FIXED_SMALL": "fixed_small", "FIXED_LARGE": "fixed_large"}.get(var_type, "learned")
        timesteps = getattr(obj, "timestep_map", None)
        if timesteps is None:
            timesteps = np.arange(len(betas))
        schedule = cls(np.asarray(betas), np.asarray(timesteps), variance)
        for theirs, ours in _TABLES.items():
            table = getattr(obj, theirs, None)
            if table is not None and not np.allclose(table, getattr(schedule, ours), rtol=1e-6, atol=1e-12):
                raise ValueError(
                    f"Schedule.from_diffusion expected {theirs} as it follows from betas, got a table of its own in "
                    f"{type(obj).__name__}"
                )
        return schedule

    @classmethod
    def one_step(cls, width: float) -> Schedule:
        """Of a network that makes a token of x_T in one call: its output is the token, ``x0 = mean = eps``.

        ``width`` > 0 is the standard deviation of the token about that output that :class:`Denoised` is to state, so
        that the fixed log variance is 2 log(width); the output itself has no density. The network is called with
        timestep 0.
        """
        return cls(np.ones(1), np.zeros(1), "fixed_small", float(width))

    @classmethod
    def cosine(cls, num_steps: int, *, train_steps: int = 1000, variance: str = "learned") -> Schedule:
        """The cosine schedule of ``train_steps`` betas, respaced to ``num_steps`` of them.

        Its last betas are near 1, so the first reverse step multiplies the network's error by
        thousands: small networks diverge under it. ``linear`` is the well-conditioned choice.
        """
        _check_steps(num_steps, train_steps)
        time = [(i / train_steps + 0.008) / 1.008 for i in range(train_steps + 1)]
        edges = np.array([math.cos(t * math.pi / 2) ** 2 for t in time])
        return cls._respaced(np.minimum(1.0 - edges[1:] / edges[:-1], 0.999), num_steps, variance)

    @classmethod
    def linear(cls, num_steps: int, *, train_steps: int = 1000, variance: str = "learned") -> Schedule:
        """Betas from 1e-4 to 0.02 (times 1000 / train_steps), respaced to ``num_steps`` of them."""
        _check_steps(num_steps, train_steps)
        scale = 1000 / train_steps
        betas = np.minimum(np.linspace(scale * 1e-4, scale * 0.02, train_steps), 0.999)
        return cls._respaced(betas, num_steps, variance)

    @classmethod
    def _respaced(cls, betas: np.ndarray, num_steps: int, variance: str) -> Schedule:
        """Keep ``num_steps`` evenly strided steps; new betas preserve the kept cumulative products."""
        stride = (len(betas) - 1) / (num_steps - 1) if num_steps > 1 else 1.0
        kept, position = [], 0.0
        for _ in range(num_steps):  # accumulated, not multiplied: existing checkpoints' maps round this way
            kept.append(round(position))
            position += stride
        acp = np.cumprod(1.0 - betas)[kept]
        return cls(1.0 - acp / np.append(1.0, acp[:-1]), np.array(kept), variance)


def _check_steps(num_steps: int, train_steps: int) -> None:
    whole = isinstance(num_steps, int) and isinstance(train_steps, int)
    if not whole or not 1 <= num_steps <= train_steps:
        raise ValueError(
            f"Schedule expected 1 <= num_steps <= {train_steps} (train_steps), got num_steps = {num_steps!r}"
        )
