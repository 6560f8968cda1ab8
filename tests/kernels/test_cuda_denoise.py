"""The CUDA chains beyond what every backend is tested for: how the persistent kernel divides its work, its watchdog,
and that nothing depends on the order in which threads run."""

import pytest
import torch
from chains import addressed, assert_agrees, kernels_of

from cspd_kernels import denoise
from cspd_kernels.ops.denoise import cuda_persistent
from cspd_kernels.ops.denoise.cuda_persistent import PersistentChain, plan_of
from cspd_kernels.testing import random_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def backend():
    return "cuda"


def call(head, rows, guided, seed=0):
    inputs = random_inputs(head, rows, seed, guided)
    return denoise(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend="cuda")


def check(head, rows, guided, seed=0):
    inputs = random_inputs(head, rows, seed, guided)
    assert_agrees(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "guided"), [(n, False) for n in (1, 2, 3, 4, 5, 8, 9, 16)] + [(1, True), (8, True)])
def test_every_number_of_rows(make_head, persistent, dtype, rows, guided):
    persistent(3)
    check(make_head(dtype, width=112), rows, guided)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 208, 1024, 1040, 1280, 1536, 2048])
def test_every_width(make_head, persistent, dtype, width):
    persistent(10)
    check(make_head(dtype, width=width, channels=16), 2, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 2, 5, 9])
@pytest.mark.parametrize("channels", [1, 17, 64])
def test_every_division_of_columns_and_channels(make_head, persistent, dtype, programs, channels):
    persistent(programs)
    check(make_head(dtype, width=144, channels=channels), 3, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 3])
def test_weights_stay_in_shared_memory_or_pass_through_it(make_head, persistent, monkeypatch, dtype, depth):
    persistent(4)
    head = make_head(dtype, width=144, depth=depth, steps=3)
    plan = plan_of(head, 2, 2)
    assert plan.resident
    monkeypatch.setattr(cuda_persistent, "shared_limit", lambda device: plan.shared_bytes)
    assert plan_of(head, 2, 2).resident
    check(head, 2, True)
    monkeypatch.setattr(cuda_persistent, "shared_limit", lambda device: plan.shared_bytes - 1)
    assert plan_of(head, 2, 2).blocks
    assert not plan_of(head, 2, 2).resident
    check(head, 2, True)


def test_what_fits_no_shared_memory_is_left_to_the_layered_chain(make_head, monkeypatch, used):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    monkeypatch.setattr(cuda_persistent, "shared_limit", lambda device: 1 << 10)
    check(make_head(), 2, False)
    assert {type(chain) for chain in used} == {kernels_of("cuda").layered}


def test_more_rows_than_a_tile_are_left_to_the_layered_chain(make_head, monkeypatch, multiprocessors, used):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    multiprocessors(2)
    head, kernels = make_head(), kernels_of("cuda")
    for rows, guided, kind in ((8, True, "persistent"), (9, True, "layered"), (16, False, "persistent")):
        used.clear()
        check(head, rows, guided)
        assert {type(chain) for chain in used} == {getattr(kernels, kind)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_nothing(make_head, monkeypatch, shape, kernel_device, dtype):
    """The emulation draws it anew for every seed; on a device it is what it is."""
    head = make_head(dtype, depth=2, steps=3, width=80)
    cond, x, _ = random_inputs(head, 3, 0, guided=True)
    first = None
    for seed in range(6):
        monkeypatch.setenv("CSPD_EMULATION_SEED", str(seed))
        out = denoise(head, cond, x, addressed(head, 3), cfg_scale=2.5, backend="cuda")
        first = first or out
        assert all(map(torch.equal, out, first))


@pytest.mark.parametrize("silent", [0, 2])
def test_a_block_that_stays_silent_is_noticed(make_head, persistent, monkeypatch, silent):
    persistent(3)
    head = make_head(width=48, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(PersistentChain, "silent", silent)
        patch.setattr(PersistentChain, "timeout_ns", 20_000_000)
        assert call(head, 2, False).sample.isnan().all()  # not captured: a first call
    if head.device.type == "cuda":
        torch.cuda.synchronize()  # the next call may come before the host knows
    with pytest.raises(RuntimeError, match=r"gave up waiting .* Set CSPD_PERSISTENT_MAX_TOKENS=0"):
        call(head, 2, False)
    check(head, 2, False)
