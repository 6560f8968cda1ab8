"""What the backends with kernels do not serve, and what they say then."""

import dataclasses

import pytest
import torch
from chains import UNSUPPORTED, assert_agrees, unsupported_head
from verdicts import cast

from cspd_kernels import DiffusionHead, accept_reject, denoise, log_density_ratio
from cspd_kernels.testing import random_chains, random_inputs


@pytest.mark.parametrize(("options", "limit"), UNSUPPORTED)
def test_heads_beyond_a_limit_are_refused_by_its_name(backend, make_diffloss, kernel_device, options, limit):
    head = unsupported_head(make_diffloss, kernel_device, **options)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve denoise: .*{limit}"):
            denoise(head, *random_inputs(head, 2, 0), backend=backend)


def test_how_many_channels_a_head_may_have(backend, make_diffloss, kernel_device):
    most = {"triton": 64, "cuda": 256}[backend]
    head = unsupported_head(make_diffloss, kernel_device, channels=most)
    denoise(head, *random_inputs(head, 1, 0), backend=backend)
    head = unsupported_head(make_diffloss, kernel_device, channels=most + 1)
    with pytest.raises(RuntimeError, match=f"up to {most} channels, and this head has {most + 1}: use backend='torch'"):
        denoise(head, *random_inputs(head, 1, 0), backend=backend)


@pytest.mark.parametrize(
    "op", [log_density_ratio, lambda *chains, **options: accept_reject(*chains, seed=0, **options)]
)
def test_more_channels_than_the_kernels_of_the_verdict_cover(backend, kernel_device, op):
    x, draft, target = random_chains(2, 257, 0)
    message = "its kernels cover up to 256 channels, and these tokens have 257: use backend='torch'"
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve .*: {message}"):
        op(x.to(kernel_device), cast(draft, kernel_device), cast(target, kernel_device), backend=backend)


def unaligned(value):
    """The same values, two elements behind a boundary."""
    return torch.cat([value.flatten()[:2], value.flatten()])[2:].view_as(value)


# --- what CUDA alone does not serve ---


def test_the_persistent_kernel_covers_few_rows_of_a_head_with_blocks(device_of, make_diffloss):
    from cspd_kernels.ops.denoise.cuda import why_not_persistent

    device = device_of("cuda")
    head = DiffusionHead.from_module(make_diffloss(steps=2).to(device))
    assert all(why_not_persistent(head, n, groups) is None for n, groups in ((1, 1), (16, 1), (8, 2)))
    assert why_not_persistent(head, 9, 2) == "32 rows of this head do not fit one launch here"
    empty = DiffusionHead.from_module(make_diffloss(depth=0, steps=2).to(device))
    assert why_not_persistent(empty, 1, 1) == "1 rows of this head do not fit one launch here"


@pytest.fixture
def cuda(make_diffloss, device_of):
    """A head, where the CUDA kernels run."""
    return DiffusionHead.from_module(make_diffloss(steps=2).to(device_of("cuda")))


@pytest.mark.parametrize("value", ["17", "-1", "1.5", "all", "²"])
def test_the_persistent_switch_takes_a_small_number(cuda, monkeypatch, value):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", value)
    message = f"expected CSPD_PERSISTENT_MAX_TOKENS as a number from 0 to 16, got '{value}'"
    with pytest.raises(ValueError, match=message):
        denoise(cuda, *random_inputs(cuda, 1, 0), backend="cuda")


CHANGES = {
    "final_weight": lambda head, change: dataclasses.replace(head, final_weight=change(head.final_weight)),
    "blocks[1].weight1": lambda head, change: dataclasses.replace(
        head, blocks=(head.blocks[0], dataclasses.replace(head.blocks[1], weight1=change(head.blocks[1].weight1)))
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_behind_a_boundary_are_refused_by_name_and_served_by_others(cuda, name):
    head = CHANGES[name](cuda, unaligned)
    message = "weights on 16-byte boundaries, and {} lies 8 bytes after one: use backend='triton' or 'torch'"
    with pytest.raises(RuntimeError) as error:
        denoise(head, *random_inputs(head, 2, 0), backend="cuda")
    assert f"backend='cuda' cannot serve denoise: its kernels read {message.format(name)}" in str(error.value)
    assert_agrees(head, *random_inputs(head, 2, 0), backend="torch")


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_not_contiguous_are_refused_by_name(cuda, name):
    head = CHANGES[name](cuda, lambda weight: weight.t().contiguous().t())
    with pytest.raises(RuntimeError) as error:
        denoise(head, *random_inputs(head, 2, 0), backend="cuda")
    assert f"contiguous weights, and {name} has strides (1, " in str(error.value)
    assert "use backend='torch'" in str(error.value)
    assert_agrees(head, *random_inputs(head, 2, 0), backend="torch")


def test_a_head_is_looked_at_once(cuda, monkeypatch):
    inputs = random_inputs(cuda, 2, 0)
    denoise(cuda, *inputs, backend="cuda")
    monkeypatch.setattr("cspd_kernels.ops.denoise.cuda._why_not_read_wide", lambda head: pytest.fail("a second time"))
    denoise(cuda, *inputs, backend="cuda")
