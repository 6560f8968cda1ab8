"""The benchmarks run, refuse to report a wrong result, and write what they print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import baselines
    import common
    import kernels

    yield kernels, common, baselines
    for name in ("kernels", "common", "baselines"):
        sys.modules.pop(name, None)


def test_rows_of_a_small_head(benchmarks, monkeypatch, capsys, tmp_path):
    kernels, common, _ = benchmarks
    monkeypatch.setitem(kernels.HEADS, "small", (2, 64, 32))
    rows = kernels.denoise_rows("small", 3, ["torch"], 3, torch.device("cpu"))
    rows += kernels.accept_reject_rows(200, ["torch"], 3, torch.device("cpu"))
    assert [row.correct for row in rows] == [True] * 4
    common.print_rows(rows)
    assert "x  " in capsys.readouterr().out
    common.write_json(tmp_path / "r.json", rows)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["rows"][0]["ratio"] == pytest.approx(rows[0].baseline_seconds / rows[0].seconds)
    assert written["environment"]["backends"]["torch"] == "ok"


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_row_shows_no_speed(benchmarks, capsys, error):
    _, common, _ = benchmarks
    row = common.Row("op", "n", "b", "base", 1.25, 1.2, 1.3, 9.75, 9.7, 9.8, 3, error, 1e-5, "of max")
    common.print_rows([row])
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "1.25" not in out
    assert "7.8" not in out


def test_eager_baseline_is_the_models_own_loop(benchmarks):
    from cspd.models import DiffLoss
    from cspd_kernels.testing import randomize_, relative_error

    torch.manual_seed(0)
    head = randomize_(DiffLoss(4, 8, 2, 32, "9"), 1)
    z = torch.randn(5, 8)
    torch.manual_seed(1)
    expected = head.sample(z)
    torch.manual_seed(1)
    x, draws = torch.randn(5, 4), [torch.randn(5, 4) for _ in range(9)]
    actual = benchmarks[2].eager_denoise(head, z, x, torch.stack(draws[::-1]))
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("script", ["kernels.py", "end_to_end.py"])
def test_help(script):
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
