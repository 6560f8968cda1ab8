"""denoise under every sampler, with limits of x0 and up to three groups of rows, against a loop written out here."""

import copy
import math

import numpy as np
import pytest
import torch
from foreign import Mean, Spaced
from foreign import Net as ForeignNet
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from cspd_kernels import DiffusionHead, PhiloxNoise, Schedule, denoise
from cspd_kernels.ops.denoise import Denoised, reference, torch_backend
from cspd_kernels.ops.denoise.parallel import Parallel
from cspd_kernels.testing import random_inputs, randomize_, relative_error

C, Z, N = 5, 7, 6
BETAS = np.linspace(0.01, 0.1, 9)
TIMES = np.linspace(0, 1, 9) ** 1.2
RULES = {
    "learned": Schedule.diffusion(BETAS),
    "large": Schedule.diffusion(BETAS, variance="fixed_large"),
    "x0": Schedule.diffusion(BETAS, prediction="x0"),
    "v": Schedule.diffusion(BETAS, variance="fixed_small", prediction="v"),
    "ddim": Schedule.diffusion(BETAS, 100 * np.arange(9)).ddim(),
    "ddim 0.5": Schedule.diffusion(BETAS, 100 * np.arange(9)).ddim(0.5),
    "euler": Schedule.euler(TIMES),
    "euler x0": Schedule.euler(1 - TIMES, data_at=0, prediction="x0"),
    "euler-maruyama": Schedule.euler_maruyama(TIMES),
    "one step": Schedule.one_step(0.3),
}
CLIPS = {"none": None, "all": (-0.4, 0.3), "channels": (np.linspace(-0.9, -0.1, C), np.linspace(0.0, 0.5, C))}
SCALES = {"plain": 1.0, "two": 2.5, "three": (1.5, 0.7), "three by token": (torch.linspace(0, 2, N), 0.7)}


def clipped(rule, clip):
    return RULES[rule] if CLIPS[clip] is None else RULES[rule].clipped(*CLIPS[clip])


@pytest.fixture
def make(make_diffloss):
    """(module, head) of a schedule; the network puts out a variance with ``learn_sigma``."""

    def made(schedule, dtype=torch.float32, **options):
        module = make_diffloss(steps=3, depth=1, **options)
        return module, DiffusionHead.from_network(module.net, schedule, dtype=dtype)

    return made


def inputs_of(head, scales, seed=1):
    _, x, noise = random_inputs(head, N, seed)
    groups = 3 if isinstance(scales, tuple) else 1 + (scales != 1.0)
    return torch.randn(groups * N, Z, generator=torch.Generator().manual_seed(seed)), x, noise


def inner(scales):
    """As backends take them."""
    scales = scales if isinstance(scales, tuple) else (scales,) if scales != 1.0 else ()
    return tuple(s[:, None].double() if isinstance(s, torch.Tensor) else s for s in scales)


@torch.no_grad()
def loop(module, schedule, cond, x, noise, temperature, scales):
    """Denoised in float64: the module's own network, one call a step, and the rule as the schedule's page has it."""
    net, x = copy.deepcopy(module.net).double(), x.double()
    lines = inner(scales)
    path = torch.zeros(N, dtype=torch.float64)
    for i in reversed(range(schedule.num_steps)):
        t = torch.full((len(cond),), float(schedule.timesteps[i]))
        groups = net(x.repeat(len(cond) // N, 1), t, cond.double()).split(N)
        v = groups[0][:, C:]
        # The weight of a group: what the scale before it leaves over, and its own.
        weights = [a - b for a, b in zip([*lines, 1.0], [0.0, *lines])]
        out = sum(w * g[:, :C] for w, g in zip(weights, groups, strict=True))
        x0 = schedule.x0_x[i] * x + schedule.x0_out[i] * out
        if schedule.clip is not None:
            low, high = (torch.tensor(limit) for limit in schedule.clip)
            x0 = torch.minimum(torch.maximum(x0, low), high)
        mean = schedule.mean_x0[i] * x0 + schedule.mean_x[i] * x
        log_std = torch.full_like(mean, schedule.log_std_lower[i])
        if schedule.learned and v.shape[1]:
            log_std = log_std + (v + 1) / 2 * (schedule.log_std_upper[i] - schedule.log_std_lower[i])
        if i:
            x, path = mean + temperature * log_std.exp() * noise[i].double(), path + log_std.sum(1)
    return Denoised(mean, mean, log_std + math.log(temperature), path)


def assert_close(actual, expected, tolerance):
    for name, a, b in zip(Denoised._fields, actual, expected):
        assert not a.isnan().any(), name
        if torch.isfinite(b).all() and b.any():
            assert relative_error(a, b) <= tolerance, name
        else:
            assert torch.equal(a.double(), b.double()), name


@pytest.mark.parametrize(
    ("clip", "scales"), [("none", "plain"), ("all", "two"), ("channels", "three"), ("all", "three by token")]
)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_loop(make, rule, clip, scales):
    schedule, scales = clipped(rule, clip), SCALES[scales]
    for learn_sigma in (True, False):
        module, head = make(schedule, learn_sigma=learn_sigma)
        assert head.learned_variance == (schedule.learned and learn_sigma)
        inputs = inputs_of(head, scales)
        expected = loop(module, schedule, *inputs, 0.9, scales)
        got = denoise(head, *inputs, temperature=0.9, cfg_scale=scales, backend="torch", parallel_tol=None)
        assert_close(got, expected, 1e-5)
        wide = DiffusionHead.from_network(module.net, schedule, dtype=torch.float64)
        definition = reference.denoise(wide, *inputs, 0.9, inner(scales), dtype=torch.float64)
        assert_close(definition, expected, 1e-10)


@pytest.mark.parametrize(("clip", "scales"), [("none", "three by token"), ("channels", "plain"), ("all", "two")])
@pytest.mark.parametrize("rule", RULES)
def test_in_parallel_it_is_the_same(make, rule, clip, scales):
    schedule, scales = clipped(rule, clip), SCALES[scales]
    _, head = make(schedule, torch.float64)
    inputs = inputs_of(head, scales)
    expected = denoise(head, *inputs, temperature=0.9, cfg_scale=scales, parallel_tol=None)
    options = {"temperature": 0.9, "cfg_scale": scales, "parallel_tol": 1e-11}
    got = denoise(head, *inputs, **options)
    assert (got.sweeps <= schedule.num_steps).all()  # in sweeps, not step by step in the end
    assert_close(got, expected, 1e-9)
    again = denoise(head, *inputs, **options, guess=got.trajectory)
    assert_close(again, expected, 1e-9)
    definition = reference.denoise_in_parallel(head, *inputs, 0.9, inner(scales), 1e-11, dtype=torch.float64)
    assert_close(definition, expected, 1e-9)
    assert_close(denoise(head, *inputs, **options, workspace_bytes=1), expected, 1e-9)


def test_sweeps_are_those_of_the_definition(make):
    """As many, with limits that bind and three groups: the slopes are the same."""
    _, head = make(clipped("learned", "channels"), torch.float64, scale=0.2)
    inputs = inputs_of(head, (1.5, 0.7))
    counts = [
        denoise(head, *inputs, cfg_scale=(1.5, 0.7), parallel_tol=1e-6).sweeps,
        reference.denoise_in_parallel(head, *inputs, 1.0, (1.5, 0.7), 1e-6, dtype=torch.float64)[4],
    ]
    assert torch.equal(*counts)


def test_slopes_are_zero_where_x0_is_limited():
    x0, slope = torch.tensor([-2.0, 0.1, math.nan, 0.5, 0.6]), torch.full((5,), 0.3)
    inside, kept = reference.limited(x0, slope, (-1.0, 0.5))
    torch.testing.assert_close(inside, torch.tensor([-1.0, 0.1, math.nan, 0.5, 0.5]), equal_nan=True)
    assert kept.tolist() == pytest.approx([0.0, 0.3, 0.0, 0.3, 0.0])


@pytest.mark.parametrize("tolerance", [None, 1e-4])
@pytest.mark.parametrize("limits", [(-1e30, 1e30), (-math.inf, np.full(C, math.inf))])
@pytest.mark.parametrize("scales", SCALES)
def test_limits_that_never_bind_change_no_bit(make, scales, limits, tolerance):
    module, head = make(RULES["learned"])
    wide = DiffusionHead.from_network(module.net, RULES["learned"].clipped(*limits))
    inputs, options = inputs_of(head, SCALES[scales]), {"cfg_scale": SCALES[scales], "parallel_tol": tolerance}
    assert all(map(torch.equal, denoise(head, *inputs, **options), denoise(wide, *inputs, **options)))


@pytest.mark.parametrize("rule", ["ddim", "euler"])
@pytest.mark.parametrize("tolerance", [None, 1e-4])
def test_steps_without_noise_use_none(make, rule, tolerance):
    _, head = make(RULES[rule])
    cond, x, noise = inputs_of(head, 1.0)
    made = [
        denoise(head, cond, x, drawn, temperature=temperature, parallel_tol=tolerance)
        for drawn, temperature in ((noise, 1.0), (-noise, 0.7), (PhiloxNoise(3, torch.arange(N)), 0.0))
    ]
    for out in made:
        assert torch.equal(out.sample, made[0].sample)
        assert torch.isneginf(out.log_std).all()
        assert torch.isneginf(out.path_log_std).all()


def test_two_equal_groups_of_three_are_two(make):
    _, head = make(RULES["learned"])
    cond, x, noise = inputs_of(head, 2.5)
    two = denoise(head, cond, x, noise, cfg_scale=2.5)
    given, free = cond.split(N)
    for three in (
        denoise(head, torch.cat([given, free, free]), x, noise, cfg_scale=(2.5, 9.0)),
        denoise(head, torch.cat([given, given, free]), x, noise, cfg_scale=(9.0, 2.5)),
        denoise(head, torch.cat([given, -cond[:N], free]), x, noise, cfg_scale=(torch.tensor(2.5), 2.5)),
    ):
        assert_close(three, two, 1e-5)


@pytest.mark.parametrize("tolerance", [None, 1e-4])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("temperature", [0.9, 0.0])
def test_temperature_as_a_tensor_is_the_number(make, temperature, shape, tolerance):
    _, head = make(RULES["learned"])
    inputs = inputs_of(head, 2.5)
    for dtype in (torch.float32, torch.float64):
        tensor = torch.full(shape, temperature, dtype=dtype)
        got = denoise(head, *inputs, temperature=tensor, cfg_scale=2.5, parallel_tol=tolerance)
        number = denoise(head, *inputs, temperature=float(tensor), cfg_scale=2.5, parallel_tol=tolerance)
        assert all(map(torch.equal, got, number))


@pytest.mark.parametrize("temperature", [0.9, 0.0])
@pytest.mark.parametrize("parallel", [False, True])
def test_backends_take_a_temperature_that_stays_on_the_device(make, temperature, parallel):
    """A tensor of one element, as a device's is given on: no number is read of it."""
    _, head = make(RULES["learned"])
    inputs, options = inputs_of(head, 1.0), (1 << 20, Parallel(1e-5, None) if parallel else None)
    number = torch_backend.denoise(head, *inputs, temperature, (), *options)
    tensor = torch_backend.denoise(head, *inputs, torch.tensor([temperature]), (), *options)
    assert_close(tensor, number, 1e-6)
    assert_close(reference.denoise(head, *inputs, torch.tensor([temperature]), ()), number, 1e-5)


BAD = {
    "temperature below 0": ({"temperature": torch.tensor(-0.5)}, "finite temperature >= 0, got -0.5"),
    "temperature NaN": ({"temperature": torch.tensor(math.nan)}, "finite temperature >= 0, got nan"),
    "temperature of two": ({"temperature": torch.ones(2)}, "temperature as a number or a floating tensor of 1 element"),
    "temperature of ints": ({"temperature": torch.tensor(1)}, "floating tensor of 1 element on cpu or .*int64"),
    "temperature far away": ({"temperature": torch.ones(1, device="meta")}, "on cpu or the CPU, got .*on meta"),
    "three scales": ({"cfg_scale": (1.0, 2.0, 3.0)}, "one scale or a tuple of two, got 3"),
    "a scale NaN": ({"cfg_scale": (1.0, math.nan)}, "finite cfg_scale, got nan"),
    "a scale's size": ({"cfg_scale": (torch.ones(3), 1.0)}, "floating tensor of 1 or 6 elements"),
    "a scale's values": ({"cfg_scale": (1.0, torch.full((N,), math.inf))}, "finite values in cfg_scale"),
    "two groups": ({"cfg_scale": 2.0}, r"cond to have 12 \(conditional first\) rows .*got 18"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(make, case):
    _, head = make(RULES["learned"])
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        denoise(head, *inputs_of(head, (1.5, 0.7)), **{"cfg_scale": (1.5, 0.7), **options})


def test_errors_of_rows_and_channels(make):
    _, head = make(RULES["learned"])
    with pytest.raises(ValueError, match=r"cond to have 18 \(fully conditional first\) rows .*got 12"):
        denoise(head, *inputs_of(head, 2.0), cfg_scale=(1.5, 0.7))
    _, head = make(RULES["learned"].clipped([-1.0] * 3, 1.0))
    with pytest.raises(ValueError, match="a clip with limits for 1 channel or for the head's 5, got 3"):
        denoise(head, *inputs_of(head, 1.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_for_any_temperature_and_scales(make, backend):
    _, head = make(clipped("euler-maruyama", "channels"))
    counter = CompileCounterWithBackend(backend)

    def function(cond, x, noise, temperature, first, second):
        return denoise(head, cond.tanh(), x, noise, temperature=temperature, cfg_scale=(first, second)).sample * 2

    compiled, counts = torch.compile(function, backend=counter, fullgraph=True), []
    inputs = inputs_of(head, (1.5, 0.7))
    for numbers in ((0.9, 2.0, 0.5), (0.8, 3.0, 0.6), (0.7, 1.5, 0.7), (0.6, 1.25, 0.8)):
        if torch.__version__.startswith("2.4"):
            numbers = tuple(map(torch.tensor, numbers))  # its compiler takes numbers for constants
        assert_close([compiled(*inputs, *numbers)], [function(*inputs, *numbers)], 1e-6)
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3  # the second call makes the numbers variable
    for tensor in (0.9, 0.0):
        values = [torch.tensor(v) for v in (tensor, 2.0, 0.5)]
        assert_close([compiled(*inputs, *values)], [function(*inputs, *values)], 1e-6)


def test_traced_it_is_one_node_of_any_size(make):
    _, head = make(RULES["ddim"])

    def function(cond, x, noise, temperature, second):
        return tuple(denoise(head, cond, x, noise, temperature=temperature, cfg_scale=(2.0, second)))

    inputs = (*inputs_of(head, (2.0, 0.5)), torch.tensor(0.9), torch.tensor(0.5))
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    calls = [node for node in graph.graph.nodes if "denoise" in str(node.target)]
    assert len(calls) == 1
    assert calls[0].meta["val"][0].shape == (N, C)
    assert_close(graph(*inputs), function(*inputs), 1e-6)


@pytest.fixture
def foreign_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ForeignNet()
    return randomize_(net, 0, 0.1)


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("mean", [Mean.EPSILON, Mean.START_X])
@pytest.mark.parametrize("ddim", [False, True])
def test_a_foreign_objects_loop(foreign_net, mean, clip, ddim):
    diffusion = Spaced(mean=mean)
    schedule = Schedule.from_diffusion(diffusion, clip=clip)
    schedule = schedule.ddim() if ddim else schedule
    head = DiffusionHead.from_network(foreign_net, schedule)
    cond, x, _ = random_inputs(head, 5, 0)
    sample = diffusion.ddim_sample_loop if ddim else diffusion.p_sample_loop
    torch.manual_seed(3)
    options = {"clip_denoised": clip is not None, "model_kwargs": {"c": cond}}
    expected = sample(foreign_net, x.shape, x, **options)
    torch.manual_seed(3)
    noise = torch.stack([torch.randn_like(x) for _ in range(schedule.num_steps)]).flip(0)
    assert relative_error(denoise(head, cond, x, noise).sample, expected) < 1e-5
    again = Schedule.from_diffusion(schedule, clip=(-1, 1))
    assert again.clip.tolist() == [-1, 1]
