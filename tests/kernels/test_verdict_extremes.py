"""Extreme inputs in every backend and type: always a token, never a NaN, no row without one."""

import math

import pytest
import torch
from slow import slow
from verdicts import assert_ratio, cast, ratio_and_scale, take

from cspd_kernels import Denoised, accept_reject, log_density_ratio
from cspd_kernels.ops.accept_reject import torch_backend
from cspd_kernels.ops.accept_reject.reference import accept_reject as definition
from cspd_kernels.testing import random_chains

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERANDS = ("x", "draft.mean", "draft.log_std", "target.log_std", "target.path_log_std")
SCALES = (1e-6, 1.0, 1e3)


@pytest.fixture(params=["definition", "torch", "torch on a device", "triton", "cuda"])
def judge(request, device_of):
    """``judge(x, draft, target, sigma, max_tries, residual)``: a backend's verdict."""
    device = device_of(request.param) if request.param in ("triton", "cuda") else torch.device("cpu")

    def judge(x, draft, target, sigma="paper", max_tries=3, residual="rejection"):
        rows = torch.arange(len(x))
        if request.param in ("definition", "torch on a device"):
            arguments = (x, draft, target, 2**64 - 1, rows, 1.0, sigma, max_tries, residual)
            if request.param == "definition":
                return definition(*arguments)
            return torch_backend.accept_reject(*arguments, compact=False)
        options = {"sigma": sigma, "max_tries": max_tries, "residual": residual, "backend": request.param}
        options["target_sigma"] = residual == "closed_form"
        chains = (cast(chain, device) for chain in (draft, target))
        verdict = accept_reject(x.to(device), *chains, seed=2**64 - 1, rows=rows.to(device), **options)
        return [v.cpu() for v in verdict]

    return judge


def extreme(channels, dtype, scales=SCALES):
    """(x, draft, target): every pair of scales, means equal or 1e4 sigma apart, path terms of 0 and +-1e6 (6e4)."""
    cases = [(q, p, d, s) for q in scales for p in scales for d in (0.0, 1e4) for s in (0, 1, -1)]
    unlikely = 6e4 if dtype == torch.float16 else 1e6  # float16 ends at 65504
    sigma_q, sigma_p, apart, path = (torch.tensor(v)[:, None] for v in zip(*cases))
    generator = torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(len(cases), channels, generator=generator) for _ in range(2))
    log_q, log_p = (s.log().expand_as(mean) for s in (sigma_q, sigma_p))
    zeros = torch.zeros(len(cases))
    draft = Denoised(mean + sigma_q * noise, mean, log_q, zeros)
    target_mean = mean + apart * sigma_p
    target = Denoised(target_mean + sigma_p * noise, target_mean, log_p, unlikely * path[:, 0])
    draft, target = cast(draft, dtype), cast(target, dtype)
    finite = [torch.isfinite(v).view(len(cases), -1).all(dim=1) for chain in (draft, target) for v in chain]
    rows = torch.stack(finite).all(dim=0).nonzero()[:, 0]
    return draft.sample[rows], take(draft, rows), take(target, rows)


def assert_sound(verdict, x, target):
    token, accepted, tries, log_ratio = verdict
    assert torch.isfinite(token).all()
    assert (token != 0).any(dim=1).all()
    assert not log_ratio.isnan().any()
    assert torch.equal(accepted, tries == 0)
    assert torch.equal(token[accepted], x.float()[accepted])
    assert torch.equal(token[tries == -1], target.sample.float()[tries == -1])


@pytest.mark.parametrize(
    ("dtype", "sigma"), [(torch.float32, "paper"), slow(torch.bfloat16, "released"), slow(torch.float16, "paper")]
)
@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
def test_extreme_inputs(judge, dtype, residual, sigma):
    x, draft, target = extreme(3, dtype)
    assert len(x) >= (36 if dtype == torch.float16 else 54)
    verdict = judge(x, draft, target, sigma, 2, residual)
    assert_sound(verdict, x, target)
    assert_ratio(verdict[3], x, draft, target, sigma=sigma)
    ratio, scale = ratio_and_scale(x, draft, target, sigma=sigma)
    sure = (ratio.abs() > 1e3) & (ratio.abs() > 1e-4 * scale)
    assert torch.equal(verdict[1][sure], (ratio > 0)[sure])
    assert sure.sum() > 12


@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
def test_extreme_inputs_of_many_channels(judge, residual):
    x, draft, target = extreme(256, torch.float32, scales=(1e-6, 1e3))
    part = torch.arange(0, len(x), 2)
    x, draft, target = x[part], take(draft, part), take(target, part)
    assert_sound(judge(x, draft, target, max_tries=2, residual=residual), x, target)


@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
def test_identical_models_accept_at_any_scale(judge, residual):
    for scale in (1e-6, 1e3):
        x, draft, _ = random_chains(9, 256, 1)
        draft = draft._replace(log_std=torch.full_like(x, math.log(scale)), mean=scale * draft.mean)
        x = draft.mean + 3 * scale
        token, accepted, _, log_ratio = judge(x, draft, draft._replace(sample=-x), residual=residual)
        assert accepted.all()
        assert not log_ratio.any()
        assert torch.equal(token, x)


@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
@pytest.mark.parametrize(
    "name", ["x", slow("draft.mean"), "draft.log_std", slow("target.log_std"), slow("target.path_log_std")]
)
def test_a_row_of_nan_is_never_accepted_and_spoils_no_other(judge, residual, name):
    chain, _, field = name.partition(".")
    arguments = dict(zip(("x", "draft", "target"), random_chains(6, 3, 2)))
    clean = judge(**arguments, residual=residual)
    tensor = (arguments["x"] if not field else getattr(arguments[chain], field)).clone()
    tensor.view(6, -1)[2, 0] = math.nan
    arguments[chain] = tensor if not field else arguments[chain]._replace(**{field: tensor})
    verdict = judge(**arguments, residual=residual)
    assert not verdict[1][2]
    assert verdict[3][2] == -math.inf
    assert torch.isfinite(verdict[0][2]).all()
    others = torch.tensor([0, 1, 3, 4, 5])
    for a, b in zip(verdict, clean):
        torch.testing.assert_close(a[others], b[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_ratios(device_of, backend, dtype):
    device = torch.device("cpu") if backend == "torch" else device_of(backend)
    x, draft, target = extreme(256, dtype)
    chains = x.to(device), cast(draft, device), cast(target, device)
    for sigma in ("paper", "released"):
        assert_ratio(log_density_ratio(*chains, sigma=sigma, backend=backend), x, draft, target, sigma=sigma)
