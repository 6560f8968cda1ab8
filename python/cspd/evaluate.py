"""FID and Inception score of images against reference statistics: ``cspd eval``.

The features are those of torch-fidelity's Inception, the 2015 TensorFlow network with its weights carried over: its
numbers are the ones that papers compare. torchvision's Inception is another network.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .errors import CheckpointError, InvalidInput, MissingPackage
from .files import sha256
from .frechet import frechet_distance

FEATURES = 2048
SPLITS = 10  # of the Inception score, as everywhere
USUAL_IMAGES = 50_000


def load_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mu (2048,), sigma (2048, 2048)) float64 of a reference file, which names them so.

    Raises:
        OSError, ValueError: no such file, or one that does not hold them.
    """
    with _open_npz(path, "--fid") as file:
        if missing := {"mu", "sigma"} - set(file.files):
            raise InvalidInput(f"expected the arrays mu and sigma in {path}, found no {min(missing)}")
        mu, sigma = (np.asarray(_array(file, name, path)) for name in ("mu", "sigma"))
    for name, array, shape in (("mu", mu, (FEATURES,)), ("sigma", sigma, (FEATURES, FEATURES))):
        if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise InvalidInput(
                f"expected {name} of {path} as finite numbers of shape {shape}, got {array.dtype} of {array.shape}"
            )
    return mu.astype(np.float64), sigma.astype(np.float64)


class Images:
    """uint8 images (n, H, W, 3) of a folder of PNG files, or of a .npz file with one array of them (``arr_0``).

    Raises:
        OSError, ValueError: there are fewer than two, or they are no such images.
    """

    def __init__(self, path: Path):
        self.path, self.files, self.array = path, [], None
        if path.is_dir():
            self.files = sorted(file for file in path.glob("*.png") if not file.name.startswith("."))
            if not self.files:
                raise InvalidInput(f"expected a folder of PNG files, found none in {path}")
        else:
            with _open_npz(path, "the images") as file:
                if "arr_0" not in file.files:
                    raise InvalidInput(f"expected the images in {path} as arr_0, got {', '.join(file.files)}")
                self.array = _array(file, "arr_0", path)
            if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
                got = f"{self.array.dtype} of {self.array.shape}"
                raise InvalidInput(f"expected arr_0 of {path} as uint8 of shape (n, H, W, 3), got {got}")
        if len(self) < 2:
            raise InvalidInput(f"expected at least 2 images for a covariance, got {len(self)} in {path}")

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """(b, 3, H, W) uint8, in order."""
        shape = None
        for first in range(0, len(self), size):
            if self.array is not None:
                batch = self.array[first : first + size]
            else:
                pixels = [_read(file) for file in self.files[first : first + size]]
                for file, image in zip(self.files[first:], pixels):
                    shape = shape or image.shape
                    if image.shape != shape:
                        raise InvalidInput(
                            f"expected images of one size, got {shape[1]} x {shape[0]} and {image.shape[1]} x "
                            f"{image.shape[0]} ({file})"
                        )
                batch = np.stack(pixels)
            yield torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))


def evaluate(
    images: Path, statistics: Path, weights: Path | None = None, *, device="cpu", batch_size: int = 64, progress=False
) -> dict:
    """FID, and Inception score over ten splits, of all images of ``images``.

    Args:
        weights: torch-fidelity's Inception weights; None: the file where torch keeps downloads. Nothing is downloaded.

    Returns:
        ``fid``, ``inception_score`` and ``inception_score_std`` (None below ten images), ``num_images``, ``weights``
        and their ``weights_sha256``.

    Raises:
        OSError, ValueError, RuntimeError: a file is missing or wrong, or torch-fidelity is not installed.
    """
    if batch_size < 1:
        raise InvalidInput(f"expected a batch size >= 1, got {batch_size}")
    # What is wrong is said before the work.
    mu, sigma = load_statistics(statistics)
    found = Images(images)
    extractor, weights = _inception(weights)
    extractor = extractor.to(device)
    features, logits = [], []
    with torch.no_grad(), tqdm(total=len(found), unit="image", disable=not progress) as bar:
        for batch in found.batches(batch_size):
            feature, logit = extractor(batch.to(device))
            features.append(feature.cpu())
            logits.append(logit.cpu())
            bar.update(len(batch))
    features = torch.cat(features).double().numpy()
    if not np.isfinite(features).all():
        raise CheckpointError(f"expected finite features, got NaN or infinity: {weights} does not hold usable weights")
    score = {"inception_score_mean": None, "inception_score_std": None}
    if len(found) >= SPLITS:
        from torch_fidelity.metric_isc import isc_features_to_metric

        score = isc_features_to_metric(torch.cat(logits), SPLITS)
    return {
        "fid": frechet_distance(features.mean(0), np.cov(features, rowvar=False), mu, sigma),
        "inception_score": score["inception_score_mean"],
        "inception_score_std": score["inception_score_std"],
        "num_images": len(found),
        "weights": str(weights),
        "weights_sha256": sha256(weights),
    }


def _inception(weights: Path | None):
    """torch-fidelity's network and the file that its weights are from."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as module
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch ends with either
        raise MissingPackage(
            f"cspd eval needs torch-fidelity, which cannot be imported ({error}): install the extra `eval`, "
            "`pip install 'cspd-kernels[eval]'`"
        ) from error
    url = module.URL_INCEPTION_V3
    name = url.rsplit("/", 1)[1]
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"expected torch-fidelity's Inception weights, found no file {path}: download {url} to it, or name "
            "your copy with --weights"
        )
    # torch-fidelity would unpickle whatever is in the file.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  (pickle, zip and torch each have their own)
        raise CheckpointError(f"expected {path} to hold weights alone, it cannot be read: {_first(error)}") from None
    if not isinstance(state, dict) or getattr(state.get("fc.weight"), "shape", None) != (1008, FEATURES):
        raise CheckpointError(
            f"expected {path} to be torch-fidelity's Inception ({name}), whose fc.weight has the shape (1008, "
            f"{FEATURES}). torchvision's Inception is another network and gives other figures"
        )
    try:
        extractor = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(FEATURES), "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise CheckpointError(f"expected {path} to be torch-fidelity's Inception ({name}): {_first(error)}") from None
    return extractor, path


def is_release(weights: str, sha256: str) -> bool | None:
    """Whether a file is the one of torch-fidelity's release, whose name ends with the first digits of its hash."""
    digits = Path(weights).stem.rsplit("-", 1)[-1]
    return sha256.startswith(digits) if len(digits) == 8 else None


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _open_npz(path: Path, what: str):
    if not path.exists():
        raise FileNotFoundError(f"expected a file for {what}, found none at {path}")
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile):
        file = None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InvalidInput(f"expected a .npz file for {what}, got {path}")
    return file


def _array(file, name: str, path: Path) -> np.ndarray:
    try:
        return file[name]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{name} of {path} cannot be read: {error}") from None


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise InvalidInput(f"{file} cannot be read as an image: {error}") from None
