"""The kernels of log_density_ratio against the definition in float64."""

import math

import pytest
import torch
from verdicts import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    LINES,
    assert_ratio,
    assert_walls_stand,
    cast,
    check_ratio,
    count_launches,
    guarded_outputs,
    judged_chains,
    laid_out,
    module_of,
    ratio_and_scale,
    take,
)  # fmt: skip

from cspd_kernels import Denoised, log_density_ratio
from cspd_kernels.testing import random_chains

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy


def on(device, x, draft, target):
    return x.to(device), cast(draft, device), cast(target, device)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("relaxation", "sigma"), [(1.0, "paper"), (3, "released"), ("per token", "paper")])
def test_agrees_with_float64(backend, kernel_device, channels, relaxation, sigma):
    chains = on(kernel_device, *random_chains(201, channels, channels, shift=1.0, scale=0.6))
    if relaxation == "per token":
        relaxation = torch.linspace(0.3, 5, 201, device=kernel_device)
    check_ratio(backend, *chains, relaxation=relaxation, sigma=sigma)


@pytest.mark.parametrize("rows", [0, 1, 2, 127, 128, 129, 6001])
@pytest.mark.parametrize("channels", [2, 16])
def test_any_number_of_rows(backend, kernel_device, rows, channels):
    chains = on(kernel_device, *random_chains(rows, channels, rows))
    assert len(check_ratio(backend, *chains)) == rows
    check_ratio(backend, *chains, relaxation=torch.linspace(0.5, 2, rows, device=kernel_device), sigma="released")


def test_tokens_without_channels_are_judged_by_their_paths(backend, kernel_device):
    chains = on(kernel_device, *random_chains(5, 0, 0))
    assert torch.equal(check_ratio(backend, *chains), chains[1].path_log_std - chains[2].path_log_std)


@pytest.mark.parametrize("channels", CHANNELS)
def test_bits_do_not_depend_on_alignment_or_type(backend, kernel_device, channels):
    """Wide loads or narrow ones, of half as many bytes or as many: the same values are judged alike."""
    chains = on(kernel_device, *random_chains(33, channels, 3))
    half = [cast(v, torch.bfloat16) if isinstance(v, Denoised) else v.bfloat16() for v in chains]
    same = [cast(v, torch.float32) if isinstance(v, Denoised) else v.float() for v in half]
    expected = log_density_ratio(*same, backend=backend)
    assert torch.equal(log_density_ratio(*half, backend=backend), expected)
    for first in (1, 2, 3, 4):

        def moved(v, first=first):
            return torch.cat([v.new_full((first,), math.nan), v.flatten()])[first:].view(v.shape)

        x, *others = same
        shifted = [Denoised(*map(moved, c)) for c in others]
        assert torch.equal(log_density_ratio(moved(x), *shifted, backend=backend), expected)
        assert torch.equal(log_density_ratio(x, others[0], shifted[1], backend=backend), expected)


@pytest.mark.parametrize("matrix", LAYOUTS)
@pytest.mark.parametrize("line", LINES)
def test_any_strides(backend, kernel_device, matrix, line):
    chains = on(kernel_device, *laid_out(*random_chains(70, 17, 1), LAYOUTS[matrix], LINES[line]))
    copies = [v.contiguous() if isinstance(v, torch.Tensor) else Denoised(*(f.contiguous() for f in v)) for v in chains]
    relaxation = torch.linspace(0.3, 5, 70, device=kernel_device)
    for value in (2.0, LINES[line](relaxation)):
        ratio = check_ratio(backend, *chains, relaxation=value)
        value = value.contiguous() if isinstance(value, torch.Tensor) else value
        assert torch.equal(ratio, log_density_ratio(*copies, relaxation=value, backend=backend))


def test_strides_of_every_operand_are_its_own(backend, kernel_device):
    """Each in another layout than the others."""
    x, draft, target = random_chains(70, 5, 2)
    layouts = [LAYOUTS[name] for name in ("every second row", "every third channel", "both", "transposed", "unaligned")]
    for turn in range(5):
        one, two, three, four, five = layouts[turn:] + layouts[:turn]
        chains = (
            one(x),
            Denoised(x, two(draft.mean), three(draft.log_std), LINES["every third"](draft.path_log_std)),
            Denoised(x, four(target.mean), five(target.log_std), target.path_log_std),
        )
        check_ratio(backend, *on_as_they_are(kernel_device, *chains))
        swapped = chains[0], chains[2], chains[1]
        check_ratio(backend, *on_as_they_are(kernel_device, *swapped))


def on_as_they_are(device, x, *chains):
    """On a device, strides kept."""

    def move(v):
        if v.device == device:
            return v
        there = torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device=device)
        return there.copy_(v)

    return move(x), *(Denoised(*map(move, chain)) for chain in chains)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_floating_type_is_judged_in_float32(backend, kernel_device, dtype):
    x, draft, target = on(kernel_device, *random_chains(200, 7, 3))
    narrow = x.to(dtype), cast(draft, dtype), cast(target, dtype)
    wide = narrow[0].float(), *(cast(chain, torch.float32) for chain in narrow[1:])
    torch.testing.assert_close(check_ratio(backend, *narrow), check_ratio(backend, *wide), rtol=1e-6, atol=1e-5)
    for relaxation in (torch.float64, torch.float16, torch.bfloat16):
        value = torch.linspace(0.3, 5, 200, device=kernel_device).to(relaxation)
        expected = log_density_ratio(*wide, relaxation=value.float(), backend=backend)
        ratio = log_density_ratio(*narrow, relaxation=value, backend=backend)
        torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=1e-5)


def test_types_may_be_mixed(backend, kernel_device):
    x, draft, target = on(kernel_device, *random_chains(50, 7, 4))
    types = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    draft = Denoised(x, *(v.to(t) for v, t in zip(draft[1:], types)))
    target = Denoised(x, *(v.to(t) for v, t in zip(target[1:], reversed(types))))
    check_ratio(backend, x.half(), draft, target)


@pytest.mark.parametrize(("shift", "scale"), [(1e-4, 0.0), (0.0, 1e-4), (1e-4, -1e-4)])
def test_close_models_far_from_x_do_not_cancel(backend, kernel_device, shift, scale):
    generator = torch.Generator().manual_seed(0)
    mean, log_std = (torch.randn(100, 16, generator=generator) for _ in range(2))
    std, zeros = log_std.exp(), torch.zeros(100)
    x = mean + 5 * std * torch.where(torch.rand(100, 16, generator=generator) < 0.5, -1, 1)
    draft, target = Denoised(x, mean, log_std, zeros), Denoised(x, mean + shift * std, log_std + scale, zeros)
    _, magnitude = ratio_and_scale(x, draft, target)
    assert (magnitude < 0.1).all()  # what the comparison is in proportion to; the densities themselves are above 100
    check_ratio(backend, *on(kernel_device, x, draft, target))


@pytest.mark.parametrize("log_scale", [-0.7, -0.501, -0.499, -1e-6, 0.0, 1e-3, 0.3, 0.499, 0.501, 2.0])
def test_either_form_of_the_difference(backend, kernel_device, log_scale):
    x, draft, target = random_chains(100, 8, 5)
    target = target._replace(log_std=draft.log_std + log_scale)
    check_ratio(backend, *on(kernel_device, x, draft, target))


@pytest.mark.parametrize("chain", ["draft", "target"])
def test_what_is_off_by_little_shows(backend, kernel_device, chain):
    """The comparison is able to see each operand: a change of any one moves every row beyond the tolerance."""
    chains = dict(zip(("x", "draft", "target"), on(kernel_device, *random_chains(50, 4, 6))))
    ratio = log_density_ratio(**chains, backend=backend)
    for field in ("mean", "log_std", "path_log_std"):
        changed = chains[chain]._replace(**{field: getattr(chains[chain], field) + 0.01})
        with pytest.raises(AssertionError):
            assert_ratio(ratio, **(chains | {chain: changed}))


def test_relaxation_widens_the_residuals_alone(backend, kernel_device):
    x, draft, target = on(kernel_device, *random_chains(20, 4, 2))
    far = log_density_ratio(x, draft, target, relaxation=1e6, backend=backend)
    scales = (draft.log_std - target.log_std).sum(dim=1) + draft.path_log_std - target.path_log_std
    torch.testing.assert_close(far, scales, rtol=1e-4, atol=1e-5)


def test_tiny_scales_and_tiny_relaxation_are_judged(backend, kernel_device):
    mean = torch.tensor([[0.5, -1.0]], device=kernel_device)
    chain = Denoised(mean, mean, torch.full_like(mean, -90.0), torch.zeros(1, device=kernel_device))
    assert log_density_ratio(mean, chain, chain, backend=backend).item() == 0.0  # 1 / sigma exceeds float32
    wide = chain._replace(log_std=torch.full_like(mean, 2.0))  # as does the ratio of the sigmas
    assert log_density_ratio(mean, chain, wide, backend=backend).item() == -184.0
    assert log_density_ratio(mean, wide, chain, backend=backend).item() == 184.0
    x, draft, target = on(kernel_device, *random_chains(50, 3, 0))
    tiny = torch.full((50,), 1e-25, device=kernel_device)
    assert not log_density_ratio(x, draft, draft, relaxation=tiny, backend=backend).any()
    judged = log_density_ratio(x, draft, target, relaxation=tiny, backend=backend)
    assert not torch.isnan(judged).any()
    assert (judged > 0).any()


@pytest.mark.parametrize(
    ("chain", "field", "value"),
    [(chain, field, math.nan) for chain in ("draft", "target") for field in ("mean", "log_std", "path_log_std")]
    + [("x", None, math.nan), ("target", "log_std", -math.inf), ("draft", "log_std", -math.inf)],
)
def test_a_row_that_cannot_be_judged_spoils_no_other(backend, kernel_device, chain, field, value):
    arguments = dict(zip(("x", "draft", "target"), on(kernel_device, *random_chains(5, 3, 5))))
    clean = log_density_ratio(**arguments, backend=backend)
    tensor = (arguments["x"] if field is None else getattr(arguments[chain], field)).clone()
    tensor[2] = value
    arguments[chain] = tensor if field is None else arguments[chain]._replace(**{field: tensor})
    ratio = log_density_ratio(**arguments, backend=backend)
    assert ratio[2] == -math.inf
    others = torch.tensor([0, 1, 3, 4], device=kernel_device)
    assert torch.equal(ratio[others], clean[others])


def test_both_temperatures_zero(backend, kernel_device):
    x, draft, target = on(kernel_device, *random_chains(3, 4, 7))
    cold = (c._replace(log_std=torch.full_like(x, -math.inf)) for c in (draft, target))
    assert (log_density_ratio(x, *cold, backend=backend) == -math.inf).all()


@pytest.mark.parametrize("channels", [1, 5, 16, 256])
def test_a_row_depends_on_neither_its_batch_nor_its_place(backend, kernel_device, channels):
    x, draft, target = on(kernel_device, *random_chains(rows := 40000 // (channels + 55), channels, 8))
    ratio = log_density_ratio(x, draft, target, backend=backend)
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    for part in (shuffled, shuffled[:3], slice(rows - 1, rows), slice(1, rows - 9)):
        few = log_density_ratio(x[part], take(draft, part), take(target, part), backend=backend)
        assert torch.equal(ratio[part], few)


@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (127, 16), (130, 17), (9, 255)])
def test_every_output_is_written_and_nothing_beside_it(backend, kernel_device, monkeypatch, rows, channels):
    chains = on(kernel_device, *random_chains(rows, channels, 9))
    expected = log_density_ratio(*chains, backend=backend)
    memory = guarded_outputs(monkeypatch, module_of(backend, "log_density_ratio"), 0)
    assert torch.equal(log_density_ratio(*chains, backend=backend), expected)
    assert len(memory) == 1
    assert_walls_stand(memory, 0)


def test_inputs_stay_and_nothing_is_recorded(backend, kernel_device):
    x, draft, target = on(kernel_device, *judged_chains(20, 5, 7))
    x.requires_grad_()
    before = [v.detach().clone() for v in (x, *draft, *target)]
    assert not log_density_ratio(x, draft, target, backend=backend).requires_grad
    assert all(map(torch.equal, before, (x, *draft, *target)))


@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_one_launch(backend, kernel_device, monkeypatch, rows):
    launches = count_launches(monkeypatch, backend, "log_density_ratio")
    check_ratio(backend, *on(kernel_device, *random_chains(rows, 5, 0)))
    assert len(launches) == min(rows, 1)
