"""The speculative runner: bookkeeping on a stub, and behaviour on small models."""

from __future__ import annotations

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch
from slow import slow
from small_models import small_mar

import cspd
from cspd import window
from cspd.order import mask_lengths
from cspd_kernels import Denoised
from cspd_kernels.testing import relative_error

LENGTH, CHANNELS = 16, 4


class Stub:
    """A model whose condition, and so whose token, is (who, position, masked count of the pass, label)."""

    def __init__(self, who: float):
        self.who, self.seq_len, self.token_embed_dim = who, LENGTH, CHANNELS
        self.fake_latent = torch.full((1, 1), -1.0)
        self.diffloss = small_mar().diffloss
        self.contexts = []

    def class_emb(self, labels):
        return labels.float()[:, None]

    def unpatchify(self, tokens):
        return tokens

    def forward_mae_encoder(self, tokens, mask, embedding):
        self.contexts.append((tokens.clone(), mask.clone(), embedding.clone()))
        return SimpleNamespace(mask=mask, embedding=embedding)

    def forward_mae_decoder(self, encoded, mask):
        assert encoded.mask is mask
        batch = mask.shape[0]
        z = torch.zeros(batch, LENGTH, 32)
        z[..., 0] = self.who
        z[..., 1] = torch.arange(LENGTH)
        z[..., 2] = mask.sum(1, keepdim=True)
        z[..., 3] = encoded.embedding
        return z


@pytest.fixture
def stubbed(monkeypatch):
    """Draft 1, target 2; denoise returns the conditional rows; the verdict accepts by ``keep(x)``."""
    calls = []

    def denoise(head, cond, x_T, noise, *, temperature, cfg_scale, backend, parallel_tol, guess):  # noqa: N803
        n = len(x_T)
        assert (parallel_tol, guess) == (None, None)  # nothing was measured to be faster on a CPU
        assert torch.equal(x_T, noise.x_T(CHANNELS))
        if len(cond) == 2 * n:  # the unconditional half repeats position and step, without the label
            assert torch.equal(cond[n:, :3], cond[:n, :3])
            assert (cond[n:, 3] == -1).all()
        calls.append(SimpleNamespace(cond=cond[:n], rows=noise.rows, cfg=cfg_scale, guided=len(cond) == 2 * n))
        token = cond[:n, :CHANNELS].clone()
        return Denoised(token, token, torch.zeros_like(token), torch.zeros(n))

    def accept_reject(x, draft, target, *, rows, **_):
        assert torch.equal(draft.sample, x)
        assert torch.equal(x[:, 1], target.sample[:, 1])  # the same positions in the same places
        kept = keep(x)
        tries = torch.where(kept, 0, 1).int()
        token = torch.where(kept[:, None], x, target.sample)
        return SimpleNamespace(token=token, accepted=kept, tries=tries, log_ratio=torch.zeros(len(x)))

    keep_box = {"keep": lambda x: torch.ones(len(x), dtype=torch.bool)}

    def keep(x):
        return keep_box["keep"](x)

    monkeypatch.setattr(window, "denoise", denoise)
    monkeypatch.setattr(window, "accept_reject", accept_reject)
    return SimpleNamespace(calls=calls, keep=keep_box, draft=Stub(1.0), target=Stub(2.0))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("gamma", [1, 3, 4, 100])
@pytest.mark.parametrize("prefill", [0.0, 0.15, slow(0.5), 1.0])
@pytest.mark.parametrize("steps", [1, 8, slow(40)])
def test_every_token_is_drawn_once_by_the_right_model_at_the_right_step(stubbed, steps, prefill, gamma, cfg):
    runner = cspd.SpecDecodeRunner(stubbed.draft, stubbed.target, prefill=prefill)
    labels = torch.tensor([3, 5])
    tokens = runner.run(2, steps, gamma, labels=labels, cfg=cfg, seed=9, first_image=10)
    lengths = mask_lengths(LENGTH, steps)
    drawing = [k for k in range(steps) if lengths[k] > lengths[k + 1]]
    alone = [k for k in drawing if k < prefill * steps]
    assert torch.equal(tokens[..., 1], torch.arange(16.0).expand(2, -1))
    assert torch.equal(tokens[..., 3], labels[:, None].expand(-1, 16).float())
    for image in tokens:
        who, before = image[:, 0], image[:, 2]
        for k in drawing:
            drawn = before == lengths[k]
            assert int(drawn.sum()) == lengths[k] - lengths[k + 1]
            assert (who[drawn] == (2.0 if k in alone else 1.0)).all()
    stats = runner.stats
    rest = len(drawing) - len(alone)
    assert stats.draft_calls == rest
    assert stats.target_calls == len(alone) + math.ceil(rest / gamma)
    assert len(stats.acceptance_per_window) == len(stats.gammas) == math.ceil(rest / gamma)
    assert sum(stats.gammas) == rest
    assert all(length == gamma for length in stats.gammas[:-1])
    assert stats.acceptance == (1.0 if rest else None)
    assert stats.drafted == 2 * sum(lengths[k] - lengths[k + 1] for k in drawing if k not in alone)
    assert stats.drafted + stats.prefilled == 32
    for call in stubbed.calls:
        positions = call.cond[:, 1].long().view(2, -1)
        addresses = torch.tensor([10, 11])[:, None] * LENGTH + positions
        assert torch.equal(call.rows, addresses.flatten())
        assert call.guided == (cfg != 1.0)


def test_rejected_tokens_come_from_the_context_before_the_window(stubbed):
    stubbed.keep["keep"] = lambda x: x[:, 1] % 2 == 0  # even positions accepted
    runner = cspd.SpecDecodeRunner(stubbed.draft, stubbed.target, prefill=0.25)
    tokens = runner.run(2, 8, 3, labels=torch.tensor([0, 1]), seed=1)
    lengths = mask_lengths(LENGTH, 8)
    starts = {2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5}  # step -> first step of its window, after two pre-filled ones
    by_count = {lengths[k]: k for k in range(8)}
    who, position, count = tokens[..., 0], tokens[..., 1], tokens[..., 2]
    redrawn = (position % 2 == 1) & (who == 2.0) & (count < lengths[1])
    assert redrawn.any()
    for value in count[redrawn].unique():
        assert by_count[int(value)] in starts.values()
    outcome = runner.stats.outcome
    drafted = outcome > 0
    assert ((outcome == 1) == (drafted & (position % 2 == 0))).all()
    assert ((outcome == 2) == (drafted & (position % 2 == 1))).all()
    assert runner.stats.acceptance == pytest.approx(float((outcome == 1).sum() / drafted.sum()))


def test_verification_sees_only_tokens_before_the_window(stubbed):
    runner = cspd.SpecDecodeRunner(stubbed.draft, stubbed.target, prefill=0.0)
    runner.run(1, 4, 2, seed=1)
    lengths = mask_lengths(LENGTH, 4)
    masked = [int(mask.sum()) for _, mask, _ in stubbed.target.contexts]
    assert masked == [lengths[0], lengths[2]]
    tokens, mask, _ = stubbed.target.contexts[1]
    assert (tokens[mask == 0][:, 0] == 1.0).all()  # what was drafted and accepted in the window before


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_each_token_has_the_guidance_of_its_own_step(stubbed, schedule):
    runner = cspd.SpecDecodeRunner(stubbed.draft, stubbed.target, prefill=0.0)
    runner.run(2, 4, 4, cfg_schedule=schedule, cfg=3.0, seed=1)
    lengths = mask_lengths(LENGTH, 4)
    by_position = {}
    for call in stubbed.calls[:4]:  # the drafts
        for row in range(len(call.rows)):
            by_position[int(call.rows[row])] = call.cfg
    verify = stubbed.calls[4]
    scale = torch.as_tensor(verify.cfg, dtype=torch.float32).expand(len(verify.rows))
    assert torch.allclose(scale, torch.tensor([by_position[int(r)] for r in verify.rows]))
    expected = {3.0} if schedule == "constant" else {1 + 2 * (16 - max(n, 1)) / 16 for n in lengths[1:]}
    assert set(by_position.values()) == expected


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize(("gamma", "prefill"), [(1, 0.0), (4, 0.15), (100, 0.15), (2, 1.0)])
def test_finite_images_never_zero_rows(pair, cfg, gamma, prefill):
    runner = cspd.SpecDecodeRunner(*pair, prefill=prefill)
    images = runner.run(3, 6, gamma, labels=torch.tensor([1, 2, 3]), cfg=cfg, seed=0)
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    assert (pair[1].patchify(images).abs().sum(-1) > 0).all()
    assert set(runner.stats.seconds) == {"draft", "target", "verify", "total"}


def test_draft_equal_to_target_accepts_everything_and_changes_nothing(pair):
    target = pair[1]
    runner = cspd.SpecDecodeRunner(target, target, 1.0, prefill=0.0)
    images = runner.run(2, 6, 1, seed=3)
    assert runner.stats.acceptance == 1.0
    assert runner.stats.raw_acceptance == pytest.approx(1.0, abs=1e-4)
    alone = cspd.SpecDecodeRunner(target, target, prefill=1.0)
    assert torch.equal(alone.run(2, 6, 1, seed=3), images)


def test_images_do_not_depend_on_their_batch(pair):
    runner = cspd.SpecDecodeRunner(*pair)
    together = runner.run(4, 6, 3, labels=torch.arange(4), seed=8)
    apart = torch.cat([runner.run(1, 6, 3, labels=torch.tensor([i]), seed=8, first_image=i) for i in range(4)])
    assert relative_error(apart, together) < 1e-4
    assert relative_error(runner.run(4, 6, 3, labels=torch.arange(4), seed=9), together) > 1e-2


def near(target, noise: float, variance: float):
    """A draft that differs from the target by small constants in its noise estimate and its variance."""
    draft = small_mar(1, width=32, schedule="linear")
    shift = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        draft.diffloss.net.final_layer.linear.bias.add_(shift * torch.tensor([noise, variance]).repeat_interleave(4))
    return draft


def test_relaxation_raises_acceptance_and_not_the_raw_figure(pair):
    draft = near(pair[1], 2e-5, 0.0)
    stats = {}
    for relaxation in (1.0, 42.0, torch.full((16,), 42.0)):
        runner = cspd.SpecDecodeRunner(draft, pair[1], relaxation, prefill=0.0)
        runner.run(64, 1, 1, seed=2)  # one step, so that all judge the same tokens
        stats[str(relaxation)[:6]] = runner.stats
    strict, relaxed, per_token = stats.values()
    assert strict.acceptance < relaxed.acceptance
    assert per_token.acceptance == relaxed.acceptance
    assert strict.raw_acceptance == pytest.approx(relaxed.raw_acceptance)
    assert 0.05 < strict.raw_acceptance < 0.95
    # 1,024 tokens: within five standard deviations of the mean acceptance probability
    assert abs(strict.acceptance - strict.raw_acceptance) < 5 * (0.25 / 1024) ** 0.5


def test_temperature_zero_is_the_target_alone(pair):
    runner = cspd.SpecDecodeRunner(*pair, prefill=0.0)
    images = runner.run(2, 6, 1, temperature=0.0, seed=4)
    alone = cspd.SpecDecodeRunner(pair[1], pair[1], prefill=1.0)
    assert relative_error(images, alone.run(2, 6, 1, temperature=0.0, seed=4)) < 1e-5


def test_default_seed_follows_torch(pair):
    runner = cspd.SpecDecodeRunner(*pair)
    torch.manual_seed(1)
    first = runner.run(1, 4, 2)
    torch.manual_seed(1)
    assert torch.equal(first, runner.run(1, 4, 2))


def test_progress_bar_counts_steps(pair, capsys):
    cspd.SpecDecodeRunner(*pair).run(1, 6, 3, progress=True, seed=0)
    assert "6/6" in capsys.readouterr().err
    cspd.SpecDecodeRunner(*pair).run(1, 6, 3, seed=0)
    assert capsys.readouterr().err == ""


def test_released_sigma_turns_the_path_term(pair):
    draft, acceptance = near(pair[1], 0.0, 1.0), {}
    for sigma in ("paper", "released"):
        runner = cspd.SpecDecodeRunner(draft, pair[1], prefill=0.0, sigma=sigma)
        runner.run(64, 1, 1, seed=2)
        acceptance[sigma] = runner.stats.acceptance
    assert abs(acceptance["paper"] - acceptance["released"]) > 0.2


def test_redraws_in_closed_form(pair):
    fixed = [small_mar(seed, schedule="linear", learn_sigma=False) for seed in (0, 1)]
    with pytest.raises(ValueError, match="a learned one in the target: pass"):
        cspd.SpecDecodeRunner(fixed[0], pair[1], residual="closed_form")
    near = copy.deepcopy(fixed[1])
    with torch.no_grad():
        near.diffloss.net.final_layer.linear.bias.add_(2e-5)
    for models, target_sigma in (((near, fixed[1]), False), (pair, True)):
        images = {}
        for residual in ("rejection", "closed_form"):
            options = {"target_sigma": target_sigma} if residual == "closed_form" else {}
            runner = cspd.SpecDecodeRunner(*models, 1.0, prefill=0.0, residual=residual, **options)
            images[residual] = models[1].patchify(runner.run(8, 1, 1, seed=0))
        outcome = runner.stats.outcome
        kept = outcome == 1
        assert torch.equal(images["closed_form"][kept], images["rejection"][kept])
        different = (images["closed_form"] != images["rejection"]).any(-1)
        assert (outcome == 2).any()
        assert different[outcome == 2].all()


@pytest.mark.parametrize("verify", ["window", "strict"])
def test_probabilities_are_those_of_the_tokens(verify):
    target = small_mar(1, schedule="linear", learn_sigma=False)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        draft.diffloss.net.final_layer.linear.bias.add_(2e-5)  # some tokens are accepted, and some are not
    runner = cspd.SpecDecodeRunner(draft, target, 1.0, prefill=0.3, verify=verify)
    runner.run(4, 6, 3, seed=0)
    stats = runner.stats
    judged, probability = stats.outcome > 0, stats.probability
    assert probability.shape == stats.outcome.shape and probability.dtype == torch.float32
    assert (probability[~judged] == 1).all() and (probability >= 0).all() and (probability <= 1).all()
    assert float(probability[judged].mean()) == pytest.approx(stats.raw_acceptance, rel=1e-5)
    # At relaxation 1 a token is accepted if its random number lies below: likely ones are kept more often.
    kept = stats.outcome[judged] == 1
    assert probability[judged][kept].mean() > probability[judged][~kept].mean()
    runner.run(1, 6, 3, seed=0, first_image=2)
    assert relative_error(runner.stats.probability[0], probability[2]) < 1e-2  # the narrow last steps magnify rounding


def test_seconds_end_with_the_run(pair):
    runner = cspd.SpecDecodeRunner(*pair)
    start = time.perf_counter()
    runner.run(1, 4, 2, seed=0)
    most = time.perf_counter() - start
    time.sleep(0.3)
    seconds = runner.stats.seconds
    assert seconds["draft"] + seconds["target"] + seconds["verify"] <= seconds["total"] <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(pair, dtype):
    models = [copy.deepcopy(model).to(dtype) for model in pair]
    runner = cspd.SpecDecodeRunner(*models)
    images = runner.run(2, 6, 3, labels=torch.tensor([1, 2]), cfg=2.0, seed=0)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    assert torch.isfinite(models[1].sample_tokens(2, 6, labels=torch.tensor([1, 2]))).all()
