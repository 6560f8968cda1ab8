"""Where judging ends: operands that are not finite, numbers near the end of float32, callers under torch.compile."""

import math

import pytest
import torch
from slow import slow

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.ops.accept_reject import reference
from cspd_kernels.testing import random_chains

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

FIELDS = [(chain, field) for chain in ("draft", "target") for field in ("mean", "log_std", "path_log_std")]


@pytest.fixture(params=["torch", "triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture
def device(kernel_device):
    return kernel_device


def to(device, x, *chains):
    return x.to(device), *(Denoised(*(field.to(device) for field in chain)) for chain in chains)


@pytest.mark.parametrize(("chain", "field"), [("x", None), *FIELDS])
@pytest.mark.parametrize("value", [slow(math.inf), -math.inf, math.nan])
@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
def test_a_row_with_an_operand_that_is_not_finite_is_never_accepted(backend, device, chain, field, value, residual):
    x, draft, target = random_chains(6, 3, 1, scale=0.0 if residual == "closed_form" else 0.3)
    draft = draft._replace(path_log_std=target.path_log_std + 20)  # every other row is accepted
    arguments = {"x": x, "draft": draft, "target": target}
    tensor = (x if field is None else getattr(arguments[chain], field)).clone()
    tensor[2] = value
    arguments[chain] = tensor if field is None else arguments[chain]._replace(**{field: tensor})
    x, draft, target = to(device, *arguments.values())
    expected = torch.tensor([True, True, False, True, True, True])
    assert torch.equal(log_density_ratio(x, draft, target, backend=backend).cpu() > 0, expected)
    options = {"residual": residual, "target_sigma": residual == "closed_form", "backend": backend}
    verdict = accept_reject(x, draft, target, seed=0, max_tries=9, **options)
    assert verdict.log_ratio[2] == -math.inf
    assert torch.equal(verdict.accepted.cpu(), expected)
    assert torch.isfinite(verdict.token).all()
    defined = reference.accept_reject(*to("cpu", x, draft, target), 0, torch.arange(6), max_tries=9, residual=residual)
    assert torch.equal(verdict.tries.cpu(), defined[2])  # also whether the row is redrawn or falls back
    if field == "path_log_std":
        assert verdict.tries[2] == -1


@pytest.mark.parametrize(
    ("log_q", "log_p", "mean_q", "mean_p"),
    [slow(87.0, 87.0, 1e38, 3e38), (-90.0, -90.0, 1.0, 2.0), slow(0.0, 0.0, -2e38, 2e38), slow(89.9, 90.0, 0.0, 1.0)],
)
@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
def test_tokens_are_finite_up_to_the_end_of_float32(backend, device, residual, log_q, log_p, mean_q, mean_p):
    n = 40
    ones, zeros = torch.ones(n, 16), torch.zeros(n)
    sample = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    draft = Denoised(sample, mean_q * ones, log_q * ones, zeros)
    target = Denoised(sample + 1, mean_p * ones, log_p * ones, zeros + 5)
    options = {"seed": 1, "max_tries": 12, "residual": residual, "target_sigma": residual == "closed_form"}
    expected = accept_reject(sample, draft, target, backend="torch", **options)
    x, draft, target = to(device, sample, draft, target)
    verdict = accept_reject(x, draft, target, backend=backend, **options)
    assert torch.isfinite(verdict.token).all()
    assert (verdict.token.abs().amax(1) > 0).all()
    assert torch.equal(verdict.tries.cpu(), expected.tries)
    torch.testing.assert_close(verdict.token.cpu(), expected.token, rtol=1e-5, atol=0)


@pytest.mark.parametrize("relaxation", [0.0, -1.0, math.nan])
def test_a_relaxation_that_only_a_device_sees_accepts_nothing(backend, device, monkeypatch, relaxation):
    x, draft, target = to(device, *random_chains(8, 3, 2))
    value = torch.full((8,), 2.0, device=device)
    value[5] = relaxation
    monkeypatch.setattr("cspd_kernels.ops.density_ratio.check", lambda op, x, d, t, relaxation, sigma: relaxation)
    ratio = log_density_ratio(x, draft, target, relaxation=value, backend=backend)
    assert ratio[5] == -math.inf
    assert torch.isfinite(ratio[[0, 1, 2, 3, 4, 6, 7]]).all()


def test_a_relaxation_that_is_zero_in_float32_is_refused():
    x, draft, target = random_chains(2, 3, 2)
    with pytest.raises(ValueError, match="every relaxation finite and > 0 in float32"):
        log_density_ratio(x, draft, target, relaxation=torch.tensor([1.0, 1e-60], dtype=torch.float64))


def test_a_compiled_caller_gets_the_same_verdicts(backend, device):
    x, draft, target = to(device, *random_chains(12, 3, 3))

    def caller(x, seed):
        verdict = accept_reject(x * 2, draft, target, seed=seed, backend=backend)
        return verdict.token + log_density_ratio(x * 2, draft, target, backend=backend)[:, None].clamp(-1, 1)

    torch._dynamo.reset()
    compiled = torch.compile(caller, backend="eager")
    for seed in (1, 2, 2**40):
        assert torch.equal(compiled(x, seed), caller(x, seed))
