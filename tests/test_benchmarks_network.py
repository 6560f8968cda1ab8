"""The benchmark of single calls of a network."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from scripts import run_main

from cspd.models.diffloss import SimpleMLPAdaLN


def small(heads):
    return {
        "small": heads.Head(partial(SimpleMLPAdaLN, 4, 32, 8, 16, 1), 4, 16, 999),
        "speech": heads.Head(partial(heads.SpeechNetwork, 4, 32, 48, 1), 4, 32, 999),
    }


def test_every_contender_has_a_row(benchmarks, monkeypatch, tmp_path, capsys):
    module = benchmarks.network
    monkeypatch.setattr(module, "HEADS", small(benchmarks.network_heads))
    monkeypatch.setattr(module, "ROWS", (3,))
    monkeypatch.setitem(module.CALLS, "cpu", 2)
    monkeypatch.setattr(torch, "compile", lambda net, **options: net)
    assert run_main(module, monkeypatch, "--json", tmp_path / "r.json") is None
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["size"] for row in rows} == {"small N=3", "speech N=3"}
    ours = {f"{ours} {dtype}" for ours in ("patched", "patched frozen") for dtype in ("float32", "bfloat16")}
    assert {row["backend"] for row in rows} == ours
    assert {row["baseline"].rsplit(" ", 1)[0] for row in rows} == {"eager", "torch.compile"}
    assert len(rows) == 2 * 4 * 2
    assert all(row["error"] <= row["bound"] for row in rows)
    lines = capsys.readouterr().out.split("calls a second")[1].splitlines()[1:]
    assert len([line for line in lines if line.startswith(("small", "speech"))]) == 8


@pytest.mark.slow
def test_what_is_wrong_or_raises_is_told(benchmarks, monkeypatch, tmp_path, capsys):
    module = benchmarks.network
    monkeypatch.setattr(module, "HEADS", {"small": small(benchmarks.network_heads)["small"]})

    def compile(net, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(module, "BOUNDS", {torch.float32: 1e-12})
    error = str(run_main(module, monkeypatch, "--quick", "--json", tmp_path / "r.json"))
    assert "wrong: network small N=2 patched float32" in error
    assert "no compiler" in error
    assert "WRONG" in capsys.readouterr().out
