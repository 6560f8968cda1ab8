"""``patch``: replace the sampling loop of every diffusion head in a model, in place, per instance."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator

import torch
import torch.nn as nn

from cspd_kernels import Denoised, PhiloxNoise, denoise
from cspd_kernels.backends import implementation, untraced
from cspd_kernels.head import OPERAND_DTYPES, stream_dtype

from .heads import HeadCache, find_heads, verify_network

_logger = logging.getLogger("cspd")
_METHODS = ("sample", "sample_with_noise", "sample_with_inter_noise")
_NOISES = ("upstream", "philox")


def patch(model: nn.Module, *, backend: str | None = None, dtype: torch.dtype | None = None, noise: str = "upstream"):
    """Make every diffusion head of a model sample through :func:`cspd_kernels.denoise`.

    Exact: the same seed gives the same tokens, up to rounding. In place and per instance: classes,
    other models, ``state_dict``, ``isinstance``, device moves and copies are as before, and weights
    that change later are picked up. Patching again replaces the options.

    Replaced are ``sample(z, temperature, cfg)`` of LTH14/mar and, where the module has them,
    ``sample_with_noise`` and ``sample_with_inter_noise`` of MarkXCloud/CSpD (its distribution
    manager is filled as before). Calls with further arguments of a fork that the kernels do not
    know run the replaced code, with one warning. Under guidance 2N rows come back as before; the
    last N, which callers drop, repeat the first. The network's weights are read, its ``forward`` is
    not called: hooks on it do not run while patched.

    On a GPU the host waits nowhere that the replaced code does not: as there, a guidance scale that
    lies on the device is read once, because the number of rows depends on it. A temperature there is
    read, too. Python numbers cost no wait. ``torch.compile`` of a model around it breaks its graph at
    these methods.

    Args:
        model: any module tree that holds one or more heads.
        backend: as in :func:`cspd_kernels.denoise`.
        dtype: type of the matrix products' operands (float32, bfloat16, float16); None follows
            autocast at the call, else the weights' type. The residual stream stays float32.
        noise: ``"upstream"`` draws the numbers of the replaced code in its order; ``"philox"`` draws
            one seed per call and stores no noise.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: nothing to patch, or a head that is not covered; nothing was changed.
        RuntimeError: the backend cannot serve.
    """
    if noise not in _NOISES:
        raise ValueError(f"patch expected noise one of {_NOISES}, got {noise!r}")
    if dtype is not None and dtype not in OPERAND_DTYPES:
        raise ValueError(f"patch expected dtype None or one of {OPERAND_DTYPES}, got {dtype!r}")
    implementation("denoise", backend)
    heads = find_heads(model)
    patches = []
    for name, head in heads.items():
        if not callable(getattr(head, "sample", None)):
            raise ValueError(f"patch expected {name or 'the head'} ({type(head).__name__}) to have a method sample")
        verify_network(name or type(head).__name__, head)
        patches.append(_HeadPatch(head, backend, dtype, noise))
    for head_patch in patches:
        head_patch.install()
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`; a model that is not patched is left as it is. Returns the model."""
    for module in model.modules():
        if (installed := _installed(module)) is not None:
            installed.remove()
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any diffusion head of the model is patched."""
    return any(_installed(module) is not None for module in model.modules())


@contextlib.contextmanager
def patched(model: nn.Module, **options) -> Iterator[nn.Module]:
    """Patch for the length of a ``with`` block; afterwards the model is as it was, also after an exception."""
    before = [installed for module in model.modules() if (installed := _installed(module)) is not None]
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)
        for head_patch in before:
            head_patch.install()


def _installed(module: nn.Module) -> _HeadPatch | None:
    owner = getattr(module.__dict__.get("sample"), "__self__", None)
    return owner if isinstance(owner, _HeadPatch) else None


class _HeadPatch:
    """The replacement methods of one head. Installed as bound methods on the instance, so that a deep
    copy or a pickle of the model carries a patch of its own, bound to the copied head."""

    def __init__(self, module: nn.Module, backend: str | None, dtype: torch.dtype | None, noise: str):
        self.module = module
        self.backend, self.dtype, self.noise = backend, dtype, noise
        self.cache = HeadCache(module)
        self.replaced: dict[str, object] = {}  # methods that already stood on the instance
        self.warned = False

    def install(self) -> None:
        if (installed := _installed(self.module)) is not None:
            installed.remove()
        for name in _METHODS:
            if callable(getattr(self.module, name, None)):
                if name in self.module.__dict__:
                    self.replaced[name] = self.module.__dict__[name]
                setattr(self.module, name, getattr(self, name))
        self.signature = inspect.signature(self._original("sample"))

    def remove(self) -> None:
        for name in _METHODS:
            if getattr(self.module.__dict__.get(name), "__self__", None) is self:
                delattr(self.module, name)
        for name, method in self.replaced.items():
            setattr(self.module, name, method)
        self.replaced = {}

    def _original(self, name: str):
        return self.replaced.get(name) or getattr(type(self.module), name).__get__(self.module)

    # Untraced: torch's own random numbers, and HeadCache looks at the parameters themselves.
    @untraced
    def sample(self, z, *args, **kwargs):
        """Tokens for conditions z; see :func:`patch`. Arguments and defaults are those of the replaced method."""
        call = self.signature.bind(z, *args, **kwargs)
        if not call.arguments.keys() <= {"z", "temperature", "cfg"}:
            return self._delegate(z, *args, **kwargs)
        call.apply_defaults()
        temperature, cfg = call.arguments.get("temperature", 1.0), call.arguments.get("cfg", 1.0)
        head, cfg, rows = self._call(z, cfg)
        if self.noise == "philox":
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
            noise = PhiloxNoise(seed, torch.arange(rows, device=head.device))
            x_T = noise.x_T(head.channels)  # noqa: N806
        else:
            x_T = _draw_first(head, rows)  # noqa: N806
            noise = _draw(head, len(z), rows)
        return self._finish(self._denoise(head, z, x_T, noise, temperature, cfg), cfg, path=False)

    @untraced
    def sample_with_noise(self, z, noise, temperature=1.0, cfg=1.0):
        """As ``sample`` from a given first noise (N or, under guidance, 2N rows)."""
        head, cfg, rows = self._call(z, cfg)
        out = self._denoise(head, z, noise[:rows], _draw(head, len(z), rows), temperature, cfg)
        return self._finish(out, cfg, path=False)

    @untraced
    def sample_with_inter_noise(self, z, noise, inter_noise, temperature=1.0, cfg=1.0):
        """As ``sample`` from given noises: x_T, and (T, N or 2N, C) of the steps or None to draw it."""
        head, cfg, rows = self._call(z, cfg)
        steps = inter_noise[:, :rows] if inter_noise is not None else _draw(head, len(z), rows)
        return self._finish(self._denoise(head, z, noise[:rows], steps, temperature, cfg), cfg, path=True)

    def _finish(self, out: Denoised, cfg: float, path: bool) -> torch.Tensor:
        """The tokens of a chain; the distribution of its last step goes to CSpD's manager where there is one."""
        guided = cfg != 1.0
        tokens = torch.cat([out.sample, out.sample]) if guided else out.sample
        manager = getattr(self.module.gen_diffusion, "manager", None)
        if manager is not None:
            double = 2 if guided else 1
            manager.sample, manager.mean = tokens, out.mean.repeat(double, 1)
            manager.variance = out.log_std.exp().repeat(double, 1)  # a standard deviation, despite its name
            if path:  # only its sum over the channels is ever used
                manager.log_var = (out.path_log_std[:, None] / out.mean.shape[1]).repeat(double, out.mean.shape[1])
        return tokens

    def _call(self, z, cfg):
        """(head, cfg as a number, rows) of a call. A scale on a device is read, as the replaced code reads it."""
        cfg = float(cfg)
        guided = cfg != 1.0
        if guided and len(z) % 2:
            raise ValueError(f"sample expected 2N rows of z, conditional first, for cfg {cfg}, got {len(z)}")
        return self.cache.get(self.dtype), cfg, len(z) // 2 if guided else len(z)

    def _denoise(self, head, z, x_T, noise, temperature, cfg) -> Denoised:  # noqa: N803
        # The type of the arithmetic is the head's, also where the model around it is wider.
        stream = stream_dtype(head.dtype)
        z, x_T = (v.to(stream) if v.dtype == torch.float64 else v for v in (z, x_T))  # noqa: N806
        if isinstance(noise, torch.Tensor):
            noise = noise.to(stream)
        return denoise(head, z, x_T, noise, temperature=float(temperature), cfg_scale=cfg, backend=self.backend)

    def _delegate(self, *args, **kwargs):
        if not self.warned:
            _logger.warning(
                "cspd.patch: %s.sample was called with arguments beyond (z, temperature, cfg), signature %s; "
                "such calls run the unpatched code",
                type(self.module).__name__,
                self.signature,
            )
            self.warned = True
        return self._original("sample")(*args, **kwargs)


def _draw_first(head, rows: int) -> torch.Tensor:
    """x_T (rows, C), drawn as the replaced code does, by the default generator: the CPU's."""
    x_T = torch.randn(rows, head.channels)  # noqa: N806
    # From other memory the copy would wait for all that the device has yet to do. While the caller captures a graph it
    # must fail, as before: replays would read memory that is long somebody else's.
    pinned = x_T.device.type == "cpu" and head.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    if pinned:
        x_T = x_T.pin_memory()  # noqa: N806
    return x_T.to(head.device, non_blocking=pinned)


def _draw(head, drawn_rows: int, rows: int) -> torch.Tensor:
    """(T, rows, C): the replaced code draws ``drawn_rows`` rows at every step, T-1 first and 0 included."""
    steps = [torch.randn(drawn_rows, head.channels, device=head.device)[:rows] for _ in range(head.num_steps)]
    return torch.stack(steps[::-1])
