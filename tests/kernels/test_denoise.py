"""denoise: the torch backend and its definition against the eager sampling loop, and every property documented."""

import math
import weakref

import pytest
import torch
import torch.nn as nn
from seeds import SEEDS, seed_tensor

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.head import stream_dtype
from cspd_kernels.ops.denoise import Denoised, reference, torch_backend
from cspd_kernels.testing import random_inputs, relative_error

C, Z, W = 5, 7, 48
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def eager(module, cond, x, noise, temperature=1.0, cfg_scale=None):
    """Denoised from the module's own p_sample_loop, its randn_like replaying ``noise`` from the last step down."""
    diffusion, rows, log_variances, replay = module.gen_diffusion, len(x), [], iter(noise.flip(0))
    doubled = (lambda v: v) if cfg_scale is None else (lambda v: torch.cat([v, v]))

    def mean(*args):
        value, log_variance = type(diffusion)._mean(diffusion, *args)
        log_variances.append(log_variance[:rows])
        return value, log_variance

    model, kwargs = module.net, {"c": cond}
    if cfg_scale is not None:
        model, kwargs = module.net.forward_with_cfg, {"c": cond, "cfg_scale": cfg_scale}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "_mean", mean)
        patch.setattr(torch, "randn_like", lambda _: doubled(next(replay)))
        start = doubled(x)
        options = {"clip_denoised": False, "model_kwargs": kwargs, "temperature": temperature}
        sample = diffusion.p_sample_loop(model, start.shape, start, **options)[:rows]
    log_stds = 0.5 * torch.stack(log_variances)
    return Denoised(sample, sample, log_stds[-1] + math.log(temperature), log_stds[:-1].sum(dim=(0, 2)))


def both(head, cond, x, noise, temperature=1.0, cfg_scale=None):
    """The dispatcher with the torch backend, and the definition."""
    scale = 1.0 if cfg_scale is None else cfg_scale
    yield denoise(head, cond, x, noise, temperature=temperature, cfg_scale=scale, backend="torch")
    dtype = stream_dtype(head.dtype)
    yield Denoised(*reference.denoise(head, cond, x, noise, temperature, cfg_scale, dtype=dtype))


def assert_close(actual, expected, tolerance):
    for name, a, b in zip(Denoised._fields, actual, expected, strict=True):
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        assert relative_error(a, b) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cfg_scale", [None, 3.5, 0.0])
@pytest.mark.parametrize(
    ("schedule", "depth", "rows"), [("cosine", 1, 3), ("linear", 3, 257), ("mild", 2, 1), ("mild", 3, 33)]
)
def test_equals_the_eager_loop(make_diffloss, schedule, depth, rows, cfg_scale, dtype):
    module = make_diffloss(schedule, depth).to(dtype)
    head = DiffusionHead.from_module(module)
    cond, x, noise = (v.to(dtype) for v in random_inputs(head, rows, 1, guided=cfg_scale is not None))
    expected = eager(module, cond, x, noise, 0.9, cfg_scale)
    for actual in both(head, cond, x, noise, 0.9, cfg_scale):
        assert actual.sample.dtype == dtype
        assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("cfg_scale", [None, 2.0])
def test_fixed_variance_equals_the_eager_loop(make_diffloss, cfg_scale):
    module = make_diffloss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.net.final_layer.linear = nn.Linear(W, C)
    head = DiffusionHead.from_module(module)
    inputs = random_inputs(head, 9, 2, guided=cfg_scale is not None)
    for actual in both(head, *inputs, cfg_scale=cfg_scale):
        assert_close(actual, eager(module, *inputs, cfg_scale=cfg_scale), 1e-5)


def test_global_generator_replay_equals_diffloss_sample(make_diffloss):
    module = make_diffloss("linear")
    head, cond = DiffusionHead.from_module(module), torch.randn(4, Z, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    expected = module.sample(cond, temperature=0.9)
    torch.manual_seed(5)
    x = torch.randn(4, C)
    noise = torch.stack([torch.randn(4, C) for _ in range(head.num_steps)]).flip(0)
    assert relative_error(denoise(head, cond, x, noise, temperature=0.9).sample, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", ["linear", "mild"])
@pytest.mark.parametrize("cfg_scale", [None, 3.0])
def test_narrow_operands_stay_near_float64(make_diffloss, dtype, schedule, cfg_scale):
    head = DiffusionHead.from_module(make_diffloss(schedule), dtype=dtype)
    inputs = random_inputs(head, 33, 3, guided=cfg_scale is not None)
    expected = reference.denoise(head, *inputs, 1.0, cfg_scale, dtype=torch.float64)
    actual = denoise(head, *inputs, cfg_scale=1.0 if cfg_scale is None else cfg_scale)
    assert actual.sample.dtype == torch.float32
    assert_close(actual, expected, 2e-2)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_no_rows(head, cfg_scale):
    inputs = random_inputs(head, 0, 0)
    for noise in (inputs[2], PhiloxNoise(0, torch.arange(0))):
        out = denoise(head, *inputs[:2], noise, cfg_scale=cfg_scale)
        assert [v.shape for v in out] == [(0, C), (0, C), (0, C), (0,)]


def test_every_step_but_the_last_adds_its_noise(head):
    cond, x, noise = random_inputs(head, 4, 0)
    expected = denoise(head, cond, x, noise)
    for i in range(head.num_steps):
        changed = noise.clone()
        changed[i] += 1
        out = denoise(head, cond, x, changed)
        moved = (out.sample - expected.sample).abs().max()
        assert moved == 0 if i == 0 else moved > 1e-2


def test_sample_is_the_mean_of_the_last_step(head):
    out = denoise(head, *random_inputs(head, 4, 0))
    assert torch.equal(out.sample, out.mean)


def test_temperature_enters_the_last_log_std_and_not_the_path(make_diffloss):
    module = make_diffloss()
    nn.init.zeros_(module.net.final_layer.linear.weight)  # the variance no longer depends on x
    head = DiffusionHead.from_module(module)
    inputs = random_inputs(head, 4, 0)
    one, half = denoise(head, *inputs), denoise(head, *inputs, temperature=0.5)
    torch.testing.assert_close(half.log_std, one.log_std + math.log(0.5))
    torch.testing.assert_close(half.path_log_std, one.path_log_std)
    assert relative_error(half.sample, one.sample) > 1e-2


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_temperature_zero_is_deterministic(head, cfg_scale):
    cond, x, noise = random_inputs(head, 4, 0, guided=cfg_scale != 1)
    out = denoise(head, cond, x, noise, temperature=0, cfg_scale=cfg_scale)
    assert torch.equal(out.sample, denoise(head, cond, x, -noise, temperature=0.0, cfg_scale=cfg_scale).sample)
    assert relative_error(out.sample, denoise(head, cond, x, 0 * noise, cfg_scale=cfg_scale).sample) <= 1e-6
    assert (out.log_std == -math.inf).all()
    assert torch.isfinite(out.path_log_std).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("rows", [1, 6])
def test_scale_as_a_tensor_of_one_element(head, shape, rows):
    inputs = random_inputs(head, rows, 4, guided=True)
    out = denoise(head, *inputs, cfg_scale=torch.full(shape, 2.5))
    assert_close(out, denoise(head, *inputs, cfg_scale=2.5), 1e-6)


def test_scale_per_token_equals_a_call_per_token(head):
    scales = [2.5, 0.0, 1.0, -1.5]
    cond, x, noise = random_inputs(head, 4, 5, guided=True)
    out = denoise(head, cond, x, noise, cfg_scale=torch.tensor(scales))
    definition = reference.denoise(head, cond, x, noise, 1.0, torch.tensor(scales)[:, None])
    assert_close(out, definition, 1e-5)
    for i, scale in enumerate(scales):
        pair = cond[[i]] if scale == 1 else cond[[i, 4 + i]]
        alone = denoise(head, pair, x[[i]], noise[:, [i]], cfg_scale=scale)
        assert_close([v[[i]] for v in out], alone, 1e-5)


def test_scale_tensor_without_unconditional_rows_is_no_guidance(head):
    inputs = random_inputs(head, 3, 6)
    assert torch.equal(denoise(head, *inputs, cfg_scale=torch.tensor(3.0)).sample, denoise(head, *inputs).sample)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("workspace", [1, 1 << 28])
def test_philox_noise_equals_the_tensor_of_its_steps(head, cfg_scale, workspace):
    cond, _, _ = random_inputs(head, 7, 7, guided=cfg_scale != 1)
    noise = PhiloxNoise(3, torch.arange(7) * 2**31)
    x = noise.x_T(C)
    stored = torch.stack([noise.step(i) for i in range(head.num_steps)])
    options = {"cfg_scale": cfg_scale, "workspace_bytes": workspace}
    addressed = PhiloxNoise(3, noise.rows)  # without channels: the head knows them
    assert_close(denoise(head, cond, x, addressed, **options), denoise(head, cond, x, stored, **options), 1e-7)
    definition = reference.denoise(head, cond, x, noise, 1.0, None if cfg_scale == 1 else cfg_scale)
    assert_close(denoise(head, cond, x, noise, **options), definition, 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, {"workspace_bytes": 1}, {"parallel_tol": 1e-6}])
def test_a_seed_tensor_gives_the_bits_of_the_number(head, seed, options):
    cond, x, _ = random_inputs(head, 7, 7)
    number, tensor = (PhiloxNoise(s, torch.arange(7) * 2**31) for s in (seed, seed_tensor(seed)))
    expected = denoise(head, cond, x, number, **options)
    assert all(map(torch.equal, denoise(head, cond, x, tensor, **options), expected))
    definition = (reference.denoise(head, cond, x, noise, 1.0, None) for noise in (tensor, number))
    assert all(map(torch.equal, *definition))


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0, "tensor"])
@pytest.mark.parametrize("workspace", [1, 6000, 20000, 60000, 100000])
def test_small_workspace_bounds_the_modulations_and_changes_nothing(head, monkeypatch, cfg_scale, workspace):
    if cfg_scale == "tensor":
        cfg_scale = torch.linspace(0, 4, 13)
    inputs = random_inputs(head, 13, 8, guided=not isinstance(cfg_scale, float) or cfg_scale != 1)
    expected = denoise(head, *inputs, cfg_scale=cfg_scale)
    sizes, modulations = [], torch_backend.modulations

    def spy(*args):
        blocks, final = modulations(*args)
        sizes.append(sum(v.numel() * v.element_size() for v in (*blocks, final)))
        return blocks, final

    monkeypatch.setattr(torch_backend, "modulations", spy)
    assert_close(denoise(head, *inputs, cfg_scale=cfg_scale, workspace_bytes=workspace), expected, 1e-6)
    assert len(sizes) > 1
    assert workspace == 1 or max(sizes) <= workspace


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_rows_do_not_depend_on_their_batch(head, cfg_scale):
    cond, x, noise = random_inputs(head, 9, 9, guided=cfg_scale != 1)
    out = denoise(head, cond, x, noise, cfg_scale=cfg_scale)
    part = torch.tensor([7, 0, 4])
    pair = cond[part] if cfg_scale == 1 else torch.cat([cond[part], cond[part + 9]])
    assert_close([v[part] for v in out], denoise(head, pair, x[part], noise[:, part], cfg_scale=cfg_scale), 1e-6)


def test_inputs_need_not_be_contiguous(head):
    cond, x, noise = random_inputs(head, 6, 10, guided=True)
    strided = [torch.stack([v, torch.full_like(v, 9)], dim=-1)[..., 0] for v in (cond, x)]
    strided.append(noise.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    assert not any(v.is_contiguous() for v in strided)
    assert_close(denoise(head, *strided, cfg_scale=2.0), denoise(head, cond, x, noise, cfg_scale=2.0), 1e-6)


def test_inputs_may_be_narrower_than_the_arithmetic(head):
    cond, x, noise = (v.bfloat16() for v in random_inputs(head, 4, 11))
    expected = denoise(head, cond.float(), x.float(), noise.float())
    assert_close(denoise(head, cond, x, noise), expected, 1e-6)


def test_nothing_is_recorded_for_autograd(head):
    inputs = [v.requires_grad_() for v in random_inputs(head, 4, 12, guided=True)]
    scale = torch.tensor(2.0, requires_grad=True)
    with torch.enable_grad():
        out = denoise(head, *inputs, cfg_scale=scale)
    assert not any(v.requires_grad for v in out)


@pytest.mark.parametrize("workspace", [1, 1 << 28])
def test_inputs_and_weights_are_not_modified(make_diffloss, workspace):
    module = make_diffloss()
    head = DiffusionHead.from_module(module)
    kept = [*random_inputs(head, 4, 13, guided=True), torch.linspace(1, 2, 4), head.time_embedding]
    kept += module.parameters()
    before = [v.detach().clone() for v in kept]
    denoise(head, *kept[:3], cfg_scale=kept[3], workspace_bytes=workspace)
    assert all(map(torch.equal, kept, before))


def test_autocast_of_the_caller_changes_nothing(head):
    inputs = random_inputs(head, 4, 14)
    expected = denoise(head, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = denoise(head, *inputs)
    assert all(map(torch.equal, out, expected))


def test_works_under_inference_mode(make_diffloss):
    module = make_diffloss()
    head = DiffusionHead.from_module(module)
    inputs = random_inputs(head, 4, 15)
    with torch.inference_mode():
        inner = DiffusionHead.from_module(module, dtype=torch.bfloat16)
        out = denoise(head, *inputs)
    assert all(map(torch.equal, out, denoise(head, *inputs)))
    assert torch.isfinite(denoise(inner, *inputs).sample).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_hold_under_a_badly_conditioned_schedule(make_diffloss, dtype):
    """x exceeds float16's range here; it is never rounded to it."""
    head = DiffusionHead.from_module(make_diffloss("cosine"), dtype=dtype)
    cond, x, noise = random_inputs(head, 9, 3)
    inputs = cond, 3 * x, noise
    expected = reference.denoise(head, *inputs, 1.0, None, dtype=torch.float64)
    assert expected[0].abs().max() > 65504
    assert_close(denoise(head, *inputs), expected, 2e-2)


def test_one_group_of_modulations_is_alive_at_a_time(head, monkeypatch):
    alive = []

    def modulations(*arguments):
        assert all(reference() is None for reference in alive)
        block_mods, final_mods = original(*arguments)
        alive[:] = [weakref.ref(value) for value in (*block_mods, final_mods)]
        return block_mods, final_mods

    original = torch_backend.modulations
    monkeypatch.setattr(torch_backend, "modulations", modulations)
    denoise(head, *random_inputs(head, 3, 0), workspace_bytes=20_000)
    assert len(alive) == head.depth + 1
