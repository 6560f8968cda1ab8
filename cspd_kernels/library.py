"""Ops as single operators of torch: torch.compile, fake tensors and dispatch modes see one opaque call.

A Library, not custom_op, which costs several times as much a call. A head travels as its handle. It has up to a
hundred tensors, and passing them would take longer than the rest of the call. They never change, and what backends
derive from a head hangs on the object.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

# It captures and replays CUDA graphs of its own, in memory that outlives the call: not for torch.compile's graphs.
_TAGS = (torch.Tag.pt2_compliant_tag, *([torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []))
_library = torch.library.Library("cspd_kernels", "FRAGMENT")


def define(op: str, schema: str, run: Callable, fake: Callable):
    """The operator ``cspd_kernels::op`` of a schema without the name.

    Modules that are imported again in one process have heads and handles of their own. So they get an operator of their
    own, ``op_2`` and so on. Objects of the earlier modules go on calling the earlier operator.
    """
    operators = torch.ops.cspd_kernels
    names = itertools.chain([op], (f"{op}_{count}" for count in itertools.count(2)))
    name = next(name for name in names if not hasattr(operators, name))
    _library.define(f"{name}{schema}", tags=_TAGS)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cspd_kernels::{name}", fake, lib=_library)
    return getattr(operators, name).default
