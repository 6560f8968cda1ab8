"""The benchmark of whole images: same seeds, honest scaling, no speed beside a wrong image."""

from __future__ import annotations

import inspect
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from small_models import small_mar
from torch.autograd import DeviceType

import cspd

SMALL = ["--device", "cpu", "--seconds", "0.01", "--models", "b", "--steps", "8", "--dtype", "float32"]


@pytest.fixture
def bench(benchmarks, monkeypatch):
    for name in ("b", "h"):
        monkeypatch.setitem(benchmarks.images.MODELS, name, partial(small_mar, class_num=1000))
    return benchmarks


def rows_of(bench, path, *options):
    bench.generate.main([*SMALL, "--json", str(path / "r.json"), *options])
    return json.loads((path / "r.json").read_text())["rows"]


def test_every_contender_is_beside_the_eager_loop(bench, tmp_path, capsys):
    rows = rows_of(bench, tmp_path, "--only", "patched,whole", "--batch", "1,2")
    ours = ["patched float32"]
    if "whole" in inspect.signature(cspd.patch).parameters:
        ours.append("whole float32")
    else:
        assert "has no whole=True" in capsys.readouterr().out
    for batch in (1, 2):
        own = [row for row in rows if f"batch {batch} " in row["size"]]
        assert [row["backend"] for row in own] == ["eager loop float32", *ours]
        assert all(row["baseline_seconds"] == own[0]["seconds"] > 0 for row in own)
        assert all(row["details"]["images_per_second"] == pytest.approx(batch / row["seconds"]) for row in own)
        for row in own[1:]:
            assert 0 < row["error"] < 1e-5
        for row in own[:2]:
            parts = row["details"]["seconds"]
            assert 0 < parts["transformer"] < parts["total"] and 0 < parts["head"] < parts["total"]
            assert parts["transformer"] + parts["head"] + parts["rest"] == pytest.approx(parts["total"])


def test_speculation_is_beside_the_target_alone(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.generate, "GAMMAS", (8,))
    rows = rows_of(bench, tmp_path, "--only", "speculative")
    assert [row["backend"] for row in rows] == ["target alone float32", "speculative gamma 8 float32"]
    assert {row["baseline"] for row in rows} == {"target alone float32"}
    assert all(row["error"] == 0 for row in rows)  # the same seed again
    assert "acceptance" not in rows[0]["details"] and 0 <= rows[1]["details"]["acceptance"] <= 1
    assert rows[1]["details"]["seconds"]["verify"] > 0


def test_steps_that_are_left_out_are_scaled_and_said(bench, tmp_path):
    images, case = bench.images, bench.images.Case("b", 8, 1, 3.0, torch.float32)
    model = images.build("b", torch.device("cpu"))
    eager, counted = images.eager(model), []
    sample = model.diffloss.sample
    model.diffloss.sample = lambda *arguments: (counted.append(1), sample(*arguments))[1]
    for every, steps in ((1, 8), (2, 4), (4, 2)):
        counted.clear()
        eager(case, 0, every)
        assert len(counted) == steps
        assert images.share_of(case, model.seq_len, every) == 8 / steps
    row = rows_of(bench, tmp_path, "--only", "eager")[0]  # least of the steps in so short a time
    assert row["details"]["measured"] == "4 of 8 steps, scaled"


def test_a_wrong_image_shows_no_speed(bench, tmp_path, monkeypatch):
    patched = bench.images.patched

    def wrong(model):
        contender = patched(model)
        made = contender.images
        contender.images = lambda case, seed: made(case, seed) * 1.001
        return contender

    monkeypatch.setattr(bench.images, "patched", wrong)
    with pytest.raises(SystemExit, match="wrong: sample_tokens MAR-B 8 steps batch 1 cfg 3 patched bfloat16"):
        rows_of(bench, tmp_path, "--only", "patched", "--dtype", "bfloat16")  # by its float32 image
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["ratio"] for row in rows] == [1.0, None]


def test_a_contender_that_raises_costs_no_other_its_row(bench, tmp_path, monkeypatch):
    def broken(model):
        return bench.images.of_model("whole", None)

    monkeypatch.setattr(bench.images, "whole", broken)
    monkeypatch.setattr(bench.images, "has_whole", lambda: True)
    with pytest.raises(SystemExit, match="failed: sample_tokens MAR-B 8 steps batch 1 cfg 3 whole: AttributeError"):
        rows_of(bench, tmp_path, "--only", "patched,whole")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["eager loop float32", "patched float32"]


def test_nothing_begins_after_its_time(bench, tmp_path, capsys):
    assert rows_of(bench, tmp_path, "--budget", "1e-9") == []
    assert "left out, the time of --budget is up: MAR-B 8 steps" in capsys.readouterr().out


def test_parts_of_the_time(benchmarks):
    spent = benchmarks.spent
    assert spent.union([(5, 7), (1, 3), (2, 4), (6, 6)]) == 5
    parts = spent.split_by_head(10.0, 4.0, steps=100, short_steps=10)
    assert math.isclose(parts["head"], 6 / 0.9) and math.isclose(parts["transformer and rest"], 10 - 6 / 0.9)


def test_what_a_profile_holds(benchmarks):
    class Event(SimpleNamespace):
        def __getattr__(self, name):
            return lambda: self.values[name]

    def event(kind, name, start, duration):
        values = {"device_type": getattr(DeviceType, kind), "name": name, "start_ns": start, "duration_ns": duration}
        return Event(values=values)

    host = (
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
        "aten::add",
        "cudaEventRecord",
    )
    events = [event("CPU", name, 0, 100) for name in host]
    events += [
        event("CUDA", "kernel", 10, 5),
        event("CUDA", "cudaLaunchKernel", 12, 5),
    ]  # a name that counts for nothing
    assert benchmarks.spent.called(events, 2) == {"launches": 1.5, "copies": 0.5}
    assert benchmarks.spent.union(benchmarks.spent.spans_of(events)) == 7


@pytest.mark.gpu
def test_what_a_device_says_of_a_run(bench):
    device = torch.device("cuda")
    case = bench.images.Case("b", 8, 1, 3.0, torch.bfloat16)
    contender = bench.images.eager(bench.images.build("b", device))
    every, _ = bench.spent.prepare(contender, case, 0.1)
    found = bench.spent.on_the_device(contender, case, every, 8 // every)
    assert found["launches"] > 100
    assert 0 < found["busy"] < bench.spent.seconds_of(contender, case, every) * 2
