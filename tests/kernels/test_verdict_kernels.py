"""The kernels of accept_reject against the definition in float64, both ways to redraw.

A program of Triton's interpreter takes some 20 ms, so rows are few and chosen for what becomes of them.
"""

import math

import pytest
import torch
from seeds import SEEDS, seed_tensor
from slow import mostly_slow, slow, slowly_interpreted
from verdicts import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    LINES,
    cast,
    check_verdict,
    chosen,
    equal,
    judged_chains,
    laid_out,
    laid_out_there,
    on,
    ratio_and_scale,
    take,
)

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.noise import uniforms
from cspd_kernels.ops.accept_reject import reference
from cspd_kernels.testing import random_chains

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

RESIDUALS = ["rejection", "closed_form"]
FAR_ROWS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**62 + 7, 2**63 - 1]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_agrees_with_the_definition(backend, kernel_device, channels, residual):
    options = {"relaxation": 0.7, "sigma": "released" if channels % 2 else "paper", "residual": residual}
    outcomes = [0, 1, 2, 5, 9] if residual == "rejection" else [0, 1]
    x, draft, target, rows = chosen(kernel_device, channels, channels, outcomes, count=1, **options)
    verdict = check_verdict(backend, x, draft, target, rows=rows, max_tries=7, unsure=0, **options)
    assert set(verdict.tries.tolist()) == ({0, 1, 2, 5, -1} if residual == "rejection" else {0, 1})


@pytest.mark.parametrize("residual", RESIDUALS)
def test_agrees_with_the_definition_row_after_row(backend, kernel_device, residual):
    """As they come, one program after another, with a number of rows that fills none."""
    chains = on(kernel_device, *judged_chains(37, 6, 0, residual == "closed_form"))
    verdict = check_verdict(backend, *chains, residual=residual, seed=3)
    assert 5 < verdict.accepted.sum() < 32


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows(backend, kernel_device, rows):
    chains = on(kernel_device, *judged_chains(rows, 5, rows))
    assert len(check_verdict(backend, *chains, seed=1).tries) == rows


def test_tokens_without_channels(backend, kernel_device):
    chains = on(kernel_device, *random_chains(4, 0, 0))
    verdict = accept_reject(*chains, seed=0, backend=backend)
    assert verdict.token.shape == (4, 0)
    assert torch.equal(verdict.accepted.cpu(), accept_reject(*on("cpu", *chains), seed=0).accepted)


@slowly_interpreted
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("sigma", ["paper", "released"])
def test_relaxation_per_token_is_for_the_accept_test_alone(backend, kernel_device, residual, sigma):
    x, draft, target = on(kernel_device, *judged_chains(12, 4, 1, residual == "closed_form"))
    against = -1.5 if sigma == "paper" else 1.5  # so that some are rejected at any relaxation
    draft = draft._replace(path_log_std=target.path_log_std + against)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        relaxation = torch.linspace(0.1, 8, 12, device=kernel_device).to(dtype)
        options = {"relaxation": relaxation, "residual": residual, "sigma": sigma}
        verdict = check_verdict(backend, x, draft, target, seed=1, **options)
        assert 0 < verdict.accepted.sum() < 10
    number = accept_reject(x, draft, target, seed=1, relaxation=8.0, residual=residual, sigma=sigma, backend=backend)
    redrawn = (number.tries > 0) & (verdict.tries > 0)
    assert torch.equal(number.tries[redrawn], verdict.tries[redrawn])


@slowly_interpreted
@pytest.mark.parametrize(("channels", "at_once"), [(3, 32), (16, 8), (64, 4)])
def test_fewer_tries_are_a_prefix(backend, kernel_device, channels, at_once):
    """The kernel looks at ``at_once`` tries together; none beyond the last is kept, and none is left out."""
    tries = [0, 1, 3, 4, 5, at_once, at_once + 1, 2 * at_once]
    x, draft, target, rows = chosen(kernel_device, channels, 7, tries, "rejection", max_tries=100, many=True)
    full = check_verdict(backend, x, draft, target, rows=rows, unsure=0)
    assert sorted(full.tries.tolist()) == sorted(tries)
    for most in (0, 1, 3, 4, 5, at_once - 1, at_once, at_once + 1):
        few = accept_reject(x, draft, target, seed=0, rows=rows, max_tries=most, backend=backend)
        assert torch.equal(few.tries, torch.where(full.tries <= most, full.tries, -1))
        kept = few.tries >= 0
        assert torch.equal(few.token[kept], full.token[kept])
        assert torch.equal(few.token[~kept], target.sample[~kept])


@pytest.mark.parametrize("max_tries", [33, 100])
def test_the_last_try_counts_and_none_after_it(backend, kernel_device, max_tries):
    tries = [max_tries, max_tries + 1]
    x, draft, target, rows = chosen(kernel_device, 2, 8, tries, "rejection", max_tries=max_tries + 1, many=True)
    verdict = check_verdict(backend, x, draft, target, rows=rows, max_tries=max_tries, unsure=0)
    assert sorted(verdict.tries.tolist()) == [-1, max_tries]


@pytest.mark.parametrize("most", [2**31 - 1, 2**31, 2**70])
def test_any_number_of_tries_may_be_allowed(backend, kernel_device, most):
    x, draft, target, rows = chosen(kernel_device, 3, 9, [0, 2, 34], "rejection", max_tries=100, many=True)
    check_verdict(backend, x, draft, target, rows=rows, max_tries=most, unsure=0)


@pytest.mark.parametrize("max_tries", [0, 1, 2])
def test_the_closed_form_takes_one_try(backend, kernel_device, max_tries):
    x, draft, target, rows = chosen(kernel_device, 5, 10, [0, 1], "closed_form", count=2)
    options = {"max_tries": max_tries, "residual": "closed_form"}
    verdict = check_verdict(backend, x, draft, target, rows=rows, unsure=0, **options)
    assert sorted(verdict.tries.tolist()) == ([0, 0, 1, 1] if max_tries else [-1, -1, 0, 0])


@pytest.mark.parametrize("seed", mostly_slow(SEEDS, fast=(SEEDS[0], SEEDS[-1])))
def test_any_seed_and_any_address(backend, kernel_device, seed):
    rows = torch.tensor(FAR_ROWS, device=kernel_device)
    for residual in RESIDUALS:
        chains = on(kernel_device, *judged_chains(8, 5, 11, residual == "closed_form"))
        verdict = check_verdict(backend, *chains, seed=seed, rows=rows, residual=residual)
        assert 0 < verdict.accepted.sum() < 8
        tensor = seed_tensor(seed, kernel_device)
        equal(accept_reject(*chains, seed=tensor, rows=rows, residual=residual, backend=backend), verdict)


@slowly_interpreted
def test_a_seed_tensor_may_lie_anywhere(backend, kernel_device):
    """At an address that 16 does not divide, and of no or two axes."""
    chains = on(kernel_device, *judged_chains(8, 5, 11))
    expected = accept_reject(*chains, seed=2**63 + 5, backend=backend)
    for seed in torch.cat([seed_tensor(2**63 + 5, kernel_device)] * 3).split(1):
        for shape in ((), (1,), (1, 1)):
            equal(accept_reject(*chains, seed=seed.view(shape), backend=backend), expected)


def test_rows_default_to_their_numbers(backend, kernel_device):
    chains = on(kernel_device, *judged_chains(6, 3, 6))
    default, given = (
        accept_reject(*chains, seed=1, rows=rows, backend=backend)
        for rows in (None, torch.arange(6, device=kernel_device))
    )
    equal(default, given)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("channels", [5, slow(129)])
def test_a_token_depends_on_neither_its_batch_nor_its_place(backend, kernel_device, residual, channels):
    x, draft, target = on(kernel_device, *judged_chains(11, channels, 12, residual == "closed_form"))
    rows = torch.arange(11, device=kernel_device) * 7 + 2**35
    verdict = accept_reject(x, draft, target, seed=9, rows=rows, residual=residual, backend=backend)
    assert 0 < verdict.accepted.sum() < 11
    shuffled = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    for part in (shuffled, shuffled[:2], slice(10, 11)):
        few = (x[part], take(draft, part), take(target, part))
        again = accept_reject(*few, seed=9, rows=rows[part], residual=residual, backend=backend)
        equal([v[part] for v in verdict], again)


@pytest.mark.parametrize("channels", [1, 5, 16, slow(200)])
def test_the_ratio_is_that_of_log_density_ratio_bit_by_bit(backend, kernel_device, channels):
    x, draft, target = on(kernel_device, *judged_chains(21, channels, 14))
    for relaxation in (1.0, 3.0, torch.linspace(0.5, 2, 21, device=kernel_device)):
        verdict = accept_reject(x, draft, target, seed=0, relaxation=relaxation, max_tries=0, backend=backend)
        ratio = log_density_ratio(x, draft, target, relaxation=relaxation, backend=backend)
        assert torch.equal(verdict.log_ratio, ratio)


@pytest.mark.parametrize("matrix", mostly_slow(LAYOUTS, fast=("both", "one row", "unaligned")))
@pytest.mark.parametrize("residual", RESIDUALS)
def test_any_strides(backend, kernel_device, matrix, residual):
    line = LINES[list(LINES)[len(matrix) % 3]]
    x, draft, target, rows = chosen("cpu", 5, 13, [0, 1], residual, count=2)
    x, draft, target = laid_out(x, draft, target, LAYOUTS[matrix], line)
    rows, relaxation = line(rows), line(torch.linspace(0.5, 2, 4))
    options, strided = {"residual": residual}, None
    if kernel_device.type == "cpu":  # moving would undo it; the GPU's tests lay tensors out there
        strided = check_verdict(backend, x, draft, target, rows=rows, relaxation=relaxation, **options)
    copies = (x.contiguous(), *(Denoised(*(v.contiguous() for v in c)) for c in (draft, target)), rows.contiguous())
    copies, relaxation = on(kernel_device, *copies), relaxation.contiguous().to(kernel_device)
    verdict = check_verdict(backend, *copies[:3], rows=copies[3], relaxation=relaxation, **options)
    equal(strided or verdict, verdict)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_strides_of_every_operand_are_its_own(backend, kernel_device, residual):
    """Each in another layout than the others, in the accept test, the redraw and the fall-back."""
    x, draft, target, rows = chosen("cpu", 5, 20, [0, 1, 4] if residual == "rejection" else [0, 1], residual)
    names = ("every second row", "every third channel", "both", "transposed", "unaligned", "transposed with gaps")
    for turn in range(len(names)):
        one, two, three, four, five, six = (LAYOUTS[name] for name in names[turn:] + names[:turn])
        x, sample = one(x), six(target.sample)
        draft = Denoised(x, two(draft.mean), three(draft.log_std), LINES["every third"](draft.path_log_std))
        target = Denoised(sample, four(target.mean), five(target.log_std), target.path_log_std.clone())
        fields = [laid_out_there(v, lambda v: v, kernel_device) for v in (x, *draft, *target)]
        for most in (0, 1):
            chains = fields[0], Denoised(*fields[1:5]), Denoised(*fields[5:])
            options = {"rows": rows.to(kernel_device), "max_tries": most, "residual": residual}
            check_verdict(backend, *chains, unsure=0, **options)


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, fast=DTYPES[1:3]))
@pytest.mark.parametrize("residual", RESIDUALS)
def test_any_floating_type_is_judged_in_float32(backend, kernel_device, dtype, residual):
    x, draft, target = on(kernel_device, *judged_chains(9, 7, 14, residual == "closed_form"))
    narrow = x.to(dtype), cast(draft, dtype), cast(target, dtype)
    wide = narrow[0].float(), *(cast(chain, torch.float32) for chain in narrow[1:])
    expected = accept_reject(*wide, seed=0, residual=residual, backend=backend)
    equal(check_verdict(backend, *narrow, residual=residual), expected)


# --- comparisons within rounding ---


@slowly_interpreted
def test_flips_within_rounding_are_balanced(backend, kernel_device):
    """log r = log u but for the last bit: the backends disagree where it rounds differently, either way alike."""
    x, draft, target = judged_chains(600, 4, 15)
    rows = torch.arange(600)
    target = target._replace(path_log_std=torch.zeros(600))
    ratio, _ = ratio_and_scale(x, draft._replace(path_log_std=torch.zeros(600)), target)
    log_u = uniforms(0, rows, 0).double().log()
    draft = draft._replace(path_log_std=(log_u - ratio).float())
    _, scale = ratio_and_scale(x, draft, target)
    verdict = accept_reject(*on(kernel_device, x, draft, target), seed=0, max_tries=0, backend=backend)
    gap = verdict.log_ratio.cpu() - log_u
    assert (gap.abs() <= 1e-6 * (1 + scale)).all()  # all of them sit in the band
    accepted = reference.accept_reject(x, draft, target, 0, rows, max_tries=0)[1]
    more, fewer = ((verdict.accepted.cpu() & ~accepted).sum(), (~verdict.accepted.cpu() & accepted).sum())
    assert more + fewer <= 300
    library = 0 if kernel_device.type == "cpu" else 60  # a device's logarithm may err to one side in the last bit
    assert abs(int(more) - int(fewer)) <= 3.9 * math.sqrt(int(more) + int(fewer) + 1) + library  # p = 1e-4
    assert 200 - library < verdict.accepted.sum() < 400 + library


@slowly_interpreted
def test_flips_of_the_redraw_within_rounding_are_balanced(backend, kernel_device):
    """The first proposal's log r_1 = -log(1 - u) but for the last bits."""
    count = 80
    rows, zeros = torch.arange(count), torch.zeros(count)
    x, draft, target = judged_chains(count, 4, 16, same_sigma=True)
    draft, target = (chain._replace(path_log_std=zeros) for chain in (draft, target))
    ratio, _ = ratio_and_scale(reference.propose(target, 0, rows, 1), draft, target)
    draft = draft._replace(path_log_std=(-torch.log1p(-uniforms(0, rows, 1).double()) - ratio).float())
    x = 1e3 * (draft.mean - target.mean).sign()  # far on the draft's side: every token is rejected
    verdict = accept_reject(*on(kernel_device, x, draft, target), seed=0, max_tries=1, backend=backend)
    assert not verdict.accepted.any()
    kept = int((verdict.tries == 1).sum())
    assert abs(kept - count / 2) <= 3.9 * math.sqrt(count) / 2  # p = 1e-4


U_IS_1 = {0: 45019215, 1: 29844952}  # rows whose uniform of try 0 and of try 1 is 1 at seed 0


def test_the_largest_uniform_accepts_identical_models_and_draws_the_nearest_token(backend, kernel_device):
    rows = torch.tensor(list(U_IS_1.values()), device=kernel_device)
    assert [float(uniforms(0, rows[[k]], k)) for k in (0, 1)] == [1.0, 1.0]
    x, draft, target = on(kernel_device, *judged_chains(2, 3, 17, same_sigma=True))
    verdict = accept_reject(x, draft, draft, seed=0, rows=rows, backend=backend)
    assert verdict.accepted.all()
    x = draft.mean + 100 * (draft.mean - target.mean)
    verdict = check_verdict(backend, x, draft, target, rows=rows, residual="closed_form")
    assert verdict.tries.tolist() == [1, 1]
    certain = draft._replace(path_log_std=target.path_log_std + 40)  # float32's 1 - exp(-log r_1) is 1
    x = draft.mean + 1e4 * (draft.mean - target.mean)
    verdict = accept_reject(x, certain, target, seed=0, rows=rows, max_tries=1, backend=backend)
    assert verdict.tries.tolist() == [1, 1]
