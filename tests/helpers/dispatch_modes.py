"""Looking inside the package's op, and watching for waits for the device."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cspd_kernels.ops.denoise import run


class Inside(TorchDispatchMode):
    """A dispatch mode for which ``denoise`` is not one opaque operation: ``seen(func, args)`` gets those in it."""

    def seen(self, func, args) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.cspd_kernels.denoise.default:
            with self:
                return run(*args, **(kwargs or {}))
        self.seen(func, args)
        return func(*args, **(kwargs or {}))


class NoHostRead(Inside):
    """Fails where a tensor's value, or a shape that depends on one, is read by the host."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique")

    def seen(self, func, args):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"the host waits for {name}"
        indexed_by_mask = name == "index" and any(v is not None and v.dtype == torch.bool for v in args[1])
        assert not indexed_by_mask, "the host waits for a boolean index"


@contextlib.contextmanager
def no_wait_for_cuda():
    """Fails where the host waits for a GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
