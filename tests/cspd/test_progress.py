"""What a run tells while it runs: to a callback, and to a bar. Nothing of it waits for the device by itself."""

from __future__ import annotations

import json
import types
from itertools import pairwise

import fake_cuda
import fake_graphs
import pytest
import torch
from small_models import small_mar

import cspd
from cspd import reporting
from cspd.errors import CallError
from cspd.stats import Recorder


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


def heard(call) -> list[cspd.Progress]:
    told: list[cspd.Progress] = []
    call(told.append)
    return told


@pytest.mark.parametrize("graphs", [False, True])
def test_windows_tell_every_step(pair, monkeypatch, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    runner, rates = cspd.SpecDecodeRunner(*pair, prefill=0.25), []

    def callback(seen):
        told.append(seen)
        rates.append((seen.acceptance, seen.recent_acceptance))

    told: list[cspd.Progress] = []
    images = runner.run(3, 8, 4, seed=5, callback=callback)
    assert torch.equal(images, runner.run(3, 8, 4, seed=5))
    window = ["draft"] * 4 + ["verify"]
    assert [seen.phase for seen in told] == ["prefill"] * 2 + window + ["draft"] * 2 + ["verify"]
    assert [seen.step for seen in told] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 8]
    assert all((seen.steps, seen.total, seen.images) == (8, 48, 3) for seen in told)
    counts = [seen.tokens for seen in told]
    assert counts == sorted(counts)
    assert counts[-1] == 48
    assert counts[1] == images.stats.prefilled
    assert [rate for rate, _ in rates[:6]] == [None] * 6
    assert rates[6][0] == pytest.approx(images.stats.acceptance_per_window[0])
    assert rates[-1][0] == pytest.approx(images.stats.acceptance)
    assert all(one == other for one, other in rates)  # on a CPU nothing is late


def test_an_undone_step_is_not_told(pair):
    runner = cspd.SpecDecodeRunner(*pair, prefill=0.0)
    told = heard(lambda callback: runner.run(2, 8, cspd.EntropyDraft(4, 1.0), seed=5, callback=callback))
    steps = [seen.step for seen in told if seen.phase == "draft"]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("graphs", [False, True])
def test_rounds_tell_what_is_known(pair, monkeypatch, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    runner, rates = cspd.SpecDecodeRunner(*pair, verify="strict", prefill=0.25), []
    told = heard(
        lambda callback: runner.run(
            3, 8, 3, seed=5, callback=lambda seen: (callback(seen), rates.append(seen.acceptance))
        )
    )
    assert [seen.phase for seen in told[:2]] == ["prefill"] * 2
    assert {seen.phase for seen in told[2:]} == {"round"}
    assert told[-1].step == 8
    assert len(told) >= 2 + runner.stats.rounds
    assert rates[-1] == pytest.approx(runner.stats.acceptance)


@pytest.mark.parametrize("graphs", [False, True])
def test_sample_tokens_tells_every_step(pair, monkeypatch, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    told = heard(lambda callback: cspd.sample_tokens(pair[1], 2, 5, seed=1, callback=callback))
    assert [(seen.phase, seen.step, seen.steps) for seen in told] == [("sample", i + 1, 5) for i in range(5)]
    assert told[-1].tokens == told[-1].total == 32
    assert told[0].acceptance is None
    assert told[0].recent_acceptance is None


class StopError(Exception):
    pass


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", ["window", "strict", "sample_tokens"])
def test_a_callback_stops_a_run(pair, monkeypatch, capsys, kind, graphs):
    if graphs:
        fake_graphs.use(monkeypatch)
    if kind == "sample_tokens":
        runner = None

        def run(**given):
            return cspd.sample_tokens(pair[1], 2, 6, seed=3, **given)
    else:
        runner = cspd.SpecDecodeRunner(*pair, verify=kind)

        def run(**given):
            return runner.run(2, 6, 2, seed=3, **given)

    expected = run()
    for last in (1, 2, 4):
        calls = []

        def callback(seen, calls=calls, last=last):
            calls.append(seen)
            if len(calls) == last:
                raise StopError

        with pytest.raises(StopError):
            run(callback=callback, progress=True)
        assert len(calls) == last
        assert capsys.readouterr().err.endswith("\n")  # the bar has ended
        if runner is not None:
            with pytest.raises(CallError, match="no statistics yet"):
                _ = runner.stats
        assert torch.equal(run(), expected)


def test_no_run_of_the_same_kind_inside_its_own_callback(pair, monkeypatch):
    fake_graphs.use(monkeypatch)
    runner = cspd.SpecDecodeRunner(*pair)
    expected = runner.run(2, 6, 2, seed=3)
    with pytest.raises(CallError, match="inside a run's callback"):
        runner.run(2, 6, 2, seed=3, callback=lambda _: runner.run(2, 6, 2, seed=4))
    assert torch.equal(runner.run(2, 6, 2, seed=3), expected)
    # Another kind is another kind.
    images = runner.run(2, 6, 2, seed=3, callback=lambda _: cspd.sample_tokens(pair[1], 1, 2, seed=4))
    assert torch.equal(images, expected)


@pytest.mark.parametrize("verify", ["window", "strict"])
def test_the_bar_says_phase_tokens_and_acceptance(pair, capsys, monkeypatch, verify):
    monkeypatch.setattr(reporting, "REFRESH", 0.0)
    runner = cspd.SpecDecodeRunner(*pair, verify=verify)
    stats = runner.run(2, 6, 3, seed=0, progress=True).stats
    lines = capsys.readouterr().err.split("\r")
    title = "strict, 2 images" if verify == "strict" else "speculative, 2 images"
    assert all(line.startswith(title) for line in lines if line.strip())
    assert any("prefill, 2 of 32 tokens" in line for line in lines)
    assert "6/6" in lines[-1]
    assert f"32 of 32 tokens, acceptance {100 * stats.acceptance:.1f} %" in lines[-1]
    runner = cspd.SpecDecodeRunner(*pair, prefill=1.0)
    runner.run(1, 2, 1, seed=0, progress=True)
    assert "target alone, 1 image:" in capsys.readouterr().err
    cspd.sample_tokens(pair[1], 1, 2, progress=True)
    assert "sampling, 1 image:" in capsys.readouterr().err


def test_a_bar_is_drawn_every_half_second_at_most(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(reporting, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    asked = []
    meter = types.SimpleNamespace(latest=lambda: asked.append(now[0]) or 0.5)
    bar = reporting.Bar("a bar", 100)
    for step in range(100):
        now[0] = step / 10
        bar.show(cspd.Progress("draft", step, 100, step, 100, 1, meter), step)
    bar.close()
    assert all(later - earlier >= 0.5 for earlier, later in pairwise(asked[:-1]))
    assert 15 <= len(asked) <= 21
    assert "acceptance 50.0 %" in capsys.readouterr().err


class Arriving(fake_cuda.FakeEvent):
    arrived = False

    def query(self):
        return self.arrived


def test_a_meter_reads_what_has_arrived_and_never_waits(monkeypatch):
    """What a device has not copied yet is not read, and no second copy is asked for meanwhile."""
    cuda = fake_cuda.FakeCuda()
    event = Arriving(cuda)
    monkeypatch.setattr(reporting, "_event", lambda: event)
    monkeypatch.setattr(reporting, "_pinned", lambda size: torch.zeros(size, dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: cuda.main)
    recorder = Recorder(torch.zeros(1, 16, dtype=torch.int8), torch.ones(1, 16))
    monkeypatch.setattr(Recorder, "device", types.SimpleNamespace(type="cuda"))
    meter = reporting.Meter(recorder)
    assert meter.latest() is None
    recorder.window(torch.tensor([3.0, 2.0, 0.0, 3.0]), 4, 2, 1)
    assert meter.latest() is None  # asked for
    recorder.window(torch.tensor([1.0, 2.0, 0.0, 1.0]), 4, 2, 1)
    assert meter.latest() is None  # still in flight
    event.arrived = True
    assert meter.latest() == 3 / 4  # and the second window is asked for
    assert meter.latest() == 4 / 8
    assert meter.latest() == 4 / 8
    assert cuda.log == []  # the host waited for no event
    event.arrived = False
    recorder.window(torch.tensor([0.0, 2.0, 0.0, 0.0]), 2, 2, 1)
    assert meter.latest() == 4 / 8  # a copy of the third window is in flight
    assert meter.read() == 4 / 10  # who waits gets that window all the same
    event.arrived = True
    assert meter.latest() == 4 / 10


def test_acceptance_so_far_is_that_of_the_statistics():
    for verify, rest in (("window", []), ("strict", [4.0, 2.0, 1.0])):
        recorder = Recorder(torch.zeros(1, 16, dtype=torch.int8), torch.ones(1, 16), verify, 2)
        meter = reporting.Meter(recorder)
        assert meter.read() is None
        for accepted in (3.0, 1.0):
            sums = torch.tensor([accepted, 2.0, 0.0, accepted, 0.0, *rest])
            if verify == "strict":
                recorder.round(sums, 2, 1)
            else:
                recorder.window(sums, 4, 2, 1)
        recorder.stop()
        assert meter.read() == meter.latest() == recorder.finish().acceptance == 0.5


def test_a_runner_and_its_statistics_show_themselves(pair):
    runner = cspd.SpecDecodeRunner(*pair, cspd.SimilarityRelaxation(), dtype="bf16")
    text = repr(runner)
    assert "draft: MAR, " in text
    assert "M parameters" in text
    assert "relaxation=SimilarityRelaxation(1.0, 42.0, low=0.0, high=1.0)" in text
    assert "dtype: bfloat16, backend: the default, cpu" in text
    assert "gamma" not in text
    with pytest.raises(CallError, match="no statistics yet"):
        _ = runner.stats
    stats = runner.run(2, 6, 3, seed=0).stats
    assert "gamma of the last run: 3" in repr(runner)
    assert repr(stats).startswith("RunStats(acceptance=")
    assert "\n" not in repr(stats)
    rows = dict(line.split("  ", 1) for line in str(stats).splitlines())
    assert {name: value.strip() for name, value in rows.items()} | {
        "images": "2",
        "target calls": f"{stats.target_calls}",
        "draft calls": f"{stats.draft_calls}",
        "acceptance": f"{100 * stats.acceptance:.1f} %",
        "windows": "2 of 2.50 steps",
    } == {name: value.strip() for name, value in rows.items()}
    assert {"raw acceptance", "fallback", "tokens", "seconds, draft", "seconds, total"} <= set(rows)
    starts = {len(line) - len(line.split("  ")[-1].lstrip()) for line in str(stats).splitlines()}
    assert len(starts) == 1  # aligned
    assert set(json.loads(json.dumps(stats.to_dict()))) == set(vars(stats)) - {"outcome", "probability"}


def test_dtypes_come_by_name_too(pair):
    one, other = (cspd.SpecDecodeRunner(*pair, dtype=dtype) for dtype in ("bfloat16", torch.bfloat16))
    assert one.dtype is torch.bfloat16
    assert torch.equal(one.run(1, 4, 2, seed=1), other.run(1, 4, 2, seed=1))
    named = cspd.sample_tokens(pair[1], 1, 4, seed=1, dtype="bf16")
    assert torch.equal(named, cspd.sample_tokens(pair[1], 1, 4, seed=1, dtype=torch.bfloat16))
    for call in (
        lambda: cspd.SpecDecodeRunner(*pair, dtype="int8"),
        lambda: cspd.sample_tokens(pair[1], 1, dtype="no"),
    ):
        with pytest.raises(cspd.WrongDtype, match="expected dtype as"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["window", "strict", "sample_tokens"])
def test_on_a_gpu(kind):
    draft, target = (small_mar(seed, width=16, schedule="linear").cuda() for seed in (0, 1))
    runner = None if kind == "sample_tokens" else cspd.SpecDecodeRunner(draft, target, verify=kind)

    def run(**given):
        if runner is None:
            return cspd.sample_tokens(target, 2, 8, seed=3, **given)
        return runner.run(2, 8, 3, seed=3, **given)

    expected = run()
    rates = []
    assert torch.equal(run(callback=lambda seen: rates.append((seen.acceptance, seen.recent_acceptance))), expected)
    if runner is not None:
        assert rates[-1][0] == pytest.approx(runner.stats.acceptance)
    with pytest.raises(StopError):
        run(callback=stop)
    assert torch.equal(run(progress=True), expected)
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")  # what waits for the device raises
        try:
            run(callback=lambda seen: seen.recent_acceptance, progress=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def stop(_):
    raise StopError
