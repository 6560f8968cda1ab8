"""Several candidates of a token in every backend, against the definition in float64.

A program of Triton's interpreter takes some 5 ms a candidate, so that rows are few where it judges.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from candidates import assert_candidates, own_chains, shared_chains
from slow import mostly_slow
from verdicts import DTYPES, cast, count_launches, judged_chains, on

from cspd_kernels import CandidateVerdict, Denoised, DenoisedInParallel, Verdict, accept_reject, log_density_ratio
from cspd_kernels.noise import CANDIDATE_STRIDE, uniforms
from cspd_kernels.ops.accept_reject import MOST_CANDIDATES, reference, torch_backend

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

RESIDUALS = ["rejection", "closed_form"]
SIZES = [  # channels, candidates, the way to redraw
    (1, 2, "rejection"), (3, 16, "closed_form"), (5, 1, "rejection"), (16, 4, "rejection"), (16, 4, "closed_form"),
    (17, 3, "closed_form"), (100, 3, "rejection"), (256, 2, "closed_form"),
]  # fmt: skip
U_IS_1, U_IS_LEAST = 45019215, 1231707775  # rows whose uniform of try 0 is 1, and 2^-33, at seed 0


@pytest.fixture(params=["definition", "torch", "torch on a device", "triton", "cuda"])
def judge(request, monkeypatch, device_of):
    """``judge(x, draft, target, **options)``: a backend's verdict, from and on the CPU; ``judge.rows`` are cheap."""
    name = request.param
    kernels = name in ("triton", "cuda")
    device = device_of(name) if kernels else torch.device("cpu")
    if name in ("definition", "torch on a device"):
        run = reference.accept_reject if name == "definition" else partial(torch_backend.accept_reject, compact=False)
        monkeypatch.setattr("cspd_kernels.ops.accept_reject.remembered", lambda *_: run)

    def judge(x, draft, target, *, seed=0, rows=None, relaxation=1.0, **options):
        relaxation = relaxation.to(device) if isinstance(relaxation, torch.Tensor) else relaxation
        options |= {"rows": rows if rows is None else rows.to(device), "relaxation": relaxation}
        options["backend"] = name if kernels else "torch"
        verdict = accept_reject(*on(device, x, draft, target), seed=seed, **options)
        return type(verdict)(*(v.cpu() for v in verdict))

    judge.rows, judge.kernels = 7 if kernels else 203, kernels
    return judge


def check(judge, x, draft, target, *, seed=0, rows=None, unsure=0.02, **options):
    verdict = judge(x, draft, target, seed=seed, rows=rows, **options)
    options.pop("target_sigma", None)
    rows = torch.arange(len(x)) if rows is None else rows
    assert_candidates(verdict, x, draft, target, seed=seed, rows=rows, unsure=unsure, **options)
    return verdict


def equal(a, b):
    assert type(a) is type(b)
    for name, u, v in zip(a._fields, a, b, strict=True):
        assert torch.equal(u, v), name


@pytest.mark.parametrize(("channels", "candidates", "residual"), mostly_slow(SIZES, fast=(SIZES[0], *SIZES[3:6])))
def test_chains_of_their_own(judge, channels, candidates, residual):
    """With path terms, and in every other size a relaxation per token and candidate and the released sign."""
    rows = judge.rows if candidates < 16 else min(judge.rows, 20)
    chains, options = own_chains(rows, candidates, channels, channels), {"residual": residual, "max_tries": 7}
    if channels % 2:
        relaxation = 0.6 + torch.rand(rows, candidates, generator=torch.Generator().manual_seed(0))
        options |= {"relaxation": relaxation, "sigma": "released"}
    verdict = check(judge, *chains, rows=torch.arange(rows) * 7 + 2**40, seed=2**63 + 5, **options)
    if rows > 100:
        assert set(verdict.candidate.tolist()) == set(range(-1, candidates))
        assert (verdict.tries > 0).any()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_shared_chain(judge, residual):
    """Fields of one candidate are those of all: nothing changes where they are spread or copied."""
    rows = max(judge.rows, 9)
    x, draft, target = shared_chains(rows, 4, 5, 1)
    few = {"residual": residual, "relaxation": torch.linspace(0.8, 1.2, rows), "max_tries": 3}
    verdict = check(judge, x, draft, target, **few)
    assert (verdict.candidate > 0).any()
    spread = [Denoised(*(v.expand(-1, 4, *v.shape[2:]) for v in chain)) for chain in (draft, target)]
    equal(judge(x, *spread, **few), verdict)
    copied = [Denoised(*(v.clone() for v in chain)) for chain in spread]
    few["relaxation"] = few["relaxation"][:, None].expand(-1, 4)
    equal(judge(x, *copied, **few), verdict)


LAYOUTS = {
    "candidates first": lambda v: v.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "every second": lambda v: torch.stack([v, torch.full_like(v, math.nan)], -1)[..., 0],
    "with gaps": lambda v: torch.cat([v, torch.full_like(v, math.nan)], 1)[:, : v.shape[1]],
    "unaligned": lambda v: v.new_full((v.numel() + 1,), math.nan)[1:].view_as(v).copy_(v),
    "bfloat16": lambda v: v.bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "residual"), [(own_chains, "rejection"), (shared_chains, "closed_form")])
def test_any_strides(judge, layout, make, residual):
    x, *chains = make(4, 3, 8, 2)
    narrow = layout == "bfloat16"
    if narrow:
        x, *chains = x.bfloat16().float(), *(cast(cast(c, torch.bfloat16), torch.float32) for c in chains)
    move, options = LAYOUTS[layout], {"residual": residual, "max_tries": 3}
    relaxation, rows = torch.linspace(0.6, 1.5, 12).view(4, 3), torch.stack([torch.arange(4)] * 2, 1)[:, 0]
    there = move(x), *(Denoised(*map(move, c)) for c in chains)
    verdict = check(judge, *there, rows=rows, relaxation=relaxation if narrow else move(relaxation), **options)
    if judge.kernels:  # the library adds channels in an order of its own
        equal(judge(x, *chains, rows=torch.arange(4), relaxation=relaxation, **options), verdict)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_floating_type_is_judged_in_float32(judge, dtype):
    x, *chains = own_chains(5, 3, 7, 3)
    narrow = x.to(dtype), *(cast(chain, dtype) for chain in chains)
    wide = narrow[0].float(), *(cast(chain, torch.float32) for chain in narrow[1:])
    equal(judge(*narrow, max_tries=3), judge(*wide, max_tries=3))


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("candidates", [1, 5])
def test_few_rows(judge, rows, candidates):
    check(judge, *own_chains(rows, candidates, 3, rows), residual="closed_form")


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_thousands_of_rows(compact, residual):
    x, draft, target = own_chains(4001, 6, 3, 4)
    run = partial(torch_backend.accept_reject, compact=compact)
    verdict = run(x, draft, target, 1, torch.arange(4001), 1.0, "paper", 20, residual)
    assert_candidates(verdict, x, draft, target, seed=1, rows=torch.arange(4001), max_tries=20, residual=residual)
    defined = reference.accept_reject(x, draft, target, 1, torch.arange(4001), 1.0, "paper", 20, residual)
    assert all(map(torch.equal, verdict, defined))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("channels", [3, 130])
def test_one_candidate_is_the_plain_verdict_bit_by_bit(judge, channels, residual):
    x, draft, target = judged_chains(judge.rows, channels, 5, residual == "closed_form")
    for relaxation in (1.0, torch.linspace(0.5, 2, judge.rows)):
        options = {"seed": 3, "relaxation": relaxation, "residual": residual, "max_tries": 9}
        plain = judge(x, draft, target, **options)
        assert isinstance(plain, Verdict)
        verdict = judge(x[:, None], *(Denoised(*(v[:, None] for v in c)) for c in (draft, target)), **options)
        assert isinstance(verdict, CandidateVerdict)
        equal(Verdict(verdict.token, verdict.accepted, verdict.tries, verdict.log_ratio[:, 0]), plain)
        assert torch.equal(verdict.candidate, plain.accepted.to(torch.int32) - 1)


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_every_ratio_is_that_of_log_density_ratio_bit_by_bit(backend, device_of):
    device = torch.device("cpu") if backend == "torch" else device_of(backend)
    x, *chains = on(device, *own_chains(9, 4, 17, 6))
    relaxation = torch.linspace(0.5, 2, 36, device=device).view(9, 4)
    ratio = accept_reject(x, *chains, seed=0, relaxation=relaxation, max_tries=0, backend=backend).log_ratio
    flat = x.flatten(0, 1), *(Denoised(*(v.flatten(0, 1) for v in c)) for c in chains)
    assert torch.equal(ratio.flatten(), log_density_ratio(*flat, relaxation=relaxation.flatten(), backend=backend))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_token_depends_on_neither_its_batch_nor_later_candidates(judge, residual):
    x, *chains = own_chains(12, 4, 5, 7)
    rows = torch.arange(12) * 3 + 2**35
    verdict = judge(x, *chains, rows=rows, residual=residual)
    for part in (torch.tensor([7, 0, 11]), torch.tensor([4])):
        few = x[part], *(Denoised(*(v[part] for v in c)) for c in chains)
        again = judge(*few, rows=rows[part], residual=residual)
        equal(CandidateVerdict(*(v[part] for v in verdict)), again)
    two = judge(x[:, :2], *(Denoised(*(v[:, :2] for v in c)) for c in chains), rows=rows, residual=residual)
    early = (verdict.candidate >= 0) & (verdict.candidate < 2)
    assert 0 < early.sum() < 12
    assert torch.equal(two.accepted, early)
    assert torch.equal(two.token[early], verdict.token[early])
    assert torch.equal(two.log_ratio, verdict.log_ratio[:, :2])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("field", "value"),
    [("x", math.inf), ("mean", math.nan), ("log_std", math.inf), ("log_std", -math.inf), ("path_log_std", -math.inf)],
)
def test_a_candidate_that_is_not_finite_is_never_accepted_and_spoils_no_other(judge, which, field, value):
    x, draft, target = own_chains(4, 3, 3, 8)
    draft = draft._replace(path_log_std=target.path_log_std - 1)
    clean = judge(x, draft, target, max_tries=2)
    tensor = (x if field == "x" else getattr(target, field)).clone()
    tensor[2, which] = value
    x, target = (tensor, target) if field == "x" else (x, target._replace(**{field: tensor}))
    verdict = judge(x, draft, target, max_tries=2, target_sigma=True)
    assert verdict.log_ratio[2, which] == -math.inf
    assert verdict.candidate[2] != which
    assert torch.isfinite(verdict.token).all()
    assert torch.equal(verdict.log_ratio[2].isfinite(), torch.arange(3) != which)
    others = torch.arange(4) != 2
    equal(CandidateVerdict(*(v[others] for v in verdict)), CandidateVerdict(*(v[others] for v in clean)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_after_a_candidate_that_is_not_finite_the_others_are_still_judged(judge, value):
    draft, target = chain_of([0.0, 0.0]), chain_of([1.0, 0.0])
    for last, candidate in ((9.0, 2), (-50.0, -1)):
        x = torch.tensor([[-50.0, 0.0], [0.0, value], [last, 0.0]])[None]
        verdict = judge(x, draft, target, residual="closed_form")
        assert verdict.candidate.tolist() == [candidate]
        assert verdict.tries.tolist() == [0 if candidate == 2 else 1]
        spoiled = draft.mean.expand(1, 3, 2).clone()
        spoiled[:, 1, 0] = value
        verdict = judge(x.nan_to_num(posinf=0), draft._replace(mean=spoiled), target, residual="closed_form")
        assert verdict.candidate.tolist() == [candidate]
        assert verdict.tries.tolist() == [0 if candidate == 2 else 1]


@pytest.mark.parametrize("residual", RESIDUALS)
def test_temperature_0_takes_the_targets_own_draw(judge, residual):
    x, draft, target = own_chains(5, 3, 4, 9)
    draft, target = (c._replace(log_std=torch.full_like(x, -math.inf)) for c in (draft, target))
    verdict = judge(x, draft, target, residual=residual, max_tries=5)
    assert (verdict.candidate == -1).all()
    assert (verdict.tries == -1).all()
    assert torch.equal(verdict.token, target.sample[:, 0])


def chain_of(mean, path=0.0, rows=1, candidates=3):
    mean = torch.tensor(mean).expand(rows, 1, len(mean))
    sample = torch.full_like(mean, 77.0)
    return Denoised(sample, mean, torch.zeros_like(mean), torch.full((rows, 1), path))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_where_nothing_is_left_to_be_drawn(judge, residual):
    """Identical models, the target a hundred times less likely along its path: whatever is rejected takes its own draw;
    a candidate whose Z is 0 and whose ratio lies above c all the same is certain."""
    rows = judge.rows
    draft, target = chain_of([0.0, 1.0], rows=rows), chain_of([0.0, 1.0], 5.0, rows)
    x = torch.randn(rows, 3, 2, generator=torch.Generator().manual_seed(0))
    verdict = judge(x, draft, target, residual=residual, max_tries=5)
    assert torch.equal(verdict.log_ratio, torch.full((rows, 3), -5.0))
    assert torch.equal(verdict.accepted, uniforms(0, torch.arange(rows), 0).log() <= -5)
    assert (verdict.candidate < 1).all()
    assert (verdict.token[~verdict.accepted] == 77).all()
    # Means 1e-3 apart and half as likely: c = 1 lies 690 sigma out. One candidate lies beyond even that.
    target = chain_of([1e-3, 1.0], 0.7, rows)
    x[:, 0, 0], x[:, 1, 0] = -1e4, 1e4
    verdict = judge(x, draft, target, residual=residual, max_tries=5)
    assert (verdict.candidate == 1).all()


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_largest_uniform(judge, residual):
    """u = 1 of a later candidate: it is kept where its ratio exceeds c + Z, not a little below."""
    draft, target = chain_of([0.0, 0.0]), chain_of([1.0, 0.0])
    log_c_plus_z = math.log(1 + 0.3829249225480262)  # 1 + 2 Phi(1 / 2) - 1
    rows = torch.tensor([U_IS_1 - CANDIDATE_STRIDE])
    assert float(uniforms(0, rows + CANDIDATE_STRIDE, 0)) == 1
    for off, candidate in ((1e-5, 1), (-1e-5, -1)):
        x = torch.tensor([[-50.0, 0.0], [0.5 + log_c_plus_z + off, 0.0]])[None]  # log r = x - 1 / 2
        assert judge(x, draft, target, rows=rows, residual=residual).candidate.tolist() == [candidate]


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_least_uniform(judge, residual):
    """u = 2^-33 of the last candidate: it is kept where its ratio exceeds c, and not below, however little."""
    draft, target = chain_of([0.0, 0.0]), chain_of([1.0, 0.0])
    rows = torch.tensor([U_IS_LEAST - 2 * CANDIDATE_STRIDE])
    assert float(uniforms(0, rows + 2 * CANDIDATE_STRIDE, 0)) == 2.0**-33
    log_c = math.log(1 + 0.3829249225480262)
    for off, candidate in ((1e-5, 2), (-1e-5, -1)):
        x = torch.tensor([[-50.0, 0.0], [-50.0, 1.0], [0.5 + log_c + off, 0.0]])[None]
        assert judge(x, draft, target, rows=rows, residual=residual).candidate.tolist() == [candidate]


def test_one_launch(monkeypatch, backend, kernel_device):
    x, *chains = on(kernel_device, *own_chains(5, 4, 5, 0))
    launches = count_launches(monkeypatch, backend, "accept_reject")
    accept_reject(x, *chains, seed=0, backend=backend)
    assert len(launches) == 1


@pytest.mark.parametrize("candidates", [0, MOST_CANDIDATES + 1])
def test_the_number_of_candidates_is_limited(candidates):
    with pytest.raises(ValueError, match=f"expected 1 to 16 candidates a token, got {candidates}"):
        accept_reject(*own_chains(2, candidates, 3, 0), seed=0)


BAD = {
    "x": (lambda a: {"x": a["x"][None]}, r"x as a floating tensor \(N, C\) or \(N, K, C\), got .*\(1, 4, 3, 5\)"),
    "mean": (
        lambda a: {"draft": a["draft"]._replace(mean=torch.ones(4, 2, 5))},
        r"draft.mean floating of shape \(4, 3, 5\) or \(4, 1, 5\) to match x, got torch.float32 \(4, 2, 5\)",
    ),
    "flat": (lambda a: {"target": a["target"]._replace(log_std=torch.ones(4, 5))}, r"target.log_std .*got .*\(4, 5\)"),
    "path": (
        lambda a: {"target": a["target"]._replace(path_log_std=torch.ones(4))},
        r"target.path_log_std floating of shape \(4, 3\) or \(4, 1\) to match x, got torch.float32 \(4,\)",
    ),
    "sample": (lambda a: {"target": a["target"]._replace(sample=None)}, "target as a Denoised with a tensor sample"),
    "relaxation": (lambda a: {"relaxation": torch.ones(4, 1)}, r"tensor \(4,\) or \(4, 3\) on cpu, got .*\(4, 1\)"),
    "rows": (lambda a: {"rows": torch.arange(12)}, r"rows of shape \(4,\) to match x, got \(12,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_are_checked(case):
    arguments = dict(zip(("x", "draft", "target"), own_chains(4, 3, 5, 0)))
    change, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        accept_reject(**(arguments | change(arguments)), seed=0)


def test_a_ratio_alone_has_no_candidates():
    with pytest.raises(ValueError, match=r"expected x as a floating tensor \(N, C\), got .*\(4, 3, 5\)"):
        log_density_ratio(*own_chains(4, 3, 5, 0))


def test_two_sigmas_need_the_targets(judge):
    x, draft, target = own_chains(judge.rows, 3, 4, 10)
    target = target._replace(log_std=target.log_std + 0.1)
    for residual in RESIDUALS:
        message = r"same log_std for 3 candidates a token, got values that differ by up to 0.1: pass target_sigma=True"
        with pytest.raises(ValueError, match=message):
            judge(x, draft, target, residual=residual)
        check(judge, x, draft, target, residual=residual, target_sigma=True, max_tries=9)
    one = x[:, :1], *(Denoised(*(v[:, :1] for v in c)) for c in (draft, target))
    check(judge, *one, max_tries=9)
    with pytest.raises(ValueError, match="True only with residual='closed_form' or several candidates"):
        judge(*one, target_sigma=True)


def test_a_verdict_that_differs_in_one_field_shows():
    """The comparison is able to see each field."""
    chains, rows = own_chains(50, 3, 4, 11), torch.arange(50)
    verdict = accept_reject(*chains, seed=0)
    assert_candidates(verdict, *chains, seed=0, rows=rows)
    for field in verdict._fields:
        value = getattr(verdict, field).clone()
        value[7] = ~value[7] if field == "accepted" else value[7] + (1e-3 if value.is_floating_point() else 1)
        with pytest.raises(AssertionError):
            assert_candidates(verdict._replace(**{field: value}), *chains, seed=0, rows=rows)


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4), (5, 3, 4)])
def test_a_chain_of_whatever_kind(shape, backend, device_of):
    """What counts are a chain's fields: of sweeps, or of an object without a draft's sample, or with any."""
    generator = torch.Generator().manual_seed(3)
    x, mean_q, mean_p, sample = (torch.randn(shape, generator=generator) for _ in range(4))
    device = torch.device("cpu") if backend == "torch" else device_of(backend)
    x, mean_q, mean_p, sample = (v.to(device) for v in (x, mean_q, mean_p, sample))
    zeros, path = torch.zeros_like(x), torch.zeros_like(x[..., 0])
    judge = partial(accept_reject, x, seed=1, backend=backend)
    expected = judge(Denoised(x, mean_q, zeros, path), Denoised(sample, mean_p, zeros, path))
    target = DenoisedInParallel(sample, mean_p, zeros, path, None, None)
    bare = SimpleNamespace(mean=mean_q, log_std=zeros, path_log_std=path)
    for draft in (bare, Denoised(None, mean_q, zeros, path), Denoised(path.flatten(), mean_q, zeros, path)):
        assert all(map(torch.equal, expected, judge(draft, target)))


@pytest.mark.parametrize("candidates", [1, 3])
def test_sigmas_of_which_one_is_0_are_infinitely_far_apart(candidates):
    x, draft, target = own_chains(4, candidates, 5, 0)
    draft = draft._replace(log_std=torch.full_like(x, -math.inf))
    with pytest.raises(ValueError, match="differ by up to inf: pass target_sigma=True to compute with the target's"):
        accept_reject(x, draft, target, seed=0, residual="closed_form")
