"""The verdict on a GPU: float64's decisions at any size and type, one launch, no wait, graphs, streams, distributions.

What other tests check with the fixture ``kernel_device`` runs on the GPU as well and is not repeated here:
layouts, seeds, tries, comparisons within rounding, extreme inputs, walls around the outputs.
"""

import itertools
from functools import partial

import pytest
import torch
from dispatch_modes import no_wait_for_cuda
from modified import CASES, P, acceptance_rate, assert_modified, components, pair
from profiled import launched
from scipy import stats
from seeds import SEEDS, seed_tensor
from verdicts import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    LINES,
    assert_ratio,
    assert_verdict,
    cast,
    check_ratio,
    check_verdict,
    equal,
    judged_chains,
    laid_out_there,
    take,
)  # fmt: skip

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.backends import implementation
from cspd_kernels.testing import random_chains

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("available")]

RESIDUALS = ["rejection", "closed_form"]
MANY = (1 << 17) + 3
DEVICE = "cuda"


def on(x, draft, target):
    return x.to(DEVICE), cast(draft, DEVICE), cast(target, DEVICE)


def chains_of(rows, channels, seed, residual="rejection"):
    return on(*judged_chains(rows, channels, seed, residual == "closed_form"))


def addresses(rows):
    return torch.arange(rows, device=DEVICE) * 2**33 + 7


@pytest.mark.parametrize("op", ["log_density_ratio", "accept_reject"])
def test_the_automatic_backend_has_kernels(kernel_backends, op):
    """Which one it is, the table of the fastest says; its bits are those of asking for it by name."""
    x, draft, target = chains_of(5, 16, 0)
    chosen = implementation(op, None, x.device, x, 5)
    (name,) = (name for name in kernel_backends if implementation(op, name) is chosen)
    ratio = partial(log_density_ratio, x, draft, target)
    verdict = partial(accept_reject, x, draft, target, seed=0)
    if op == "accept_reject":
        equal(verdict(), verdict(backend=name))
    else:
        assert torch.equal(ratio(), ratio(backend=name))
    wide = chains_of(5, 257, 0)
    equal(accept_reject(*wide, seed=0), accept_reject(*wide, seed=0, backend="torch"))


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_of_every_width_and_type(backend, dtype, channels, rows):
    x, draft, target = on(*random_chains(rows, channels, channels, shift=1.0, scale=0.6))
    narrow = x.to(dtype), cast(draft, dtype), cast(target, dtype)
    relaxation = torch.linspace(0.3, 5, rows, device=DEVICE)
    check_ratio(backend, *narrow)
    check_ratio(backend, *narrow, relaxation=relaxation, sigma="released")
    check_ratio(backend, *narrow, relaxation=relaxation.to(dtype))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_verdicts_of_every_width_and_type(backend, dtype, channels, residual):
    x, draft, target = chains_of(999, channels, channels, residual)
    narrow = x.to(dtype), cast(draft, dtype), cast(target, dtype)
    relaxation = torch.linspace(0.3, 5, 999, device=DEVICE)
    check_verdict(backend, *narrow, seed=1, max_tries=21, residual=residual)
    options = {"relaxation": relaxation, "sigma": "released", "residual": residual}
    check_verdict(backend, *narrow, seed=2**64 - 1, rows=addresses(999), **options)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_many_tokens(backend, channels, residual):
    chains = chains_of(MANY, channels, 1, residual)
    assert len(check_ratio(backend, *chains)) == MANY
    verdict = check_verdict(
        backend, *chains, seed=2**63 + 5, rows=addresses(MANY), max_tries=30, residual=residual, unsure=1e-3
    )
    assert MANY // 4 < verdict.accepted.sum() < MANY * 3 // 4


@pytest.mark.parametrize("residual", RESIDUALS)
def test_close_models_take_many_tries(backend, residual):
    x, draft, target = random_chains(MANY, 16, 2, shift=0.02, scale=0.0)
    chains = on(x, draft, target)
    check_verdict(backend, *chains, seed=3, residual=residual, unsure=1e-3)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_backends_differ_within_rounding_alone(backend, residual):
    x, draft, target = chains_of(MANY, 16, 3, residual)
    one, other = (
        accept_reject(x, draft, target, seed=4, residual=residual, backend=which) for which in ("torch", backend)
    )
    same = one.tries == other.tries
    assert (~same).float().mean() < 1e-4
    std = target.log_std.exp()
    assert ((one.token - other.token).abs() <= 2e-5 * (std + one.token.abs()))[same].all()


@pytest.mark.parametrize("matrix", LAYOUTS)
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_any_strides(backend, matrix, line, residual):
    x, draft, target = judged_chains(203, 17, 4, residual == "closed_form")
    matrix, line = LAYOUTS[matrix], LINES[line]
    there = laid_out_there(x, matrix, DEVICE), *(
        Denoised(*(laid_out_there(v, matrix, DEVICE) for v in c[:3]), laid_out_there(c.path_log_std, line, DEVICE))
        for c in (draft, target)
    )  # fmt: skip
    rows = laid_out_there(torch.arange(203), line, DEVICE)
    relaxation = laid_out_there(torch.linspace(0.3, 5, 203), line, DEVICE)
    ratio = check_ratio(backend, *there, relaxation=relaxation)
    verdict = check_verdict(backend, *there, rows=rows, relaxation=relaxation, residual=residual)
    copies = there[0].contiguous(), *(Denoised(*(v.contiguous() for v in c)) for c in there[1:])
    assert torch.equal(log_density_ratio(*copies, relaxation=relaxation, backend=backend), ratio)
    options = {"seed": 0, "rows": rows.contiguous(), "relaxation": relaxation.contiguous(), "residual": residual}
    equal(accept_reject(*copies, **options, backend=backend), verdict)


@pytest.mark.parametrize("channels", [1, 16, 100, 256])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_token_depends_on_neither_its_batch_nor_its_place(backend, channels, residual):
    x, draft, target = chains_of(5003, channels, 5, residual)
    rows = addresses(5003)
    verdict = accept_reject(x, draft, target, seed=9, rows=rows, residual=residual, backend=backend)
    ratio = log_density_ratio(x, draft, target, backend=backend)
    shuffled = torch.randperm(5003, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for part in (slice(None), shuffled, shuffled[:77], *shuffled[:20, None], slice(3, 4096)):
        few = (x[part], take(draft, part), take(target, part))
        again = accept_reject(*few, seed=9, rows=rows[part], residual=residual, backend=backend)
        equal([v[part] for v in verdict], again)
        assert torch.equal(log_density_ratio(*few, backend=backend), ratio[part])


@pytest.mark.parametrize("channels", [3, 16, 256])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_token_depends_on_neither_alignment_nor_type(backend, channels, residual):
    x, draft, target = chains_of(777, channels, 15, residual)
    half = x.bfloat16(), cast(draft, torch.bfloat16), cast(target, torch.bfloat16)
    same = half[0].float(), *(cast(c, torch.float32) for c in half[1:])
    options = {"seed": 3, "rows": addresses(777), "residual": residual, "backend": backend}
    expected = accept_reject(*same, **options)
    assert torch.equal(log_density_ratio(*same, backend=backend), expected.log_ratio)
    equal(accept_reject(*half, **options), expected)
    for first in (1, 2, 4):

        def moved(v, first=first):
            return torch.cat([v.new_full((first,), float("nan")), v.flatten()])[first:].view(v.shape)

        equal(accept_reject(moved(same[0]), *(Denoised(*map(moved, c)) for c in same[1:]), **options), expected)
        equal(accept_reject(same[0], same[1], Denoised(*map(moved, same[2])), **options), expected)


def test_many_runs_agree_bit_by_bit(backend):
    x, draft, target = chains_of(4096, 16, 6)
    first = accept_reject(x, draft, target, seed=1, backend=backend)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(200):
        again = accept_reject(x, draft, target, seed=1, backend=backend)
        wrong += sum((a != b).any() for a, b in zip(again, first))
    assert int(wrong) == 0


def test_the_count_of_launches_sees_every_kernel():
    x = torch.ones(1000, device=DEVICE)
    assert len(launched(lambda: (x + 1, x.cos()))) == 2


@pytest.mark.parametrize("rows", [1, 64, 5000])
@pytest.mark.parametrize("per_token", [False, True])
def test_one_launch(backend, rows, per_token):
    x, draft, target = chains_of(rows, 16, 7, "closed_form")
    address, relaxation = addresses(rows), torch.ones(rows, device=DEVICE) if per_token else 1.0
    options = {"relaxation": relaxation, "backend": backend}
    (name,) = launched(lambda: log_density_ratio(x, draft, target, **options))
    assert "log_density_ratio_kernel" in name
    options["rows"] = address
    for residual, seed in itertools.product(RESIDUALS, (1, seed_tensor(1, DEVICE))):
        (name,) = launched(lambda: accept_reject(x, draft, target, seed=seed, residual=residual, **options))  # noqa: B023
        assert "accept_reject_kernel" in name


@pytest.mark.parametrize("backend", [None, "torch", "triton", "cuda"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_no_wait_for_the_host(backend, residual):
    x, draft, target = chains_of(100, 16, 8, residual)
    rows, relaxation, on_device = addresses(100), torch.ones(100, device=DEVICE), seed_tensor(7, DEVICE)

    def everything():
        for value in (2.0, relaxation):
            log_density_ratio(x, draft, target, relaxation=value, backend=backend)
            options = {"residual": residual, "target_sigma": residual == "closed_form", "backend": backend}
            for seed in (2**64 - 1, on_device):
                accept_reject(x, draft, target, seed=seed, rows=rows, relaxation=value, **options)

    everything()  # compiles
    with no_wait_for_cuda():
        everything()


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("rows", [1, 203, 5000])
def test_inside_a_graph_of_the_caller(backend, residual, rows):
    x, draft, target = chains_of(rows, 16, 9, residual)
    address, relaxation = addresses(rows), torch.ones(rows, device=DEVICE)
    options = {"seed": 5, "rows": address, "relaxation": relaxation, "residual": residual, "max_tries": 9}

    def both():
        ratio = log_density_ratio(x, draft, target, relaxation=relaxation, backend=backend)
        return ratio, accept_reject(x, draft, target, **options, backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ratio, verdict = both()
    for seed in range(10, 13):
        x_new, draft_new, target_new = chains_of(rows, 16, seed, residual)
        for to, value in zip((x, *draft, *target), (x_new, *draft_new, *target_new), strict=True):
            to.copy_(value)
        address.add_(2**40 + seed)
        relaxation.fill_(seed / 10)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert_ratio(ratio, x, draft, target, relaxation)
        known = {name: value for name, value in options.items() if name not in ("seed", "rows")}
        assert_verdict(verdict, x, draft, target, seed=5, rows=address, **known)
        again_ratio, again = both()
        assert torch.equal(ratio, again_ratio)
        equal(verdict, again)


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_graph_of_the_caller_is_replayed_with_another_seed(backend, residual):
    chains, seed = chains_of(203, 16, 9, residual), seed_tensor(5, DEVICE)
    options = {"rows": addresses(203), "residual": residual, "max_tries": 9, "backend": backend}
    first = accept_reject(*chains, seed=seed, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        verdict = accept_reject(*chains, seed=seed, **options)
    for number in (5, *SEEDS):
        seed.copy_(seed_tensor(number))
        graph.replay()
        equal(verdict, accept_reject(*chains, seed=number, **options))
        assert torch.equal(verdict.token, first.token) == (number == 5)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_two_streams_in_turn(backend, residual):
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [chains_of((100, 3000)[seed // 2 % 2], 16, seed, residual) for seed in range(20)]
    expected = [accept_reject(*one, seed=1, residual=residual, backend=backend) for one in inputs]
    torch.cuda.synchronize()
    out = []
    for i, one in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            out.append(accept_reject(*one, seed=1, residual=residual, backend=backend))
    torch.cuda.synchronize()
    for result, same in zip(out, expected, strict=True):
        equal(result, same)
    check_verdict(backend, *inputs[0], seed=1, residual=residual)


def test_work_already_on_the_stream_comes_first(backend):
    x, draft, target = chains_of(500, 16, 10)
    expected = accept_reject(2 * x, draft, target, seed=1, backend=backend)
    late = x.clone()
    torch.cuda._sleep(10**8)
    late.mul_(2)
    equal(accept_reject(late, draft, target, seed=1, backend=backend), expected)


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cuda", dtype=torch.bfloat16)])
def test_contexts_of_the_caller_change_nothing(backend, context):
    x, draft, target = chains_of(500, 16, 11)
    expected = accept_reject(x, draft, target, seed=1, backend=backend)
    with context():
        equal(accept_reject(x, draft, target, seed=1, backend=backend), expected)


def test_memory_is_stable(backend):
    x, draft, target = chains_of(500, 16, 12)

    def calls(count):
        for _ in range(count):
            accept_reject(x, draft, target, seed=1, backend=backend)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = calls(5)
    assert calls(500) == before


@pytest.mark.parametrize(("distance", "path", "channels"), CASES)
@pytest.mark.parametrize("sigma", ["paper", "released"])
def test_closed_form_follows_the_modified_distribution(backend, distance, path, channels, sigma):
    x, draft, target = pair(distance, path, channels, MANY, sigma)
    verdict = accept_reject(*on(x, draft, target), seed=5, sigma=sigma, residual="closed_form", backend=backend)
    assert (verdict.tries == 1).all()
    assert_modified(verdict.token, draft, target, sigma)


@pytest.mark.parametrize(("distance", "path", "channels"), CASES[:3])
def test_both_residuals_have_one_distribution(backend, distance, path, channels):
    x, draft, target = pair(distance, path, channels, MANY)
    there = on(x, draft, target)
    looped = accept_reject(*there, seed=6, max_tries=1000, backend=backend)
    drawn = accept_reject(*there, seed=7, residual="closed_form", backend=backend)
    assert (looped.tries > 0).all()
    assert_modified(looped.token, draft, target)
    (t, across), (u, other) = (components(v.token.cpu(), draft, target) for v in (looped, drawn))
    for a, b in ((t, u), *zip(across.T, other.T)):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > P


@pytest.mark.parametrize("residual", RESIDUALS)
def test_accepted_and_redrawn_tokens_together_are_the_targets(backend, residual):
    _, draft, target = pair(1.0, 0.0, 3, MANY)
    noise = torch.randn(MANY, 3, generator=torch.Generator().manual_seed(0))
    x = draft.mean + draft.log_std.exp() * noise
    verdict = accept_reject(*on(x, draft, target), seed=8, max_tries=1000, residual=residual, backend=backend)
    assert stats.binomtest(int(verdict.accepted.sum()), MANY, acceptance_rate(1.0)).pvalue > P
    z = ((verdict.token.cpu() - target.mean) / target.log_std.exp()).double()
    for c in range(3):
        assert stats.kstest(z[:, c].numpy(), "norm").pvalue > P


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_offsets_beyond_32_bits(backend, layout):
    """A tensor of more than 2^31 elements, whose rows or channels lie that far apart."""
    rows, channels = (1 << 27) + 5, 17
    needed = 40 if backend == "triton" else 100  # GiB; CUDA copies what is not contiguous float32
    if torch.cuda.mem_get_info()[0] < needed << 30:
        pytest.skip(f"needs {needed} GiB of free device memory")
    x, draft, target = chains_of(1, channels, 13)
    whole = torch.zeros(rows * channels, dtype=torch.bfloat16, device=DEVICE)
    wide = whole.view(rows, channels) if layout == "rows" else whole.view(channels, rows).t()
    wide[-3:] = x.to(torch.bfloat16)
    one = (Denoised(*(v.expand(rows, *v.shape[1:]) for v in c)) for c in (draft, target))
    address = torch.zeros(1, dtype=torch.int64, device=DEVICE).expand(rows)
    verdict = accept_reject(wide, *one, seed=1, rows=address, backend=backend)
    expected = accept_reject(wide[-1:].contiguous(), draft, target, seed=1, backend=backend)
    for a, b in zip(verdict, expected):
        assert torch.equal(a[-3:], b.expand(3, *b.shape[1:]))
