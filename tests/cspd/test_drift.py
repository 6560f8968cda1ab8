"""The drifting field, its loss and its head: what they are, what they learn, and that they are served."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import sample, small_mar

import cspd
from cspd.loop import patch_of
from cspd.models import drift
from cspd.models.drift import DriftLoss, affinities, drifting_loss
from cspd_kernels.testing import randomize_, relative_error


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field_by_hand(x, data, others, tau, alone=False):
    """V (N, C) in loops over numbers; alone: sample i does not see others[i]."""
    points, count = torch.cat([data, others]), len(data)
    k = torch.zeros(len(x), len(points), dtype=x.dtype)
    for i in range(len(x)):
        for j in range(len(points)):
            k[i, j] = 0.0 if alone and j == i + count else math.exp(-float((x[i] - points[j]).norm()) / tau)
    k = (k / k.sum(1, keepdim=True) * (k / k.sum(0, keepdim=True))).sqrt()
    v = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(count):
            for other in range(count, len(points)):
                v[i] += k[i, j] * k[i, other] * (points[j] - points[other])
    return v


def test_the_field_is_the_double_sum():
    x, data, others = normal(5, 2), normal(4, 2, seed=1), normal(3, 2, seed=2)
    assert relative_error(drift.drift(x, data, 0.7, others), field_by_hand(x, data, others, 0.7)) < 1e-9
    assert relative_error(drift.drift(x, data, 0.7), field_by_hand(x, data, x, 0.7, alone=True)) < 1e-9
    batch = torch.stack([x, x + 1.0])
    tau = torch.tensor([0.7, 0.3], dtype=torch.float64).view(2, 1, 1)
    together = drift.drift(batch, torch.stack([data, data]), tau)
    assert relative_error(together[1], drift.drift(x + 1.0, data, 0.3)) < 1e-9


def test_affinities_are_normalised_over_the_points_and_over_the_samples():
    x, points = normal(6, 3), normal(4, 3, seed=1)
    weights = affinities(x, points, 0.5)
    squares = weights.square()
    assert (weights > 0).all() and (weights <= 1).all()
    # Two softmaxes of the same numbers: the product is k^2 over the sums of its row and its column.
    k = torch.exp(-torch.cdist(x, points) / 0.5)
    assert relative_error(squares * k.sum(0) * k.sum(1, keepdim=True), k.square()) < 1e-9
    alone = torch.zeros(6, 4, dtype=torch.bool)
    alone[2, 1] = True
    masked = affinities(x, points, 0.5, alone)
    assert masked[2, 1] == 0
    assert relative_error(masked[[0, 1, 3, 4, 5]][:, [0, 2, 3]], weights[[0, 1, 3, 4, 5]][:, [0, 2, 3]]) < 1e-9


def test_exchanging_data_and_others_turns_its_sign():
    x, data, others = normal(5, 2), normal(4, 2, seed=1), normal(3, 2, seed=2)
    field = drift.drift(x, data, 0.4, others)
    assert field.abs().max() > 1e-2
    assert relative_error(drift.drift(x, others, 0.4, data), -field) < 1e-9
    assert drift.drift(x, data, 0.4, data).abs().max() < 1e-12  # equilibrium
    assert drift.drift(x, data, 0.4, data.flip(0)).abs().max() < 1e-12


def test_it_draws_to_the_data_and_away_from_the_others():
    x = torch.zeros(1, 1)
    right, left = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    assert drift.drift(x, right, 1.0, left) > 0 > drift.drift(x, left, 1.0, right)
    here = torch.zeros(1, 1)
    assert drift.drift(x, right, 1.0, here) > 0  # attraction alone
    assert drift.drift(x, here, 1.0, right) < 0  # repulsion alone
    pair = torch.tensor([[0.1], [-0.1]])
    pushed = drift.drift(pair, torch.zeros(1, 1), 1.0)  # both at the only datum, but in each other's way
    assert pushed[0] == -pushed[1]


def test_the_gradient_goes_through_the_samples_alone():
    """It is -2 V / (size M) at every sample, whatever V depends on."""
    x, data = normal(2, 5, 3).requires_grad_(), normal(2, 4, 3, seed=1).requires_grad_()
    drifting_loss(x, data, taus=(0.5,)).backward()
    assert data.grad is None
    with torch.no_grad():
        size = torch.cdist(x, data).mean((-2, -1), keepdim=True)
        field = drift.drift(x, data, 0.5 * size) / size
        field = field / field.square().mean().sqrt()
        assert relative_error(x.grad, -2 * field / size / x.numel()) < 1e-6
    again = drifting_loss(x, data, taus=(0.5,))
    assert float(again.detach()) == pytest.approx(1.0, rel=1e-6)  # V is of unit length
    assert drifting_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)).isfinite()


def trained(repelled: bool, monkeypatch, steps=1000):
    """Of a head that was shown -1 and 1 for one condition and 0.5 for another: which fraction of the one's samples is
    near each of the two, and samples of the other."""
    if not repelled:

        def attracted(x, data, tau, others=None):
            """Towards the mean of the data alone, weighed as in the field."""
            near = affinities(x, data, tau)
            return near @ data / near.sum(-1, keepdim=True) - x

        monkeypatch.setattr(drift, "drift", attracted)
    torch.manual_seed(0)
    head = DriftLoss(1, 2, 1, 32)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    z = torch.eye(2)
    data = torch.stack([torch.tensor([-1.0, 1.0]).repeat(8), torch.full((16,), 0.5)])[..., None]
    for _ in range(steps):
        optimiser.zero_grad()
        head(data, z).backward()
        optimiser.step()
    torch.manual_seed(1)
    both, one = head.sample(z.repeat_interleave(400, dim=0)).view(2, 400)
    near = torch.stack([(both - point).abs() < 0.25 for point in (-1.0, 1.0)]).float().mean(dim=1)
    return near, one


def test_it_learns_two_points(monkeypatch):
    near, one = trained(True, monkeypatch)
    assert near.min() > 0.35
    assert near.sum() > 0.85
    assert (one - 0.5).abs().mean() < 0.15


def test_without_repulsion_it_does_not(monkeypatch):
    """The negative control: the same training by attraction alone gives one of the points, or their mean."""
    near, _ = trained(False, monkeypatch)
    assert near.min() <= 0.35 or near.sum() <= 0.85


def head(**options) -> DriftLoss:
    torch.manual_seed(0)
    return randomize_(DriftLoss(4, 32, 2, 32, **{"std": 0.3, "entropies": (0.6, 0.9), "least": 0.4, **options}), 3)


def test_state_dict():
    made, other = head(), DriftLoss(4, 32, 2, 32)
    assert (other.std, other.entropies, other.least) == (1.0, (0.0, 1.0), 0.5)
    before = other.gen_diffusion
    other.load_state_dict(made.state_dict(), strict=True)
    assert (other.std, other.entropies, other.least) == (0.3, (0.6, 0.9), 0.4)
    assert other.gen_diffusion is not before  # whatever goes by it is made again
    assert other.gen_diffusion.schedule.width == 0.3
    for again in (other, copy.deepcopy(made)):
        torch.manual_seed(0)
        expected = made.sample(torch.ones(3, 32))
        torch.manual_seed(0)
        assert torch.equal(again.sample(torch.ones(3, 32)), expected)
        assert torch.equal(again.get_extra_state(), made.get_extra_state())
    without = {name: value for name, value in made.state_dict().items() if name != "_extra_state"}
    with pytest.raises(RuntimeError, match="_extra_state"):
        other.load_state_dict(without, strict=True)
    with pytest.raises(AttributeError):
        other.std = 1.0  # its schedule would not know


@pytest.mark.parametrize("options", [{"entropies": (0.5, 0.5)}, {"least": 0.0}, {"least": 1.5}, {"std": 0.0}])
def test_bad_numbers(options):
    with pytest.raises(ValueError, match="expected"):
        head(**options)


def test_initial_scale():
    made = head()
    entropy = torch.linspace(0, 1, 101)
    scale = made.initial_scale(entropy)
    assert scale.min() == pytest.approx(0.4)
    assert scale.max() == 1.0
    assert (scale.diff() >= 0).all()
    assert (scale[:61] == scale[0]).all() and (scale[90:] > 1 - 1e-6).all()
    middle = made.initial_scale(torch.tensor([[0.75]], dtype=torch.bfloat16))
    assert middle.shape == (1, 1)
    assert float(middle.square()) == pytest.approx((0.4**2 + 1) / 2, rel=1e-2)
    assert (head(least=1.0).initial_scale(entropy) == 1.0).all()


@pytest.mark.parametrize("options", [{}, {"cfg": 2.5}, {"entropy": torch.tensor([0.1, 0.7, 1.0])}])
def test_patched_it_gives_the_same_tokens(options):
    made = head().eval()
    z = torch.randn(6 if "cfg" in options else 3, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    expected = made.sample(z, **options)
    cspd.patch(made)
    patch_of(made.net).tell = pytest.fail
    torch.manual_seed(5)
    got = made.sample(z, **options)
    cspd.unpatch(made)
    assert relative_error(got[:3], expected[:3]) < 1e-5
    torch.manual_seed(6)
    assert relative_error(made.sample(z, **options)[:3], expected[:3]) > 1e-2


def test_a_model_with_it_samples_whole_as_its_own_code_does():
    model = small_mar()
    model.diffloss = head().eval()
    expected = sample(model, cfg=2.0)
    cspd.patch(model)
    patch_of(model.diffloss.net).tell = pytest.fail
    assert relative_error(sample(model, cfg=2.0), expected) < 1e-5
