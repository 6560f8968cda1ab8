"""Stands in for a network's ``forward``, for loops that are the model's own."""

from __future__ import annotations

from types import MethodType

import torch

from cspd_kernels.backends import untraced

from .diffusions import NotServedError
from .loop import patch_of
from .standins import StandIn


class NetworkForward(StandIn):
    """A network's own ``forward``, by the kernels where the patch in charge of it can serve the call.

    What else calls it (``forward_with_cfg``, a loop of the model's own, a scheduler's) is as it was.
    """

    names = ("forward",)

    @property
    def forward(self) -> MethodType:
        """Bound; name, docstring and signature are the original's."""
        return self._as_original("forward")

    @untraced
    def run(self, *args, **kwargs) -> torch.Tensor:
        patch = patch_of(self.module)
        network = None if patch is None else getattr(patch, "network", None)  # a Trial's has none
        if network is not None and network.pays:
            try:
                return network.serve(args, kwargs)
            except NotServedError as reason:
                patch.tell_of_network(str(reason))
        return self.original("forward")(*args, **kwargs)
