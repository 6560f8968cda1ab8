"""``cspd.sample_tokens`` and ``patch(whole=True)``: the model's own images, seed for seed."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import fake_graphs
import numpy as np
import pytest
import torch
from slow import slow
from small_models import sample, small_mar

import cspd
from cspd.diffusions import NotServedError
from cspd.models import MAR
from cspd.transformer import conditions_by_masks
from cspd.whole import compare, compiled, noise, passes
from cspd.whole.images import SampleOptions, Sampler
from cspd.whole.weights import Weights
from cspd_kernels import products
from cspd_kernels.testing import randomize_, relative_error

CALLS = {
    "plain": {},
    "guided": {"cfg": 3.0},
    "constant guidance": {"cfg": 2.0, "cfg_schedule": "constant", "temperature": 0.7},
    "no labels": {"labels": None, "cfg": 0.5},
    "more steps than tokens": {"num_iter": 40},
    "one step": {"num_iter": 1, "cfg": 2.0},
    "cold": {"temperature": 0.0},
}


class Released(MAR):
    """A model whose loop is to be compared, as it is not this package's."""

    def sample_tokens(self, *args, **kwargs):
        return super().sample_tokens(*args, **kwargs)


class Colder(MAR):
    """A fork with another loop."""

    def sample_tokens(self, bsz, num_iter=64, cfg=1.0, cfg_schedule="linear", labels=None, temperature=1.0):
        return super().sample_tokens(bsz, num_iter, cfg, cfg_schedule, labels, temperature * 0.9)


class OtherOrder(MAR):
    def sample_orders(self, bsz):
        return super().sample_orders(bsz).flip(1)


def model(kind=MAR, **options) -> MAR:
    made = small_mar(3, **{"encoder_depth": 2, "decoder_depth": 2, "img_size": 16, **options})
    made.__class__ = kind
    return made


def ours(model, seed=0, options=None, **arguments):
    torch.manual_seed(seed)
    np.random.seed(seed)
    arguments = {"num_iter": 6, "labels": torch.tensor([1, 4, 9]), **arguments}
    return cspd.sample_tokens(model, 3, **arguments, **(options or {}))


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_image_from_the_same_seeds(monkeypatch, name, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    mar = model(decoder_embed_dim=48)
    for seed in (5, 0, 0):  # in the first and in later calls, which a graph's buffers serve again
        expected = sample(mar, seed, **CALLS[name])
        states = torch.get_rng_state(), np.random.get_state()[1].tolist()
        actual = ours(mar, seed, **CALLS[name])
        assert relative_error(actual, expected) < 1e-5
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == np.random.get_state()[1].tolist()
    assert relative_error(ours(mar, 1, **CALLS[name]), expected) > 1e-2 or CALLS[name].get("temperature") == 0.0


def test_half_precision_is_as_near_to_float64_as_the_loop_under_autocast():
    mar = model(width=64)
    with torch.autocast("cpu", torch.bfloat16):
        own, followed = sample(mar, cfg=2.0), ours(mar, cfg=2.0)
    exact = ours(mar, cfg=2.0, options={"dtype": torch.float64})
    asked = ours(mar, cfg=2.0, options={"dtype": torch.bfloat16})
    assert torch.equal(asked, followed)
    assert relative_error(asked, exact) < max(2e-2, 1.5 * relative_error(own, exact))
    assert relative_error(ours(mar, cfg=2.0), exact) < 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5, 15])
def test_conditions_are_the_models_own(count, bias):
    mar = small_mar(encoder_depth=2, decoder_depth=2, decoder_embed_dim=48)
    if not bias:
        for block in (*mar.encoder_blocks, *mar.decoder_blocks):
            block.attn.qkv.bias = None
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    known, where, rank = order[:, :count], order[:, count : count + 3], order.argsort(dim=1)
    tokens, embedding = torch.randn(3, 16, 4), torch.randn(6, 32)
    mask = (rank >= count).float().repeat(2, 1)
    with torch.no_grad():
        expected = conditions_by_masks(
            mar.double(), tokens.double().repeat(2, 1, 1), mask, embedding.double(), where.repeat(2, 1)
        )
    mar.float()
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)):
        weights = Weights(mar, dtype)
        for room in (None, 16):  # exactly the known ones, and with others behind them
            padded = tokens.clone()
            if room is not None:
                padded.scatter_(1, order[:, count:, None].expand(-1, -1, 4), torch.nan)  # which nobody must look at
            taken, at = (known, None) if room is None else (order, torch.tensor([count]))
            actual = passes.conditions(weights, padded, taken, rank, where, embedding, at)
            assert actual.dtype == weights.stream
            assert relative_error(actual, expected) < bound


@pytest.mark.parametrize(("masked", "first"), [(False, True), (True, False)])
def test_a_compiled_block_is_the_block(monkeypatch, masked, first):
    monkeypatch.setattr(products, "packs", lambda dtype: False)  # as on a device
    monkeypatch.setattr(compiled, "_compiled", lambda: compiled.block)
    block = Weights(small_mar(width=64), torch.float32).encoder[0]
    stream, mask = torch.randn(2, 9, 64), torch.zeros(1, 1, 1, 9).masked_fill(torch.arange(9) > 6, -torch.inf)
    delta = None if first else torch.randn(2, 9, 64)
    arguments = (delta, mask if masked else None, torch.float32, "torch")
    expected = passes.run_block(block, stream.clone(), *arguments)
    for got, wanted in zip(compiled.run_block(block, stream, *arguments), expected, strict=True):
        assert relative_error(got, wanted) < 1e-5


def test_compiling_is_for_gpus():
    with pytest.raises(ValueError, match="expected compile=True with a model on a GPU, got one on cpu"):
        ours(model(), options={"compile": True})
    with pytest.raises(ValueError, match="expected whole=True together with compile=True"):
        cspd.patch(model(), compile=True)


def test_noise_is_drawn_in_parts_where_it_is_large(monkeypatch):
    mar = model()
    expected = ours(mar, cfg=2.0, num_iter=12)
    monkeypatch.setattr(noise, "_TABLE_BYTES", 4 * 3 * 12 * 4 * 7)  # seven tokens of three images
    fresh = Sampler(mar, SampleOptions())
    for use in (lambda _: None, fake_graphs.use):
        use(monkeypatch)
        for _ in range(2):
            torch.manual_seed(0)
            np.random.seed(0)
            actual = fresh.sample(3, 12, 2.0, labels=torch.tensor([1, 4, 9]))
            assert relative_error(actual, expected) < 1e-5


def test_addressed_noise_needs_no_table():
    mar = model()
    one, two, three = (ours(mar, seed, options={"noise": "philox"}) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert relative_error(one, three) > 1e-2


def test_changes_of_weights_are_seen_at_the_next_call():
    mar = model()
    for dtype in (None, torch.bfloat16):
        before = ours(mar, options={"dtype": dtype})
        with torch.no_grad():
            mar.encoder_blocks[0].attn.qkv.weight.data.mul_(1.5)
            mar.decoder_norm.bias.data += 0.3
        after = ours(mar, options={"dtype": dtype})
        assert relative_error(after, before) > 1e-2
        twin = copy.deepcopy(mar)
        fresh = Sampler(twin, SampleOptions(dtype))
        torch.manual_seed(0)
        np.random.seed(0)
        assert torch.equal(fresh.sample(3, 6, labels=torch.tensor([1, 4, 9])), after)
    mar.encoder_blocks[1] = copy.deepcopy(mar.encoder_blocks[0])
    assert relative_error(ours(mar), sample(mar)) < 1e-5


def test_a_model_of_another_class_is_compared_and_served(monkeypatch):
    asked = []
    own = compare._difference
    monkeypatch.setattr(compare, "_difference", lambda *args: asked.append(args) or own(*args))
    mar = model(Released)
    for _ in range(2):
        assert relative_error(ours(mar, cfg=2.0), sample(mar, cfg=2.0)) < 1e-5
    assert len(asked) == len(compare._CASES)  # once


class DrawsMore(MAR):
    def sample_tokens(self, bsz, *args, **kwargs):
        torch.rand(bsz)
        return super().sample_tokens(bsz, *args, **kwargs)


class AtLeastOne(MAR):
    def sample_tokens(self, bsz, num_iter=64, cfg=1.0, *args, **kwargs):
        return super().sample_tokens(bsz, num_iter, max(1.0, cfg), *args, **kwargs)


class Later(MAR):
    """A fork with a parameter that says nothing yet."""

    def forward_mae_encoder(self, x, mask, class_embedding):
        return super().forward_mae_encoder(x, mask, class_embedding) + self.more


FORKS = {
    Colder: "calls its head with other arguments",
    OtherOrder: "images differ by",
    DrawsMore: "draws other random numbers",
    AtLeastOne: "calls its head with other arguments",
}


@pytest.mark.parametrize("kind", FORKS)
def test_another_loop_is_refused_and_nothing_drawn(kind):
    mar = model(kind)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(NotServedError, match=FORKS[kind]):
        cspd.sample_tokens(mar, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_that_nobody_reads_yet_are_refused():
    mar = model(Later)
    mar.more = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(NotServedError, match="it has more parameters: more"):
        cspd.sample_tokens(mar, 2)


def replace_head(mar):
    own = mar.diffloss.sample
    mar.diffloss.sample = lambda *args, **kwargs: own(*args, **kwargs) * 1.5


CHANGES = {
    "its orders": lambda mar: setattr(mar, "sample_orders", lambda bsz: type(mar).sample_orders(mar, bsz).flip(1)),
    "its head's sample": replace_head,
    "a norm's epsilon": lambda mar: setattr(mar.encoder_blocks[0].norm1, "eps", 0.5),
    "the last norm's epsilon": lambda mar: setattr(mar.decoder_norm, "eps", 0.5),
    "a part of a block": lambda mar: setattr(mar.encoder_blocks[1].mlp, "drop", torch.nn.Tanh().eval()),
    "heads of attention": lambda mar: setattr(mar.encoder_blocks[0].attn, "num_heads", 4),
}


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_later_is_seen(monkeypatch, what, graphs):
    """The model's own image, by its own method or by ours, as soon as it draws another one."""
    if graphs:
        fake_graphs.use(monkeypatch)
    mar = cspd.patch(model(), whole=True)
    before = [sample(mar, cfg=2.0) for _ in range(2)][1]
    CHANGES[what](mar)
    after = [sample(mar, cfg=2.0) for _ in range(2)]
    expected = sample(cspd.unpatch(mar), cfg=2.0)
    assert relative_error(expected, before) > 1e-4
    assert all(relative_error(image, expected) < 1e-5 for image in after)


def test_a_forks_own_defaults_are_taken(monkeypatch):
    class Fork(MAR):
        def sample_tokens(
            self, bsz, num_iter=5, cfg=2.0, cfg_schedule="constant", labels=None, temperature=0.9, progress=False
        ):
            return super().sample_tokens(bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress)

    mar = model(Fork)

    def image(mar):
        torch.manual_seed(0)
        np.random.seed(0)
        return mar.sample_tokens(2)

    expected, served, own = image(mar), [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, **given: served.append(given) or own(self, **given))
    assert relative_error(image(cspd.patch(mar, whole=True)), expected) < 1e-5
    assert [given["num_iter"] for given in served] == [5]  # not by its own method


def test_a_replaced_method_is_not_taken_for_the_models():
    mar = model()
    mar.sample_tokens = lambda *args, **kwargs: "mine"
    with pytest.raises(NotServedError, match="has been replaced on the instance"):
        cspd.sample_tokens(mar, 2)
    with pytest.raises(TypeError, match=r"pass the model inside, model._orig_mod"):
        cspd.sample_tokens(torch.compile(model()), 2)


def test_a_first_call_under_autocast_is_compared_without_it():
    mar = model(Released)
    with torch.autocast("cpu", torch.bfloat16):
        first = ours(mar, cfg=2.0)
    assert torch.equal(first, ours(mar, cfg=2.0, options={"dtype": torch.bfloat16}))
    assert relative_error(ours(mar), sample(mar)) < 1e-5


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_inference_mode_and_then_none(monkeypatch, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    mar, images = model(), []
    runner = cspd.SpecDecodeRunner(mar, mar, prefill=0.3)
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            images.append((ours(mar, cfg=2.0), runner.run(2, 6, 2, seed=0)))
    assert all(torch.equal(a, b) for pair in images[1:] for a, b in zip(pair, images[0]))
    mar.class_emb.weight.requires_grad_(True)
    assert not sample(cspd.patch(mar, whole=True)).requires_grad


def test_another_schedule_is_left_to_the_models_own_method(caplog):
    mar = cspd.patch(model(), whole=True)
    with caplog.at_level(logging.WARNING, "cspd"), pytest.raises(ValueError, match="expected cfg_schedule"):
        mar.sample_tokens(2, 3, cfg=2.0, cfg_schedule="cosine")
    assert "sample_tokens of MAR runs its own code" in caplog.text


def test_a_copy_of_the_head_carries_no_model():
    mar = cspd.patch(model(), whole=True)
    sample(mar)
    bare = len(pickle.dumps(cspd.unpatch(copy.deepcopy(mar)).diffloss))
    assert len(pickle.dumps(copy.deepcopy(mar.diffloss))) < 1.2 * bare
    ours(mar)
    gone = weakref.ref(mar)
    del mar
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("graphs", [slow(False), True], ids=["plain", "graphs"])
def test_runs_of_one_runner_with_other_numbers_of_steps(monkeypatch, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    draft, target = model(schedule="linear"), model(schedule="linear")
    randomize_(target, 8)
    runner = cspd.SpecDecodeRunner(draft, target, prefill=0.2)
    for steps, prefill in ((1, 0.2), (12, 0.2), (24, 0.2), (6, 0.2), (12, 0.6), (12, 1.0), (12, 0.2)):
        runner.prefill = prefill
        image, stats = runner.run(2, steps, 3, seed=0), runner.stats
        fresh = cspd.SpecDecodeRunner(draft, target, prefill=prefill)
        assert relative_error(fresh.run(2, steps, 3, seed=0), image) < 1e-5
        assert stats.prefilled == fresh.stats.prefilled
        assert torch.equal(stats.outcome, fresh.stats.outcome)
        assert relative_error(fresh.stats.probability, stats.probability) < 1e-4


def around(*layers):
    return torch.nn.Sequential(*layers).eval()


REFUSALS = {
    "training mode": (lambda m: m.decoder_blocks.train(), "training mode"),
    "a hook": (lambda m: m.encoder_blocks[0].mlp.register_forward_hook(lambda *_: None), "hooks"),
    "more in a block": (lambda m: m.encoder_blocks[0].register_parameter("gamma", torch.nn.Parameter(torch.ones(32))),
                        "has more than an attention and an MLP: gamma"),
    "another layer": (lambda m: setattr(m.decoder_blocks[0].mlp, "fc1", around(m.decoder_blocks[0].mlp.fc1)),
                      "is a Sequential, not a Linear"),
    "another norm": (lambda m: setattr(m.encoder_blocks[0], "norm1", around()), "is a Sequential, not a LayerNorm"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_served_says_why_and_the_patch_runs_the_own_method(name, caplog):
    change, match = REFUSALS[name]
    mar = cspd.patch(model(), whole=True)
    assert relative_error(sample(mar), sample(cspd.unpatch(copy.deepcopy(mar)))) < 1e-5
    change(mar)
    with pytest.raises(NotServedError, match=match):
        cspd.sample_tokens(mar, 2)
    with caplog.at_level(logging.WARNING, "cspd"):
        images = [sample(mar) for _ in range(2)]
    own = sample(cspd.unpatch(mar))
    assert all(relative_error(image, own) < 1e-5 for image in images)
    told = [record.message for record in caplog.records if "sample_tokens of MAR runs its own code" in record.message]
    assert len(told) == 1
    assert match.split(":")[0].split(" and")[0] in told[0]


def test_a_patch_comes_and_goes_with_its_copies():
    mar = model()
    expected, signature = sample(mar, cfg=2.0), str(mar.sample_tokens.__doc__)
    with cspd.patched(mar, whole=True):
        for one in (mar, copy.deepcopy(mar), pickle.loads(pickle.dumps(mar))):
            assert relative_error(sample(one, cfg=2.0), expected) < 1e-5
            assert one.sample_tokens.__self__.module is one
            assert str(one.sample_tokens.__doc__) == signature
        assert list(mar.state_dict()) == list(model().state_dict())
    assert "sample_tokens" not in mar.__dict__
    assert torch.equal(sample(mar, cfg=2.0), expected)
    with pytest.raises(ValueError, match=r"expected a MAR model with sample_tokens .* omit whole=True"):
        cspd.patch(mar.diffloss, whole=True)
    assert not cspd.is_patched(mar)


def test_the_patch_is_at_work(monkeypatch):
    mar, seen = cspd.patch(model(), whole=True), []
    assert "patched, whole images, parallel_tol=auto" in str(cspd.describe(mar))
    own = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, *a, **k: seen.append(k) or own(self, *a, **k))
    sample(mar, cfg=2.0)
    assert len(seen) == 1
    mar.sample_tokens = lambda *a, **k: "mine"
    assert mar.sample_tokens(2) == "mine"


def test_nothing_keeps_the_model():
    mar = model()
    ours(mar)
    gone = weakref.ref(mar)
    del mar
    gc.collect()
    assert gone() is None


def test_wrong_input_is_one_clear_error():
    mar = model()
    for options, error, match in (
        ({"noise": "none"}, ValueError, "sample_tokens expected noise one of"),
        ({"dtype": torch.int8}, ValueError, "sample_tokens expected dtype as float32"),
        ({"parallel_tol": 3}, ValueError, "sample_tokens expected parallel_tol"),
        ({"bsz": 0}, ValueError, "expected bsz >= 1, got 0"),
        ({"labels": torch.tensor([1, 2, 11])}, ValueError, r"expected labels in 0\.\.9"),
        ({"labels": torch.tensor([1])}, ValueError, r"expected labels as an integer tensor of shape \(3,\)"),
        ({"cfg_schedule": "cosine"}, ValueError, "expected cfg_schedule 'linear' or 'constant'"),
        ({"temperature": -1.0}, ValueError, "expected a finite temperature >= 0"),
    ):
        state = torch.get_rng_state()
        with pytest.raises(error, match=match):
            cspd.sample_tokens(mar, **{"bsz": 3, "num_iter": 3, **options})
        assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(TypeError, match="expected a MAR model, got Linear without"):
        cspd.sample_tokens(torch.nn.Linear(2, 2), 1)


@pytest.mark.parametrize("relaxation", [slow(42.0), torch.linspace(1.0, 50.0, 64), slow(cspd.SimilarityRelaxation())])
@pytest.mark.parametrize(("cfg", "tolerance"), [(1.0, None), (2.0, None), (2.0, 1e-4)])
def test_the_runner_by_graphs_and_without(monkeypatch, cfg, tolerance, relaxation):
    """Seeds, labels, orders and images of later runs reach what the first one's graphs read."""
    draft, target = (model(schedule="linear") for _ in range(2))
    randomize_(draft, 7)
    plain, graphs = (
        cspd.SpecDecodeRunner(draft, target, relaxation, prefill=0.2, parallel_tol=tolerance) for _ in range(2)
    )
    calls = [
        {"seed": 2**63 + 5, "labels": torch.tensor([1, 2, 3])},
        {"seed": 3, "labels": torch.tensor([4, 5, 6]), "first_image": 9},
        {"seed": 3, "labels": torch.tensor([4, 5, 6]), "orders": torch.stack([torch.randperm(64) for _ in range(3)])},
        {"seed": 2**63 + 5, "labels": torch.tensor([1, 2, 3])},
    ]
    expected = []
    for call in calls:
        expected.append((plain.run(3, 12, 3, cfg=cfg, **call), plain.stats.outcome))
    fake_graphs.use(monkeypatch)
    got = [(graphs.run(3, 12, 3, cfg=cfg, **call), graphs.stats) for call in calls]
    (steps,) = graphs._steps.values()
    assert max(plan.graph.uses for plan in steps.plans.values()) >= len(calls)
    for (image, stats), (wanted, outcome) in zip(got, expected, strict=True):
        assert torch.equal(stats.outcome, outcome)
        assert relative_error(image, wanted) < 1e-5
        assert stats.target_calls + stats.draft_calls > 10


def test_the_target_alone_by_graphs(monkeypatch):
    target = model()
    runner = cspd.SpecDecodeRunner(target, target, prefill=1.0)
    expected = [runner.run(2, 12, cfg=2.0, seed=seed) for seed in (1, 2)]
    fake_graphs.use(monkeypatch)
    for seed in (1, 2, 1, 2):
        assert relative_error(runner.run(2, 12, cfg=2.0, seed=seed), expected[seed - 1]) < 1e-5
