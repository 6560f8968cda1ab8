"""The errors that tests and benchmarks compare by: none of them passes where nothing was compared."""

import math

import pytest
import torch
from chains import assert_close

from cspd_kernels import Denoised
from cspd_kernels.testing import relative_error


def test_a_relative_error():
    expected = torch.tensor([[4.0, -8.0], [0.0, 1.0]])
    assert relative_error(expected, expected) == 0.0
    assert relative_error(expected.half() + 0.5, expected) == 0.5 / 8
    assert relative_error(torch.zeros(2, 2), expected) == 1.0
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_nan_is_no_small_error():
    for nan in (torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0])):
        assert math.isnan(relative_error(nan, nan))
    assert math.isnan(relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)))
    assert relative_error(torch.tensor([1.0, float("inf")]), torch.ones(2)) == math.inf


@pytest.mark.parametrize("actual", [torch.zeros(3), torch.ones(3), torch.full((3,), float("nan"))])
def test_zeros_are_nothing_to_compare_with(actual):
    with pytest.raises(ValueError, match="expected values other than 0"):
        relative_error(actual, torch.zeros(3))


def test_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match=r"two equal shapes, got \(1, 3\) and \(5, 3\)"):
        relative_error(torch.ones(1, 3), torch.ones(5, 3))


def test_fields_of_zeros_and_infinities_are_compared_exactly():
    """log_std at temperature 0 is -inf, and a path of one step is 0."""
    x, ends = torch.ones(2, 3), torch.full((2, 3), -math.inf)
    good = Denoised(x, x, ends, torch.zeros(2))
    assert_close(good, good, 1e-5)
    for wrong in (good._replace(path_log_std=torch.full((2,), 1e-30)), good._replace(log_std=-ends)):
        with pytest.raises(AssertionError):
            assert_close(wrong, good, 1e-5)
