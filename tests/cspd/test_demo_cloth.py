"""The cloth pair: its images and their law, its loader, its training, its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cspd.demo import cloth, train
from cspd.demo.run import generate
from cspd.models import MAR

WEIGHTS = Path(__file__).parents[2] / "benchmarks/pairs"


def test_cloth_is_of_the_seed_alone():
    (first, labels), (again, _), (other, _) = (cloth.make_cloth(5, seed) for seed in (1, 1, 2))
    assert first.shape == (5, 1, 12, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(labels, torch.zeros(5, dtype=torch.int64))


def test_threads_are_shared_by_four_tokens():
    images, _ = cloth.make_cloth(3, 0)
    bands = torch.nn.functional.avg_pool2d(images, 2)  # of a token; pixels 2 k - 1 and 2 k share their thread
    assert bands.shape[-1] == cloth.SIDE
    difference = (images[..., 2::2] - images[..., 1:-1:2]) / (2 * cloth.BAND)  # of one thread: its columns' bands
    assert (difference - difference.round()).abs().max() < 1e-6
    assert set(difference.round().unique().tolist()) == {-1.0, 0.0, 1.0}


def test_law_is_that_of_many_images():
    mean, covariance = cloth.law()
    images = cloth.make_cloth(20000, 0)[0].flatten(1).double().numpy()
    # Five and a half standard deviations of a mean, and of an entry of a covariance of 20,000.
    spread = np.sqrt(covariance.diagonal().max())
    assert np.abs(images.mean(0) - mean).max() < 5.5 * spread / np.sqrt(20000)
    assert np.abs(np.cov(images, rowvar=False) - covariance).max() < 5.5 * np.sqrt(2 / 20000) * spread**2
    assert covariance.trace() == pytest.approx(64.44)


def test_distance_sees_one_pixel_too_many_and_little_noise():
    images = cloth.make_cloth(2048, 3)[0]
    real = cloth.frechet_distance(images)
    assert real < 0.6
    clashing = images.clone()
    clashing[:512, :, 4:6, 4:6] = images[512:1024, :, 4:6, 4:6]  # a token of another image in each of a quarter
    assert cloth.frechet_distance(clashing) > real + 0.1
    noisy = [cloth.frechet_distance(images + s * torch.randn(images.shape)) for s in (0.05, 0.1, 0.2)]
    assert real < noisy[0] < noisy[1] < noisy[2]
    assert cloth.frechet_distance(images + 0.5) == pytest.approx(real + 144 * 0.25, rel=0.05)
    with pytest.raises(ValueError, match=r"expected images of shape \(n, 1, 12, 12\), got \(4, 1, 8, 8\)"):
        cloth.frechet_distance(torch.zeros(4, 1, 8, 8))


def test_missing_and_foreign_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"do not exist: the repository has them in benchmarks/pairs"):
        cloth.load_pair(tmp_path)
    (tmp_path / "cloth-target.safetensors").write_bytes((WEIGHTS / "cloth-draft.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not hold the weights"):
        cloth.load_pair(tmp_path)


def test_training_writes_a_loadable_pair_again_and_again(tmp_path):
    few = ["--pair", "cloth", "--steps", "2", "--draft-steps", "2"]
    for name in ("a", "b"):
        train.main([*few, "--out", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["cloth-draft.safetensors", "cloth-target.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    target, draft = cloth.load_pair(tmp_path / "a")
    assert not target.training
    assert next(draft.parameters()).dtype == torch.float32
    train.main([*few, "--keep-target", "--out", str(tmp_path / "a")])  # from what was stored: the same draft
    assert (tmp_path / "a" / files[0]).read_bytes() == (tmp_path / "b" / files[0]).read_bytes()


def test_a_pruned_draft_has_the_first_encoder_and_the_last_decoder_blocks():
    target, draft = MAR(**cloth.TARGET), MAR(**cloth.DRAFT)
    train.prune(target, draft)
    for mine, theirs in (
        (draft.encoder_blocks[0], target.encoder_blocks[0]),
        (draft.decoder_blocks[0], target.decoder_blocks[2]),
        (draft.diffloss, target.diffloss),
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))


def test_the_package_has_no_place_for_it(capsys):
    with pytest.raises(SystemExit):
        train.main(["--pair", "cloth"])
    assert "expected --out with --pair cloth" in capsys.readouterr().err


@pytest.mark.slow
def test_shipped_pair_draws_cloth_and_fewer_steps_draw_worse():
    target, draft = cloth.load_pair(WEIGHTS)
    size = [sum(p.numel() for p in model.parameters()) for model in (target, draft)]
    assert size[1] / size[0] < 0.5
    assert sum(path.stat().st_size for path in WEIGHTS.glob("cloth-*.safetensors")) < 4 * 2**20
    labels = torch.zeros(160, dtype=torch.int64)

    def distance(model, steps):
        return cloth.frechet_distance(generate(draft, model, labels, steps, None, 0)[0])

    whole, few, alone = distance(target, 36), distance(target, 4), distance(draft, 36)
    noise = torch.randn(160, 1, 12, 12) * cloth.law()[1].diagonal().mean() ** 0.5
    assert whole < alone < cloth.frechet_distance(noise) / 2
    assert few > whole + 2
