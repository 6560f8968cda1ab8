"""denoise: the torch backend and its definition against the eager sampling loop, and every property documented."""

import math

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.head import stream_dtype
from cspd_kernels.ops.accept_reject import torch_backend as accept_reject_backend
from cspd_kernels.ops.denoise import Denoised, reference, torch_backend
from cspd_kernels.testing import random_chains, random_inputs, relative_error

C, Z, W = 5, 7, 48
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def eager(module, cond, x, noise, temperature=1.0, cfg_scale=None):
    """Denoised from the module's own p_sample_loop, its randn_like replaying ``noise`` from the last step down."""
    diffusion, rows, log_variances, replay = module.gen_diffusion, len(x), [], iter(noise.flip(0))
    doubled = (lambda v: v) if cfg_scale is None else (lambda v: torch.cat([v, v]))

    def posterior(*args):
        mean, log_variance = type(diffusion).posterior(diffusion, *args)
        log_variances.append(log_variance[:rows])
        return mean, log_variance

    model, kwargs = module.net, {"c": cond}
    if cfg_scale is not None:
        model, kwargs = module.net.forward_with_cfg, {"c": cond, "cfg_scale": cfg_scale}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "posterior", posterior)
        patch.setattr(torch, "randn_like", lambda _: doubled(next(replay)))
        sample = diffusion.p_sample_loop(model, doubled(x), temperature, kwargs)[:rows]
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


@pytest.fixture
def head(make_diffloss):
    return DiffusionHead.from_module(make_diffloss("mild", 2))


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


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0, "tensor"])
@pytest.mark.parametrize("workspace", [1, 6000, 20000, 60000, 100000])
def test_small_workspace_bounds_the_modulations_and_changes_nothing(head, monkeypatch, cfg_scale, workspace):
    if cfg_scale == "tensor":
        cfg_scale = torch.linspace(0, 4, 13)
    inputs = random_inputs(head, 13, 8, guided=not isinstance(cfg_scale, float) or cfg_scale != 1)
    expected = denoise(head, *inputs, cfg_scale=cfg_scale)
    sizes, modulations = [], torch_backend._modulations

    def spy(*args):
        blocks, final = modulations(*args)
        sizes.append(sum(v.numel() * v.element_size() for v in (*blocks, final)))
        return blocks, final

    monkeypatch.setattr(torch_backend, "_modulations", spy)
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


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor's value, or a shape that depends on one, is read by the host."""

    FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"the host waits for {name}"
        indexed_by_mask = name == "index" and any(v is not None and v.dtype == torch.bool for v in args[1])
        assert not indexed_by_mask, "the host waits for a boolean index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, bool, torch.nonzero, lambda v: v[v > 0], lambda v: torch.arange(int(v[0]))]
)
def test_the_check_for_host_reads_can_fail(read):
    with NoHostRead(), pytest.raises(AssertionError, match="the host waits"):
        read(torch.ones(1))


@pytest.mark.parametrize("workspace", [1, 1 << 28])
@pytest.mark.parametrize("scale", [None, 2.0, torch.tensor([[2.0]]), torch.linspace(1, 2, 5)[:, None]])
@pytest.mark.parametrize("addressed", [False, True])
def test_torch_backend_never_reads_a_tensor_on_the_host(head, addressed, scale, workspace):
    cond, x, noise = random_inputs(head, 5, 16, guided=scale is not None)
    if addressed:
        noise = PhiloxNoise(0, torch.arange(5), C)
    with torch.no_grad(), NoHostRead():
        out = torch_backend.denoise(head, cond, x, noise, 0.9, scale, workspace)
    assert_close(out, denoise(head, cond, x, noise, temperature=0.9, cfg_scale=1.0 if scale is None else scale), 1e-5)


N = 4
NAN, INF = math.nan, math.inf


def spoiled(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


BAD = {
    "head": (lambda a: {"head": nn.Linear(1, 1)}, TypeError, "expected a DiffusionHead, got Linear"),
    "x_T type": (lambda a: {"x_T": [1.0]}, TypeError, rf"expected x_T as a tensor \(N, {C}\), got list"),
    "x_T channels": (lambda a: {"x_T": torch.ones(N, C + 1)}, ValueError, rf"x_T of shape \(N, {C}\), got \({N}, 6\)"),
    "x_T dims": (lambda a: {"x_T": torch.ones(C)}, ValueError, rf"x_T of shape \(N, {C}\), got \({C},\)"),
    "x_T integer": (lambda a: {"x_T": torch.ones(N, C).long()}, ValueError, "expected x_T floating.*got torch.int64"),
    "x_T wide": (lambda a: {"x_T": a["x_T"].double()}, ValueError, "x_T floating.*torch.float32.*got torch.float64"),
    "x_T device": (lambda a: {"x_T": a["x_T"].to("meta")}, ValueError, "x_T on the head's device cpu, got meta"),
    "x_T NaN": (lambda a: {"x_T": spoiled(a["x_T"], NAN)}, ValueError, "expected finite values in x_T, got NaN"),
    "x_T infinite": (lambda a: {"x_T": spoiled(a["x_T"], INF)}, ValueError, "expected finite values in x_T, got"),
    "cond type": (lambda a: {"cond": None}, TypeError, "expected cond as a tensor.*got NoneType"),
    "cond width": (lambda a: {"cond": torch.ones(N, Z - 1)}, ValueError, r"shape \(N or 2N, 7\), got \(4, 6\)"),
    "cond rows": (lambda a: {"cond": torch.ones(N + 1, Z)}, ValueError, "expected cond to have 4 .*got 5"),
    "cond unguided": (lambda a: {"cond": torch.ones(2 * N, Z)}, ValueError, "expected cond to have 4 .*got 8"),
    "cond guided": (lambda a: {"cfg_scale": 2.0}, ValueError, "expected cond to have 8 .*got 4"),
    "cond scale tensor": (
        lambda a: {"cfg_scale": torch.tensor(2.0), "cond": torch.ones(3 * N, Z)}, ValueError,
        "expected cond to have 4 or 8 .*got 12",
    ),
    "cond NaN": (lambda a: {"cond": spoiled(a["cond"], NAN)}, ValueError, "expected finite values in cond"),
    "noise type": (lambda a: {"noise": None}, TypeError, "expected noise as a tensor.*got NoneType"),
    "noise steps": (lambda a: {"noise": a["noise"][1:]}, ValueError, r"shape \(12, 4, 5\), got \(11, 4, 5\)"),
    "noise rows": (lambda a: {"noise": a["noise"][:, 1:]}, ValueError, r"shape \(12, 4, 5\), got \(12, 3, 5\)"),
    "noise NaN": (lambda a: {"noise": spoiled(a["noise"], NAN)}, ValueError, "expected finite values in noise"),
    "noise addresses": (
        lambda a: {"noise": PhiloxNoise(0, torch.arange(3))}, ValueError, "PhiloxNoise of 4 rows on cpu, got 3 on cpu",
    ),
    "noise device": (
        lambda a: {"noise": PhiloxNoise(0, torch.arange(4, device="meta"))}, ValueError, "4 rows on cpu, got 4 on meta",
    ),
    "temperature negative": (lambda a: {"temperature": -0.1}, ValueError, "finite temperature >= 0, got -0.1"),
    "temperature NaN": (lambda a: {"temperature": NAN}, ValueError, "finite temperature >= 0, got nan"),
    "temperature infinite": (lambda a: {"temperature": INF}, ValueError, "finite temperature >= 0, got inf"),
    "temperature tensor": (lambda a: {"temperature": torch.ones(())}, ValueError, "temperature >= 0, got tensor"),
    "cfg_scale NaN": (lambda a: {"cfg_scale": NAN}, ValueError, "finite cfg_scale, got nan"),
    "cfg_scale type": (lambda a: {"cfg_scale": "3"}, ValueError, "finite cfg_scale, got '3'"),
    "cfg_scale size": (lambda a: {"cfg_scale": torch.ones(3)}, ValueError, r"1 or 4 elements on cpu, got .*\(3,\)"),
    "cfg_scale integer": (lambda a: {"cfg_scale": torch.tensor(2)}, ValueError, "floating.*got torch.int64"),
    "cfg_scale device": (lambda a: {"cfg_scale": torch.ones(1, device="meta")}, ValueError, "on cpu, got .*on meta"),
    "workspace": (lambda a: {"workspace_bytes": 0}, ValueError, "expected workspace_bytes.* > 0, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise_before_anything_is_computed(head, monkeypatch, case):
    change, error, message = BAD[case]
    monkeypatch.setattr("cspd_kernels.ops.denoise.implementation", lambda *_: lambda *_: pytest.fail("it was computed"))
    arguments = {"head": head, **dict(zip(("cond", "x_T", "noise"), random_inputs(head, N, 0), strict=True))}
    with pytest.raises(error, match=message):
        denoise(**(arguments | change(arguments)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_hold_under_a_badly_conditioned_schedule(make_diffloss, dtype):
    """x exceeds float16's range here; it is never rounded to it."""
    head = DiffusionHead.from_module(make_diffloss("cosine"), dtype=dtype)
    cond, x, noise = random_inputs(head, 9, 3)
    inputs = cond, 3 * x, noise
    expected = reference.denoise(head, *inputs, 1.0, None, dtype=torch.float64)
    assert expected[0].abs().max() > 65504
    assert_close(denoise(head, *inputs), expected, 2e-2)


@pytest.mark.parametrize("size", [1e6, None, 0, -5])
def test_workspace_is_a_positive_int(head, size):
    with pytest.raises(ValueError, match="expected workspace_bytes as an int > 0"):
        denoise(head, *random_inputs(head, 2, 0), workspace_bytes=size)


def test_non_finite_scale_tensor_raises_on_the_cpu(head):
    with pytest.raises(ValueError, match="finite values in cfg_scale"):
        denoise(head, *random_inputs(head, 2, 0, guided=True), cfg_scale=torch.tensor([float("nan"), 1.0]))


class NoTensorFromHost(TorchDispatchMode):
    """Fails where a Python number becomes a tensor: on a device that would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh"), name
        return func(*args, **(kwargs or {}))


def test_addressed_noise_and_verdicts_make_no_tensor_from_a_number(head):
    """What runs between the first kernel and the last, with everything checked before it."""
    cond = torch.randn(4, Z)
    x, draft, target = random_chains(4, C, 0)
    rows = torch.arange(4)
    arguments = (x, draft, target, 5, rows, 1.0, "paper", 12)
    with torch.no_grad(), NoTensorFromHost():
        noise = PhiloxNoise(3, rows)
        torch_backend.denoise(head, cond, noise.x_T(C), noise, 1.0, None, 1 << 20)
        accept_reject_backend.accept_reject(*arguments, compact=False)
