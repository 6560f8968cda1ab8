"""``cspd serve``: what a request may ask for and what it gets, the page over HTTP, and the command."""

from __future__ import annotations

import argparse
import builtins
import math
import socket

import pytest
import torch
from small_models import small_mar

from cspd import cli_serve, page
from cspd.demo.pair import load_pair
from cspd.demo.picture import to_pixels
from cspd.serve import MAX_SEED, Limits, Made, Studio, render
from cspd.speculative import SpecDecodeRunner

GOOD = dict(label=3, steps=4, gamma=2, guidance=1, seed=5, images=2)


def arguments(*words):
    parser = argparse.ArgumentParser()
    cli_serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


@pytest.fixture(scope="module")
def studio() -> Studio:
    return cli_serve.load_studio(arguments("--relaxation", "1"))


def test_a_request_is_the_two_runs(studio):
    made = studio.make(**GOOD)
    target, draft = load_pair()
    labels = torch.tensor([3, 3])
    runner = SpecDecodeRunner(draft, target, 1.0)
    images = runner.run(2, 4, 2, labels=labels, seed=5)
    assert made.speculative.shape == (2, 8, 8)
    assert torch.equal(made.speculative, ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte())
    assert torch.equal(made.outcome, runner.stats.outcome)
    assert (made.target_calls, made.draft_calls, made.target_calls_alone) == (3, 3, 4)
    alone = SpecDecodeRunner(target, target, 1.0, 1.0).run(2, 4, 2, labels=labels, seed=5)
    assert torch.equal(made.alone, ((alone[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte())
    assert made.seconds > 0 and made.seconds_alone > 0
    with_floats = studio.make(3.0, 4.0, 2.0, 1.0, 5.0, 2.0)  # what a page sends
    assert torch.equal(with_floats.speculative, made.speculative)
    assert not torch.equal(studio.make(**{**GOOD, "guidance": 3}).speculative, made.speculative)


@pytest.mark.parametrize(
    ("name", "value"),
    [("label", value) for value in (-1, 10, 2.5, None, "3", True, math.nan, math.inf)]
    + [("steps", 0), ("steps", 17), ("gamma", 0), ("gamma", 17), ("images", 0), ("images", 17), ("images", 10**30)]
    + [("seed", -1), ("seed", MAX_SEED + 1), ("guidance", 0.9), ("guidance", 11), ("guidance", math.nan)]
    + [("guidance", None), ("guidance", [1])],
)
def test_limits_hold_whatever_a_page_sends(studio, monkeypatch, name, value):
    monkeypatch.setattr(SpecDecodeRunner, "run", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=r"^Expected .* number from .*, got"):
        studio.make(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(verify="strictly"), "Expected the verification as one of window, strict, got 'strictly'"),
        (dict(verify=None), "Expected the verification as one of window, strict, got nothing"),
        (dict(candidates=17), "Expected the candidates as a whole number from 1 to 16, got 17"),
        (dict(candidates=None), "Expected the candidates as a whole number"),
        (dict(verify="strict", branches=0), "Expected the branches as a whole number from 1 to 4, got 0"),
        (dict(verify="strict", candidates=8, branches=5), "Expected the branches as a whole number from 1 to 4, got 5"),
        (dict(candidates=2, branches=2), "Expected strict verification for 2 branches"),
        (dict(verify="strict", candidates=2, branches=3), "Expected at most as many branches as candidates"),
    ],
)
def test_verification_that_does_not_go_together(studio, monkeypatch, wrong, message):
    monkeypatch.setattr(SpecDecodeRunner, "run", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=message):
        studio.make(**GOOD, **wrong)


def test_a_strict_request_is_exact():
    """It knows no relaxation and no fallback; the windows behind it are as they were."""
    studio = cli_serve.load_studio(arguments())
    window = studio.make(**GOOD)
    strict = studio.make(**GOOD, verify="strict", candidates=3.0, branches=2.0)  # what a page sends
    target, draft = load_pair()
    labels, noisy = torch.tensor([3, 3]), dict(criterion="last_step")
    rule = noisy | dict(verify="strict", residual="closed_form", num_candidates=3, branches=2)
    runner = SpecDecodeRunner(draft, target, 1.0, **rule)
    images = runner.run(2, 4, 2, labels=labels, seed=5)
    assert torch.equal(strict.speculative, to_pixels(images)) and torch.equal(strict.outcome, runner.stats.outcome)
    alone = SpecDecodeRunner(target, target, 1.0, 1.0, **noisy).run(2, 4, 2, labels=labels, seed=5)
    assert torch.equal(strict.alone, to_pixels(alone))
    assert (strict.rounds, strict.steps_per_round) == (runner.stats.rounds, runner.stats.steps_per_round)
    assert f"{strict.rounds} rounds, each {strict.steps_per_round:.1f} steps of an image." in render(strict)
    again = studio.make(**GOOD)
    assert torch.equal(again.speculative, window.speculative) and torch.equal(again.alone, window.alone)
    assert " rounds, " not in render(again)
    few = studio.make(**GOOD, candidates=2)
    runner = SpecDecodeRunner(draft, target, num_candidates=2, **noisy)
    assert torch.equal(few.speculative, to_pixels(runner.run(2, 4, 2, labels=labels, seed=5)))


def test_learned_variances_take_what_a_runner_takes():
    """No closed form for one candidate, the target's sigma for several."""
    pytest.importorskip("cspd.vae")
    target, draft = (small_mar(width=width, img_size=4) for width in (32, 16))
    studio = Studio(target, draft, Vae(), limits=Limits(4, 4, 2), steps=4, classes=target.num_classes, name="x")
    assert not studio.one_sigma
    for verify, candidates in (("strict", 1), ("strict", 2), ("window", 2), ("window", 1)):
        made = studio.make(1, 4, 2, 1.0, 5, 1, verify, candidates)
        rule = {name: getattr(studio.pair, name) for name in ("residual", "target_sigma", "criterion")}
        runner = SpecDecodeRunner(
            draft, target, studio.pair.relaxation, verify=verify, num_candidates=candidates, **rule
        )
        runner.run(1, 4, 2, labels=torch.tensor([1]), seed=5)
        assert torch.equal(made.outcome, runner.stats.outcome)


def test_what_is_shown():
    outcome = torch.tensor([[0, 1, 2, 3]])
    grey = torch.zeros(1, 8, 8, dtype=torch.uint8)
    text = render(Made(grey, grey, outcome, 0.5, 1.0, 3, 4, 8, 0.25))
    assert text.count("<img") == 3
    for words in ("pre-filled: 1", "accepted: 1", "redrawn: 1", "fell back to the target's: 1"):
        assert words in text
    assert "<b>2.00 times</b>" in text and "25.0 %" in text
    assert "No token was drafted" in render(Made(grey, grey, outcome * 0, 0.5, 1.0, 3, 0, 8, None))


class Vae:
    """A decoder of pictures of one colour."""

    def decode(self, latents):
        return torch.full((len(latents), 3, 32, 32), 0.5)


def test_a_vae_makes_the_pictures(monkeypatch):
    pytest.importorskip("cspd.vae")
    target, draft = load_pair()
    limits = Limits(steps=16, gamma=8, images=2)
    made = Studio(target, draft, Vae(), limits=limits, steps=8, classes=10, name="x").make(**GOOD)
    assert made.speculative.shape == made.alone.shape == (2, 32, 32, 3)
    assert made.speculative.unique().numel() == 1
    assert render(made).count("<img") == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "a"], "expected --target, --draft and --vae together, got only --target"),
        (["--target", "a", "--vae", "b"], "got only --target and --vae"),
        (["--patch-size", "1"], "expected --target together with --patch-size"),
    ],
)
def test_what_does_not_fit_together(words, message):
    with pytest.raises(ValueError, match=message):
        cli_serve.run(arguments(*words))


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="expected a --device that torch has on this machine"):
        cli_serve.load_studio(arguments("--device", "nonsense"))


def test_without_gradio_one_sentence_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(cli_serve, "load_studio", lambda args: pytest.fail("the models were loaded"))
    with pytest.raises(RuntimeError, match=r"needs gradio.*cspd-kernels\[serve\]"):
        cli_serve.run(arguments())


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_page_over_http(studio, port, monkeypatch):
    """A click makes a picture; an error is a sentence; another server cannot take the same port."""
    pytest.importorskip("gradio")
    client_of = pytest.importorskip("gradio_client")
    app = page.build_page(studio)
    assert not app.analytics_enabled
    address = page.start(app, "127.0.0.1", port)
    try:
        assert address == f"http://127.0.0.1:{port}/"
        client = client_of.Client(address, verbose=False)
        assert client.predict(*GOOD.values(), api_name="/make").count("<img") == 6
        assert " rounds, each " in client.predict(*GOOD.values(), "strict", 2, 2, api_name="/make")
        for values, message in (
            ({"seed": -1}, "Expected the seed as a whole number"),
            ({"label": 10}, "Expected the class as a whole number from 0 to 9, got 10"),
            ({"verify": "window", "candidates": 2, "branches": 2}, "Expected strict verification for 2 branches"),
        ):
            with pytest.raises(Exception, match=message):
                client.predict(*{**GOOD, **values}.values(), api_name="/make")
        with pytest.raises(Exception, match=r"maximum|steps"):
            client.predict(*{**GOOD, "steps": 1000}.values(), api_name="/make")

        def broken(*_, **__):
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr(studio.pair, "run", broken)
        with pytest.raises(Exception, match="The run failed: out of memory"):
            client.predict(*GOOD.values(), api_name="/make")
        with pytest.raises(OSError, match="choose others with --host and --port"):
            page.start(page.build_page(studio), "127.0.0.1", port)
    finally:
        app.close(verbose=False)
