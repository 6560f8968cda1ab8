"""``benchmarks/quality.py``: its settings run, and its ratios are those of equal quality."""

import json

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
