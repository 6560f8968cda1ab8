"""What the CUDA chains share: the extension's names of types, and the embedded condition."""

from __future__ import annotations

import torch

from ...cuda_support import extension, launch_stream
from ...head import DiffusionHead
from .chain import Chain

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class CudaChain(Chain):
    """A chain whose modulations are ready; what runs the steps is left to the subclass."""

    @property
    def scale_pointer(self) -> int:
        """Of the guidance scales; 0 without guidance."""
        return self.scale.data_ptr() if self.halves == 2 else 0

    def embed(self, head: DiffusionHead, start: int, stop: int) -> None:
        extension().condition(
            DTYPE_CODES[head.dtype],
            self.y.data_ptr(),
            head.time_embedding[start:stop].data_ptr(),
            self.embedded.data_ptr(),
            stop - start,
            self.rows,
            head.width,
            launch_stream(head.device),
        )
