"""Several candidates of a token on a GPU: many tokens against float64, one launch, no wait, graphs.

What tests/kernels/test_candidates.py checks runs on the GPU as well and is not repeated here: strides, types, numbers
that are not finite, the order of candidates.
"""

import pytest
import torch
from candidates import assert_candidates, own_chains, shared_chains
from dispatch_modes import no_wait_for_cuda
from profiled import launched
from seeds import SEEDS, seed_tensor
from verdicts import cast

from cspd_kernels import Denoised, accept_reject

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("available")]

RESIDUALS = ["rejection", "closed_form"]
MAKE = [own_chains, shared_chains]
DEVICE = "cuda"


def chains_of(make, rows, candidates, channels, seed):
    x, draft, target = make(rows, candidates, channels, seed)
    return x.to(DEVICE), cast(draft, DEVICE), cast(target, DEVICE)


def addresses(rows):
    return torch.arange(rows, device=DEVICE) * 2**33 + 7


def take(chains, part):
    return chains[0][part], *(Denoised(*(v[part] for v in chain)) for chain in chains[1:])


def equal(a, b):
    for name, u, v in zip(a._fields, a, b, strict=True):
        assert torch.equal(u, v), name


@pytest.mark.parametrize(("rows", "candidates", "channels"), [(20001, 4, 16), (3001, 16, 3), (2001, 2, 256)])
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_many_tokens(backend, make, rows, candidates, channels, residual):
    chains = chains_of(make, rows, candidates, channels, channels)
    options = {"seed": 2**63 + 5, "rows": addresses(rows), "max_tries": 30, "residual": residual}
    verdict = accept_reject(*chains, **options, backend=backend)
    assert_candidates(verdict, *chains, **options, unsure=2e-3)
    assert set(verdict.candidate.tolist()) == set(range(-1, candidates))


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("channels", [3, 16, 132])
def test_a_token_depends_on_neither_its_batch_nor_its_place(backend, make, residual, channels):
    chains = chains_of(make, 3001, 4, channels, 1)
    rows = addresses(3001)
    verdict = accept_reject(*chains, seed=9, rows=rows, residual=residual, backend=backend)
    shuffled = torch.randperm(3001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for part in (slice(None), shuffled, shuffled[:77], *shuffled[:10, None], slice(3, 2000)):
        again = accept_reject(*take(chains, part), seed=9, rows=rows[part], residual=residual, backend=backend)
        equal(type(verdict)(*(v[part] for v in verdict)), again)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("make", MAKE)
def test_one_launch(backend, make, residual):
    """Of a chain that candidates share nothing is copied, expanded or not."""
    x, *both = chains_of(make, 64, 4, 16, 2)
    rows, relaxation = addresses(64), torch.ones(64, 4, device=DEVICE)
    spread = [Denoised(*(v.expand(-1, 4, *v.shape[2:]) for v in chain)) for chain in both]
    for chains, seed in ((both, 1), (both, seed_tensor(1, DEVICE)), (spread, 1)):
        options = {"seed": seed, "rows": rows, "relaxation": relaxation, "residual": residual, "target_sigma": True}
        (name,) = launched(lambda: accept_reject(x, *chains, **options, backend=backend))  # noqa: B023
        assert "accept_reject_kernel" in name


@pytest.mark.parametrize("backend", [None, "torch", "triton", "cuda"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_no_wait_for_the_host(backend, residual):
    chains, rows, seed = chains_of(own_chains, 100, 3, 16, 3), addresses(100), seed_tensor(7, DEVICE)

    def everything():
        for value in (2.0, torch.ones(100, device=DEVICE)):
            accept_reject(*chains, seed=seed, rows=rows, relaxation=value, residual=residual, backend=backend)

    everything()  # compiles
    with no_wait_for_cuda():
        everything()


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_graph_of_the_caller_is_replayed_with_other_inputs(backend, residual):
    x, draft, target = chains_of(shared_chains, 203, 4, 16, 4)
    seed, options = seed_tensor(5, DEVICE), {"rows": addresses(203), "residual": residual, "max_tries": 9}
    accept_reject(x, draft, target, seed=seed, **options, backend=backend)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        verdict = accept_reject(x, draft, target, seed=seed, **options, backend=backend)
    for number in SEEDS:
        others = chains_of(shared_chains, 203, 4, 16, number % 1000)
        for to, value in zip((x, *draft, *target), (others[0], *others[1], *others[2]), strict=True):
            to.copy_(value)
        seed.copy_(seed_tensor(number))
        graph.replay()
        assert_candidates(verdict, x, draft, target, seed=number, **options)
        equal(verdict, accept_reject(x, draft, target, seed=number, **options, backend=backend))
