"""compare.py: what moved between two runs beyond the spreads of both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CPU = {"gpus": [], "cpu threads": 2, "torch": "2.13.0+cpu"}


def row(seconds=1.0, spread=0.01, backend="torch float32", **fields):
    found = {"op": "denoise", "size": "MAR-B N=2", "backend": backend, "baseline": "eager float32"}
    found |= {"seconds": seconds, "seconds_p20": seconds - spread, "seconds_p80": seconds + spread}
    found |= {
        "baseline_seconds": 4.0,
        "baseline_p20": 3.9,
        "baseline_p80": 4.1,
        "error": 1e-7,
        "bound": 1e-5,
        "ratio": 4.0,
    }
    return found | fields


@pytest.fixture
def compared(benchmarks, tmp_path, capsys):
    """``f(old rows, new rows, *options, old={}, new={}) -> (exit status, output, errors)``."""

    def run(before, after, *options, old=None, new=None):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, rows, more in zip(paths, (before, after), (old, new)):
            path.write_text(json.dumps({"environment": CPU, "rows": rows} | (more or {})))
        status = benchmarks.compare.main([*map(str, paths), *options])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("seconds", "spread", "what", "status"),
    [
        (1.2, 0.01, "slower", 1),
        (0.8, 0.01, "faster", 0),
        (1.2, 0.3, None, 0),  # within its own spread
        (1.015, 0.001, None, 0),  # within the other's
        (1.0, 0.0, None, 0),
    ],
)
def test_what_moved_beyond_both_spreads_is_told(compared, seconds, spread, what, status):
    code, out, err = compared([row()], [row(seconds, spread)])
    assert (code, err) == (status, "")
    lines = out.splitlines()
    assert len(lines) == (2 if what else 1)
    if what:
        change = {"slower": "+20.0 %", "faster": "-20.0 %"}[what]
        assert lines[0] == f"{what:12s}  denoise | MAR-B N=2 | torch float32  1 s -> {seconds:g} s ({change})"
    assert lines[-1] == f"2 medians compared, {int(bool(what))} lines above"


@pytest.mark.parametrize(("seconds", "status"), [(1.06, 0), (0.94, 0), (1.2, 1)])
def test_a_change_within_the_old_spread_is_none(compared, seconds, status):
    code, out, _ = compared([row(1.0, 0.1)], [row(seconds, 0.001)])
    assert (code, len(out.splitlines())) == (status, 1 + status)


def test_a_small_change_counts_only_where_it_is_asked_for(compared):
    before, after = [row(1.0, 0.001)], [row(1.01, 0.001)]
    assert compared(before, after)[0] == 0
    assert compared(before, after, "--least", "0.5")[0] == 1


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"error": 0.5, "ratio": None}, "its error 5.0e-01 exceeds 1.0e-05"),
        ({"error": math.nan}, "its error is nan"),
        ({"ratio": None}, "it has no ratio"),
        ({"seconds": math.nan}, "its time is not a number"),
        ({"seconds": None}, "its time is not a number"),
        ({"seconds_p80": math.inf}, "its time is not a number"),
    ],
)
def test_a_wrong_result_is_wrong_however_fast(compared, fields, note):
    code, out, _ = compared([row()], [row(0.1) | fields])
    assert code == 1
    assert out.startswith("wrong         denoise | MAR-B N=2 | torch float32")
    assert note in out.splitlines()[0]
    back, out, _ = compared([row() | fields], [row()])
    assert (back, out.splitlines()[0].split("  ")[0]) == (0, "right again")
    assert compared([row() | fields], [row() | fields])[0] == 1  # no better


def test_a_wrong_row_among_several_of_a_case_makes_it_wrong(compared):
    other = row(baseline="eager autocast bfloat16")
    wrong = other | {"error": 1.0}
    for after in ([row(), wrong], [wrong, row()]):
        assert compared([row(), other], after)[0] == 1


def test_a_failure_is_wrong_and_not_missing(compared):
    failures = [{"op": "denoise", "size": "MAR-B N=2", "name": "torch float32", "reason": "RuntimeError: made of wood"}]
    code, out, _ = compared([row(), row(backend="b")], [row(backend="b")], new={"failures": failures})
    assert code == 1
    assert (
        out.splitlines()[0]
        == "wrong         denoise | MAR-B N=2 | torch float32  it failed: RuntimeError: made of wood"
    )
    assert "missing" not in out


def test_cases_of_one_file_alone_are_named(compared):
    code, out, _ = compared([row(), row(backend="gone")], [row(), row(backend="added")])
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["missing", "new", "2"]


@pytest.mark.parametrize("after", [[], [row(size="MAR-B N=3")]])
def test_files_without_a_case_in_common_guard_nothing(compared, after):
    code, out, err = compared([row()], after)
    assert (code, out, err) == (2, "", "expected cases that are in both files, got none\n")


def test_json_has_no_nan(compared):
    code, out, _ = compared([row()], [row(math.nan)], "--json")
    ((moved),) = json.loads(out, parse_constant=pytest.fail)["moved"]
    assert (code, moved["what"], moved["new"]) == (1, "wrong", None)


def test_a_baseline_that_moved_is_told_and_is_no_failure(compared):
    moved = {"baseline_seconds": 8.0, "baseline_p20": 7.9, "baseline_p80": 8.1}
    code, out, _ = compared([row()], [row() | moved])
    assert code == 0
    assert out.startswith("baseline slower  denoise | MAR-B N=2 | eager float32  4 s -> 8 s (+100.0 %)\n")


@pytest.mark.parametrize(
    ("environment", "sentence", "status"),
    [
        ({"gpus": [{"name": "H"}]}, "the runs differ in device: a CPU and H; --anyway compares them nevertheless\n", 2),
        ({"cpu threads": 1}, "warning: the runs differ in threads: 2 and 1\n", 0),
        ({"torch": "2.4"}, "warning: the runs differ in torch: 2.13.0+cpu and 2.4\n", 0),
    ],
)
def test_runs_of_other_conditions_are_refused_or_told(compared, environment, sentence, status):
    code, _, err = compared([row()], [row()], new={"environment": CPU | environment})
    assert (code, err) == (status, sentence)
    code, _, err = compared([row()], [row()], "--anyway", new={"environment": CPU | environment})
    assert code == 0
    assert err.startswith("warning: the runs differ in")


def test_a_file_that_does_not_say_where_it_was_made_is_told(compared):
    code, _, err = compared([row()], [row()], old={"environment": None})
    assert (code, err) == (0, "warning: one of the files does not say on what it was measured\n")


def test_other_kinds_of_rows_are_matched_by_what_they_have(compared):
    host = {"model": "MAR-B", "tokens": 2, "cfg": 1.0, "weights": "live", "error": 0.0, "ratio": 2.0}
    old, new = (host | {"call seconds": [s, s, s], "rest seconds": [1.0, 1.0, 1.0], "share": 0.1} for s in (1.0, 2.0))
    code, out, _ = compared([old], [new])
    assert code == 1
    assert out.splitlines() == [
        "slower        MAR-B | tokens 2 | cfg 1.0 | live | call  1 s -> 2 s (+100.0 %)",
        "2 medians compared, 1 lines above",
    ]


@pytest.mark.parametrize("rows", [[], [{"name": "demo", "seconds": 1.0}], ["text"], [{}]])
def test_files_without_spreads_cannot_be_compared(compared, rows):
    code, _, err = compared(rows, rows)
    assert (code, err) == (2, "expected rows with a median, p20 and p80, got none\n")


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 1}', None])
def test_what_is_no_result_file_is_refused(benchmarks, tmp_path, capsys, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    assert benchmarks.compare.main([str(path), str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_json_holds_the_same(compared, tmp_path):
    code, out, _ = compared([row()], [row(2.0)], "--json")
    written = json.loads(out)
    assert (code, written["compared"], written["warnings"]) == (1, 2, [])
    ((moved),) = written["moved"]
    assert moved == {
        "case": "denoise | MAR-B N=2 | torch float32",
        "what": "slower",
        "old": 1.0,
        "new": 2.0,
        "note": "",
    }
    compared([row()], [row(2.0)], "--json", str(tmp_path / "c.json"))
    assert json.loads((tmp_path / "c.json").read_text()) == written


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_file_is_equal_to_itself(benchmarks, capsys, path):
    status = benchmarks.compare.main([str(path), str(path)])
    has_spreads = "seconds_p80" in (text := path.read_text()) or ' seconds": [' in text
    assert status == (0 if has_spreads else 2)
    if has_spreads:
        assert capsys.readouterr().out.splitlines()[-1].endswith("medians compared, 0 lines above")


def test_two_old_files_of_two_devices(benchmarks, capsys):
    paths = [str(RESULTS / f"kernels-{name}.json") for name in ("cpu", "h100")]
    assert benchmarks.compare.main(paths) == 2
    assert "a CPU and NVIDIA H100" in capsys.readouterr().err
    assert benchmarks.compare.main([*paths, "--anyway"]) in (0, 1)
