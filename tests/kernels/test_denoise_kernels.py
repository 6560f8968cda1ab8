"""The chains of every backend with kernels against their definition in float64: on a GPU, or, without one, in Triton's
interpreter and emulated on the CPU."""

import pytest
import torch
from chains import (
    addressed,
    assert_agrees,
    assert_close,
    definition,
    kernels_of,
    run_chain,
    workspace_of,
)  # fmt: skip
from seeds import seed_tensor
from slow import slow

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.testing import random_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(3, 64, 144, False), (5, 33, 48, True), (17, 5, 16, True), (33, 5, 80, False), (257, 4, 16, False)]
# Of those with kernels, CUDA alone has a persistent one.
cuda_alone = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def guided_inputs(head, rows, seed=0):
    return random_inputs(head, rows, seed, guided=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "width", "depth", "steps", "guided"),
    [(1, 4, 16, 1, 1, False), slow(1, 16, 48, 1, 7, True), (2, 5, 80, 3, 2, True), slow(17, 4, 16, 1, 2, False)],
)
def test_agrees_with_float64(backend, make_head, dtype, rows, channels, width, depth, steps, guided):
    head = make_head(dtype, channels=channels, width=width, depth=depth, steps=steps)
    assert_agrees(head, *random_inputs(head, rows, 0, guided), cfg_scale=2.5 if guided else 1.0, backend=backend)


@pytest.mark.parametrize(
    ("rows", "channels", "width", "guided"),
    [
        slow(3, 64, 144, False),
        slow(5, 33, 48, True),
        (17, 5, 16, True),
        slow(33, 5, 80, False),
        slow(257, 4, 16, False),
    ],
)
def test_sizes(backend, make_head, rows, channels, width, guided):
    head = make_head(channels=channels, width=width)
    assert_agrees(head, *random_inputs(head, rows, 0, guided), cfg_scale=2.5 if guided else 1.0, backend=backend)


@cuda_alone
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("programs", "rows", "steps", "guided"), [(1, 3, 7, True), (2, 5, 2, True), (3, 1, 2, False)])
def test_persistent_agrees_with_float64(backend, make_head, persistent, dtype, programs, rows, steps, guided):
    persistent(programs)
    head = make_head(dtype, depth=3, steps=steps)
    inputs = random_inputs(head, rows, 0, guided)
    assert_agrees(head, *inputs, cfg_scale=2.5 if guided else 1.0, backend=backend)


@cuda_alone
@pytest.mark.parametrize(("rows", "channels", "width"), [(1, 4, 16), (2, 33, 80), (16, 5, 144)])
def test_persistent_sizes(backend, make_head, persistent, rows, channels, width):
    persistent(5)
    head = make_head(channels=channels, width=width)
    assert_agrees(head, *random_inputs(head, rows, 0), backend=backend)


def test_no_blocks(backend, make_head):
    head = make_head(depth=0)
    assert_agrees(head, *guided_inputs(head, 3), cfg_scale=2.5, backend=backend)


def test_rows_so_alike_that_the_epsilon_of_the_norms_counts(backend, make_diffloss, kernel_device, shape):
    module = make_diffloss(steps=2, scale=0.15).to(kernel_device)
    for parameter in module.net.input_proj.parameters():
        parameter.data *= 1e-3
    assert_agrees(head := DiffusionHead.from_module(module), *random_inputs(head, 3, 0), backend=backend)


@pytest.mark.parametrize("guided", [False, True])
def test_fixed_variance(backend, make_head, shape, guided):
    head = make_head(learn_sigma=False)
    assert not head.learned_variance
    assert_agrees(head, *random_inputs(head, 5, 1, guided), cfg_scale=3.0 if guided else 1.0, backend=backend)


@pytest.mark.parametrize("guided", [False, True])
def test_addressed_noise(backend, make_head, shape, guided):
    head = make_head(steps=3)
    cond, x, _ = random_inputs(head, 5, 2, guided)
    options = {"cfg_scale": 3.0 if guided else 1.0, "backend": backend}
    noise = addressed(head, 5, 2**63 - guided)
    assert_agrees(head, cond, x, noise, **options)
    held = torch.tensor([noise.seed - 2**64 * (noise.seed >= 2**63)], device=head.device)
    for got, expected in zip(
        denoise(head, cond, x, PhiloxNoise(held, noise.rows), **options), denoise(head, cond, x, noise, **options)
    ):
        assert torch.equal(got, expected)


def test_a_seed_tensor_gives_the_bits_of_the_number(backend, make_head, shape):
    head, seed = make_head(), 2**64 - 1
    cond, x, _ = random_inputs(head, 2, 2)
    expected, got = (
        denoise(head, cond, x, addressed(head, 2, s), backend=backend) for s in (seed, seed_tensor(seed, head.device))
    )
    assert all(map(torch.equal, got, expected))


def test_sweeps_with_a_seed_tensor(backend, make_head):
    head, seed = make_head(), 2**63 + 5
    cond, x, _ = random_inputs(head, 1, 2)
    expected, got = (
        denoise(head, cond, x, addressed(head, 1, s), parallel_tol=1e-4, backend=backend)
        for s in (seed, seed_tensor(seed, head.device))
    )
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "scale", [0.0, -1.5, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([2.5, 0.0, 1.0, -1.5, 4.0])]
)
def test_guidance_scales(backend, make_head, scale):
    head = make_head()
    scale = scale.to(head.device) if isinstance(scale, torch.Tensor) else scale
    assert_agrees(head, *guided_inputs(head, 5, 3), cfg_scale=scale, backend=backend)


def test_guidance_scale_per_token(backend, make_head, shape):
    head = make_head()
    scale = torch.tensor([2.5, 0.0, 1.0, -1.5, 4.0], device=head.device)
    assert_agrees(head, *guided_inputs(head, 5, 3), cfg_scale=scale, backend=backend)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_temperatures(backend, make_head, shape, temperature):
    head = make_head()
    assert_agrees(head, *random_inputs(head, 3, 4), temperature=temperature, backend=backend)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noise", ["stored", "addressed"])
def test_no_rows(backend, make_head, guided, noise):
    head = make_head()
    cond, x, stored = random_inputs(head, 0, 0, guided)
    noise = stored if noise == "stored" else addressed(head, 0)
    out = denoise(head, cond, x, noise, cfg_scale=2.0 if guided else 1.0, backend=backend)
    assert [v.shape for v in out] == [(0, 5), (0, 5), (0, 5), (0,)]


def test_inputs_need_not_be_contiguous(backend, make_head, shape):
    head = make_head()
    strided = [v.transpose(0, -1).contiguous().transpose(0, -1) for v in guided_inputs(head, 5, 5)]
    assert not any(v.is_contiguous() for v in strided)
    assert_agrees(head, *strided, cfg_scale=2.0, backend=backend)


def test_inputs_may_be_narrower_than_the_arithmetic(backend, make_head, shape):
    head = make_head()
    assert_agrees(head, *(v.bfloat16() for v in guided_inputs(head, 5, 6)), cfg_scale=2.0, backend=backend)


@pytest.mark.parametrize("kind", ["stored", "addressed", "scale per token"])
@pytest.mark.parametrize("workspace", [slow(1), 5_000, slow(25_000)])  # a row, two rows, two steps of all rows
def test_small_workspace_bounds_the_modulations_and_changes_nothing(backend, make_head, monkeypatch, kind, workspace):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "0")
    head = make_head(steps=3)
    cond, x, noise = guided_inputs(head, 5, 7)
    noise = addressed(head, 5) if kind == "addressed" else noise
    scale = torch.linspace(0, 4, 5, device=head.device) if kind == "scale per token" else 2.0
    layered = kernels_of(backend).layered
    sizes, run_steps = [], layered.run_steps

    def measured(chain, *arguments):
        sizes.append(workspace_of(chain))
        return run_steps(chain, *arguments)

    monkeypatch.setattr(layered, "run_steps", measured)
    assert_agrees(head, cond, x, noise, cfg_scale=scale, workspace_bytes=workspace, backend=backend)
    assert len(sizes) > 1
    assert workspace == 1 or max(sizes) <= workspace


@cuda_alone
@pytest.mark.parametrize("steps_at_once", [1, 2, 4])
def test_persistent_in_chunks_of_steps(backend, make_head, persistent, steps_at_once):
    persistent(1)
    head = make_head(steps=5)
    workspace = 3 * 2 * head.width * 6 * 4 * steps_at_once
    assert_agrees(head, *guided_inputs(head, 3, 8), cfg_scale=2.0, workspace_bytes=workspace, backend=backend)


def test_inputs_and_weights_are_not_modified(backend, make_diffloss, kernel_device, shape):
    module = make_diffloss(steps=2).to(kernel_device)
    head = DiffusionHead.from_module(module)
    kept = [*guided_inputs(head, 3, 9), torch.linspace(1, 2, 3, device=kernel_device), head.time_embedding]
    kept += module.parameters()
    before = [v.detach().clone() for v in kept]
    denoise(head, *kept[:3], cfg_scale=kept[3], backend=backend)
    assert all(map(torch.equal, kept, before))


def test_inference_mode_and_then_none(backend, make_head):
    head = make_head()
    inputs = random_inputs(head, 3, 10)
    with torch.inference_mode():
        inner = [denoise(head, *inputs, backend=backend) for _ in range(2)]
    outer = denoise(head, *inputs, backend=backend)
    for out in inner:
        assert all(map(torch.equal, out, outer))


def test_autocast_of_the_caller_changes_nothing(backend, make_head):
    head = make_head()
    inputs = random_inputs(head, 3, 11)
    expected = denoise(head, *inputs, backend=backend)
    with torch.autocast(head.device.type, dtype=torch.bfloat16):
        assert all(map(torch.equal, denoise(head, *inputs, backend=backend), expected))


def test_weights_that_are_transposed_views(backend, make_diffloss, kernel_device, shape):
    module = make_diffloss(steps=2, scale=0.15).to(kernel_device)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()
    head = DiffusionHead.from_module(module)
    assert_agrees(head, *random_inputs(head, 3, 12), backend=backend)


def test_float16_holds_under_a_badly_conditioned_schedule(backend, make_head, shape):
    """x exceeds float16's range here; it is never rounded to it."""
    head = make_head(torch.float16, "cosine", steps=5)
    cond, x, noise = random_inputs(head, 3, 13)
    assert definition(head, cond, 3 * x, noise).sample.abs().max() > 65504
    assert_agrees(head, cond, 3 * x, noise, backend=backend)


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_is_read_before_it_is_written(backend, make_head, shape, poisoned, steps):
    head = make_head(steps=steps)
    assert_agrees(head, *guided_inputs(head, 5, 17), cfg_scale=2.0, backend=backend)


@pytest.mark.parametrize(
    ("backend", "kind"), [("triton", "layered"), ("cuda", "layered"), ("cuda", "persistent")], indirect=["backend"]
)
@pytest.mark.parametrize("noise", ["stored", "addressed"])
@torch.no_grad()
def test_a_chain_serves_fewer_tokens_than_it_has_and_one_call_after_the_other(
    backend, make_head, multiprocessors, poisoned, kind, noise
):
    multiprocessors(1)
    head, chain = make_head(steps=3), None
    for seed, rows in enumerate((3, 4, 1)):
        cond, x, stored = guided_inputs(head, rows, seed)
        inputs = cond, x, stored if noise == "stored" else addressed(head, rows, seed)
        scale = torch.linspace(0, 4, rows, device=head.device)[:, None] if seed % 2 else 2.0 + seed
        chain = chain or getattr(kernels_of(backend), kind)(head, 4, 2, inputs[2], 2, static=True)
        out = run_chain(chain, head, inputs, 0.9 + seed, scale)
        assert_close(out, definition(head, *inputs, 0.9 + seed, scale), 1e-5)


@torch.no_grad()
def test_results_are_copies(backend, make_head):
    head = make_head()
    one, two = (random_inputs(head, 3, seed) for seed in (0, 1))
    chain = kernels_of(backend).layered(head, 3, 1, one[2], 2, static=True)
    out = run_chain(chain, head, one)
    kept = [v.clone() for v in out]
    run_chain(chain, head, two)
    assert all(map(torch.equal, out, kept))


@cuda_alone
@torch.no_grad()
def test_a_chain_that_stopped_waiting_gives_nan_and_the_next_call_says_so(backend, make_head, multiprocessors):
    multiprocessors(1)
    head = make_head(steps=3)
    inputs = random_inputs(head, 3, 0)
    chain = kernels_of(backend).persistent(head, 3, 1, inputs[2], 3, static=True)
    chain.load(*inputs, 0.9, ())
    chain.error.fill_(1)
    tables = Tables(head)
    chain.launch(head, tables)
    sample, mean, *_ = chain.results(3, 0.9, tables)
    assert sample.isnan().all()
    assert mean.isnan().all()
    if head.device.type == "cuda":
        torch.cuda.synchronize()  # the next call may come before the host knows
    with pytest.raises(RuntimeError, match=r"gave up waiting .* Set CSPD_PERSISTENT_MAX_TOKENS=0"):
        tables.check()
    tables.check()  # said once
    assert_close(run_chain(chain, head, inputs), definition(head, *inputs, 0.9), 1e-5)


@cuda_alone
@torch.no_grad()
def test_calls_that_stopped_waiting_are_told_of_once_however_many(backend, make_head, multiprocessors):
    multiprocessors(1)
    head = make_head()
    tables, (_, _, noise) = Tables(head), random_inputs(head, 1, 0)
    chain = kernels_of(backend).persistent(head, 1, 1, noise, 2, static=True)
    chain.error.fill_(1)
    for calls in (1, 2, 1):
        for _ in range(calls):
            chain.results(1, 1.0, tables)
        if head.device.type == "cuda":
            torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="gave up waiting"):
            tables.check()
        tables.check()


@cuda_alone
def test_persistent_takes_up_to_the_given_number_of_tokens(backend, make_head, monkeypatch, multiprocessors, used):
    multiprocessors(1)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "3")
    head = make_head()
    for rows in (3, 4):
        assert_agrees(head, *random_inputs(head, rows, 0), backend=backend)
    kernels = kernels_of(backend)
    assert [type(chain) for chain in used] == [kernels.persistent, kernels.layered]


def test_a_wide_head(backend, make_head, shape):
    head = make_head(channels=4, width=1040)
    assert_agrees(head, *random_inputs(head, 5, 0), backend=backend)
