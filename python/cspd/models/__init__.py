"""Own implementations of MAR and its diffusion head, state-dict compatible with LTH14/mar."""

from .diffloss import DiffLoss, SimpleMLPAdaLN
from .diffusion import GaussianDiffusion
from .mar import MAR, mar_base, mar_huge, mar_large

__all__ = ["MAR", "DiffLoss", "GaussianDiffusion", "SimpleMLPAdaLN", "mar_base", "mar_huge", "mar_large"]
