"""Matrix products with a layer's weight; on a CPU by oneDNN, with the weight packed once for it.

In float32 ``F.linear`` is MKL's there, which reads a plain weight at every call. oneDNN's own product of a weight in
its blocked layout is up to twice as fast, and a row's bits hardly ever depend on how many rows there are. PyTorch has
it as two private operators of its compiler. They are tried on small operands before the first use of a type. Where they
are missing or wrong ``F.linear`` serves, as it does on devices and in other types.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .live import fingerprint, same
from .logs import log_once

# Elements of the smallest weight that is packed: a call of oneDNN's costs 10 us, one of MKL's next to nothing, and in
# the half types F.linear is oneDNN's, too.
_SMALLEST = {torch.float32: 1 << 17, torch.bfloat16: 1 << 12, torch.float16: 1 << 12}
_NARROWEST = 64  # of both sides
_ROWS = 32  # a hint for the layout, which serves any number of rows
_FUSED = {None: ("none", [], ""), "gelu": ("gelu", [], "none"), "silu": ("swish", [], "")}
_PROOF_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest value


class _Made(NamedTuple):
    """What was made of a weight and a bias."""

    packed: torch.Tensor | None  # for oneDNN
    plain: torch.Tensor | None  # for F.linear: the weight itself where it is of the type
    bias: torch.Tensor | None
    prints: list[tuple[torch.Tensor, tuple]]  # of what is not shared, as it was


class Product:
    """``activation(x weight^T + bias)`` with operands of one type, of a weight that may change and be of another.

    What is made of the weight is made at the first call. :meth:`look` makes it again where the values have changed,
    whatever changed them. Copies and pickles make their own.

    Args:
        weight: (N, K) floating. bias: (N,) floating, or None.
        dtype: of the operands, and of the result; None is the weight's.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None = None):
        self.weight, self.bias, self.dtype = weight, bias, weight.dtype if dtype is None else dtype
        self._made: _Made | None = None
        self._parts: dict[tuple[int, int], Product] = {}

    def __reduce__(self):
        return Product, (self.weight, self.bias, self.dtype)

    def __call__(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """x (..., K) of the type -> (..., N). ``activation``: None, "gelu" (exact) or "silu"."""
        made = self._made or self._make()
        if made.packed is not None:
            return _operators()._linear_pointwise(x, made.packed, made.bias, *_FUSED[activation])
        y = F.linear(x, made.plain, made.bias)
        if activation == "silu":
            return F.silu(y, inplace=True)
        return y if activation is None else F.gelu(y)

    def plain(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in the dtype, not packed: for products that are made in another way, on a device."""
        made = self._made or self._make()
        if made.plain is None:
            raise RuntimeError("expected a weight that is not packed, as on a device, got one packed for oneDNN")
        return made.plain, made.bias

    def part(self, first: int, stop: int) -> Product:
        """The product with some rows of the weight."""
        if (first, stop) not in self._parts:
            bias = None if self.bias is None else self.bias[first:stop]
            self._parts[first, stop] = Product(self.weight[first:stop], bias, self.dtype)
        return self._parts[first, stop]

    def look(self) -> None:
        """Follow the weight's values. On a CPU: a device's are not looked at."""
        for part in list(self._parts.values()):
            part.look()
        made = self._made
        if made is None:
            return
        changed = any(not same(fingerprint(source), before) for source, before in made.prints)
        if changed or self.is_packed != self._can_pack():
            self._make()

    @property
    def is_packed(self) -> bool:
        """Whether the last call was oneDNN's."""
        return self._made is not None and self._made.packed is not None

    @property
    def bytes(self) -> int:
        """Bytes of what was made and is not shared with the weight."""
        prints = [] if self._made is None else self._made.prints
        made = sum(source.numel() for source, _ in prints) * self.dtype.itemsize
        return made + sum(part.bytes for part in self._parts.values())

    def _can_pack(self) -> bool:
        weight = self.weight
        if weight.device.type != "cpu" or min(weight.shape) < _NARROWEST or not packs(self.dtype):
            return False
        return weight.numel() >= _SMALLEST[self.dtype]

    @torch.no_grad()
    def _make(self) -> _Made:
        with torch.inference_mode(False):
            before = [(v, fingerprint(v)) for v in (self.weight, self.bias) if v is not None and v.device.type == "cpu"]
            weight = self.weight.detach().to(self.dtype).contiguous()
            bias = None if self.bias is None else self.bias.detach().to(self.dtype).contiguous()
            packed = None
            if self._can_pack():
                packed = _operators()._reorder_linear_weight(weight, _ROWS)
                weight = None
            prints = [(v, p) for v, p in before if not (_shared(v, weight) or _shared(v, bias))]
        self._made = _Made(packed, weight, bias, prints)  # at once: another thread may be about to multiply
        return self._made


class PlainProduct:
    """The same by ``F.linear`` with the weight as it is, of the operands' type: nothing is made, nothing to follow."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """Like :class:`Product`."""
        y = F.linear(x, self.weight, self.bias)
        if activation == "silu":
            return F.silu(y, inplace=True)
        return y if activation is None else F.gelu(y)


def _shared(source: torch.Tensor, made: torch.Tensor | None) -> bool:
    return made is not None and made.data_ptr() == source.data_ptr() and made.dtype == source.dtype


def packs(dtype: torch.dtype) -> bool:
    """Whether products of this type are oneDNN's on a CPU, as PyTorch is set now."""
    if dtype not in _SMALLEST or not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    reason = _why_not_packed(dtype)
    if reason is not None and dtype != torch.float16:  # which few CPUs can do
        log_once(f"on the CPU products in {dtype} are done by F.linear, with plain weights: {reason}")
    return reason is None


def _operators():
    return torch.ops.mkldnn


@functools.cache
def _why_not_packed(dtype: torch.dtype) -> str | None:
    """None where the operators compute what ``F.linear`` does."""
    operators = _operators()
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if missing := [name for name in names if not hasattr(operators, name)]:
        return f"this PyTorch lacks mkldnn.{missing[0]}"
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    weight, bias = random(80, 96), random(80)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for rows in (1, 3, 70):
            x = random(rows, 96)
            for activation, fused in _FUSED.items():
                expected = F.linear(x.double(), weight.double(), bias.double())
                expected = expected if activation is None else getattr(F, activation)(expected)
                try:
                    packed = operators._reorder_linear_weight(weight, _ROWS)
                    actual = operators._linear_pointwise(x, packed, bias, *fused).double()
                except (RuntimeError, TypeError, NotImplementedError) as error:
                    return f"mkldnn._linear_pointwise does not run ({str(error).splitlines()[0]})"
                if not float((actual - expected).abs().max()) <= _PROOF_BOUND[dtype] * float(expected.abs().max()):
                    return "mkldnn._linear_pointwise gives wrong results"
    return None
