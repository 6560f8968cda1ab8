"""Several candidates on a GPU: float64's decisions at any size, one launch, no wait, graphs, streams, distributions.

What other tests check with the fixture ``judge`` or ``backend`` runs on the GPU as well and is not repeated here.
"""

import itertools
import math

import pytest
import torch
from candidates import assert_candidates, own_chains, rates, shared_chains
from dispatch_modes import no_wait_for_cuda
from modified import components, modified_cdf
from scipy import stats
from seeds import seed_tensor
from verdicts import cast

from cspd_kernels import CandidateVerdict, Denoised, accept_reject
from cspd_kernels.backends import why_unavailable
from cspd_kernels.ops.accept_reject import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("judges_candidates")]

RESIDUALS = ["rejection", "closed_form"]
DEVICE, P = "cuda", 1e-9


@pytest.fixture
def judges_candidates(request):
    """A backend that does not run here, or judges one candidate a token, is skipped with the reason."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    reason = why_unavailable(name) if name else None
    if not reason and name == "cuda":
        reason = cuda.why_unsupported(torch.empty(1, 2, 3))
    if reason:
        pytest.skip(reason)


def there(x, draft, target):
    return x.to(DEVICE), cast(draft, DEVICE), cast(target, DEVICE)


def addresses(rows):
    return torch.arange(rows, device=DEVICE) * 2**33 + 7


def equal(a, b):
    for name, u, v in zip(CandidateVerdict._fields, a, b, strict=True):
        assert torch.equal(u, v), name


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 64, 100, 256])
@pytest.mark.parametrize("candidates", [1, 2, 5, 16])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_verdicts_of_every_width(backend, channels, candidates, residual):
    rows = 501
    chains = there(*own_chains(rows, candidates, channels, channels + candidates))
    relaxation = torch.linspace(0.6, 1.6, rows * candidates, device=DEVICE).view(rows, candidates)
    options = {"rows": addresses(rows), "relaxation": relaxation, "residual": residual, "max_tries": 11}
    for sigma in ("paper", "released"):
        verdict = accept_reject(*chains, seed=2**63 + 5, backend=backend, sigma=sigma, **options)
        assert_candidates(verdict, *chains, seed=2**63 + 5, sigma=sigma, **options)


@pytest.mark.parametrize("make", [own_chains, shared_chains])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_many_tokens(backend, make, residual):
    chains, rows = there(*make(40_003, 4, 16, 1)), addresses(40_003)
    verdict = accept_reject(*chains, seed=1, rows=rows, residual=residual, max_tries=30, backend=backend)
    assert_candidates(verdict, *chains, seed=1, rows=rows, residual=residual, max_tries=30, unsure=1e-3)
    assert set(verdict.candidate.tolist()) == {-1, 0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_type_is_judged_in_float32(backend, dtype):
    x, *chains = there(*own_chains(777, 3, 16, 2))
    narrow = x.to(dtype), *(cast(chain, dtype) for chain in chains)
    same = narrow[0].float(), *(cast(chain, torch.float32) for chain in narrow[1:])
    equal(accept_reject(*narrow, seed=3, backend=backend), accept_reject(*same, seed=3, backend=backend))


@pytest.mark.parametrize("channels", [3, 16, 100])
def test_bits_depend_on_neither_layout_nor_batch(backend, channels):
    x, *chains = there(*own_chains(301, 4, channels, 3))
    options = {"seed": 3, "backend": backend, "max_tries": 9}
    expected = accept_reject(x, *chains, rows=addresses(301), **options)

    def turned(v):
        return v.transpose(0, 1).contiguous().transpose(0, 1)

    def moved(v):
        return torch.cat([v.new_full((1,), math.nan), v.flatten()])[1:].view(v.shape)

    for layout in (turned, moved):
        again = layout(x), *(Denoised(*map(layout, c)) for c in chains)
        equal(accept_reject(*again, rows=addresses(301), **options), expected)
    for part in (slice(7, 8), torch.randperm(301, device=DEVICE)[:100]):
        few = x[part], *(Denoised(*(v[part] for v in c)) for c in chains)
        equal(accept_reject(*few, rows=addresses(301)[part], **options), [v[part] for v in expected])


def test_many_runs_agree_bit_by_bit(backend):
    chains = there(*own_chains(4096, 4, 16, 6))
    first = accept_reject(*chains, seed=1, backend=backend)
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(100):
        again = accept_reject(*chains, seed=1, backend=backend)
        wrong += sum((a != b).any() for a, b in zip(again, first))
    assert int(wrong) == 0


def launched(function) -> list[str]:
    """Names of what the device executes: kernels, copies, fills."""
    function()  # compiles
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("make", [own_chains, shared_chains])
@pytest.mark.parametrize("candidates", [1, 8])
def test_one_launch(backend, make, candidates):
    chains, rows = there(*make(64, candidates, 16, 7)), addresses(64)
    for residual, seed in itertools.product(RESIDUALS, (1, seed_tensor(1, DEVICE))):
        options = {"rows": rows, "residual": residual, "backend": backend}
        (name,) = launched(lambda: accept_reject(*chains, seed=seed, **options))  # noqa: B023
        assert "accept_reject_kernel" in name


@pytest.mark.parametrize("backend", [None, "torch", "triton", "cuda"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_no_wait_for_the_host(backend, residual):
    chains, rows = there(*shared_chains(100, 4, 16, 8)), addresses(100)
    relaxation, seed = torch.ones(100, 4, device=DEVICE), seed_tensor(7, DEVICE)

    def everything():
        for value in (2.0, relaxation, relaxation[:, 0]):
            options = {"relaxation": value, "residual": residual, "backend": backend}
            accept_reject(*chains, seed=seed, rows=rows, **options)

    everything()  # compiles
    with no_wait_for_cuda():
        everything()


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("make", [own_chains, shared_chains])
def test_inside_a_graph_of_the_caller(backend, make):
    (x, draft, target), rows, seed = there(*make(203, 4, 16, 9)), addresses(203), seed_tensor(5, DEVICE)
    relaxation = torch.ones(203, 4, device=DEVICE)
    options = {"rows": rows, "relaxation": relaxation, "residual": "closed_form", "backend": backend}
    accept_reject(x, draft, target, seed=seed, **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        verdict = accept_reject(x, draft, target, seed=seed, **options)
    for number in (5, 2**63 + 1):
        x_new, draft_new, target_new = there(*make(203, 4, 16, number % 97))
        for to, value in zip((x, *draft, *target), (x_new, *draft_new, *target_new), strict=True):
            to.copy_(value)
        seed.copy_(seed_tensor(number))
        rows.add_(2**40)
        relaxation.mul_(0.9)
        graph.replay()
        equal(verdict, accept_reject(x, draft, target, seed=number, **options))
        few = {"rows": rows, "relaxation": relaxation, "residual": "closed_form"}
        assert_candidates(verdict, x, draft, target, seed=number, **few)


@pytest.mark.parametrize("distance", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_law_of_tokens(backend, distance, residual):
    """A million tokens of one pair of Gaussians, four candidates each."""
    rows, candidates = 1 << 20, 4
    generator = torch.Generator(DEVICE).manual_seed(0)
    mean = torch.zeros(rows, 1, 3, device=DEVICE)
    target_mean = mean.clone()
    target_mean[..., 1] = distance
    zeros, log_std = torch.zeros(rows, 1, device=DEVICE), torch.zeros_like(mean)
    x = torch.randn(rows, candidates, 3, generator=generator, device=DEVICE)
    draft, target = Denoised(mean, mean, log_std, zeros), Denoised(target_mean, target_mean, log_std, zeros)
    verdict = accept_reject(x, draft, target, seed=1, residual=residual, max_tries=20_000, backend=backend)
    rate = rates(distance, candidates)
    for k in range(1, candidates + 1):
        none = int(((verdict.candidate < 0) | (verdict.candidate >= k)).sum())
        assert stats.binomtest(none, rows, rate[k - 1]).pvalue > P
    assert (verdict.tries >= 0).all()
    few = (Denoised(*(v[:1, 0].cpu() for v in chain)) for chain in (draft, target))
    along, across = components(verdict.token.cpu(), *few)
    assert stats.kstest(along.numpy(), "norm").pvalue > P
    for component in across.T:
        assert stats.kstest(component.numpy(), "norm").pvalue > P
    cdf = modified_cdf(distance, math.log(1 + sum(rate[:-1])) / distance - distance / 2)
    assert stats.kstest(along[(verdict.tries > 0).cpu()].numpy(), cdf).pvalue > P
