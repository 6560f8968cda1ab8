"""Transformers over index tables: what the models' own methods compute, and which models are served so."""

from __future__ import annotations

import copy
import functools
import logging
import types

import pytest
import torch
from small_models import small_mar

import cspd
from cspd.models import MAR
from cspd.transformer import PARTS, conditions, conditions_by_masks, known_of_mask, why_not_by_tables
from cspd.whole import chosen
from cspd_kernels.testing import relative_error


class Released(MAR):
    """A MAR with transformer methods of its own, which pick tokens out by a mask, as released code bases have."""

    def known(self, mask):
        return torch.cat([torch.ones(len(mask), self.buffer_size, dtype=torch.bool), mask == 0], dim=1)

    def forward_mae_encoder(self, x, mask, class_embedding):
        x = self.z_proj(x.to(self.z_proj.weight.dtype))
        x = torch.cat([class_embedding[:, None].expand(-1, self.buffer_size, -1), x], dim=1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = x[self.known(mask)].reshape(len(mask), -1, x.shape[-1])
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def forward_mae_decoder(self, x, mask):
        x = self.decoder_embed(x)
        padded = self.mask_token.to(x.dtype).repeat(len(mask), self.buffer_size + self.seq_len, 1)
        padded[self.known(mask)] = x.flatten(0, 1)
        x = padded + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned


def released(seed=0, **options):
    model = small_mar(seed, schedule="linear", decoder_embed_dim=48, **options)
    model.__class__ = Released
    return model


def tables(count, seed=0, rows=3):
    """(known, where, mask) of random positions, other ones in every row; ``where`` is in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(16, generator=generator) for _ in range(rows)])
    known = orders[:, :count].sort(1).values
    return known, orders[:, max(0, count - 2) :], torch.ones(rows, 16).scatter_(1, known, 0.0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 15, 16])
def test_tables_give_what_masks_give(count, autocast):
    model, (known, where, mask) = released(), tables(count)
    tokens, embedding = torch.randn(3, 16, 4), model.class_emb(torch.tensor([1, 5, 9]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = conditions_by_masks(model, tokens, mask, embedding, where)
        assert torch.equal(conditions(model, tokens, known, embedding, where), expected)
        assert torch.equal(known_of_mask(mask), known)
        own = copy.copy(model)
        own.__class__ = MAR
        assert torch.equal(conditions_by_masks(own, tokens, mask, embedding, where), expected)
        other = known.flip(0)  # the rows' tables matter, and not only their sizes
        assert not count % 16 or relative_error(conditions(model, tokens, other, embedding, where), expected) > 1e-2


def test_known_tokens_must_be_as_many_in_every_image():
    mask = torch.ones(2, 16)
    mask[0, :4], mask[1, :6] = 0, 0
    with pytest.raises(ValueError, match=r"the same number of known tokens in every image, got \[4, 6\]"):
        known_of_mask(mask)


def test_gradients_flow_through_the_tables():
    model, (known, where, mask) = released(), tables(6)
    tokens, embedding = torch.randn(3, 16, 4), model.class_emb.weight.detach()[:3]
    gradients = []
    for compute, table in ((conditions, known), (conditions_by_masks, mask)):
        model.zero_grad()
        compute(model, tokens, table, embedding, where).square().sum().backward()
        gradients.append([getattr(model, name).grad.clone() for name in PARTS if name.endswith(("learned", "token"))])
    for one, other in zip(*gradients):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_models_with_the_same_arithmetic_are_recognised(dtype):
    for model in (small_mar(), released()):
        model = copy.deepcopy(model).to(dtype)
        assert why_not_by_tables(model) is None


def doubled_positions(self, x, mask, class_embedding):
    return Released.forward_mae_encoder(self, x, mask, class_embedding) + 0.1 * self.encoder_pos_embed_learned[:, :1]


def reversed_tokens(self, x, mask):
    return Released.forward_mae_decoder(self, x.flip(1), mask)


def fewer_tokens(self, x, mask):
    return Released.forward_mae_decoder(self, x, mask)[:, 1:]


def other_arguments(self, x, mask, labels, extra):
    raise NotImplementedError


FORKS = {
    "forward_mae_encoder": [(doubled_positions, "differ by"), (other_arguments, "cannot be compared .TypeError")],
    "forward_mae_decoder": [(reversed_tokens, "differ by"), (fewer_tokens, "cannot be compared .RuntimeError")],
}


@pytest.mark.parametrize(
    ("name", "method", "match"), [(name, method, match) for name, cases in FORKS.items() for method, match in cases]
)
def test_forks_with_other_arithmetic_are_told_apart(name, method, match):
    model = released()
    setattr(model, name, types.MethodType(method, model))
    assert match.split(".")[0] in why_not_by_tables(model)
    assert match.split(".")[-1] in why_not_by_tables(model)


@pytest.mark.parametrize("name", ["forward_mae_encoder", "forward_mae_decoder"])
def test_what_is_put_in_place_of_an_own_method_is_compared(name):
    model = small_mar()
    own = getattr(model, name)
    setattr(model, name, lambda *args: 1.1 * own(*args))
    assert "differ by" in why_not_by_tables(model)


def test_a_model_is_compared_once(monkeypatch):
    model = released()
    calls = calls_of(model, monkeypatch)
    cspd.SpecDecodeRunner(model, model).run(1, 3, 2, seed=0)
    assert len(calls) == 3  # with three counts of known tokens


def test_a_model_without_the_parts():
    model = released()
    del model.mask_token, model.encoder_norm
    assert why_not_by_tables(model) == "it lacks encoder_norm, mask_token"


def test_comparing_leaves_no_trace():
    model = released()
    own = model.forward_mae_encoder
    model.forward_mae_encoder = lambda *args: own(*args) * torch.nn.functional.dropout(torch.ones(()), 0.1) ** 0
    before = [torch.get_rng_state(), *(value.clone() for value in model.state_dict().values())]
    why_not_by_tables(model)
    assert all(map(torch.equal, before, [torch.get_rng_state(), *model.state_dict().values()]))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_run_is_the_same_by_weights_by_tables_and_by_masks(monkeypatch, cfg):
    models, images, outcomes = (released(0), released(1)), [], []
    asked = "asked for by this test"
    for weights, tables in ((None, None), (asked, None), (asked, asked)):
        monkeypatch.setattr(chosen, "why_not_by_weights", lambda model, backend, reason=weights: reason)
        monkeypatch.setattr(chosen, "why_not_by_tables", lambda model, reason=tables: reason)
        calls = calls_of(models[1], monkeypatch)
        runner = cspd.SpecDecodeRunner(*models, prefill=0.25)
        images.append(runner.run(3, 6, 2, labels=torch.tensor([1, 2, 3]), cfg=cfg, seed=0))
        outcomes.append(runner.stats.outcome)
        assert bool(calls) == (tables is not None)
    for i in (1, 2):
        assert relative_error(images[i], images[0]) < 1e-5
        assert torch.equal(outcomes[i], outcomes[0])


def calls_of(model, monkeypatch):
    """How often the model's own encoder is called from here on."""
    count, own = [], model.forward_mae_encoder
    monkeypatch.setattr(model, "forward_mae_encoder", lambda *args: count.append(args) or own(*args), raising=False)
    return count


def test_own_methods_run_only_where_they_must(monkeypatch, caplog):
    draft, target = released(0), released(1)
    target.forward_mae_encoder = types.MethodType(doubled_positions, target)
    with caplog.at_level(logging.INFO, "cspd"):
        runner = cspd.SpecDecodeRunner(draft, target, prefill=0.25)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the target (Released) runs its own forward_mae_encoder and forward_mae_decoder, which synchronise at every "
        "pass"
    ]
    assert "differ by" in caplog.text
    drafted, targeted = calls_of(draft, monkeypatch), calls_of(target, monkeypatch)
    runner.run(2, 6, 2, seed=0)
    assert len(drafted) == 3  # methods that were replaced are compared, with three counts of known tokens
    for seen in (drafted, targeted, caplog):
        seen.clear()
    runner.run(2, 6, 2, seed=0)
    runner.run(2, 6, 2, seed=0)
    assert not drafted
    assert len(targeted) == 2 * runner.stats.target_calls
    assert not caplog.records  # once is enough


def test_models_in_training_mode_run_their_own_methods(monkeypatch, caplog):
    draft, target = released(0).train(), released(1)
    with caplog.at_level(logging.INFO, "cspd"):
        runner = cspd.SpecDecodeRunner(draft, target, prefill=0.25)
        assert not caplog.records
        calls = calls_of(draft, monkeypatch)
        runner.run(2, 6, 2, seed=0)
    assert len(calls) == runner.stats.draft_calls
    assert "the draft is in training mode" in caplog.text
    draft.eval()
    runner.run(2, 6, 2, seed=0)  # compares now, with three counts of known tokens
    assert len(calls) == runner.stats.draft_calls + 3


def test_a_method_that_wraps_the_own_one_is_compared_and_run(caplog):
    """``functools.wraps`` copies attributes: the mark of a method that is as good as the tables must not be one."""
    model = small_mar(1, schedule="linear")
    own = model.forward_mae_decoder

    @functools.wraps(own)
    def louder(x, mask):
        return 5 * own(x, mask)

    model.forward_mae_decoder = louder
    with caplog.at_level(logging.INFO, "cspd"):
        assert "differ by" in (why_not_by_tables(model) or "")
        cspd.SpecDecodeRunner(model, model)
    assert "the draft (MAR) runs its own" in caplog.text
