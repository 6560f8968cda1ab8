"""Benchmarks go on where something fails, and tell it."""

from __future__ import annotations

import json

import pytest
import torch
from scripts import run_main, shrink

CPU = torch.device("cpu")


@pytest.fixture
def small(benchmarks, monkeypatch):
    """The script ``kernels.py`` on little work."""
    registry = benchmarks.registry
    eager = {"float32": ("eager float32",), "bfloat16": ("eager float32", registry.AUTOCAST)}
    shrink(
        benchmarks,
        monkeypatch,
        registry.Plan("denoise", "cpu", (("small", 2), ("small", 3)), eager, ("torch",), 3),
        registry.Plan("log_density_ratio", "cpu", (("", 20),), {"float32": registry.MOVED}, ("torch",), 3),
        registry.Plan(
            "accept_reject", "cpu", (("", 20),), {"float32": registry.LOOP}, ("torch",), 3, registry.RESIDUALS
        ),
    )
    return benchmarks


def fails(*_, **__):
    raise RuntimeError("made of wood\nand of more lines")


def test_a_contender_that_fails_is_told_in_its_place_and_the_others_go_on(small, monkeypatch, capsys, tmp_path):
    denoise = small.denoising.denoise

    def sometimes(head, *inputs, **options):
        return fails() if head.dtype == torch.bfloat16 and len(inputs[1]) == 2 else denoise(head, *inputs, **options)

    monkeypatch.setattr(small.denoising, "denoise", sometimes)
    end = run_main(small.kernels, monkeypatch, "--json", tmp_path / "r.json")
    assert str(end) == "failed: denoise small N=2 T=4 torch bfloat16: RuntimeError: made of wood"  # a text: status 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("denoise  ")]
    assert [line.split()[:4] for line in lines if "FAILED" in line] == [["denoise", "small", "N=2", "T=4"]]
    assert "FAILED: RuntimeError: made of wood" in lines[0]
    assert len([line for line in lines if "FAILED" not in line]) == 1 + 3
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["failures"] == [
        {"op": "denoise", "size": "small N=2 T=4", "name": "torch bfloat16", "reason": "RuntimeError: made of wood"}
    ]
    assert [row["op"] for row in written["rows"]] == ["denoise"] * 4 + ["log_density_ratio"] * 2 + ["accept_reject"] * 2


def test_a_baseline_that_fails_loses_its_rows_alone(small, monkeypatch, tmp_path):
    eager = small.denoising.eager_denoise

    def sometimes(*arguments, dtype=None):
        return fails() if dtype is torch.bfloat16 else eager(*arguments, dtype=dtype)

    monkeypatch.setattr(small.denoising, "eager_denoise", sometimes)
    end = run_main(small.kernels, monkeypatch, "--json", tmp_path / "r.json")
    assert [line.rpartition(": RuntimeError")[0] for line in str(end).splitlines()] == [
        f"failed: denoise small N={n} T=4 eager autocast bfloat16" for n in (2, 3)
    ]
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["baseline"] for row in rows if row["op"] == "denoise"} == {"eager float32"}
    assert len(rows) == 4 + 4


def test_a_baseline_of_other_tokens_is_none(small, monkeypatch, tmp_path):
    eager = small.denoising.eager_denoise
    monkeypatch.setattr(small.denoising, "eager_denoise", lambda *a, **k: eager(*a, **k).flip(0))
    end = run_main(small.kernels, monkeypatch, "--only", "denoise/*/2/*", "--json", tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["rows"] == []
    assert [failure["name"] for failure in written["failures"]] == ["eager float32", "eager autocast bfloat16"]
    assert str(end).count("expected the loop's tokens within") == 2


@pytest.mark.parametrize(("module", "left"), [("denoising", 4), ("judging", 6)])
def test_a_case_that_fails_as_a_whole_loses_its_rows_alone(small, monkeypatch, tmp_path, module, left):
    monkeypatch.setattr(getattr(small, module), "group", fails)
    end = run_main(small.kernels, monkeypatch, "--json", tmp_path / "r.json")
    assert "all of it: RuntimeError: made of wood" in str(end)
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == left


def test_rows_are_printed_and_written_as_they_come(small, monkeypatch, capsys, tmp_path):
    seen = []

    def second(*arguments):
        seen.append((capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())["rows"]))
        raise KeyboardInterrupt  # nothing is done about this one

    monkeypatch.setattr(small.judging, "group", second)
    with pytest.raises(KeyboardInterrupt):
        run_main(small.kernels, monkeypatch, "--json", tmp_path / "r.json")
    ((out, rows),) = seen
    assert len(rows) == 6
    lines = [line for line in out.splitlines() if line.startswith(("op ", "denoise  "))]
    assert len(lines) == 1 + 6
    at = [lines[0].index("baseline s"), lines[0].index("ratio")]
    assert all(line[i - 2 : i] == "  " and line[i] != " " for line in lines for i in at)  # columns of fixed width


def test_a_run_without_failures_ends_with_status_0(small, monkeypatch, capsys):
    assert run_main(small.kernels, monkeypatch, "--quick") is None
    sizes = {line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("denoise  ")}
    assert sizes == {"N=2"}


def test_an_error_without_somebody_to_tell_is_raised(benchmarks):
    with pytest.raises(RuntimeError, match="made of wood"):
        benchmarks.common.measure({"a": fails}, [()], 1, CPU)
    told = []
    seconds = benchmarks.common.measure(
        {"a": fails, "b": lambda: None}, [()], 3, CPU, failed=lambda name, error: told.append((name, str(error)[:4]))
    )
    assert told == [("a", "made")]
    assert {name: len(values) for name, values in seconds.items()} == {"b": 3}
