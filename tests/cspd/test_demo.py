"""The demo: its quality as promised, its table, its picture, its training script."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from slow import slow

import cspd
from cspd.demo import pair as pair_module
from cspd.demo import run, train
from cspd.demo.pair import DATA, load_model, load_pair
from cspd.demo.quality import frechet_distance, real_digits, reference_statistics
from cspd.demo.run import STEPS, generate, run_demo

IMAGES = 512  # the default of `cspd demo`


@pytest.fixture(scope="module")
def digits():
    return train.load_digits()


@pytest.fixture(scope="module")
def classifier(digits):
    from sklearn.svm import SVC

    images, labels = digits
    return SVC(gamma=0.01).fit(images.flatten(1).numpy(), labels.numpy())


SPECULATIVE = [(gamma, residual) for gamma in (4, 8) for residual in ("rejection", "closed_form")]
ROWS = [key if key == (8, "rejection") else slow(key) for key in SPECULATIVE]


@pytest.fixture(scope="module")
def generated():
    """``generated(key)``: images, figures and distance of a row that the quality promise speaks of, as the demo makes
    it; None for the target alone."""
    target, draft = load_pair()
    labels = torch.arange(IMAGES) % 10

    @functools.cache
    def row(key):
        gamma, residual = key or (None, "rejection")
        drawn = generate(draft, target, labels, STEPS, gamma, 0, residual=residual)
        return drawn.images, drawn.figures, frechet_distance(drawn.images)

    return row


def test_target_alone_is_close_to_the_real_digits(generated):
    assert generated(None)[2] <= 0.75


@pytest.mark.parametrize("key", ROWS)
def test_speculation_keeps_the_quality(generated, key):
    assert generated(key)[2] <= 1.10 * generated(None)[2]


@pytest.mark.parametrize("key", [None, *ROWS])
def test_a_classifier_of_real_digits_reads_the_labels(generated, classifier, key):
    pixels = generated(key)[0].flatten(1).clamp(-1, 1).numpy()
    assert (classifier.predict(pixels) == np.arange(IMAGES) % 10).mean() >= 0.95


@pytest.mark.parametrize(
    ("gamma", "residual", "target_calls"),
    [(8, "rejection", 5), slow(4, "rejection", 7), slow(4, "closed_form", 7), slow(8, "closed_form", 5)],
)
def test_speculation_accepts_and_saves_target_calls(generated, gamma, residual, target_calls):
    figures = generated((gamma, residual))[1]
    assert (figures["target_calls"], figures["draft_calls"]) == (target_calls, 13)
    assert 0.05 < figures["raw_acceptance"] < figures["acceptance"] < 1.0


def test_images_and_figures_do_not_depend_on_the_batches(monkeypatch):
    target, draft = load_pair()
    labels = torch.arange(7)
    whole = generate(draft, target, labels, STEPS, 4, 0)
    monkeypatch.setattr("cspd.demo.run.BATCH", 3)
    parts = generate(draft, target, labels, STEPS, 4, 0)
    assert (parts.images - whole.images).abs().max() < 1e-4
    assert torch.equal(parts.outcome, whole.outcome)
    figures, of_parts = whole.figures, parts.figures
    later = generate(draft, target, labels[4:], STEPS, 4, 0, 4)
    assert (later.images - whole.images[4:]).abs().max() < 1e-4
    assert later.probability.shape == (3, 16)
    for name in ("target_calls", "draft_calls"):
        assert of_parts[name] == 3 * figures[name]
    for name in ("raw_acceptance", "acceptance"):
        assert of_parts[name] == pytest.approx(figures[name], rel=1e-3)


def test_the_draft_is_clearly_smaller():
    cost = [sum(p.numel() for p in model.parameters()) for model in load_pair()]
    assert cost[1] / cost[0] <= 0.4
    sizes = {path.name: path.stat().st_size for path in DATA.iterdir()}
    assert sizes.pop("head100.safetensors") < 2e6
    assert sizes.pop("drift.safetensors") < 2e6
    assert sum(sizes.values()) < 8 * 2**20  # the pair


def test_demo_prints_its_table_and_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TIMED_RUNS", 1)
    lines = []
    files = [tmp_path / f"d.{kind}" for kind in ("png", "json", "html")]
    result = run_demo(9, [3, 3], 1, *files, echo=lines.append)
    names = ["target, 16 steps", "target, 8 steps", "target, 4 steps", "draft, 16 steps", "speculative, gamma 3"]
    assert [row["name"] for row in result["rows"]] == names
    assert [row["target_calls"] for row in result["rows"]] == [16, 8, 4, 0, 8]
    assert [row["draft_calls"] for row in result["rows"]] == [0, 0, 0, 16, 13]
    assert (result["num_images"], result["timed_images"], result["timed_runs"]) == (9, 4, 1)
    text = "\n".join(lines)
    assert all(name in text for name in names)
    assert all(
        f"\n{word}: " in text for word in ("target", "draft", "gamma", "acceptance", "raw acceptance", "distance")
    )
    assert json.loads(files[1].read_text()) == json.loads(json.dumps(result))
    assert all(0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"] for row in result["rows"])
    target, draft = load_pair()
    labels = torch.arange(9) % 10
    for row, model, gamma in ((result["rows"][0], target, None), (result["rows"][4], target, 3)):
        whole = generate(draft, model, labels, STEPS, gamma, 1)  # in one run: the same digits
        assert row["frechet_distance"] == pytest.approx(frechet_distance(whole.images), rel=1e-4)
    assert result["rows"][4]["acceptance"] == pytest.approx(whole.figures["acceptance"], rel=1e-4)


def test_the_seconds_are_the_median_of_the_timed_runs(monkeypatch):
    made = []

    def draw(draft, target, labels, steps, gamma, seed, first_image, **options):
        made.append((steps, first_image, len(labels)))
        figures = {"seconds": float(first_image), "target_calls": first_image, "draft_calls": 0, "drafted": len(labels)}
        figures |= dict.fromkeys(("acceptance", "raw_acceptance"), first_image / 100)
        many = torch.zeros(len(labels), 16)
        return run.Drawn(torch.randn(len(labels), 1, 8, 8), figures, many, many)

    monkeypatch.setattr(run, "generate", draw)
    plan = [run.Way("a", "target", 16), run.Way("b", "draft", 8)]
    a, b = run.draw({"target": 1, "draft": 2}, plan, run.parts(11), 0)
    # The rows take turns; the first run, which warms up, has what the timed ones leave.
    assert made == [(steps, first, count) for first, count in ((0, 5), (5, 2), (7, 2), (9, 2)) for steps in (16, 8)]
    assert (a.figures["seconds"], a.figures["seconds_min"], a.figures["seconds_max"]) == (7.0, 5.0, 9.0)
    assert (a.figures["target_calls"], a.figures["draft_calls"]) == (7, 0)
    assert (b.figures["target_calls"], b.figures["draft_calls"]) == (0, 7)
    assert a.figures["acceptance"] == pytest.approx((2 * 5 + 2 * 7 + 2 * 9) / 11 / 100)
    assert len(a.images) == 11


@pytest.mark.parametrize("images", [4, 7, 64, 512])
def test_every_image_is_drawn_once(images):
    runs = run.parts(images)
    assert [i for part in runs for i in part] == list(range(images))
    assert len(runs) == 4 and len({len(part) for part in runs[1:]}) == 1 and len(runs[0]) >= len(runs[1]) > 0


@pytest.mark.slow
def test_strict_rows_of_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TIMED_RUNS", 1)
    lines = []
    result = run_demo(8, [3], 1, tmp_path / "d.png", echo=lines.append, strict=True)
    noisy, strict = result["rows"][-2:]
    assert [row["name"] for row in (noisy, strict)] == ["target, 16 steps, noise", "strict, gamma 4"]
    assert (noisy["target_calls"], noisy["draft_calls"], noisy["acceptance"]) == (16, 0, None)
    assert noisy["frechet_distance"] != result["rows"][0]["frechet_distance"]
    assert strict["acceptance"] < 1 and strict["draft_calls"] > 13  # some steps were drafted again
    assert "exactly the distribution of 'target, 16 steps, noise'" in "\n".join(lines)
    target, draft = load_pair()
    rule = dict(verify="strict", criterion="last_step", relaxation=1.0, residual="closed_form")
    runner = cspd.SpecDecodeRunner(draft, target, **rule)
    images = runner.run(8, STEPS, 4, labels=torch.arange(8), seed=1)
    assert strict["frechet_distance"] == pytest.approx(frechet_distance(images), rel=1e-4)
    assert strict["acceptance"] == pytest.approx(runner.stats.acceptance, rel=1e-4)


def test_same_seed_same_digits():
    target, draft = load_pair()
    labels = torch.arange(4)
    first, again, other = (generate(draft, target, labels, STEPS, 4, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_patched_target_draws_the_same_digits():
    target, _ = load_pair()
    images = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        images.append(target.sample_tokens(8, STEPS, labels=torch.arange(8)))
        cspd.patch(target)
    assert (images[0] - images[1]).abs().max() < 1e-4


def test_distance_of_the_real_digits_is_zero_and_a_shift_is_its_square(digits):
    images, _ = digits
    assert abs(frechet_distance(images)) < 1e-6  # roots of zero eigenvalues keep half of the digits
    assert frechet_distance(images + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)


def test_distance_matches_the_textbook_formula():
    images = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    mean, covariance = images.flatten(1).mean(0).numpy(), np.cov(images.flatten(1).numpy(), rowvar=False)
    real_mean, real = reference_statistics()
    roots = np.sqrt(np.linalg.eigvals(covariance @ real).real.clip(0))
    expected = ((mean - real_mean) ** 2).sum() + np.trace(covariance + real) - 2 * roots.sum()
    assert frechet_distance(images) == pytest.approx(expected, rel=1e-6)


def test_the_real_digits_that_are_shipped_are_real(digits):
    images, labels = real_digits()
    assert labels.tolist() == [*range(10)] * 4
    every, of_every = digits
    for image, label in zip(images, labels):
        same = (every == image).flatten(1).all(1)
        assert same.any() and of_every[same].tolist() == [int(label)] * int(same.sum())


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(4, 8, 8), r"expected images of shape \(n, 1, 8, 8\), got \(4, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), "at least 2 images"),
        (torch.full((4, 1, 8, 8), float("nan")), "finite pixels"),
    ],
)
def test_distance_refuses_wrong_images(images, match):
    with pytest.raises(ValueError, match=match):
        frechet_distance(images)


def test_training_writes_a_loadable_pair(tmp_path):
    train.main(["--out", str(tmp_path), "--steps", "3", "--draft-steps", "2"])
    target, draft = load_pair(tmp_path)
    assert not target.training
    assert torch.equal(
        load_file(tmp_path / "reference.safetensors")["mean"], load_file(DATA / "reference.safetensors")["mean"]
    )
    made, shipped = (safe_open(folder / "digits.safetensors", "pt") for folder in (tmp_path, DATA))
    assert made.metadata() == shipped.metadata()  # the file's bytes hold it in any order
    assert set(made.keys()) == set(shipped.keys())
    assert all(torch.equal(made.get_tensor(name), shipped.get_tensor(name)) for name in made.keys())  # noqa: SIM118
    first = load_file(tmp_path / "target.safetensors")
    train.main(["--out", str(tmp_path), "--steps", "3", "--draft-steps", "2"])
    again = load_file(tmp_path / "target.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert sum(p.numel() for p in draft.parameters()) < sum(p.numel() for p in target.parameters())


def test_missing_and_foreign_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="do not exist: reinstall"):
        load_pair(tmp_path)
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_model(pair_module.TARGET, DATA / "draft.safetensors")
