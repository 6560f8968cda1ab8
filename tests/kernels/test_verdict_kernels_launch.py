"""What the kernels of accept_reject do beside computing: outputs, launches, and what it leaves alone."""

import pytest
import torch
from dispatch_modes import Inside
from verdicts import (
    assert_verdict,
    assert_walls_stand,
    check_verdict,
    chosen,
    count_launches,
    equal,
    guarded_outputs,
    judged_chains,
    module_of,
    on,
)

from cspd_kernels import accept_reject

RESIDUALS = ["rejection", "closed_form"]


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize(("residual", "max_tries"), [("rejection", 2), ("closed_form", 1), ("closed_form", 0)])
@pytest.mark.parametrize("channels", [3, 17])
def test_every_output_is_written_and_nothing_beside_it(
    backend, kernel_device, monkeypatch, fill, residual, max_tries, channels
):
    outcomes = [0, 1, 5] if residual == "rejection" else [0, 1]
    x, draft, target, rows = chosen(kernel_device, channels, 18, outcomes, residual, max_tries=40)
    options = {"rows": rows, "residual": residual, "max_tries": max_tries}
    memory = guarded_outputs(monkeypatch, module_of(backend, "accept_reject"), fill)
    check_verdict(backend, x, draft, target, unsure=0, **options)
    assert len(memory) == 4
    assert_walls_stand(memory, fill)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_inputs_stay_and_nothing_is_recorded(backend, kernel_device, residual):
    x, draft, target = on(kernel_device, *judged_chains(4, 3, 13, residual == "closed_form"))
    x.requires_grad_()
    kept = (x, *draft, *target)
    before = [v.detach().clone() for v in kept]
    verdict = accept_reject(x, draft, target, seed=0, residual=residual, backend=backend)
    assert all(map(torch.equal, before, kept))
    assert not verdict.token.requires_grad
    assert not any(verdict.token.data_ptr() == v.data_ptr() for v in kept)


def test_the_drafts_sample_is_not_looked_at(backend, kernel_device):
    x, draft, target = on(kernel_device, *judged_chains(4, 3, 0))
    one, other = (
        accept_reject(x, d, target, seed=0, backend=backend) for d in (draft, draft._replace(sample=None))
    )  # fmt: skip
    equal(one, other)


class OnlyAllocates(Inside):
    """Fails where a device would get anything to do but the one kernel."""

    def seen(self, func, args):
        assert func.overloadpacket.__name__ == "empty", func


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("rows", "launches"), [(0, 0), (1, 1), (5000, 1)])
def test_one_launch_and_nothing_else(backend, kernel_device, monkeypatch, residual, per_token, rows, launches):
    x, draft, target = on(kernel_device, *judged_chains(rows, 5, 0, same_sigma=True))
    address = torch.arange(rows, device=kernel_device)
    relaxation = torch.ones(rows, device=kernel_device) if per_token else 1.0
    launch = module_of(backend, "accept_reject").accept_reject
    counted = count_launches(monkeypatch, backend, "accept_reject", run=False)
    with OnlyAllocates():
        launch(x, draft, target, 0, address, relaxation, "paper", 100, residual)
        if not per_token and residual == "rejection":  # the others look at values of CPU tensors
            accept_reject(x, draft, target, seed=0, rows=address, backend=backend)
            launches *= 2
        seed = torch.empty(1, dtype=torch.int64, device=kernel_device)
        launch(x, draft, target, seed, address, relaxation, "paper", 100, residual)
    assert len(counted) == launches + (rows > 0)


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
