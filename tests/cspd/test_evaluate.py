"""``cspd eval``: the Frechet distance, what is read, and what is refused before any work."""

from __future__ import annotations

import argparse
import builtins
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from cspd import cli_eval, evaluate
from cspd.frechet import frechet_distance


def test_closed_forms():
    """Normals whose covariances commute: |m1 - m2|^2 + sum (s1 - s2)^2 over the standard deviations."""
    generator = np.random.default_rng(0)
    mean1, mean2 = generator.normal(size=(2, 6))
    s1, s2 = generator.uniform(0.1, 3, size=(2, 6))
    turn = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    first, second = (turn @ np.diag(s**2) @ turn.T for s in (s1, s2))
    expected = ((mean1 - mean2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(mean1, first, mean2, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mean1, first, mean1, first) == pytest.approx(0, abs=1e-10)
    one = [np.array([value]) for value in (1.0, 3.0)]
    assert frechet_distance(one[0], np.array([[4.0]]), one[1], np.array([[9.0]])) == pytest.approx(4 + 1)


def test_any_covariances_as_by_scipy():
    generator = np.random.default_rng(1)
    first, second = (np.cov(generator.normal(size=(40, 8)) @ generator.normal(size=(8, 8)), rowvar=False) for _ in "ab")
    mean = np.zeros(8)
    expected = np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(mean, first, mean, second) == pytest.approx(expected, rel=1e-8)
    low = np.outer(mean + 1, mean + 1)  # of rank one, as few images give
    assert frechet_distance(mean, low, mean, low) == pytest.approx(0, abs=1e-6)


class Inception:
    """In the place of torch-fidelity's: an image's first pixels as its features."""

    def to(self, device):
        return self

    def __call__(self, batch):
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 4, 4)
        features = batch.flatten(1).float()[:, :5]
        return features, features


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Five features, statistics of them, and twelve images as a folder and as a file."""
    monkeypatch.setattr(evaluate, "FEATURES", 5)
    weights = tmp_path / "weights-00000000.pth"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(evaluate, "_inception", lambda path: (Inception(), weights))
    pixels = np.random.default_rng(2).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "stats.npz", mu=np.full(5, 100.0), sigma=np.eye(5) * 50)
    np.savez(tmp_path / "images.npz", pixels)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:06}.png")
    return tmp_path, pixels


def command(*words):
    parser = argparse.ArgumentParser()
    cli_eval.add_parser(parser.add_subparsers())
    return cli_eval.run(parser.parse_args(["eval", *map(str, words)]))


def test_a_folder_and_a_file_are_the_same_images(small, capsys):
    folder, pixels = small
    few = folder / "few"
    few.mkdir()
    np.savez(folder / "nine.npz", pixels[:9])  # the Inception score needs torch-fidelity
    for i in range(9):
        Image.fromarray(pixels[i]).save(few / f"{i}.png")
    results = [evaluate.evaluate(path, folder / "stats.npz", batch_size=4) for path in (few, folder / "nine.npz")]
    assert results[0] == results[1]
    features = pixels[:9].transpose(0, 3, 1, 2).reshape(9, -1)[:, :5].astype(float)
    expected = frechet_distance(features.mean(0), np.cov(features, rowvar=False), np.full(5, 100.0), np.eye(5) * 50)
    assert results[0]["fid"] == pytest.approx(expected, rel=1e-10)
    assert command(few, "--fid", folder / "stats.npz", "--json", folder / "out.json") == 0
    printed = capsys.readouterr().out
    assert f"FID {expected:.4f} of 9 images" in printed and "biased upwards" in printed
    assert "is not that of torch-fidelity's release" in printed
    assert json.loads((folder / "out.json").read_text())["fid"] == pytest.approx(expected)


def test_wrong_files_are_refused(small):
    folder, pixels = small
    stats = folder / "stats.npz"

    def refused(message, images=folder / "images.npz", statistics=stats):
        with pytest.raises((ValueError, OSError), match=message):
            evaluate.evaluate(images, statistics)

    refused("expected a file for the images, found none", folder / "nothing.npz")
    refused("expected a file for --fid, found none", statistics=folder / "nothing.npz")
    (folder / "empty").mkdir()
    refused("expected a folder of PNG files", folder / "empty")
    (folder / "text.npz").write_text("hello")
    refused("a .npz file for the images", folder / "text.npz")
    refused("a .npz file for --fid", statistics=folder / "text.npz")
    refused("found no mu", statistics=folder / "images.npz")
    for name, array in (("floats", pixels / 255), ("flat", pixels[..., 0])):
        np.savez(folder / f"{name}.npz", array)
        refused("as uint8 of shape", folder / f"{name}.npz")
    np.savez(folder / "one.npz", pixels[:1])
    refused("at least 2 images", folder / "one.npz")
    np.savez(folder / "objects.npz", np.array([{}, {}], dtype=object))
    refused("arr_0 of .* cannot be read", folder / "objects.npz")
    for name, mu, sigma in (("short", np.zeros(4), np.eye(5)), ("nan", np.full(5, np.nan), np.eye(5))):
        np.savez(folder / f"{name}.npz", mu=mu, sigma=sigma)
        refused("expected mu of", statistics=folder / f"{name}.npz")
    Image.new("RGB", (5, 4)).save(folder / "images" / "000005.png")
    refused("images of one size", folder / "images")
    data = (folder / "images" / "000000.png").read_bytes()
    (folder / "images" / "000005.png").write_bytes(data[: len(data) // 2])
    refused("000005.png cannot be read as an image", folder / "images")


def test_without_torch_fidelity_one_sentence_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("torch_fidelity"):
            raise ModuleNotFoundError("No module named 'torch_fidelity'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeError, match=r"cspd eval needs torch-fidelity.*cspd-kernels\[eval\]"):
        evaluate._inception(None)


def test_a_hash_in_a_name():
    assert evaluate.is_release("a/weights-2015-12-05-6726825d.pth", "6726825d" + 56 * "0")
    assert not evaluate.is_release("a/weights-2015-12-05-6726825d.pth", 64 * "0")
    assert evaluate.is_release("a/weights.pth", 64 * "0") is None


def test_weights_of_torch_fidelity(tmp_path, monkeypatch):
    """With its own network: which file is wanted, what is no such file, and its score from a random one."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(FileNotFoundError, match=r"found no file .*hub/checkpoints/weights-inception-2015.*--weights"):
        evaluate._inception(None)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="to hold weights alone"):
        evaluate._inception(file)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, file)
    with pytest.raises(ValueError, match="torchvision's Inception is another network"):
        evaluate._inception(file)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, file)
    with pytest.raises(ValueError, match=r"expected .* to be torch-fidelity's Inception"):
        evaluate._inception(file)

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.save(inception.FeatureExtractorInceptionV3("x", ["2048"]).state_dict(), file)
    monkeypatch.undo()
    pixels = np.random.default_rng(3).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", pixels)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result = evaluate.evaluate(tmp_path / "images.npz", tmp_path / "stats.npz", file, batch_size=5)
    extractor = inception.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(file))
    features = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))[0].double()
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(features), {"mu": np.zeros(2048), "sigma": np.eye(2048)}, False
    )
    assert result["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert result["inception_score"] >= 1
