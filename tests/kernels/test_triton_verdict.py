"""The Triton kernel of accept_reject against the definition in float64, both ways to redraw.

A program of the interpreter takes some 20 ms, so rows are few and chosen for what becomes of them.
"""

import math

import pytest
import torch

from cspd_kernels import Denoised, accept_reject
from cspd_kernels.noise import uniforms
from cspd_kernels.testing import random_chains

from verdicts import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    LINES,
    CountedKernel,
    assert_verdict,
    assert_walls_stand,
    cast,
    check_verdict,
    equal,
    guarded_outputs,
    judged_chains,
    laid_out,
    ratio_and_scale,
    some_of_each,
    take,
)  # fmt: skip

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from dispatch_modes import Inside

from cspd_kernels.ops.accept_reject import reference
from cspd_kernels.ops.accept_reject import triton as backend

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

RESIDUALS = ["rejection", "closed_form"]
SEEDS = [0, 2**31, 2**32 - 1, 2**63 + 5, 2**64 - 1]
FAR_ROWS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**62 + 7, 2**63 - 1]


def on(device, x, draft, target, rows=None):
    moved = x.to(device), cast(draft, device), cast(target, device)
    return moved if rows is None else (*moved, rows.to(device))


def chosen(device, channels, seed, outcomes, residual, count=1, max_tries=40, many=False, **options):
    """(x, draft, target, rows) of rows with certain outcomes, found with the torch backend, and shuffled.

    With ``many`` the models are close and tokens far, so that a redraw takes some thirty tries.
    """
    x, draft, target = judged_chains(3000, channels, seed, residual == "closed_form")
    if many:
        x, draft, target = random_chains(3000, channels, seed, shift=0.1 * channels**-0.5, scale=0.0)
        draft = draft._replace(path_log_std=target.path_log_std)
        x[5:] += 100 * (draft.mean - target.mean)[5:]
    verdict = accept_reject(x, draft, target, seed=0, residual=residual, max_tries=max_tries, **options)
    rows = some_of_each(verdict, outcomes, count)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return on(device, x[rows], take(draft, rows), take(target, rows), rows)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_agrees_with_the_definition(triton_device, channels, residual):
    options = {"relaxation": 0.7, "sigma": "released" if channels % 2 else "paper", "residual": residual}
    outcomes = [0, 1, 2, 5, 9] if residual == "rejection" else [0, 1]
    x, draft, target, rows = chosen(triton_device, channels, channels, outcomes, count=1, **options)
    verdict = check_verdict(x, draft, target, rows=rows, max_tries=7, unsure=0, **options)
    assert set(verdict.tries.tolist()) == ({0, 1, 2, 5, -1} if residual == "rejection" else {0, 1})


@pytest.mark.parametrize("residual", RESIDUALS)
def test_agrees_with_the_definition_row_after_row(triton_device, residual):
    """As they come, one program after another, with a number of rows that fills none."""
    chains = on(triton_device, *judged_chains(37, 6, 0, residual == "closed_form"))
    verdict = check_verdict(*chains, residual=residual, seed=3)
    assert 5 < verdict.accepted.sum() < 32


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows(triton_device, rows):
    chains = on(triton_device, *judged_chains(rows, 5, rows))
    assert len(check_verdict(*chains, seed=1).tries) == rows


def test_tokens_without_channels(triton_device):
    chains = on(triton_device, *random_chains(4, 0, 0))
    verdict = accept_reject(*chains, seed=0, backend="triton")
    assert verdict.token.shape == (4, 0)
    assert torch.equal(verdict.accepted.cpu(), accept_reject(*on("cpu", *chains), seed=0).accepted)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("sigma", ["paper", "released"])
def test_relaxation_per_token_is_for_the_accept_test_alone(triton_device, residual, sigma):
    x, draft, target = on(triton_device, *judged_chains(12, 4, 1, residual == "closed_form"))
    against = -1.5 if sigma == "paper" else 1.5  # so that some are rejected at any relaxation
    draft = draft._replace(path_log_std=target.path_log_std + against)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        relaxation = torch.linspace(0.1, 8, 12, device=triton_device).to(dtype)
        options = {"relaxation": relaxation, "residual": residual, "sigma": sigma}
        verdict = check_verdict(x, draft, target, seed=1, **options)
        assert 0 < verdict.accepted.sum() < 10
    number = accept_reject(x, draft, target, seed=1, relaxation=8.0, residual=residual, sigma=sigma, backend="triton")
    redrawn = (number.tries > 0) & (verdict.tries > 0)
    assert torch.equal(number.tries[redrawn], verdict.tries[redrawn])


@pytest.mark.parametrize(("channels", "at_once"), [(3, 32), (16, 8), (64, 4)])
def test_fewer_tries_are_a_prefix(triton_device, channels, at_once):
    """The kernel looks at ``at_once`` tries together; none beyond the last is kept, and none is left out."""
    tries = [0, 1, 3, 4, 5, at_once, at_once + 1, 2 * at_once]
    x, draft, target, rows = chosen(triton_device, channels, 7, tries, "rejection", max_tries=100, many=True)
    full = check_verdict(x, draft, target, rows=rows, unsure=0)
    assert sorted(full.tries.tolist()) == sorted(tries)
    for most in (0, 1, 3, 4, 5, at_once - 1, at_once, at_once + 1):
        few = accept_reject(x, draft, target, seed=0, rows=rows, max_tries=most, backend="triton")
        assert torch.equal(few.tries, torch.where(full.tries <= most, full.tries, -1))
        kept = few.tries >= 0
        assert torch.equal(few.token[kept], full.token[kept])
        assert torch.equal(few.token[~kept], target.sample[~kept])


@pytest.mark.parametrize("max_tries", [33, 100])
def test_the_last_try_counts_and_none_after_it(triton_device, max_tries):
    tries = [max_tries, max_tries + 1]
    x, draft, target, rows = chosen(triton_device, 2, 8, tries, "rejection", max_tries=max_tries + 1, many=True)
    verdict = check_verdict(x, draft, target, rows=rows, max_tries=max_tries, unsure=0)
    assert sorted(verdict.tries.tolist()) == [-1, max_tries]


@pytest.mark.parametrize("most", [2**31 - 1, 2**31, 2**70])
def test_any_number_of_tries_may_be_allowed(triton_device, most):
    x, draft, target, rows = chosen(triton_device, 3, 9, [0, 2, 34], "rejection", max_tries=100, many=True)
    check_verdict(x, draft, target, rows=rows, max_tries=most, unsure=0)


@pytest.mark.parametrize("max_tries", [0, 1, 2])
def test_the_closed_form_takes_one_try(triton_device, max_tries):
    x, draft, target, rows = chosen(triton_device, 5, 10, [0, 1], "closed_form", count=2)
    options = {"max_tries": max_tries, "residual": "closed_form"}
    verdict = check_verdict(x, draft, target, rows=rows, unsure=0, **options)
    assert sorted(verdict.tries.tolist()) == ([0, 0, 1, 1] if max_tries else [-1, -1, 0, 0])


@pytest.mark.parametrize("seed", SEEDS)
def test_any_seed_and_any_address(triton_device, seed):
    rows = torch.tensor(FAR_ROWS, device=triton_device)
    for residual in RESIDUALS:
        chains = on(triton_device, *judged_chains(8, 5, 11, residual == "closed_form"))
        verdict = check_verdict(*chains, seed=seed, rows=rows, residual=residual)
        assert 0 < verdict.accepted.sum() < 8


def test_rows_default_to_their_numbers(triton_device):
    chains = on(triton_device, *judged_chains(6, 3, 6))
    default, given = (
        accept_reject(*chains, seed=1, rows=rows, backend="triton")
        for rows in (None, torch.arange(6, device=triton_device))
    )
    equal(default, given)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("channels", [5, 129])
def test_a_token_depends_on_neither_its_batch_nor_its_place(triton_device, residual, channels):
    x, draft, target = on(triton_device, *judged_chains(11, channels, 12, residual == "closed_form"))
    rows = torch.arange(11, device=triton_device) * 7 + 2**35
    verdict = accept_reject(x, draft, target, seed=9, rows=rows, residual=residual, backend="triton")
    assert 0 < verdict.accepted.sum() < 11
    shuffled = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(triton_device)
    for part in (shuffled, shuffled[:2], slice(10, 11)):
        few = (x[part], take(draft, part), take(target, part))
        again = accept_reject(*few, seed=9, rows=rows[part], residual=residual, backend="triton")
        equal([v[part] for v in verdict], again)


@pytest.mark.parametrize("matrix", LAYOUTS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_any_strides(triton_device, matrix, residual):
    line = LINES[list(LINES)[len(matrix) % 3]]
    x, draft, target, rows = chosen("cpu", 5, 13, [0, 1], residual, count=2)
    x, draft, target = laid_out(x, draft, target, LAYOUTS[matrix], line)
    rows, relaxation = line(rows), line(torch.linspace(0.5, 2, 4))
    if triton_device.type == "cpu":  # moving would undo it; the GPU's tests lay tensors out there
        check_verdict(x, draft, target, rows=rows, relaxation=relaxation, residual=residual)
    copies = (x.contiguous(), *(Denoised(*(v.contiguous() for v in c)) for c in (draft, target)), rows.contiguous())
    copies, relaxation = on(triton_device, *copies), relaxation.contiguous().to(triton_device)
    check_verdict(*copies[:3], rows=copies[3], relaxation=relaxation, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_any_floating_type_is_judged_in_float32(triton_device, dtype, residual):
    x, draft, target = on(triton_device, *judged_chains(9, 7, 14, residual == "closed_form"))
    narrow = x.to(dtype), cast(draft, dtype), cast(target, dtype)
    wide = narrow[0].float(), *(cast(chain, torch.float32) for chain in narrow[1:])
    equal(check_verdict(*narrow, residual=residual), accept_reject(*wide, seed=0, residual=residual, backend="triton"))


# --- comparisons within rounding ---


def test_flips_within_rounding_are_balanced(triton_device):
    """log r = log u but for the last bit: the backends disagree where it rounds differently, either way alike."""
    x, draft, target = judged_chains(600, 4, 15)
    rows = torch.arange(600)
    target = target._replace(path_log_std=torch.zeros(600))
    ratio, _ = ratio_and_scale(x, draft._replace(path_log_std=torch.zeros(600)), target)
    log_u = uniforms(0, rows, 0).double().log()
    draft = draft._replace(path_log_std=(log_u - ratio).float())
    _, scale = ratio_and_scale(x, draft, target)
    verdict = accept_reject(*on(triton_device, x, draft, target), seed=0, max_tries=0, backend="triton")
    gap = verdict.log_ratio.cpu() - log_u
    assert (gap.abs() <= 1e-6 * (1 + scale)).all()  # all of them sit in the band
    accepted = reference.accept_reject(x, draft, target, 0, rows, max_tries=0)[1]
    more, fewer = ((verdict.accepted.cpu() & ~accepted).sum(), (~verdict.accepted.cpu() & accepted).sum())
    assert more + fewer <= 300
    library = 0 if triton_device.type == "cpu" else 60  # a device's logarithm may err to one side in the last bit
    assert abs(int(more) - int(fewer)) <= 3.9 * math.sqrt(int(more) + int(fewer) + 1) + library  # p = 1e-4
    assert 200 - library < verdict.accepted.sum() < 400 + library


def test_flips_of_the_redraw_within_rounding_are_balanced(triton_device):
    """The first proposal's log r_1 = -log(1 - u) but for the last bits."""
    count = 80
    rows, zeros = torch.arange(count), torch.zeros(count)
    x, draft, target = judged_chains(count, 4, 16, same_sigma=True)
    draft, target = (chain._replace(path_log_std=zeros) for chain in (draft, target))
    ratio, _ = ratio_and_scale(reference.propose(target, 0, rows, 1), draft, target)
    draft = draft._replace(path_log_std=(-torch.log1p(-uniforms(0, rows, 1).double()) - ratio).float())
    x = 1e3 * (draft.mean - target.mean).sign()  # far on the draft's side: every token is rejected
    verdict = accept_reject(*on(triton_device, x, draft, target), seed=0, max_tries=1, backend="triton")
    assert not verdict.accepted.any()
    kept = int((verdict.tries == 1).sum())
    assert abs(kept - count / 2) <= 3.9 * math.sqrt(count) / 2  # p = 1e-4


U_IS_1 = {0: 45019215, 1: 29844952}  # rows whose uniform of try 0 and of try 1 is 1 at seed 0


def test_the_largest_uniform_accepts_identical_models_and_draws_the_nearest_token(triton_device):
    rows = torch.tensor(list(U_IS_1.values()), device=triton_device)
    assert [float(uniforms(0, rows[[k]], k)) for k in (0, 1)] == [1.0, 1.0]
    x, draft, target = on(triton_device, *judged_chains(2, 3, 17, same_sigma=True))
    verdict = accept_reject(x, draft, draft, seed=0, rows=rows, backend="triton")
    assert verdict.accepted.all()
    x = draft.mean + 100 * (draft.mean - target.mean)
    verdict = check_verdict(x, draft, target, rows=rows, residual="closed_form")
    assert verdict.tries.tolist() == [1, 1]
    certain = draft._replace(path_log_std=target.path_log_std + 40)  # float32's 1 - exp(-log r_1) is 1
    x = draft.mean + 1e4 * (draft.mean - target.mean)
    verdict = accept_reject(x, certain, target, seed=0, rows=rows, max_tries=1, backend="triton")
    assert verdict.tries.tolist() == [1, 1]


# --- what a backend does beside computing ---


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize(("residual", "max_tries"), [("rejection", 2), ("closed_form", 1), ("closed_form", 0)])
@pytest.mark.parametrize("channels", [3, 17])
def test_every_output_is_written_and_nothing_beside_it(triton_device, monkeypatch, fill, residual, max_tries, channels):
    outcomes = [0, 1, 5] if residual == "rejection" else [0, 1]
    x, draft, target, rows = chosen(triton_device, channels, 18, outcomes, residual, max_tries=40)
    options = {"rows": rows, "residual": residual, "max_tries": max_tries}
    memory = guarded_outputs(monkeypatch, backend, fill)
    check_verdict(x, draft, target, unsure=0, **options)
    assert len(memory) == 4
    assert_walls_stand(memory, fill)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_inputs_stay_and_nothing_is_recorded(triton_device, residual):
    x, draft, target = on(triton_device, *judged_chains(4, 3, 13, residual == "closed_form"))
    x.requires_grad_()
    kept = (x, *draft, *target)
    before = [v.detach().clone() for v in kept]
    verdict = accept_reject(x, draft, target, seed=0, residual=residual, backend="triton")
    assert all(map(torch.equal, before, kept))
    assert not verdict.token.requires_grad
    assert not any(verdict.token.data_ptr() == v.data_ptr() for v in kept)


def test_the_drafts_sample_is_not_looked_at(triton_device):
    x, draft, target = on(triton_device, *judged_chains(4, 3, 0))
    one, other = (
        accept_reject(x, d, target, seed=0, backend="triton") for d in (draft, draft._replace(sample=None))
    )  # fmt: skip
    equal(one, other)


class OnlyAllocates(Inside):
    """Fails where a device would get anything to do but the one kernel."""

    def seen(self, func, args):
        assert func.overloadpacket.__name__ == "empty", func


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("rows", "launches"), [(0, 0), (1, 1), (5000, 1)])
def test_one_launch_and_nothing_else(triton_device, monkeypatch, residual, per_token, rows, launches):
    x, draft, target = on(triton_device, *judged_chains(rows, 5, 0, same_sigma=True))
    address = torch.arange(rows, device=triton_device)
    relaxation = torch.ones(rows, device=triton_device) if per_token else 1.0
    counted = CountedKernel()
    monkeypatch.setattr(backend, "_accept_reject_kernel", counted)
    with OnlyAllocates():
        backend.accept_reject(x, draft, target, 0, address, relaxation, "paper", 100, residual)
        if not per_token and residual == "rejection":  # the others look at values of CPU tensors
            accept_reject(x, draft, target, seed=0, rows=address, backend="triton")
            launches *= 2
    assert counted.launches == launches


def test_the_check_for_other_launches_can_fail():
    chains = judged_chains(3, 5, 0)
    with OnlyAllocates(), pytest.raises(AssertionError, match="arange"):
        accept_reject(*chains, seed=0)


def test_a_verdict_that_differs_in_one_field_shows():
    """The comparison is able to see each field."""
    chains, rows = judged_chains(50, 4, 19), torch.arange(50)
    verdict = accept_reject(*chains, seed=0)
    assert_verdict(verdict, *chains, seed=0, rows=rows)
    for field in verdict._fields:
        value = getattr(verdict, field).clone()
        value[7] = ~value[7] if field == "accepted" else value[7] + (1 if field == "tries" else 1e-3)
        with pytest.raises(AssertionError):
            assert_verdict(verdict._replace(**{field: value}), *chains, seed=0, rows=rows)
