"""All images of a run in one array, written image by image: it takes the memory of a few."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..files import writing


def write_npz(path: Path, images: Iterable[np.ndarray], labels: Sequence[int], shape: tuple[int, int, int]) -> None:
    """Write ``arr_0`` (N, H, W, 3) uint8 and ``arr_1`` (N,) int64, as guided-diffusion's evaluator reads them.

    Args:
        images: N arrays of ``shape`` (H, W, 3), uint8; taken one by one.

    Raises:
        OSError: it could not be written; nothing has changed.
    """
    with writing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with _member(archive, "arr_0.npy") as member:
            _header(member, np.dtype(np.uint8), (len(labels), *shape))
            for image in images:
                member.write(np.ascontiguousarray(image).data)
        with _member(archive, "arr_1.npy") as member:
            _header(member, np.dtype(np.int64), (len(labels),))
            member.write(np.asarray(labels, dtype=np.int64).data)


def _member(archive: zipfile.ZipFile, name: str):
    """Its date is fixed: the same images are the same bytes."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def _header(member, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
