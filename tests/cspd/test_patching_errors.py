"""``cspd.patch`` where there is nothing to patch or something that it cannot: the message, and nothing has changed."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
from foreign import Head, conditions, made, run, state, unchanged
from small_models import small_mar

import cspd
from cspd.models import DiffLoss
from cspd.models.diffloss import TimestepEmbedder

Z = conditions()


def test_nothing_to_patch_lists_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no diffusion head found in Linear.*p_sample_loop.*No module came near"):
        cspd.patch(nn.Linear(2, 2))
    model = small_mar()
    model.diffloss.net.time_embed = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"came near:\s+diffloss \(DiffLoss\): it lacks net.time_embed.mlp"):
        cspd.patch(model)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module.*got str"):
        cspd.patch("model")


def test_other_arithmetic_is_seen_on_fresh_weights_too():
    torch.manual_seed(0)
    head = DiffLoss(4, 32, 2, 32, "12")  # modulations and output layer are zero

    class Swapped(type(head.net.time_embed)):
        @staticmethod
        def timestep_embedding(t, dim):
            cos, sin = TimestepEmbedder.timestep_embedding(t, dim).chunk(2, dim=-1)  # no order that is known
            return torch.cat([cos, -sin], dim=-1)

    cspd.patch(head)
    cspd.unpatch(head)
    head.net.time_embed.__class__ = Swapped
    with pytest.raises(ValueError, match=r"left unpatched: its sample .* its network also differs: .* differ by"):
        cspd.patch(head)


def test_a_network_of_other_arithmetic_is_refused():
    class Odd(Head):
        class net_class(Head.net_class):  # noqa: N801
            def forward(self, x, t, c):
                return 1.05 * super().forward(x, t, c)

    head = made(Odd)
    before = state(head)
    with pytest.raises(ValueError, match="samples differently"):
        cspd.patch(head)
    assert unchanged(before, state(head))


def test_what_differs_in_one_of_two_heads_leaves_both_unpatched():
    class Odd(Head.net_class):
        def forward(self, x, t, c):
            return super().forward(x, t, c) + 0.01

    pair = nn.ModuleList([made(), made(type("Odd", (Head,), {"net_class": Odd}))])
    before = [state(head) for head in pair]
    with pytest.raises(ValueError, match=r"^1 \(Odd\) samples differently"):
        cspd.patch(pair)
    assert all(unchanged(a, state(head)) for a, head in zip(before, pair))


def test_heads_that_cannot_be_served_beside_one_that_can_are_named(caplog):
    pair = nn.ModuleDict({"good": small_mar(0), "odd": small_mar(1)})
    pair["odd"].diffloss.net.res_blocks[0].in_ln = nn.Identity()
    with caplog.at_level(logging.WARNING, "cspd"):
        cspd.patch(pair)
    assert "odd.diffloss (DiffLoss)" in caplog.text
    assert "net.res_blocks[0].in_ln is Identity(), not a LayerNorm" in caplog.text
    assert cspd.is_patched(pair["good"])
    assert not cspd.is_patched(pair["odd"])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"noise": "white"}, ValueError, "expected noise one of"),
        ({"weights": "warm"}, ValueError, "expected weights one of .*, got 'warm'"),
        ({"dtype": torch.int8}, ValueError, "expected dtype"),
        ({"backend": "metal"}, ValueError, "expected backend one of torch, triton, cuda, got 'metal'"),
    ],
)
def test_bad_options(options, error, match):
    model = small_mar()
    for use in (cspd.patch, lambda *a, **o: cspd.patched(*a, **o).__enter__()):
        with pytest.raises(error, match=match):
            use(model, **options)
        assert not cspd.is_patched(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = small_mar()
    with torch.no_grad():
        model.diffloss.net.res_blocks[1].mlp[0].weight[3, 4] = value
    with pytest.raises(
        ValueError, match=r"expected finite weights, got NaN or infinity in net.res_blocks.1.mlp.0.weight"
    ):
        cspd.patch(model)
    assert not cspd.is_patched(model)


def test_weights_beyond_the_range_of_half_precision():
    model = small_mar()
    with torch.no_grad():
        model.diffloss.net.res_blocks[1].mlp[0].weight[3, 4] = 7e4
    with pytest.raises(ValueError, match=r"net.res_blocks.1.mlp.0.weight holds values beyond float16's range"):
        cspd.patch(model, dtype=torch.float16)
    assert not cspd.is_patched(model)
    cspd.patch(model, dtype=torch.bfloat16)


def test_non_finite_conditions_raise_on_the_cpu():
    model = cspd.patch(small_mar())
    z = torch.randn(3, 32)
    z[1, 2] = float("nan")
    with pytest.raises(ValueError, match="finite values in cond"):
        model.diffloss.sample(z)


def test_its_own_errors_stay():
    plain, head = made(), cspd.patch(made())
    calls = [
        lambda h: h.sample(Z[:5], 1.0, 2.0),  # an odd number of rows under guidance
        lambda h: h.sample(Z, colour="red"),
        lambda h: h.gen_diffusion.p_sample_loop(h.net.forward),
        lambda h: h.gen_diffusion.p_sample_loop(h.net.forward, (2, 4), colour="red"),
        lambda h: h.gen_diffusion.p_sample_loop(None, (2, 4)),
    ]
    for call in calls:
        errors = []
        for each in (plain, head):
            with pytest.raises(Exception) as caught:
                call(each)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


def test_conditions_of_another_width():
    head = made()
    errors = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:  # its own
            head.sample(Z[:, :5])
        errors.append(str(error.value))
        cspd.patch(head)
    assert errors[0] == errors[1]


def test_an_installation_that_fails_half_way_leaves_nothing(monkeypatch):
    pair = nn.ModuleList([made(seed=seed) for seed in range(2)])
    before = [state(head) for head in pair]
    install, seen = cspd.patching.HeadPatch.install, []

    def fail(self):
        seen.append(self)
        install(self)
        if len(seen) == 2:
            raise RuntimeError("half way")

    monkeypatch.setattr(cspd.patching.HeadPatch, "install", fail)
    with pytest.raises(RuntimeError, match="half way"):
        cspd.patch(pair)
    assert all(unchanged(a, state(head)) for a, head in zip(before, pair))
    assert [run(head, lambda h: h.sample(Z))[2] for head in pair] == [12, 12]


def test_a_failed_patch_leaves_the_one_before():
    head = cspd.patch(made(), noise="philox")
    with torch.no_grad():
        head.net.cond_embed.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite weights"):
        cspd.patch(head)
    with torch.no_grad():
        head.net.cond_embed.weight[0, 0] = 0.0
    assert cspd.loop.patch_of(head.net).options.noise == "philox"
    assert run(head, lambda h: h.sample(Z))[2] == 0


def test_untrained_heads_are_patched():
    torch.manual_seed(0)
    head = DiffLoss(4, 32, 2, 32, "12")
    torch.manual_seed(0)
    expected = head.sample(torch.ones(3, 32))
    torch.manual_seed(0)
    assert torch.allclose(cspd.patch(head).sample(torch.ones(3, 32)), expected, rtol=1e-4, atol=1e-4)
