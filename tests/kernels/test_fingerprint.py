"""Fingerprints of weights: every changed bit shows, and so does another order of rows or columns."""

from __future__ import annotations

import pytest
import torch

from cspd_kernels.live import fingerprint, same

INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
SHAPES = [(160, 160), (161, 163), (7, 5), (17000,), (1, 16385), (1,), (0, 3)]


def made(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_counts(shape, dtype):
    weight = made(shape, dtype)
    before, flat = fingerprint(weight), weight.view(-1).view(INTEGERS[dtype])
    assert same(fingerprint(weight.clone()), before)
    count, bits = len(flat), 8 * weight.element_size()
    for position in {0, 1, count // 2, count - 2, count - 1} & set(range(count)):
        for bit in (0, 3, bits - 2):
            flat[position] ^= 1 << bit
            assert not same(fingerprint(weight), before)
            flat[position] ^= 1 << bit
    assert same(fingerprint(weight), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [160, 256])
def test_the_order_of_rows_and_columns_counts(width, dtype):
    weight = made((width, width), dtype)
    before = fingerprint(weight)
    for other in range(1, width):
        order = list(range(width))
        order[0], order[other] = other, 0
        assert not same(fingerprint(weight[order]), before), f"rows 0 and {other}"
        assert not same(fingerprint(weight[:, order]), before), f"columns 0 and {other}"
        shifted = [(i + other) % width for i in range(width)]
        assert not same(fingerprint(weight[shifted]), before), f"rows moved by {other}"
        assert not same(fingerprint(weight[:, shifted]), before), f"columns moved by {other}"


@pytest.mark.parametrize("width", [8, 200])
def test_weights_that_are_not_contiguous_or_not_aligned(width):
    weight = made((width, width), torch.float32)
    original, memory = weight.clone(), torch.cat([torch.zeros(1), weight.view(-1)])
    views = [weight.clone(), weight.t().contiguous().t(), memory[1:].view(width, width)]
    for view in views:
        assert torch.equal(view, original)
        before = fingerprint(view)
        assert same(fingerprint(view), before)
        view[3, 5] += 1e-6
        assert not same(fingerprint(view), before)


def test_nan_is_equal_to_itself_and_the_sign_of_zero_counts():
    weight = torch.tensor([float("nan"), 0.0])
    before = fingerprint(weight)
    assert same(fingerprint(weight), before)
    weight[1] = -0.0
    assert not same(fingerprint(weight), before)


def test_a_parameter_under_gradients():
    weight = torch.nn.Parameter(made((200, 200), torch.float32))
    before = fingerprint(weight)
    assert not any(part.requires_grad for part in before)
    with torch.no_grad():
        weight.data.mul_(1.0000002)
    assert not same(fingerprint(weight), before)
