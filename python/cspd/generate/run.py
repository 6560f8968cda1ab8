"""A start of ``cspd generate``, from the options to the last file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import torch

from ..cli_support import one_line, say
from ..errors import CallError, InvalidInput
from ..files import check_output, write_file
from ..reporting import Bar, title_of
from .circumstances import circumstances, warn_of_changes
from .folder import RunFolder, check_space
from .images import grid, read_png
from .models import Models, merge_statistics
from .npz import write_npz
from .ranks import Ranks
from .settings import Settings, check_options, checkpoints, differences, resolve, without_part

_logger = logging.getLogger("cspd")
_BETWEEN_LINES = 60.0  # seconds, where there is no terminal for a bar
_GOES_ON = "what was written stays; run the same command again to make the rest"


class Missing(NamedTuple):
    """What is to be written: numbers of images."""

    images: list[int]
    latents: list[int]

    @property
    def numbers(self) -> set[int]:
        """Numbers of both."""
        return {*self.images, *self.latents}


def generate(args) -> None:
    """Run the command; ``args`` as its parser leaves them.

    Raises:
        OSError, ValueError, RuntimeError: what is wrong with the options, before any work; or what stopped the work.
        SystemExit: another rank has told it.
    """
    ranks = Ranks()
    with ranks, contextlib.ExitStack() as stack:
        device = ranks.together(lambda: _prepare(args, ranks))
        folder = RunFolder(args.out)
        stack.callback(folder.close)
        began = time.perf_counter()
        settings, missing = ranks.lead(lambda: _look(args, device, folder))
        looked = time.perf_counter()
        stack.enter_context(_threads(settings.threads))
        models = None
        if missing is None or missing.numbers:
            models = ranks.together(lambda: _load(args, settings, device, ranks))
            settings = models.settings
            if missing is None:
                missing = Missing(*(list(range(settings.num_images)) * wanted for wanted in _wanted(args)))
        options = {name: getattr(args, name) for name in ("target", "draft", "vae", "out", "grid", "npz")}
        start = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "missing": len(missing.numbers),
            "ranks": ranks.size,
            "options": {name: path and str(path) for name, path in options.items()} | {"latents": args.latents},
            **circumstances(device, settings),
            "seconds": {"look": looked - began, "load": time.perf_counter() - looked},
        }
        ranks.lead(lambda: _begin(args, folder, settings, models, missing, start))
        with _going_on():
            if models is not None:
                _work(folder, models, missing, ranks)
            if ranks.rank == 0:
                _finish(args, folder, settings)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads, None for as many as there are; afterwards the caller's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(args, ranks: Ranks) -> torch.device:
    """What costs nothing to find out."""
    check_options(args)
    return ranks.device("cpu" if args.target is None and args.device == "auto" else args.device)


def _load(args, settings: Settings, device: torch.device, ranks: Ranks) -> Models:
    """The models, of the files that rank 0 has seen: on another machine the same path may hold another one."""
    if ranks.rank > 0 and ranks.local == 0:
        known = settings.to_dict()
        here = checkpoints(args, known)
        here = {name: value for name, value in here.items() if value}  # the digits pair is in the package
        if texts := differences({name: known[name] for name in here}, here):
            raise InvalidInput(
                f"expected the checkpoints of rank 0 on this machine too, got others: {'; '.join(texts)}"
            )
    return Models(args, settings, device)


def _wanted(args) -> tuple[bool, bool]:
    """Whether images and latents are written."""
    return args.target is None or args.vae is not None, args.latents


def _look(args, device: torch.device, folder: RunFolder) -> tuple[Settings, Missing | None]:
    """The settings, and what is missing of an earlier run; None where there was none. Nothing is made."""
    folder.check()
    for name in ("grid", "npz"):
        if (path := getattr(args, name)) is not None:
            _check_extra(args, folder, name, path)
    folder.open()
    settings = resolve(args, device, folder.known.get("settings", {}))
    if not folder.known:
        return settings, None
    _check_settings(folder, settings)
    images, latents = _wanted(args)
    count = settings.num_images
    return settings, Missing(
        folder.missing_images(count, folder.known["image_size"]) if images else [],
        folder.missing_latents(count, folder.known["latent_size"]) if latents else [],
    )


def _check_settings(folder: RunFolder, settings: Settings, models: Models | None = None) -> None:
    """Raise where a run would go on with other settings, or with models of other sizes, than it began with."""
    texts = differences(folder.known["settings"], settings.to_dict())
    for name in ("latent_size", "image_size") if models else ():
        was, now = (side and list(side) for side in (folder.known[name], getattr(models, name)))
        if was != now:
            texts.append(f"the {name.replace('_', ' ')} was {was}, is {now}")
    if texts:
        raise InvalidInput(
            f"expected the settings of the run in {folder.path}, got others: {'; '.join(texts)}. Choose another "
            "--out, or repeat the earlier settings"
        )


def _check_extra(args, folder: RunFolder, name: str, path) -> None:
    """A file beside the images: the grid, or the array."""
    option = f"--{name}"
    if folder.owns(path):
        raise InvalidInput(f"expected {option} to name a file that the run does not write itself, got {path}")
    for other in ("target", "draft", "vae"):
        checkpoint = getattr(args, other)
        if checkpoint and checkpoint.exists() and path.exists() and checkpoint.samefile(path):
            raise InvalidInput(f"expected different files for {option} and --{other}, got {path} for both")
    if args.grid and args.npz and os.path.realpath(args.grid) == os.path.realpath(args.npz):
        raise InvalidInput(f"expected different files for --grid and --npz, got {path} for both")
    if folder.path.exists() or path.parent.resolve() != folder.path.resolve():  # else it comes with the folder
        check_output(path, option)


def _begin(args, folder: RunFolder, settings: Settings, models: Models | None, missing: Missing, start: dict) -> None:
    """The last checks, of what the models tell and of the space; then the folder, and in it what is to be made."""
    if folder.known and models is not None:
        _check_settings(folder, settings, models)
    run = folder.known or {
        "settings": settings.to_dict(),
        "image_size": models.image_size,
        "latent_size": models.latent_size,
        "models": models.loaded,
        "starts": [],
    }
    check_space(_needs(args, folder, settings, missing, run))
    if run["starts"] and missing.numbers:
        warn_of_changes(run["starts"][-1], start)
    if options := without_part(args):
        _logger.warning("without --draft nothing is drafted; these options have no effect: %s", ", ".join(options))
    if missing.numbers and settings.batch_size > settings.num_images:
        _logger.warning(
            "--batch-size %d is larger than the number of images: all of the batch is computed, and %d images are kept",
            settings.batch_size,
            settings.num_images,
        )
    run["starts"].append(start)
    folder.create()
    folder.merge_records()
    folder.known = run
    folder.write_run(run)
    for role, text in models.loaded.items() if models else ():
        say(f"{role}: {text}")


def _needs(args, folder: RunFolder, settings: Settings, missing: Missing, run: dict) -> Iterator[tuple]:
    """(where, bytes), generously: images as if they were not compressed, whole blocks, grid and array."""
    block = 4096
    height, width = run["image_size"] or (0, 0)
    yield folder.path, 64 * block + 2048 * settings.batches  # notes of the batches, twice while they are merged
    yield folder.path, len(missing.images) * (height * width * 3 + height + 2 * block)
    yield folder.path, len(missing.latents) * (4 * int(np.prod(run["latent_size"])) + 2 * block)
    if args.grid:
        yield args.grid.parent, 64 * max(height * width * 3, block)
    if args.npz:
        yield args.npz.parent, settings.num_images * (height * width * 3 + 8) + block


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """What stops the work tells that it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_GOES_ON}") from None
    except BrokenPipeError:  # nobody reads on: the command's own matter
        raise
    except (OSError, ValueError, RuntimeError) as error:
        text = one_line(error)
        raise CallError(text if _GOES_ON in text else f"{text}; {_GOES_ON}") from error


def _work(folder: RunFolder, models: Models, missing: Missing, ranks: Ranks) -> None:
    """This rank's batches of those with something missing, then the others' end."""
    from .writer import Writer

    settings = models.settings
    images, latents = set(missing.images), set(missing.latents)
    batches = sorted({number // settings.batch_size for number in missing.numbers})[ranks.rank :: ranks.size]
    before, size = settings.num_images - len(missing.numbers), settings.batch_size
    told = ranks.rank == 0 and sys.stderr is not None
    shown = told and sys.stderr.isatty()
    next_line = time.monotonic() + _BETWEEN_LINES
    with Bar(title_of(settings.prefill == 1, settings.verify), settings.num_images, "img", before, shown) as bar:

        def show() -> None:
            nonlocal next_line
            if shown:
                bar.move(before + ranks.done())
            elif told and time.monotonic() >= next_line:
                next_line = time.monotonic() + _BETWEEN_LINES
                say(f"{before + ranks.done()} of {settings.num_images} images", sys.stderr)

        with Writer(folder, settings, images, latents, ranks.rank) as writer:
            for number in batches:
                ranks.check()
                wanted = not images.isdisjoint(range(number * size, (number + 1) * size))
                ranks.add(writer.put(models.make(number, wanted, bar.show if shown else None)))
                show()
            ranks.add(writer.wait())
        ranks.wait(show)


def _finish(args, folder: RunFolder, settings: Settings) -> None:
    """Rank 0's: the statistics of all, then the grid and the array from the files."""
    statistics, seconds = merge_statistics(folder.merge_records())
    run = folder.known
    run |= {"statistics": statistics, "seconds": seconds}
    start = time.perf_counter()
    paths = [folder.image(number) for number in range(settings.num_images)]
    if args.grid:
        write_file(args.grid, grid(list(_read(paths[:64]))))
    if args.npz:
        labels = [settings.label(number) for number in range(settings.num_images)]
        write_npz(args.npz, _read(paths), labels, (*run["image_size"], 3))
    run["starts"][-1]["seconds"]["collect"] = time.perf_counter() - start
    folder.write_run(run)
    say(_summary(settings, folder, run))


def _read(paths: list) -> Iterator[np.ndarray]:
    """Images, in order, read a few ahead by threads."""
    with ThreadPoolExecutor(4) as threads:
        ahead: deque = deque()
        for path in paths:
            ahead.append(threads.submit(read_png, path))
            if len(ahead) >= 32:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _summary(settings: Settings, folder: RunFolder, run: dict) -> str:
    count, made, statistics = settings.num_images, run["starts"][-1]["missing"], run["statistics"]
    texts = [f"{folder.path}: {count} image{'s' * (count > 1)}, {made} made now"]
    if not settings.digits:
        texts.append(f"latents of shape {tuple(run['latent_size'])}")
    texts.append(f"{statistics['target_calls']} target and {statistics['draft_calls']} draft calls")
    if lost := settings.batches - statistics["batches"]:
        texts.append(f"not counting {lost} batch{'es' * (lost > 1)} whose process was stopped before it noted them")
    if statistics["acceptance"] is not None:
        texts.append(f"{100 * statistics['acceptance']:.1f} % of the drafted tokens kept")
    if settings.verify == "strict" and statistics["steps_per_round"]:
        texts.append(f"{statistics['rounds']} rounds of {statistics['steps_per_round']:.2f} steps an image")
    return ", ".join(texts)
