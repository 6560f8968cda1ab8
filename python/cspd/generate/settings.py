"""What an image depends on: the settings of a run, which no later start of it may change."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cspd_kernels.ops.accept_reject import MOST_CANDIDATES

from ..cli_generate import DRAFTING
from ..errors import InvalidInput
from ..files import sha256
from ..weight_files import MAR_FILE, VAE_FILE, config_beside, find_file

DIGITS = "digits"
_CHECKPOINTS = {"target": MAR_FILE, "draft": MAR_FILE, "vae": VAE_FILE}
_MOST_IMAGES = 65_536  # of a batch: more is a slip
# Settings that folders of earlier versions do not have: they were run with these.
_ADDED = {"criterion": "trajectory"} | {name: DRAFTING[name] for name in ("verify", "candidates", "branches")}


@dataclass(frozen=True)
class Settings:
    """Options of ``cspd generate`` by their names, defaults filled in.

    Checkpoints are dicts, see :func:`fingerprint`, ``"digits"``, or None where there is none. ``patch_size`` and
    ``vae_stride`` are the target's once it is loaded, whoever tells them. ``labels`` is None where ``num_images`` are
    balanced over ``classes``. ``threads`` is None on a GPU.
    """

    target: dict | str
    draft: dict | str | None
    vae: dict | None
    patch_size: int | None
    vae_stride: int | None
    num_sampling_steps: int
    device: str
    threads: int | None
    dtype: str
    vae_dtype: str | None
    labels: list[int] | None
    num_images: int
    classes: int | None
    steps: int
    cfg: float
    cfg_schedule: str
    temperature: float
    seed: int
    batch_size: int
    gamma: int
    prefill: float
    relaxation: float
    residual: str
    target_sigma: bool
    verify: str
    candidates: int
    branches: int
    criterion: str
    parallel_tol: float | str | None

    @property
    def digits(self) -> bool:
        """Whether the models are the digits pair."""
        return self.target == DIGITS

    @property
    def batches(self) -> int:
        """How many batches the images are made in."""
        return -(-self.num_images // self.batch_size)

    def label(self, image: int) -> int:
        """The class of an image; of the last batch's padding, too."""
        return image % self.classes if self.labels is None else self.labels[image % len(self.labels)]

    def to_dict(self) -> dict:
        """All of it, ready for JSON."""
        return asdict(self)


def resolve(args, device: torch.device, known: dict) -> Settings:
    """The settings that the options of the command line mean.

    Args:
        known: the settings of an earlier start, {} for none. Files that have not changed since are not hashed again.

    Raises:
        ValueError: options that exclude each other. FileNotFoundError: no such checkpoint.
    """
    digits = args.target is None
    labels = None if args.labels is None else [label for part in args.labels for label in part]
    count = args.num_images if labels is None else len(labels)
    alone = not digits and args.draft is None  # nothing is drafted
    of = checkpoints(args, known)
    if digits:
        of |= {"target": DIGITS, "draft": DIGITS}
    classes = args.classes
    if labels is None and classes is None:  # all of the model's, which an earlier start has looked up
        classes = known.get("classes")
    return Settings(
        **of,
        # What the checkpoint tells is looked at when it is loaded; that it tells the same is seen then.
        patch_size=args.patch_size or known.get("patch_size"),
        vae_stride=args.vae_stride or known.get("vae_stride"),
        num_sampling_steps=args.num_sampling_steps or (40 if digits else 100),
        device=device.type,
        threads=_threads(args, known) if device.type == "cpu" else None,
        dtype=args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        vae_dtype=args.vae_dtype if args.vae else None,
        labels=labels,
        num_images=count,
        classes=classes,
        steps=args.steps or (16 if digits else 64),
        cfg=args.cfg,
        cfg_schedule=args.cfg_schedule,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size or min(count, 64 if digits or device.type != "cpu" else 8),
        # Without a draft all steps are the target's, and what is said of drafting plays no part.
        **(DRAFTING | {"prefill": 1.0} if alone else {name: getattr(args, name) for name in DRAFTING}),
        criterion=args.criterion,  # of the target alone, too: its last step adds its noise or does not
        parallel_tol=args.parallel_tol,
    )


def _threads(args, known: dict) -> int:
    """Threads of a process on a CPU: sums are rounded by their number, so an earlier start's stays.

    The digits' tensors are so small that more than one gains nothing.
    """
    if count := args.threads or known.get("threads"):
        return count
    return 1 if args.target is None and not os.environ.get("OMP_NUM_THREADS") else torch.get_num_threads()


def check_options(args) -> None:
    """Raise where options exclude each other; nothing is looked up."""
    if args.out.suffix in (".png", ".safetensors", ".npz") and not args.out.is_dir():
        raise InvalidInput(
            f"expected --out to name a folder, got {args.out}: --grid writes one picture of all images, --npz one array"
        )
    if (args.labels is None) == (args.num_images is None):
        raise InvalidInput("expected either --labels or --num-images")
    if args.classes is not None and args.num_images is None:
        raise InvalidInput("expected --num-images together with --classes: with --labels every image has its own class")
    if not 0.0 <= args.prefill <= 1.0:
        raise InvalidInput(f"expected --prefill in [0, 1], got {args.prefill}")
    if not 0.0 < args.relaxation < math.inf:
        raise InvalidInput(f"expected a finite --relaxation > 0, got {args.relaxation}")
    _check_verify(args)
    for name, most in (("batch_size", _MOST_IMAGES), ("threads", max(64, 8 * (os.cpu_count() or 1)))):
        if (getattr(args, name) or 0) > most:
            raise InvalidInput(f"expected --{name.replace('_', '-')} at most {most}, got {getattr(args, name)}")
    if args.target is None:
        for name in ("draft", "vae", "num_sampling_steps", "patch_size", "vae_stride"):
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise InvalidInput(f"expected --target together with {option}: the digits pair has a fixed one")
    elif args.vae is None:
        if not args.latents:
            raise InvalidInput("expected --vae to decode pictures, or --latents to write the latents")
        for name in ("grid", "npz"):
            if getattr(args, name) is not None:
                raise InvalidInput(f"expected --vae together with --{name}: without a VAE there are no pictures")


def _check_verify(args) -> None:
    """Raise where drafted tokens cannot be verified or redrawn in the way that is asked for, whatever the models."""
    if args.candidates > MOST_CANDIDATES:
        raise InvalidInput(f"expected --candidates at most {MOST_CANDIDATES}, got {args.candidates}")
    if args.branches > args.candidates:
        raise InvalidInput(
            f"expected at most as many --branches as --candidates, got {args.branches} and {args.candidates}: each "
            "branch goes on from one candidate"
        )
    if args.branches > 1 and args.verify != "strict":
        raise InvalidInput(f"expected --branches {args.branches} together with --verify strict")
    if args.target_sigma and args.residual != "closed_form" and args.candidates == 1:
        raise InvalidInput("expected --target-sigma together with --residual closed_form or several --candidates")


def without_part(args) -> list[str]:
    """The options of drafting that were given although nothing is drafted."""
    alone = args.target is not None and args.draft is None
    return [f"--{name.replace('_', '-')}" for name in DRAFTING if alone and getattr(args, name) != DRAFTING[name]]


def checkpoints(args, known: dict) -> dict[str, dict | None]:
    """The fingerprints of target, draft and VAE by name; None where there is none."""
    files = {name: getattr(args, name) for name in _CHECKPOINTS}
    return {name: path and fingerprint(name, path, known.get(name)) for name, path in files.items()}


def fingerprint(name: str, path: Path, known: dict | str | None = None) -> dict:
    """What is known of the file that is read of a checkpoint: path, size, times, inode, and its SHA-256.

    Args:
        name: target, draft or vae.
        known: of an earlier start. Its SHA-256 is taken where all else is the same: then nobody has written the file.

    Returns:
        Beside these ``config``, the SHA-256 of the config.json that is asked with the weights; None where none is.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a checkpoint, found none at {path}")
    file = find_file(path, *_CHECKPOINTS[name])
    state = file.stat()
    found = {
        "path": str(file.resolve()),
        "bytes": state.st_size,
        "modified": state.st_mtime_ns,
        "changed": state.st_ctime_ns,
        "inode": state.st_ino,
    }
    config = config_beside(file) if name != "vae" else None
    same = isinstance(known, dict) and all(known.get(key) == value for key, value in found.items())
    return found | {"sha256": known["sha256"] if same else sha256(file), "config": config and sha256(config)}


def differences(was: dict, now: dict) -> list[str]:
    """What differs between the settings of two starts, one text per setting; a checkpoint is its contents."""
    texts, was = [], {name: value for name, value in _ADDED.items() if name in now} | was
    for name in [*now, *(name for name in was if name not in now)]:
        if _content(was.get(name)) != _content(now.get(name)):
            texts.append(f"--{name.replace('_', '-')} was {_text(was.get(name))}, is {_text(now.get(name))}")
    return texts


def _content(value):
    return (value["sha256"], value.get("config")) if isinstance(value, dict) else value


def _text(value) -> str:
    if isinstance(value, dict):
        config = f", with a config.json {value['config'][:12]}" if value.get("config") else ""
        return f"{value['path']} (sha256 {value['sha256'][:12]}{config})"
    if isinstance(value, list):
        text = ",".join(map(str, value))
        return text if len(text) <= 60 else f"{text[:50]}... ({len(value)})"
    return "none" if value is None else str(value)
