"""A run never waits for the device: nothing is read on the host, and nothing comes from it after the first kernel."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
from unittest import mock

import dispatch_modes
import fake_cuda
import pytest
import torch
from dispatch_modes import NoHostRead
from small_models import small_mar
from torch.utils._python_dispatch import _disable_current_modes

import cspd
from cspd import beginning, loops, order, reporting
from cspd.order import to_device
from cspd.whole import chosen, steps
from cspd.window import prefill, run_window
from cspd_kernels.live import LiveWeights
from cspd_kernels.ops import accept_reject as accept_reject_op
from cspd_kernels.ops import denoise as denoise_op
from cspd_kernels.ops.accept_reject import torch_backend
from cspd_kernels.testing import relative_error

COPIES = ("tolist", "numpy", "cpu")  # of which a dispatch mode sees nothing on the CPU


class NoWait(NoHostRead):
    """Fails also, once ``started``, where a tensor is made from numbers of the host."""

    started = False

    def seen(self, func, args):
        name = func.overloadpacket.__name__
        # A guidance scale that is a number goes through denoise's operator as a tensor of the CPU on every device.
        number = name in ("item", "_local_scalar_dense") and args[0].dtype == torch.float64 and args[0].dim() == 0
        if not number:
            super().seen(func, args)
        assert not (self.started and name == "lift_fresh"), "a tensor comes from the host"
        self.started |= name == "addmm"


@contextlib.contextmanager
def no_wait():
    """A block in which any wait for the device fails."""

    def copied(name, *_):
        raise AssertionError(f"the host waits for {name}")

    with contextlib.ExitStack() as patches, NoWait() as mode:
        for name in COPIES:
            patches.enter_context(mock.patch.object(torch.Tensor, name, functools.partial(copied, name)))
        yield mode


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Without what is done on the CPU alone: checks of values, picking out the rows that are still undecided, and
    comparing the weights, which a kernel does on a device.
    """
    monkeypatch.setattr(LiveWeights, "_compare", LiveWeights._embed)
    monkeypatch.setattr(beginning, "check_run", lambda *_: None)
    monkeypatch.setattr(order, "check_room", lambda *_: None)
    monkeypatch.setattr("cspd_kernels.ops.denoise.check_values", lambda **_: None)
    monkeypatch.setattr("cspd_kernels.ops.denoise.check_result", lambda *_: None)
    monkeypatch.setattr(accept_reject_op, "_check_residual", lambda *_: None)
    monkeypatch.setattr(accept_reject_op, "check", lambda op, x, draft, target, relaxation, sigma, **_: relaxation)
    backend = functools.partial(torch_backend.accept_reject, compact=False)
    monkeypatch.setattr(accept_reject_op, "remembered", lambda *_, **__: backend)


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


def by_entropy(window):
    return 1.0 + 41.0 * torch.sigmoid(window.target_log_std.mean(dim=-1))


LABELS = torch.tensor([3, 1, 4])
OPTIONS = {
    "plain": ({}, {}),
    "guided": ({}, {"cfg": 3.0, "labels": LABELS}),
    "guided, constant": ({}, {"cfg": 3.0, "cfg_schedule": "constant", "labels": LABELS}),
    "labels": ({}, {"labels": LABELS}),
    "no pre-filling": ({"prefill": 0.0, "sigma": "released"}, {"temperature": 0.7}),
    "tensor": ({"relaxation": torch.linspace(1, 40, 16)}, {"cfg": 2.0}),
    "policy": ({"relaxation": cspd.SimilarityRelaxation()}, {"cfg": 2.0, "labels": LABELS}),
    "entropy": ({"relaxation": by_entropy}, {}),
    "orders": ({}, {"orders": torch.stack([torch.randperm(16) for _ in range(3)])}),
    "closed form": ({"residual": "closed_form", "target_sigma": True}, {}),
    "candidates": ({"num_candidates": 3, "target_sigma": True}, {"cfg": 2.0}),
    "last step": ({"num_candidates": 2, "target_sigma": True, "criterion": "last_step"}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_waits_nowhere(pair, as_on_a_device, name):
    options, arguments = OPTIONS[name]
    runner = cspd.SpecDecodeRunner(*pair, **options)
    expected = runner.run(3, 8, 3, seed=5, **arguments)
    with no_wait() as mode:
        images = runner.run(3, 8, 3, seed=5, **arguments)
    assert mode.started
    assert torch.equal(images, expected)
    assert 0 <= runner.stats.acceptance <= 1


@pytest.mark.parametrize("verify", ["window", "strict"])
def test_callbacks_and_bars_wait_nowhere(pair, as_on_a_device, places_of_a_device, monkeypatch, capsys, verify):
    """Except a callback that reads the acceptance. The bar asks for a copy to the host and does not wait for it."""
    meters_of_a_device(monkeypatch, places_of_a_device)
    runner, told = cspd.SpecDecodeRunner(*pair, verify=verify), []
    expected = runner.run(3, 8, 3, seed=5)
    places_of_a_device.told()
    with no_wait() as mode:
        images = runner.run(3, 8, 3, seed=5, progress=True, callback=told.append)
    assert mode.started
    assert torch.equal(images, expected)
    assert "acceptance" in capsys.readouterr().err
    log, rounds = places_of_a_device.told(), [seen for seen in told if seen.phase == "round"]
    waits = [line for line in log if "waits" in line]
    assert len(waits) == max(len(rounds) - 1, 0)  # as without callback and bar
    with pytest.raises(AssertionError, match="the host waits"), no_wait():
        runner.run(3, 8, 3, seed=5, callback=lambda seen: seen.acceptance)


def meters_of_a_device(monkeypatch, cuda):
    """The acceptance comes to the host as it does from a device, and has always arrived."""

    class Arrived(fake_cuda.FakeEvent):
        def query(self):
            return True

    given = reporting.Meter.__init__

    def made(meter, recorder):
        given(meter, recorder)
        meter._room = torch.zeros(2, dtype=torch.float64), Arrived(cuda)

    numbers, own = ctypes.c_double * 2, reporting._read

    def read(told):
        pinned = told.data_ptr() in [room.data_ptr() for room in rooms]
        return tuple(numbers.from_address(told.data_ptr())) if pinned else own(told)

    rooms = []
    monkeypatch.setattr(reporting.Meter, "__init__", lambda *args: (made(*args), rooms.append(args[0]._room[0]))[0])
    monkeypatch.setattr(reporting, "_read", read)
    monkeypatch.setattr(reporting, "REFRESH", 0.0)


def test_what_the_runner_adds_to_sweeps_waits_nowhere(pair, as_on_a_device, monkeypatch):
    """Sweeps of the torch backend, alone of all, wait; so here the op is not looked into."""

    def unseen(*args):
        with _disable_current_modes():
            return denoise_op.run(*args)

    monkeypatch.setattr(dispatch_modes, "run", unseen)
    runner = cspd.SpecDecodeRunner(*pair, parallel_tol=1e-3)
    expected = runner.run(3, 8, 3, seed=5, cfg=2.0)
    with no_wait() as mode:
        images = runner.run(3, 8, 3, seed=5, cfg=2.0)
    assert mode.started
    assert torch.equal(images, expected)


def test_a_length_policy_reads_once_a_window(pair, as_on_a_device):
    runner, asked = cspd.SpecDecodeRunner(*pair, ratio=0.0), []

    def two(windows):
        asked.append(len(windows))
        return 2

    runner.run(3, 8, 2, seed=5)
    with pytest.raises(AssertionError, match="the host waits for tolist"), no_wait():
        runner.run(3, 8, two, seed=5)
    assert asked == [0]
    with no_wait():
        runner.run(3, 8, lambda windows: 8, seed=5)  # one window: nothing is to be known of it


STRICT = {
    "plain": ({}, {}),
    "guided": ({"criterion": "last_step"}, {"cfg": 3.0, "labels": LABELS}),
    "branches": ({"num_candidates": 3, "branches": 2, "target_sigma": True, "criterion": "last_step"}, {"cfg": 3.0}),
    "by position": ({"relaxation": torch.linspace(1, 40, 16)}, {"cfg": 2.0}),
    "policy": ({"relaxation": cspd.ContextRelaxation(), "prefill": 0.0}, {"cfg": 2.0}),
    "entropy": ({"relaxation": cspd.SimilarityRelaxation()}, {"gamma": cspd.EntropyDraft(3)}),
    "everything pre-filled": ({"prefill": 1.0}, {}),
}


@pytest.fixture
def places_of_a_device(monkeypatch):
    """Where images are comes to the host as it does from a device: what happens, in order."""
    cuda = fake_cuda.FakeCuda()
    where = types.SimpleNamespace(type="cuda")
    given = loops.Places
    monkeypatch.setattr(loops, "Places", lambda _, first: given(where, first))
    monkeypatch.setattr(loops, "_pinned", lambda size: torch.empty(size, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "Event", lambda: fake_cuda.FakeEvent(cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: cuda.main)
    # What the host reads there is no wait: it is its own memory, and the event was waited for.
    numbers = ctypes.c_int64 * 2
    monkeypatch.setattr(loops, "_read", lambda told: list(numbers.from_address(told.data_ptr())))
    round_of = steps.PlainSteps.round
    monkeypatch.setattr(steps.PlainSteps, "round", lambda *args: cuda.log.append("a round") or round_of(*args))
    return cuda


@pytest.mark.parametrize("name", STRICT)
def test_a_strict_run_waits_for_the_round_before_the_last_alone(pair, as_on_a_device, places_of_a_device, name):
    options, arguments = STRICT[name]
    arguments = {"gamma": 3, "seed": 5, **arguments}
    runner = cspd.SpecDecodeRunner(*pair, **{"relaxation": 1.0, "verify": "strict", **options})
    expected = runner.run(3, 8, **arguments)
    places_of_a_device.told()
    with no_wait() as mode:
        images = runner.run(3, 8, **arguments)
    assert mode.started
    assert torch.equal(images, expected)
    log, rounds = places_of_a_device.told(), runner.stats.rounds
    launched = log.count("a round")
    assert rounds <= launched <= rounds + 1  # one that was launched before the host knew that there was no more to do
    assert launched <= 8 - runner.stats.target_calls + rounds
    # A round is launched before the one in front of it is waited for.
    assert log == ["a round", *["a round", "the host waits for the event of main"] * (launched - 1)][: len(log)]
    assert len(log) == max(2 * launched - 1, 0)


def test_what_a_device_tells_is_right_whenever_it_is_read(pair, places_of_a_device, monkeypatch):
    """The rounds of a device are those of a CPU, with one more at most."""
    runner = cspd.SpecDecodeRunner(*pair, 42.0, verify="strict", prefill=0.0)
    on_a_device = runner.run(5, 9, 2, seed=3)
    stats = runner.stats
    assert "a round" in places_of_a_device.log
    monkeypatch.undo()
    assert relative_error(on_a_device, runner.run(5, 9, 2, seed=3)) < 1e-5
    assert runner.stats.rounds == stats.rounds
    assert torch.equal(runner.stats.outcome, stats.outcome)


FAULTS = {
    "boolean index": lambda window: window.log_ratio[window.log_ratio > 0],
    "count": lambda window: int(window.positions[0, 0]),
    "list": lambda window: window.steps.tolist(),
    "late table": lambda window: torch.tensor([1.0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_can_fail(pair, as_on_a_device, fault):
    runner = cspd.SpecDecodeRunner(*pair, lambda window: torch.full_like(window.log_ratio, 2.0))
    runner.run(3, 8, 3, seed=5)
    runner.relaxation = FAULTS[fault]
    with pytest.raises(AssertionError, match=r"the host waits|comes from the host"), no_wait():
        runner.run(3, 8, 3, seed=5)


def test_masks_would_fail_the_check(pair, as_on_a_device, monkeypatch):
    monkeypatch.setattr(chosen, "why_not_by_weights", lambda *_: "asked for by this test")
    monkeypatch.setattr(chosen, "why_not_by_tables", lambda _: "asked for by this test")
    runner = cspd.SpecDecodeRunner(*pair)
    runner.run(3, 8, 3, seed=5)
    with pytest.raises(AssertionError, match="the host waits for tolist"), no_wait():
        runner.run(3, 8, 3, seed=5)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_eager_sampling_waits_nowhere_in_the_transformer(pair, monkeypatch, cfg):
    model = pair[1]
    monkeypatch.setattr(model.diffloss, "sample", lambda z, temperature, scale: z[:, :4])
    with no_wait():
        images = model.sample_tokens(3, 6, cfg=cfg, labels=LABELS)
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("relaxation", [42.0, cspd.SimilarityRelaxation()])
def test_a_window_can_be_run_again_in_the_same_buffers(pair, relaxation):
    """What a CUDA graph of it needs: the same buffers each time, and nothing kept elsewhere."""
    runner = cspd.SpecDecodeRunner(*pair, relaxation, ratio=0.25)
    arguments = {"labels": LABELS, "cfg": 2.0, "seed": 5}
    images = runner.run(3, 8, 3, **arguments)
    state = runner.begin(3, 8, **arguments)
    for i in range(state.prefilled):
        prefill(state, state.plan.step(i))
    stop = len(state.plan.steps)
    windows = [state.plan.window(i, min(i + 3, stop)) for i in range(state.prefilled, stop, 3)]
    buffers = [state.tokens, state.outcome, *([state.previous_target_z] if callable(relaxation) else [])]
    for window in windows:
        before = [buffer.clone() for buffer in buffers]
        first = run_window(state, window)
        after = [buffer.clone() for buffer in buffers]
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        again = run_window(state, window)
        assert all(map(torch.equal, buffers, after))
        assert not any(map(torch.equal, before, after))
        assert all(map(torch.equal, first, again))
    now = [state.tokens, state.outcome, *([state.previous_target_z] if callable(relaxation) else [])]
    assert all(one is other for one, other in zip(now, buffers, strict=True))
    assert torch.equal(pair[1].unpatchify(state.tokens), images)
    assert torch.equal(runner.stats.outcome, state.outcome)


def test_a_window_reports_its_phases(pair):
    runner, entered = cspd.SpecDecodeRunner(*pair, ratio=0.0), []

    def phase(name):
        entered.append(name)
        return contextlib.nullcontext()

    state = runner.begin(2, 8, seed=1)
    run_window(state, state.plan.window(0, 3), phase)
    assert entered == ["draft"] * 3 + ["target", "verify"]


def test_what_comes_from_the_host_is_pinned_and_not_waited_for(monkeypatch):
    copies = []

    class OnTheHost:
        device = torch.device("cpu")

        def pin_memory(self):
            return types.SimpleNamespace(to=lambda device, non_blocking: copies.append((device, non_blocking)))

    to_device(OnTheHost(), torch.device("cuda", 0))
    assert copies == [(torch.device("cuda", 0), True)]
