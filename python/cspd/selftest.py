"""The checks of ``cspd selftest``: every op of every backend that is there, then a patched model and a runner."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from cspd_kernels.selftest import NOT_HERE, Check, OtherwiseError, check_ops, checked, places
from cspd_kernels.testing import randomize_, relative_error

from .demo.pair import one_thread
from .description import describe
from .models import MAR
from .patching import patched
from .speculative import SpecDecodeRunner

_BOUND = 1e-5  # of an image in float32


def run(quick: bool = False) -> Iterator[Check]:
    """All checks, one by one. Generators, settings and the environment are afterwards as they were.

    Args:
        quick: float32 alone, and no speculative decoding.
    """
    checks = _checks(quick)
    while True:
        # The settings are changed while a check runs, and not while its caller prints.
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # from the numpy of Triton's interpreter
            check = next(checks, None)
        if check is None:
            return
        yield check


def _checks(quick: bool) -> Iterator[Check]:
    yield from check_ops(quick)
    for backend, device, _ in places():
        if device is None:
            continue  # said among the ops
        yield checked(f"{backend}: patch, same seed, same image", _BOUND, lambda b=backend, d=device: _patch(b, d))
        if not quick:
            name = f"{backend}: speculative decoding"
            yield checked(name, _BOUND, lambda b=backend, d=device: _speculate(b, d))


def passed(checks: list[Check]) -> bool:
    """Whether nothing failed. A backend that is not here has neither passed nor failed."""
    return all(check.status != "FAILED" for check in checks)


def summary(checks: list[Check]) -> str:
    """One line."""
    count = {status: sum(check.status == status for check in checks) for status in ("ok", "FAILED", NOT_HERE)}
    return f"{count['ok']} ok, {count['FAILED']} failed, {count[NOT_HERE]} not here (not tested)"


def _model(device: torch.device, seed: int) -> MAR:
    """A MAR of four tokens with random weights."""
    with _seeded(seed):
        model = MAR(
            img_size=4, vae_stride=1, patch_size=2, vae_embed_dim=1, class_num=10, buffer_size=2,
            encoder_embed_dim=32, encoder_depth=1, encoder_num_heads=2,
            decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
            diffloss_d=1, diffloss_w=32, num_sampling_steps="4",
        )  # fmt: skip
    return randomize_(model, seed + 1).eval().to(device)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators, which MAR draws from, seeded for a while."""
    numpy_state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)


def _image(model: MAR, device: torch.device) -> torch.Tensor:
    """Two images under guidance."""
    with _seeded(3), torch.no_grad():
        return model.sample_tokens(2, num_iter=2, cfg=2.0, labels=torch.tensor([1, 4], device=device))


def _patch(backend: str, device: torch.device) -> float:
    model = _model(device, 0)
    expected = _image(model, device)
    with patched(model, backend=backend):
        error = relative_error(_image(model, device), expected)
        for head in describe(model).heads:
            if reasons := [reason for reason in (head.own_loop, *head.own_code) if reason]:
                raise OtherwiseError(f"the kernels did not serve the head's loop: {'; '.join(reasons)}")
    return error


def _speculate(backend: str, device: torch.device) -> float:
    """A draft that equals its target has every token accepted, and gives the target's image.

    Another draft gives an image without NaN, the same one for the same seed.
    """
    target, other = _model(device, 0), _model(device, 5)
    options = dict(steps=4, gamma=1, seed=3)
    alone = SpecDecodeRunner(target, target, 1.0, prefill=1.0, backend=backend).run(2, **options)
    runner = SpecDecodeRunner(copy.deepcopy(target), target, 1.0, prefill=0.25, backend=backend)
    image = runner.run(2, **options)
    if (rate := runner.stats.acceptance) != 1.0:
        raise OtherwiseError(f"expected every token of a draft that equals its target to be accepted, got {rate:.0%}")
    runner = SpecDecodeRunner(other, target, 4.0, prefill=0.25, backend=backend)
    first, again = (runner.run(2, steps=4, gamma=2, seed=3) for _ in range(2))
    if not (bool(first.isfinite().all()) and torch.equal(first, again)):
        raise OtherwiseError("a run with another draft was not finite, or not the same for the same seed")
    return relative_error(image, alone)
