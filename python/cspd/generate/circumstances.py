"""What a start was made on, and with which versions."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from importlib import metadata

import torch

from cspd_kernels import __version__

from .settings import Settings

_logger = logging.getLogger("cspd")


def circumstances(device: torch.device, settings: Settings) -> dict:
    """What images should not depend on, but may up to rounding."""
    versions = {"cspd": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "pillow", "safetensors", *(["diffusers"] if settings.vae else [])):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("CSPD_")},
        "versions": versions | ({"cuda": torch.version.cuda} if cuda else {}),
    }


def warn_of_changes(was: dict, now: dict) -> None:
    """Tell what differs between two starts of a run that may show in the images."""

    def flat(start: dict) -> dict:
        return {"device": start.get("device"), **start.get("versions", {}), **start.get("environment", {})}

    before, after = flat(was), flat(now)
    changed = [name for name in [*before, *(set(after) - set(before))] if before.get(name) != after.get(name)]
    if changed:
        texts = ", ".join(f"{name} was {before.get(name)}, is {after.get(name)}" for name in changed)
        _logger.warning("the images that are made now may differ from a run in one go by rounding: %s", texts)
