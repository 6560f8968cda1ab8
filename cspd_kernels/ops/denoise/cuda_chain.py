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
        """Address of the guidance scales; 0 without guidance."""
        return self.scale.data_ptr() if self.groups > 1 else 0

    def embed(self, head: DiffusionHead, start: int, stop: int) -> None:
        self._condition(head.time_embedding[start:stop], stop - start, own=False)

    def embed_rows(self, embedding: torch.Tensor) -> None:
        self._condition(embedding, 1, own=len(embedding) > 1)

    def _condition(self, embedding: torch.Tensor, steps: int, own: bool) -> None:
        extension().condition(
            DTYPE_CODES[self.dtype],
            self.y.data_ptr(),
            embedding.data_ptr(),
            self.embedded.data_ptr(),
            steps,
            self.rows,
            embedding.shape[1],
            own,
            launch_stream(embedding.device),
        )


def address(tensor: torch.Tensor | None) -> int:
    """0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
