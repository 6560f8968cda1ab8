"""Names of the dtypes that a head's products can be computed in.

The command line reads them before torch is imported.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import WrongDtype

SHORT = {  # PyTorch's names, and shorter ones
    "float32": ("fp32", "float"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float64": ("fp64", "double"),
}
_FULL = {short: full for full, names in SHORT.items() for short in (full, *names)}


def full_name(name: str, who: str, accepted: Sequence[str] = tuple(SHORT)) -> str:
    """PyTorch's name of a dtype, without "torch.": "bfloat16" of "bf16", "BF16", "bfloat16" or "torch.bfloat16".

    Raises:
        WrongDtype: it names no dtype, or not an accepted one. The message lists the accepted ones.
    """
    full = _FULL.get(name.strip().lower().removeprefix("torch."), "")
    if full not in accepted:
        raise wrong(name, who, accepted)
    return full


def wrong(given: object, who: str, accepted: Sequence[str]) -> WrongDtype:
    """The error of a dtype that ``who`` does not accept."""
    short = ", ".join(name for full in accepted for name in SHORT[full])
    return WrongDtype(f"{who} expected dtype as {', '.join(accepted)} (or {short}), got {given!r}")
