"""``benchmarks/quality.py``: its settings run, its ratios are those of equal quality, and its page is written."""

import json
from importlib.machinery import ModuleSpec
from sys import modules
from types import ModuleType

import pytest


@pytest.mark.slow
def test_a_few_digits(benchmarks):
    quality, lines, kept = benchmarks.quality, [], []
    pair = benchmarks.quality_pairs.load("digits")
    chosen = [
        s for s in benchmarks.quality_settings.settings(4, (2, 1), [*pair.one_step]) if s.quick or s.kind == "one step"
    ]
    rows = quality.measure(pair, 4, [3, 4], chosen, echo=lines.append, keep=kept.append)
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == [setting.name for setting in chosen]
    assert [row["target_calls"] for row in rows if row["kind"] == "target"] == [4, 1]
    assert (by_name["draft, 4 steps"]["target_calls"], by_name["draft, 4 steps"]["draft_calls"]) == (0, 4)
    assert all(len(row["figures"]) == 2 and min(row["figures"]) > 0 and row["seconds"] > 0 for row in rows)
    twin, own = by_name["exact, gamma 4, 4 candidates, 2 branches"], by_name["exact, gamma 2, 4 candidates"]
    assert twin["figures"] == own["figures"]
    assert 1 <= own["target_calls"] <= 4
    assert 1 <= own["steps_per_round"] <= 2
    assert len(lines) == len(kept) == 2
    assert kept[-1] == json.loads(json.dumps(rows)) == rows


@pytest.mark.slow
def test_the_cloth_pair(benchmarks):
    pair = benchmarks.quality_pairs.load("cloth")
    denoising = pair.target.diffloss.gen_diffusion.num_timesteps
    rows = benchmarks.quality_settings.settings(3, (1,), denoising=denoising)
    chosen = [s for s in rows if s.quick and s.kind != "strict"]
    rows = benchmarks.quality.measure(pair, 2, [0], chosen, echo=lambda _: None)
    assert [row["kind"] for row in rows] == ["target", "target", "target with noise", "sampler", "sampler", "draft"]


def test_settings(benchmarks):
    for one_step in (["measured width"], []):
        rows = benchmarks.quality_settings.settings(16, (8, 4), one_step)
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        assert {row.twin for row in rows} - {None} < set(names)
        assert any(row.kind == "one step" for row in rows) == bool(one_step)
        assert json.loads(json.dumps([row.describe() for row in rows]))


@pytest.mark.parametrize(
    ("figure", "cost"),
    [(1.0, 16.0), (0.5, 16.0), (1.1, 12.0), (1.2, 8.0), (1.6, 6.0), (2.0, 4.0), (9.0, 4.0)],
)
def test_cost_of_plain_decoding_at_equal_quality(benchmarks, figure, cost):
    """Linear between the points; the one at 20 is dearer and no better, so nobody would choose it."""
    curve = [(1.0, 16.0), (2.0, 4.0), (1.2, 8.0), (1.0, 20.0)]
    assert benchmarks.quality_equal.plain_cost(figure, curve) == pytest.approx(cost)


def test_ratios(benchmarks):
    rows = [
        {"kind": "target", "figure": 1.0, "seconds": 10.0, "target_calls": 16.0},
        {"kind": "target", "figure": 2.0, "seconds": 2.0, "target_calls": 4.0},
        {"kind": "window", "figure": 1.5, "seconds": 3.0, "target_calls": 5.0},
        {"kind": "draft", "figure": 1.5, "seconds": 1.0, "target_calls": 0.0},
    ]
    benchmarks.quality_equal.with_ratios(rows)
    assert (rows[2]["plain_seconds"], rows[2]["plain_calls"]) == (6.0, 10.0)
    assert (rows[2]["seconds_ratio"], rows[2]["calls_ratio"], rows[3]["calls_ratio"]) == (2.0, 2.0, None)


def test_rows_of_an_earlier_run_stay(benchmarks):
    before, now = [{"name": "a", "x": 1}], [{"name": "a", "x": 2}, {"name": "b", "x": 3}]
    assert benchmarks.quality.added(before, now) == [{"name": "a", "x": 1}, {"name": "b", "x": 3}]


def _result(name):
    row = dict.fromkeys(("raw_acceptance", "acceptance", "steps_per_round", "seconds_ratio", "calls_ratio"), None)
    row |= {"name": f"of {name}", "kind": "target", "seconds": 1.0, "seconds_p20": 0.9, "seconds_p80": 1.1}
    row |= {"target_calls": 4.0, "figure": 0.5, "figures": [0.4, 0.6], "plain_seconds": 1.0, "gamma": None}
    return {"pair": name, "rows": [row], "figure": "distance"}


def test_the_page(benchmarks, monkeypatch, tmp_path):
    docs = benchmarks.quality_docs
    monkeypatch.setattr(docs, "plot", lambda results, path: path.touch())
    page = tmp_path / "quality.md"
    page.write_text("".join(f"{docs.START.format(name)}old\n{docs.END}\n" for name in ("digits", "cloth")) + "after\n")
    for _ in range(2):  # writing again replaces what was written
        docs.write_docs(tmp_path, [_result("cloth"), _result("digits")])
    text = page.read_text()
    assert "old" not in text
    assert text.endswith("after\n")
    assert text.index("| of digits |") < text.index("| of cloth |")
    assert text.count("| 1.00 (0.90") == 2
    header, rule, row = docs.markdown(_result("cloth")).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|")


def test_a_plot_of_two_pairs(benchmarks, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {**_result("x")["rows"][0], "figure": f, "target_calls": c} for f, c in ((0.5, 4.0), (0.7, 2.0), (0.9, 1.0))
    ]
    results = [{**_result(name), "rows": rows} for name in ("digits", "cloth")]
    benchmarks.quality_docs.plot(results, tmp_path / "q.png")
    assert (tmp_path / "q.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", [None, "no marks\n", "<!-- TABLE digits -->\nno end\n"])
def test_a_page_without_marks_stops_before_writing(benchmarks, tmp_path, monkeypatch, page):
    monkeypatch.setitem(modules, "matplotlib", ModuleType("matplotlib"))
    modules["matplotlib"].__spec__ = ModuleSpec("matplotlib", None)
    file = tmp_path / "result.json"
    file.write_text("{}")
    if page is not None:
        (tmp_path / "quality.md").write_text(page)
    with pytest.raises(SystemExit, match="a mark <!-- TABLE PAIR --> and <!-- /TABLE --> for every file"):
        benchmarks.quality_docs.check_docs(tmp_path, [file])
    with pytest.raises(SystemExit, match="measure with --json first"):
        benchmarks.quality_docs.check_docs(tmp_path, [tmp_path / "none.json"])
