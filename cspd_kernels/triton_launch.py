"""Launches of Triton kernels without binding their arguments anew at every call.

Triton finds a call's compilation from the type, alignment and value of every argument, 20 to 60 us of host time for
some thirty of them. Where a caller can tell a call's compilation by less, it is looked up, and launched as Triton
itself would.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from triton.runtime.jit import JITFunction

_RUN = JITFunction.run  # whoever replaces it wants to see every launch
_compiled: dict[tuple, object] = {}


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether 16 divides all of their addresses, which is all that Triton asks about an address."""
    bits = 0
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & 15 == 0


def launch(kernel, programs: int, arguments: tuple, constants: dict, options: dict, key: Hashable = None) -> None:
    """``kernel[(programs,)](*arguments, **constants, **options)`` on the current device.

    Args:
        arguments: in the order of the kernel's parameters; ``constants``, the rest of them, in the same order.
        key: equal for two calls only if they have the same device and options, and Triton would compile them alike; the
            kernel and its constants need not be in it. None where the caller cannot tell.
    """
    if key is None or type(kernel) is not JITFunction or JITFunction.run is not _RUN:
        kernel[(programs,)](*arguments, **constants, **options)
        return
    values = tuple(constants.values())
    where = (id(kernel), key, values)
    compiled = _compiled.get(where)
    if compiled is None:
        _compiled[where] = kernel[(programs,)](*arguments, **constants, **options)
    else:
        compiled[(programs, 1, 1)](*arguments, *values)
