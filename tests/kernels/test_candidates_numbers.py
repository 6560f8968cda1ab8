"""The one number of several candidates, the mass above c: in torch and in Triton, against the integral."""

import math

import numpy as np
import pytest
import torch
from candidates import exact_log_mass, integrated_mass

from cspd_kernels import Denoised
from cspd_kernels.ops.accept_reject import candidates as definition

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's numpy

MASSES = [
    (distance, path, log_c)
    for distance in (1e-4, 0.05, 1.0, 6.0)
    for path in (-0.5 * distance, 0.0, 0.7)
    for log_c in (0.0, 0.9 * distance, 3 * distance)
]


def masses():
    distance, path, log_c = (torch.tensor(v, dtype=torch.float64) for v in zip(*MASSES))
    zeros = torch.zeros_like(distance)[:, None]
    draft, target = (-distance[:, None], zeros, path), (zeros, zeros, zeros[:, 0])
    draft, target = (Denoised(None, *(v.float() for v in chain)) for chain in (draft, target))
    values = zip(log_c.tolist(), (-draft.mean[:, 0].double()).tolist(), draft.path_log_std.tolist())
    return draft, target, log_c, np.array([integrated_mass(math.exp(c), d, path) for c, d, path in values])


def test_the_mass_is_the_integral():
    draft, target, log_c, expected = masses()
    mass = definition.log_mass_above(draft, target, "paper", log_c).exp()
    np.testing.assert_allclose(mass, expected, rtol=1e-7)
    released = draft._replace(path_log_std=-draft.path_log_std)
    assert torch.equal(definition.log_mass_above(released, target, "released", log_c).exp(), mass)
    chains = (Denoised(None, *(v.double() for v in chain[1:])) for chain in (draft, target))
    np.testing.assert_allclose(exact_log_mass(*chains, "paper", log_c).exp(), expected, rtol=1e-7)


@pytest.mark.parametrize("distance", [0.0, 1e-9, 0.5, 1e4, 1e30])
@pytest.mark.parametrize("path", [0.0, 1e5, -1e5])
def test_a_mass_is_a_number_or_nothing(distance, path):
    draft = Denoised(None, torch.tensor([[-distance]]), torch.zeros(1, 1), torch.tensor([path]))
    target = Denoised(None, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))
    for log_c in (0.0, 1.0, 1e5):
        mass = definition.log_mass_above(draft, target, "paper", torch.tensor([log_c], dtype=torch.float64))
        assert mass <= path + 1e-12
        assert not mass.isnan()


def test_identical_means_count_as_a_millionth_of_a_sigma_apart():
    zeros, log_c = torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64)
    chain = Denoised(None, zeros, zeros, zeros[:, 0])
    mass = definition.log_mass_above(chain, chain, "paper", log_c).exp()
    assert float(mass) == pytest.approx(1e-6 / math.sqrt(2 * math.pi), rel=1e-6)


triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.language as tl  # noqa: E402

from cspd_kernels.ops.accept_reject.triton_candidates import log_mass_above  # noqa: E402

NO_NUMBERS = (0.0, 0.0, 0.0, 0.0), (math.nan, math.inf, 1.0, 0.0), (0.0, 0.0, math.nan, -1.0)  # log c, D, path


@triton.jit
def _mass_kernel(out, log_c, distance, path):
    at = tl.program_id(0)
    tl.store(out + at, log_mass_above(tl.load(log_c + at), tl.load(distance + at), tl.load(path + at)))


def test_the_mass_in_triton(triton_device):
    draft, _, log_c, expected = masses()
    distance, path = -draft.mean[:, 0].double(), draft.path_log_std.double()
    values = [
        torch.cat([v, v.new_tensor(bad)]).to(triton_device) for v, bad in zip((log_c, distance, path), NO_NUMBERS)
    ]
    out = torch.empty_like(values[0])
    _mass_kernel[(len(out),)](out, *values)
    np.testing.assert_allclose(out[: len(expected)].exp().cpu(), expected, rtol=1e-7)
    assert (out[len(expected) :] == -math.inf).all()
