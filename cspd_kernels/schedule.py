"""How a token is sampled: the update of every step, as the float64 tables that every backend reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import samplers
from .errors import InvalidInput
from .samplers import PREDICTIONS, VARIANCES

Array: TypeAlias = npt.NDArray[np.float64]
Clip: TypeAlias = tuple[npt.ArrayLike, npt.ArrayLike]  # the lower and the upper limits of x0: numbers, or one a channel
_TABLE = ("x0_x", "x0_out", "mean_x0", "mean_x", "log_std_upper", "log_std_lower")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The T steps that make a token of noise, float64 on the host, index 0 the last step taken.

    Step i, with ``out`` what the network puts out, and v its second half where the variance is learned::

        x0   = x0_x[i] x + x0_out[i] out             limited to [clip[0], clip[1]] where there is a clip
        mean = mean_x0[i] x0 + mean_x[i] x
        log_std = f log_std_upper[i] + (1 - f) log_std_lower[i],   f = (v + 1) / 2      where it is learned
        log_std = log_std_lower[i]                                                      elsewhere
        x   <- mean + [i > 0] temperature exp(log_std) noise[i]

    Diffusions and their samplers, flows and a network of one call are all such steps: make one by a class method; the
    constructor takes the table of any other.

    Attributes:
        timesteps: (T,) what the time embedding of the network receives at each step; (T, K) where it has K of them.
        x0_x, x0_out, mean_x0, mean_x: (T,) as above.
        log_std_lower, log_std_upper: (T,) log standard deviation; -inf where a step adds no noise. The last step adds
            none whatever its own says, which is the deviation stated of the token.
        learned: whether the variance is for the network to say, if it puts it out.
        clip: None, or (2,) or (2, C) the lower and the upper limits of x0.
        name: of the sampler.
        prediction: what the network puts out: ``"epsilon"``, ``"x0"``, ``"v"`` or ``"velocity"``.
        variance: of a :meth:`diffusion`: ``"learned"``, ``"fixed_small"`` or ``"fixed_large"``; else None.
        betas, alphas_cumprod: (T,) of a diffusion, after respacing; else None.
        width: of a :meth:`one_step` schedule, else None.

    Example:
        >>> from cspd_kernels import Schedule
        >>> schedule = Schedule.cosine(100)  # as MAR samples
        >>> schedule
        Schedule(ddpm, num_steps=100, prediction='epsilon', variance='learned')
        >>> schedule.timesteps[:3], schedule.x0_x.shape
        (array([ 0., 10., 20.]), (100,))
    """

    timesteps: Array
    x0_x: Array
    x0_out: Array
    mean_x0: Array
    mean_x: Array
    log_std_lower: Array
    log_std_upper: Array | None = None  # None: as the lower
    learned: bool = False
    clip: Array | None = None
    name: str = "custom"
    prediction: str = "epsilon"
    variance: str | None = None
    betas: Array | None = None
    alphas_cumprod: Array | None = None
    width: float | None = None

    def __post_init__(self) -> None:
        if self.log_std_upper is None:
            object.__setattr__(self, "log_std_upper", self.log_std_lower)
        shape = self._keep("timesteps").shape
        if len(shape) not in (1, 2) or 0 in shape:
            raise InvalidInput(f"Schedule expected timesteps of shape (T,) or (T, K) with T >= 1, got {shape}")
        if not np.isfinite(self.timesteps).all():
            raise InvalidInput("Schedule expected finite values in timesteps, got NaN or infinity")
        shape = shape[:1]
        for name in (*_TABLE, "betas", "alphas_cumprod"):
            if getattr(self, name) is None and name not in _TABLE:
                continue
            values = self._keep(name)
            if values.shape != shape:
                raise InvalidInput(f"Schedule expected {name} of shape {shape}, got {values.shape}")
            finite = np.isfinite(values)
            if name.startswith("log_std") and not self.learned:
                finite |= np.isneginf(values)
            if not finite.all():
                raise InvalidInput(f"Schedule expected finite values in {name}, got {values[~finite][0]}")
        if self.clip is not None:
            values = self._keep("clip")
            if values.shape == (2, 1):  # one for all channels
                object.__setattr__(self, "clip", values := values[:, 0])
            low, high = values if values.ndim in (1, 2) and len(values) == 2 else (np.ones(1), np.zeros(1))
            if not np.all(low <= high):  # false for NaN, too
                raise InvalidInput(
                    "Schedule expected clip as (2,) or (2, C), no lower limit above its upper one, got "
                    f"{values.tolist()}"
                )
        if self.prediction not in PREDICTIONS:
            raise InvalidInput(f"Schedule expected prediction one of {PREDICTIONS}, got {self.prediction!r}")

    def _keep(self, name: str) -> Array:
        """A copy of the caller's values, which stay theirs."""
        values = np.array(getattr(self, name), dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, name, values)
        return values

    @property
    def num_steps(self) -> int:
        """T, the number of steps, each of which calls the network once."""
        return len(self.timesteps)

    @property
    def deterministic(self) -> bool:
        """Whether a step that should add noise, or the last, has no standard deviation: then a chain has no density."""
        return bool(np.isneginf(self.log_std_lower).any())

    def __reduce__(self) -> tuple[type[Schedule], tuple[Any, ...]]:
        """Copies and pickles are read-only, too, and leave behind what is kept for a device."""
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __repr__(self) -> str:
        if self.width is not None and self.clip is None:
            return f"Schedule.one_step({self.width!r})"
        told = [f"{self.name}, num_steps={self.num_steps}, prediction={self.prediction!r}"]
        told += [f"variance={self.variance!r}"] if self.variance is not None else []
        if self.clip is not None:
            told.append(f"clip={self.clip.tolist()}" if self.clip.ndim == 1 else "clip by channel")
        return f"Schedule({', '.join(told)})"

    @classmethod
    def diffusion(
        cls,
        betas: npt.ArrayLike,
        timesteps: npt.ArrayLike | None = None,
        variance: str = "learned",
        *,
        prediction: str = "epsilon",
        clip: Clip | None = None,
    ) -> Schedule:
        """Ancestral steps of a diffusion with these betas.

        With acp the cumulative product of ``1 - betas``, acp_prev the one before it, and out a noise estimate eps, a
        data estimate x0 or ``v = sqrt(acp) eps - sqrt(1 - acp) x0``::

            x0   = sqrt(1/acp) x - sqrt(1/acp - 1) eps                           "epsilon"
            x0   = out                                                           "x0"
            x0   = sqrt(acp) x - sqrt(1 - acp) v                                 "v"
            mean = beta sqrt(acp_prev) / (1 - acp) x0 + (1 - acp_prev) sqrt(1 - beta) / (1 - acp) x
            2 log_std_lower = log(beta (1 - acp_prev) / (1 - acp)),   the posterior variance
            2 log_std_upper = log(beta)

        The posterior variance of the last step is 0: its neighbour's stands in for it, and beta where there is none.

        Args:
            betas: (T,) in (0, 1]. timesteps: (T,), None: 0..T-1.
            variance: ``"learned"``; or ``"fixed_small"``, the lower; or ``"fixed_large"``, the upper, except for the
                last step's.
            prediction: what the network puts out. clip: limits of x0, as :meth:`clipped` takes them, in a tuple.

        Example:
            >>> from cspd_kernels import Schedule
            >>> Schedule.diffusion([0.01, 0.02, 0.03], variance="fixed_small", prediction="v", clip=(-1, 1))
            Schedule(ddpm, num_steps=3, prediction='v', variance='fixed_small', clip=[-1.0, 1.0])

        Source: Ho et al. 2020 (arXiv 2006.11239, eq. 6-7 and 15), Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 15),
        Salimans & Ho 2022 (arXiv 2202.00512, v).
        """
        betas = samplers.check_betas(np.array(betas, dtype=np.float64))
        if variance not in VARIANCES:
            raise InvalidInput(f"Schedule expected variance one of {VARIANCES}, got {variance!r}")
        times = np.array(np.arange(betas.size) if timesteps is None else timesteps, dtype=np.float64)
        if times.shape != betas.shape:
            raise InvalidInput(f"Schedule expected timesteps of shape {betas.shape}, got {times.shape}")
        made = cls(
            timesteps=times, **samplers.ancestral(betas, variance, prediction), learned=variance == "learned",
            name="ddpm", prediction=prediction, variance=variance, betas=betas,
        )  # fmt: skip
        return made._within(clip)

    @classmethod
    def cosine(
        cls, num_steps: int, *, train_steps: int = 1000, variance: str = "learned", prediction: str = "epsilon"
    ) -> Schedule:
        """The cosine schedule of ``train_steps`` betas, respaced to ``num_steps`` of them.

        Its last betas are near 1, so the first reverse step multiplies the network's error by
        thousands: small networks diverge under it. ``linear`` is the well-conditioned choice.

        Example:
            >>> from cspd_kernels import Schedule
            >>> Schedule.cosine(25).timesteps[-3:]
            array([916., 957., 999.])

        Source: arXiv 2102.09672, eq. 17.
        """
        _check_steps(num_steps, train_steps)
        time = [(i / train_steps + 0.008) / 1.008 for i in range(train_steps + 1)]
        edges = np.array([math.cos(t * math.pi / 2) ** 2 for t in time])
        betas = np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)
        return cls.diffusion(betas, variance=variance, prediction=prediction).respaced(num_steps)

    @classmethod
    def linear(
        cls, num_steps: int, *, train_steps: int = 1000, variance: str = "learned", prediction: str = "epsilon"
    ) -> Schedule:
        """Betas from 1e-4 to 0.02 (times 1000 / train_steps), respaced to ``num_steps`` of them.

        Example:
            >>> from cspd_kernels import Schedule
            >>> schedule = Schedule.linear(1000)
            >>> f"{schedule.betas[0]:.4f} to {schedule.betas[-1]:.4f}"
            '0.0001 to 0.0200'
        """
        _check_steps(num_steps, train_steps)
        scale = 1000 / train_steps
        betas = np.minimum(np.linspace(scale * 1e-4, scale * 0.02, train_steps), 0.999)
        return cls.diffusion(betas, variance=variance, prediction=prediction).respaced(num_steps)

    @classmethod
    def euler(
        cls,
        times: npt.ArrayLike,
        *,
        data_at: float = 1.0,
        prediction: str = "velocity",
        timesteps: npt.ArrayLike | None = None,
        clip: Clip | None = None,
    ) -> Schedule:
        """Euler steps of a flow along straight lines, ``x_t = data`` at t = ``data_at``, without noise.

        With ``out = dx/dt`` ("velocity") or the data itself ("x0")::

            x0   = x + (data_at - t) out         or out
            mean = x + (t_next - t) out = r x0 + (1 - r) x,      r = (t_next - t) / (data_at - t)

        Args:
            times: (T+1,) from noise to data, the last where the token is read off.
            timesteps: (T,) what the network receives at the steps, from the first taken, where not ``times[:-1]``.
            clip: limits of x0.

        Example:
            >>> import numpy as np
            >>> from cspd_kernels import Schedule
            >>> Schedule.euler(np.linspace(0, 1, 26))
            Schedule(euler, num_steps=25, prediction='velocity')
            >>> Schedule.euler([1.0, 0.5, 0.0], data_at=0.0).timesteps  # the last step first
            array([0.5, 1. ])

        Source: Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003).
        """
        made = cls(name="euler", prediction=prediction, **samplers.euler(times, data_at, prediction, timesteps))
        return made._within(clip)

    @classmethod
    def euler_maruyama(
        cls,
        times: npt.ArrayLike,
        *,
        data_at: float = 1.0,
        sizes: npt.ArrayLike | None = None,
        prediction: str = "velocity",
        timesteps: npt.ArrayLike | None = None,
        clip: Clip | None = None,
    ) -> Schedule:
        """Steps of the stochastic equation that has a flow's marginals, the last one without noise.

        With t the share of data, from 0 to 1, and u = data - noise as the network has it, its score is
        ``(t u - x) / (1 - t)``, and at the diffusion ``sqrt(2 (1 - t))``::

            dx   = (u + (1 - t) score) dt + sqrt(2 (1 - t)) dw
            mean = x + ((1 + t) u - x) dt,      std = sqrt(2 (1 - t) dt)
                 = (1 + t) r x0 + (1 - 2 r) x,      r = dt / (1 - t),      x0 = x + (1 - t) u
            last: mean = x + u dt = r x0 + (1 - r) x

        The standard deviation stated of the last step is its neighbour's, as that of a diffusion is; its own where
        there is none.

        Args:
            times, data_at, prediction, timesteps, clip: as :meth:`euler`. With ``data_at`` 0 the network's time and
                velocity run the other way.
            sizes: (T,) of the steps, from the first taken, where not the differences of ``times``, which may then be
                (T,).

        Example:
            >>> import numpy as np
            >>> from cspd_kernels import Schedule
            >>> Schedule.euler_maruyama(np.linspace(0, 1, 26))
            Schedule(euler_maruyama, num_steps=25, prediction='velocity')

        Source: Ma et al. 2024 (arXiv 2401.08740, SiT), NextStep-1 (arXiv 2508.10711, stepfun-ai/NextStep-1).
        """
        table = samplers.euler_maruyama(times, data_at, sizes, prediction, timesteps)
        made = cls(name="euler_maruyama", prediction=prediction, **table)
        return made._within(clip)

    @classmethod
    def one_step(cls, width: float) -> Schedule:
        """The schedule of a network that makes a token from x_T in one call: ``x0 = mean = out``.

        ``width`` > 0 is the standard deviation of the token about that output that :class:`Denoised` is to state; the
        output itself has no density. The network is called with timestep 0.

        Example:
            >>> from cspd_kernels import Schedule
            >>> schedule = Schedule.one_step(0.5)
            >>> schedule, schedule.num_steps
            (Schedule.one_step(0.5), 1)
        """
        if not isinstance(width, Real) or not 0 < width < math.inf:
            raise InvalidInput(f"Schedule expected a finite width > 0 of one step, got {width!r}")
        table = samplers.table([0.0], [0.0], [1.0], [1.0], [0.0], [math.log(width)])
        return cls(name="one_step", prediction="x0", width=float(width), **table)

    @classmethod
    def from_diffusion(cls, obj: object, *, clip: Clip | None = None) -> Schedule:
        """Read an existing (respaced) diffusion object, such as ``DiffLoss.gen_diffusion``: its ancestral steps.

        Needs ``obj.betas`` (T,); reads ``timestep_map``, ``model_mean_type`` and ``model_var_type``
        where they exist. The tables follow from the betas in float64, as in the object itself.

        Args:
            clip: limits of x0, as :meth:`clipped` takes them, in a tuple.

        Raises:
            NotAModel: the object has no betas, or is a list of objects.
            UnsupportedModel: the network predicts something that is neither noise, data nor v, or a table of the object
                does not follow from its betas.

        Example:
            >>> from cspd.models import DiffLoss
            >>> from cspd_kernels import Schedule
            >>> head = DiffLoss(4, 6, 2, 8, num_sampling_steps=5)
            >>> Schedule.from_diffusion(head.gen_diffusion)
            Schedule(ddpm, num_steps=5, prediction='epsilon', variance='learned')
        """
        obj = getattr(obj, "schedule", obj)
        if isinstance(obj, cls):
            return obj._within(clip)
        betas, timesteps, variance, prediction = samplers.read(obj)
        return cls.diffusion(betas, timesteps, variance, prediction=prediction, clip=clip)

    def last(self, steps: int) -> Schedule:
        """The last ``steps`` of the steps taken, or all where there are no more.

        Example:
            >>> from cspd_kernels import Schedule
            >>> Schedule.cosine(100).last(10)
            Schedule(ddpm, num_steps=10, prediction='epsilon', variance='learned')
        """
        if not isinstance(steps, Integral) or steps < 1:
            raise InvalidInput(f"Schedule.last expected steps as an int >= 1, got {steps!r}")
        tables = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: v[:steps] for n, v in tables.items() if isinstance(v, np.ndarray) and n != "clip"})

    def respaced(self, steps: int) -> Schedule:
        """``steps`` evenly strided ones of these; new betas preserve the kept cumulative products.

        Example:
            >>> from cspd_kernels import Schedule
            >>> Schedule.linear(1000).respaced(5).timesteps
            array([  0., 250., 500., 749., 999.])

        Source: arXiv 2102.09672, section 4.
        """
        _, cumulative, variance = self._ancestral("respaced")
        _check_steps(steps, self.num_steps)
        stride = (self.num_steps - 1) / (steps - 1) if steps > 1 else 1.0
        kept, position = [], 0.0
        for _ in range(steps):  # accumulated, not multiplied: existing checkpoints' maps round this way
            kept.append(round(position))
            position += stride
        acp = cumulative[kept]
        betas = 1.0 - acp / np.append(1.0, acp[:-1])
        made = Schedule.diffusion(betas, self.timesteps[kept], variance, prediction=self.prediction)
        return made if self.clip is None else replace(made, clip=self.clip)

    def ddim(self, eta: float = 0.0) -> Schedule:
        """The same steps of a diffusion by DDIM, without noise at ``eta`` 0; at 1 ancestral with the small variance.

        With acp_prev of the step taken next::

            sigma = eta sqrt((1 - acp_prev) / (1 - acp)) sqrt(1 - acp / acp_prev)
            mean  = sqrt(acp_prev) x0 + sqrt(1 - acp_prev - sigma^2) (x - sqrt(acp) x0) / sqrt(1 - acp)

        A variance that the network puts out is not used. The deviation stated of the last step is its neighbour's.

        Example:
            >>> from cspd_kernels import Schedule
            >>> schedule = Schedule.cosine(100).ddim()
            >>> schedule, schedule.deterministic
            (Schedule(ddim, num_steps=100, prediction='epsilon'), True)

        Source: Song et al. 2020 (arXiv 2010.02502, eq. 12 and 16).
        """
        betas, cumulative, _ = self._ancestral("ddim")
        if not isinstance(eta, Real) or not 0 <= eta <= 1:
            raise InvalidInput(f"Schedule.ddim expected eta in [0, 1], got {eta!r}")
        table = samplers.ddim(betas, cumulative, float(eta))
        return replace(self, name="ddim", learned=False, variance=None, **table)

    def clipped(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Schedule:
        """The same steps with x0 limited to [low, high]: numbers, or one a channel (C,); infinite where there is none.

        It is limited after guidance and before the mean.

        Example:
            >>> from cspd_kernels import Schedule
            >>> Schedule.cosine(100).clipped(-1, 1)
            Schedule(ddpm, num_steps=100, prediction='epsilon', variance='learned', clip=[-1.0, 1.0])
            >>> Schedule.cosine(100).clipped([-1, -2], [1, 2]).clip.shape  # by channel
            (2, 2)
        """
        lower, upper = np.array(low, np.float64), np.array(high, np.float64)
        if lower.shape != upper.shape and lower.size != 1 and upper.size != 1:
            raise InvalidInput(
                f"Schedule.clipped expected as many lower limits as upper ones, got {lower.size} and {upper.size}"
            )
        return replace(self, clip=np.stack(np.broadcast_arrays(lower, upper)))

    def _within(self, clip: Clip | None) -> Schedule:
        """``clipped(*clip)``, or itself without a clip."""
        if clip is None:
            return self
        try:
            low, high = clip
        except (TypeError, ValueError):
            raise InvalidInput(f"Schedule expected clip as a pair of limits, (low, high), got {clip!r}") from None
        return self.clipped(low, high)

    def _ancestral(self, method: str) -> tuple[Array, Array, str]:
        """Betas, their cumulative products and the kind of variance, of what has them."""
        if self.variance is None or self.betas is None or self.alphas_cumprod is None:
            raise InvalidInput(
                f"Schedule.{method} expected the ancestral steps of a diffusion, got {self!r}"
                + (": respace them first" if self.name == "ddim" and method == "respaced" else "")
            )
        return self.betas, self.alphas_cumprod, self.variance


def _check_steps(num_steps: int, train_steps: int) -> None:
    whole = isinstance(num_steps, int) and isinstance(train_steps, int)
    if not whole or not 1 <= num_steps <= train_steps:
        raise InvalidInput(
            f"Schedule expected 1 <= num_steps <= {train_steps} (train_steps), got num_steps = {num_steps!r}"
        )
