"""What a sampling call returns: a tensor of images that also knows how they were made."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from .stats import Recorder, RunStats


class SampleOutput(torch.Tensor):
    """Images from :meth:`cspd.SpecDecodeRunner.run` or :func:`cspd.sample_tokens`, with their statistics.

    It is a tensor: use it wherever a tensor is expected. Operations on it return plain tensors, without the statistics.
    Operations that return their input, such as ``contiguous()`` of a contiguous tensor, return this object.
    Copies, pickles and files of ``torch.save`` hold a plain tensor, which loads with ``weights_only=True``.

    Pass ``images`` to a function that ``torch.compile`` has compiled. Recent versions of torch refuse tensor subclasses
    in the first call of such a function.

    Attributes:
        images: the same values as a plain :class:`torch.Tensor`, in the same memory.
        stats: the run's :class:`cspd.stats.RunStats`; None for :func:`cspd.sample_tokens`, which drafts nothing.
            Reading them waits for the device the first time.

    Example:
        >>> import cspd, torch
        >>> from cspd.demo.pair import load_pair
        >>> target, draft = load_pair()
        >>> out = cspd.SpecDecodeRunner(draft, target).run(2, steps=4, gamma=2, labels=torch.tensor([3, 7]), seed=0)
        >>> isinstance(out, torch.Tensor), out.images.shape, out.stats.target_calls
        (True, torch.Size([2, 1, 8, 8]), 3)
        >>> type(out * 2).__name__
        'Tensor'
    """

    _stats: RunStats | Recorder | None

    # Operations take the same way as those of a plain tensor: no Python runs for them.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(images: torch.Tensor, stats: RunStats | Recorder | None = None) -> SampleOutput:
        """Images with their statistics. Those may still have to be read from the device.

        Example:
            >>> import cspd, torch
            >>> cspd.SampleOutput.of(torch.zeros(1, 3, 8, 8))
            SampleOutput((1, 3, 8, 8), float32, cpu)
        """
        made = images.as_subclass(SampleOutput)
        made._stats = stats
        return made

    @property
    def images(self) -> torch.Tensor:
        """The same values as a plain tensor, in the same memory."""
        return self.as_subclass(torch.Tensor)

    @property
    def stats(self) -> RunStats | None:
        """Statistics of the run; the first reading waits for the device."""
        found: Any = getattr(self, "_stats", None)
        if hasattr(found, "finish"):
            found = self._stats = found.finish()
        return cast("RunStats | None", found)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """One line; it never waits for the device."""
        dtype = str(self.dtype).removeprefix("torch.")
        stats = getattr(self, "_stats", None)
        line = "" if stats is None else f", {stats.line}"
        return f"SampleOutput({tuple(self.shape)}, {dtype}, {self.device}{line})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self.images
        return plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = memo[id(self)] = copy.deepcopy(self.images, memo)
        return made
