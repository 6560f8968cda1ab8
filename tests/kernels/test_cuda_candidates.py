"""What the CUDA backend hands to its kernel for tokens that have several candidates."""

from types import SimpleNamespace

import pytest
import torch
from verdicts import judged_chains

from cspd_kernels import Denoised
from cspd_kernels.ops.accept_reject import cuda

ROWS, CANDIDATES, CHANNELS = 9, 3, 5


def with_axis(chain):
    """A chain that all candidates share."""
    return Denoised(*(v[:, None] for v in chain))


def chains():
    x, draft, target = judged_chains(ROWS, CHANNELS, 0, same_sigma=True)
    x = x[:, None] + torch.randn(ROWS, CANDIDATES, CHANNELS, generator=torch.Generator().manual_seed(1))
    return x, with_axis(draft), with_axis(target)


@pytest.fixture
def handed(monkeypatch, device_of):
    """The arguments of launches, which do not happen, by name."""
    device_of("cuda")
    names = [
        *("x", "mean_q", "log_q", "path_q", "mean_p", "log_p", "path_p", "relaxations", "relaxation", "sample"),
        *("rows", "token", "accepted", "tries", "log_ratio", "candidate", "n", "candidates", "own", "channels"),
        *("seed", "seeds", "max_tries", "released", "closed_form", "multiprocessors", "stream"),
    ]
    seen = []
    launch = lambda *arguments: seen.append(SimpleNamespace(**dict(zip(names, arguments, strict=True))))  # noqa: E731
    monkeypatch.setattr(cuda, "extension", lambda: SimpleNamespace(accept_reject=launch))
    return seen


def run(x, draft, target, relaxation=1.0):
    cuda.accept_reject(x, draft, target, 7, torch.arange(len(x)), relaxation, "paper", 4, "rejection")


def test_what_candidates_share_is_read_where_it_lies(handed):
    """Of one candidate's shape or expanded to all: no copy, and one row a token."""
    x, draft, target = chains()
    spread = [Denoised(*(v.expand(-1, CANDIDATES, *v.shape[2:]) for v in chain)) for chain in (draft, target)]
    for there in ((draft, target), spread):
        run(x, *there, torch.ones(ROWS, 1))
        last = handed.pop()
        assert (last.n, last.candidates, last.own, last.channels) == (ROWS, CANDIDATES, 0, CHANNELS)
        assert last.x == x.data_ptr()
        assert (last.mean_q, last.log_q, last.path_q) == tuple(v.data_ptr() for v in draft[1:])
        assert (last.mean_p, last.log_p, last.path_p) == tuple(v.data_ptr() for v in target[1:])
        assert last.sample == target.sample.data_ptr()


@pytest.mark.parametrize("bit", range(8))
def test_which_matrices_have_a_row_for_every_candidate(handed, bit):
    """In the order of the bindings: the sample, the draft's mean, log_std and path, the target's, the relaxation."""
    x, draft, target = chains()
    fields = [target.sample, *draft[1:], *target[1:], torch.ones(ROWS, 1)]
    fields[bit] = fields[bit].repeat(1, CANDIDATES, *[1] * (fields[bit].dim() - 2))
    draft, target = Denoised(x, *fields[1:4]), Denoised(fields[0], *fields[4:7])
    run(x, draft, target, fields[7])
    assert handed[0].own == 1 << bit


def test_one_candidate_a_token_without_the_axis(handed):
    x, draft, target = judged_chains(ROWS, CHANNELS, 0)
    run(x, draft, target)
    assert (handed[0].candidates, handed[0].own, handed[0].candidate) == (1, 0, 0)
