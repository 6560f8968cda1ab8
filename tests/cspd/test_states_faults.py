"""Errors while patching, and threads that patch, undo and sample at once: all or nothing."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.nn as nn
from slow import slow
from states import everything, listening, model_in, rows, sample, served_calls

import cspd
import cspd.before_patching
import cspd.head_patch
import cspd.patching
from cspd.head_patch import HeadPatch
from cspd.heads import HeadCache
from cspd.loop import LoopHook
from cspd.models import GaussianDiffusion
from cspd.standins import StandIn, WatchedMoves, WatchedSample
from cspd_kernels.testing import relative_error

STEPS = {
    "looking": (cspd.patching, "find_heads"),
    "checking values": (cspd.before_patching, "_check_values"),
    "comparing": (cspd.before_patching, "check_sample"),
    "describing": (cspd.patching, "describe_head"),
    "telling": (logging.Handler, "handle"),
    "a patch": (HeadPatch, "__init__"),
    "its cache": (HeadCache, "__init__"),
    "its hooks": (HeadPatch, "install"),
    "a loop's hook": (LoopHook, "__init__"),
    "a loop": (LoopHook, "install"),
    "a stand-in": (StandIn, "install"),
    "a stand-in for sample": (WatchedSample, "__init__"),
    "a stand-in for moves": (WatchedMoves, "__init__"),
}

OFTEN = {"its cache", "a loop's hook", "a loop"}  # called many times, so that they fail at many places


class FaultError(Exception):
    """Whatever goes wrong."""


def failing(target, name: str, at: int):
    """The function raises at its call number ``at``, after it has done its work."""
    original, calls = getattr(target, name), []

    def run(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(None)
        if len(calls) == at:
            raise FaultError(name)
        return result

    return mock.patch.object(target, name, run), calls


def pair():
    """Where its ``sample`` fails on a copy, the loop of training is compared, too, in all of its steps."""
    return nn.ModuleDict({name: model_in(seed, num_train_steps=40) for seed, name in enumerate(("one", "two"))})


@pytest.mark.parametrize("patched", [False, slow(True)])
@pytest.mark.parametrize("step", [slow(step) if step in OFTEN else step for step in STEPS])
def test_an_error_at_any_step_leaves_nothing_changed(step, patched):
    models, logger = pair(), logging.getLogger("cspd")
    expected = [rows(model) for model in models.values()]
    if patched:
        cspd.patch(models)
    was, level = everything(models), logger.level
    raised = 0
    logger.setLevel(logging.INFO)
    try:
        for at in itertools.count(1):
            fault, calls = failing(*STEPS[step], at)
            try:
                with fault:
                    cspd.patch(models, dtype=torch.bfloat16)
            except FaultError:
                raised += 1
                assert everything(models) == was, at
                for model, tokens in zip(models.values(), expected):
                    with served_calls() as served:
                        assert relative_error(rows(model), tokens) < 1e-5
                    assert len(served) == patched
            else:  # not so many calls; or it was on a copy, of which nothing is left
                cspd.unpatch(models)
                if patched:
                    cspd.patch(models)
                    was = everything(models)
            if len(calls) < at:
                break
    finally:
        logger.setLevel(level)
    assert raised > 0 or patched  # where the stand-ins are there already
    cspd.unpatch(models)
    assert all(torch.equal(rows(model), tokens) for model, tokens in zip(models.values(), expected))


class Sealed(GaussianDiffusion):
    """Takes no attribute that it does not know, once it is made."""

    def __init__(self, schedule):
        super().__init__(schedule)
        self.__dict__["sealed"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("sealed"):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)


class Kept(GaussianDiffusion):
    """Lets nothing be taken away."""

    def __delattr__(self, name):
        raise AttributeError(f"{name} cannot be deleted")


def test_a_diffusion_object_that_refuses_is_named_and_nothing_changes():
    models = pair()
    models["two"].diffloss.gen_diffusion = Sealed(models["two"].diffloss.gen_diffusion.schedule)
    was = everything(models)
    expected = rows(models["two"])
    with pytest.raises(TypeError, match=r"whose p_sample_loop can be replaced, but .*Sealed does not let it: Attri"):
        cspd.patch(models)
    assert everything(models) == was
    assert torch.equal(rows(models["two"]), expected)


def test_unpatch_takes_off_what_the_diffusion_object_would_keep():
    model = model_in()
    model.diffloss.gen_diffusion = Kept(model.diffloss.gen_diffusion.schedule)
    was, expected = everything(model), rows(model)
    cspd.patch(model)
    assert relative_error(rows(model), expected) < 1e-5
    cspd.unpatch(model)
    assert everything(model) == was


def test_unpatch_reaches_the_patch_of_a_network_that_was_put_aside():
    model = cspd.patch(model_in())
    model.diffloss.net = model_in(3).diffloss.net
    cspd.unpatch(model)
    assert "p_sample_loop" not in vars(model.diffloss.gen_diffusion)
    assert "sample" not in vars(model.diffloss)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_threads_that_patch_undo_and_sample_at_once():
    model, failures, stop = model_in(), [], threading.Event()
    net, shape, noise, z = model.diffloss.net, (3, 4), torch.randn(3, 4), torch.randn(3, 32)

    def run():
        loop = model.diffloss.gen_diffusion.p_sample_loop
        return loop(net.forward, shape, noise, False, model_kwargs={"c": z}, temperature=0.0)  # draws, and uses nothing

    expected = run()

    def sampling():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    error = relative_error(run(), expected)
                if error > 1e-5:
                    failures.append(error)
            except Exception as error:  # noqa: BLE001
                failures.append(repr(error))

    def patching(seed):
        choice = random.Random(seed)
        try:
            for _ in range(6):
                if choice.random() < 0.5:
                    with cspd.patched(model):
                        run()
                else:
                    cspd.patch(model, weights=choice.choice(["live", "frozen"]))
                    cspd.unpatch(model)
        except Exception as error:  # noqa: BLE001
            failures.append(repr(error))

    samplers = [threading.Thread(target=sampling) for _ in range(3)]
    patchers = [threading.Thread(target=patching, args=(seed,)) for seed in range(3)]
    messages = []
    with listening(messages):
        for thread in (*samplers, *patchers):
            thread.start()
        for thread in patchers:
            thread.join()
        stop.set()
        for thread in samplers:
            thread.join()
    assert not failures, failures[:3]
    assert not messages
    cspd.unpatch(model)
    assert not cspd.is_patched(model)
    assert "p_sample_loop" not in vars(model.diffloss.gen_diffusion)
    assert torch.equal(run(), expected)
    assert sample(model).isfinite().all()


class Seeding(type(model_in().diffloss)):
    """A head that seeds before it samples."""

    def sample(self, z, temperature=1.0, cfg=1.0):
        torch.manual_seed(5)
        return super().sample(z, temperature, cfg)


@pytest.mark.parametrize("kind", [type(model_in().diffloss), Seeding])
def test_comparing_draws_nothing_from_the_generator_of_the_caller(kind):
    model = model_in()
    model.diffloss.__class__ = kind
    torch.manual_seed(1)
    was = torch.get_rng_state()
    cspd.patch(model)
    assert torch.equal(torch.get_rng_state(), was)


def test_a_network_with_moves_of_its_own():
    model = model_in()
    net = model.diffloss.net

    class Moving(type(net)):
        def _apply(self, fn):
            return super()._apply(fn)

    net.__class__ = Moving
    cspd.patch(model).double()
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert rows(model).dtype == torch.float64


def test_what_cannot_be_copied_runs_its_own_code_and_says_so():
    model, messages = model_in(), []
    expected = rows(model)
    cspd.patch(model)
    model.diffloss.gen_diffusion.lock = threading.Lock()
    with listening(messages):
        assert torch.equal(rows(model), expected)
    assert "does not run on a copy, so it cannot be compared: TypeError" in messages[0]
    cspd.unpatch(model)
    cspd.patch(model)  # compares at the first call, and cannot
    assert torch.equal(rows(model), expected)


def test_weights_go_with_their_model_and_wait_for_no_collection():
    model = model_in()
    cspd.patch(model)
    rows(model)
    weight = weakref.ref(model.diffloss.net.cond_embed.weight.untyped_storage())
    cspd.unpatch(model)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()
