"""Tables of the pages: what is wrong shows no speed, and what is new gets a column."""

from __future__ import annotations

import copy

import pytest


@pytest.fixture
def tables(benchmarks):
    return benchmarks.report_tables


@pytest.fixture
def summary(benchmarks):
    return benchmarks.report_summary


def test_a_wrong_row_shows_no_speed_and_new_contenders_get_a_column(tables):
    rows = tables.load("kernels-h100.json")["rows"]
    before = tables.chains(rows)
    assert "| MAR-B N=2 | 171 | 27.7 | 17.5 | 4.72 | 3.29 | 4.34 | **3.05** | 3e-03 |\n" in before
    rows = copy.deepcopy([row for row in rows if "one CUDA graph" not in row["baseline"]])
    assert "in one CUDA graph" not in tables.chains(rows)
    for row in rows:
        if row["size"] == "MAR-B N=2 T=100" and row["backend"] == "cuda persistent bfloat16":
            row |= {"ratio": None, "error": 0.5}
    rows.append({**rows[2], "baseline": "eager loop in one CUDA graph bfloat16", "baseline_seconds": 0.0123})
    after = tables.chains(rows)
    assert "| MAR-B N=2 | 171 | 12.3 | 17.5 | 4.72 | **3.29** | 4.34 | – | 5e-01 |\n" in after  # noqa: RUF001
    assert "| MAR-B N=8 | 167 | – |" in after  # noqa: RUF001


def test_shares_are_told_beside_the_baseline_that_they_are_of(tables):
    rows = tables.load("kernels-h100.json")["rows"]
    copies = [row for row in rows if row["op"] == "log_density_ratio" and row["baseline"] == "copy of as many bytes"]
    sums = [row | {"baseline": "sum of as many bytes", "ratio": 0.5} for row in copies]
    copied, summed = tables.ratios(copies + sums).split("\n\n")
    assert copied + "\n" == tables.ratios(copies)
    assert tables.ratios(rows).startswith(copied)
    assert summed.startswith("| share of a sum's bandwidth | N=64 |")
    assert "| `log_density_ratio`, cuda | 0.50 | 0.50 | 0.50 | 0.50 |" in summed


def test_a_run_without_the_extension_has_tables_of_what_there_is(tables):
    rows = [row for row in tables.load("kernels-h100.json")["rows"] if not row["backend"].startswith("cuda")]
    text = tables.verdicts(rows)
    assert text.startswith("| `accept_reject`, ms | looped torch | triton | triton, replayed |")
    assert "| N=64, rejection | 2.04 | 0.15 | 0.019 |" in text


def test_sweeps_stand_beside_the_steps_of_their_backend(tables):
    rows = copy.deepcopy([row for row in tables.load("in-parallel-h100.json")["rows"] if "MAR-B N=1 " in row["size"]])
    assert "| MAR-B N=1 guided | 3.31 | **1.94** | 4.41 | 3.26 | 1.99 | 4.36 |\n" in tables.sweeps(rows)
    for row in rows:
        if row["backend"].startswith("triton 10 sweeps"):
            row["ratio"] = None
    assert "| MAR-B N=1 guided | 3.31 | – | 4.41 | 3.26 | **1.99** | 4.36 |\n" in tables.sweeps(rows)  # noqa: RUF001


def test_images_of_a_run_are_a_line_a_case(tables):
    def row(op, size, name, seconds, base, baseline="eager loop", **details):
        row = {"op": op, "size": size, "backend": f"{name} bfloat16", "baseline": f"{baseline} bfloat16"}
        row |= {"seconds": seconds, "baseline_seconds": base, "ratio": base / seconds, "error": 0.02}
        return row | {"details": details}

    one, many = "MAR-B 256 steps batch 1 cfg 3", "MAR-H 64 steps batch 8 cfg 3"
    rows = [row("sample_tokens", one, "eager loop", 72.0, 72.0, measured="7 of 256 steps, scaled")]
    rows += [row("sample_tokens", one, "whole", 0.8, 72.0), row("sample_tokens", many, "eager loop", 16.0, 16.0)]
    rows += [row("sample_tokens", many, "patched", 8.0, 16.0) | {"ratio": None}]
    rows += [row("run", many, "target alone", 4.0, 4.0, "target alone")]
    rows += [row("run", many, "speculative gamma 8", 2.0, 4.0, "target alone", acceptance=0.05)]
    assert tables.generated(rows) == (
        "| seconds an image | eager loop | patched | whole | difference |\n|---|---|---|---|---|\n"
        f"| {one}, bfloat16 | 72\\* | – | 0.8 (90.0x) | 2e-02 |\n"  # noqa: RUF001
        f"| {many}, bfloat16 | 2 | wrong | – | 2e-02 |\n\n"  # noqa: RUF001
        "| seconds an image | target alone | speculative | accepted |\n|---|---|---|---|\n"
        f"| {many}, speculative gamma 8 bfloat16 | 0.5 | 0.25 (2.0x) | 5 % |\n"
    )


def test_where_a_run_was_made(tables):
    cpu = {
        "environment": {"gpus": [], "cpu threads": 2, "nvidia driver": "none", "torch": "2.13.0+cpu", "python": "3.11"}
    }
    cpu["environment"]["cuda extension"] = {"built": "no: nothing to build it with"}
    assert (
        tables.origin(cpu | {"commit": "abc-dirty"}) == "CPU, 2 threads, PyTorch 2.13.0+cpu, Python 3.11; commit abc."
    )
    assert tables.origin(tables.load("kernels-h100.json")).startswith("NVIDIA H100 80GB HBM3")


def test_the_headline_names_baselines_and_ends_with_what_does_not_help(summary, monkeypatch):
    head, _, *lines = summary.headline().splitlines()
    assert head == "| what | device | baseline | this package | ratio | difference |"
    assert len(lines) == 8
    assert {"H100", "CPU, 2 threads"} == {line.split(" | ")[1] for line in lines}
    assert lines[0].endswith("| H100 | your loop, eager 99.4 s\\* | 4.33 s\\* | 23x | 2e-02 |")
    assert "`torch.compile` 17.5 ms | 3.05 ms | 5.7x | 3e-03 |" in lines[2]
    assert lines[-1].startswith("| **no gain:** ")
    load, files = summary.load, {}

    def wrong(name):
        files[name] = copy.deepcopy(load(name))
        for row in files[name]["rows"]:
            if row.get("backend") == "patched bfloat16":
                row["ratio"] = None
        return files[name]

    monkeypatch.setattr(summary, "load", wrong)
    assert "| wrong | – | 2e-02 |" in summary.headline()  # noqa: RUF001
    assert set(files) == {"generate-h100.json", "kernels-h100.json", "generate-cpu.json", "demo-cpu.json"}


def test_limits_have_their_figures(summary):
    lines = summary.limits().splitlines()
    assert [line.split("**")[1] for line in lines] == [
        "Speculation on the digits.", "Many tokens on a CPU.", "Many tokens on the H100.", "Judging on the H100.",
        "Judging on a CPU.",
    ]  # fmt: skip
    assert "CUDA kernels took 44.5 ms and the Triton kernels 51.7 ms. `torch.compile` took 54.9 ms" in lines[2]
    assert "0.409 s and eager code 0.597 s" in lines[2]


@pytest.mark.parametrize(("seconds", "text"), [(134.2, "134 s"), (4.328, "4.33 s"), (0.9311, "0.931 s")])
def test_times_have_three_digits(summary, seconds, text):
    assert summary.time(seconds) == text
    assert summary.time(seconds / 1e4) == {"134 s": "13.4 ms", "4.33 s": "0.433 ms", "0.931 s": "0.0931 ms"}[text]


def test_sweeps_that_take_as_long_as_the_steps(summary, monkeypatch):
    def row(count, backend, seconds, steps, ratio=1.0):
        size, backend = "MAR-B N=2 T=100 guided", f"{backend} {count} sweeps bfloat16"
        return {"size": size, "backend": backend, "seconds": seconds, "baseline_seconds": steps, "ratio": ratio}

    rows = [row(10, "triton", 2e-3, 4e-3), row(27, "triton", 5.4e-3, 4e-3), row(10, "cuda", 3e-3, 5e-3)]
    rows += [row(10, "torch", 1e-4, 1e-4)]
    monkeypatch.setattr(summary, "load", lambda name: {"rows": rows})
    expected = "| MAR-B, 2 tokens, guided | 4.00 | 2.00 | 2.00x | 20 |"
    assert summary.sweeps_or_steps().splitlines()[2:] == [expected]
    rows[0]["ratio"] = None  # a wrong one shows no speed
    assert "| 3.00 | 1.33x |" in summary.sweeps_or_steps()


def test_settings_of_a_pair_are_a_line_each(benchmarks):
    row = dict.fromkeys(("raw_acceptance", "acceptance", "steps_per_round", "seconds_ratio", "calls_ratio"))
    row |= {"name": "n", "kind": "window", "seconds": 1.0, "seconds_p20": 0.9, "seconds_p80": 1.1, "acceptance": 0.5}
    row |= {"target_calls": 4.0, "figure": 0.5, "figures": [0.4, 0.6], "plain_seconds": 1.0}
    head, _, line = benchmarks.report_trained.quality_table([row]).splitlines()
    assert head.count("|") == line.count("|") == 11
    assert line.startswith("| n | 1.00 (0.90–1.10) | 4.0 | - | - | 50.0 % | 0.500 (0.400, 0.600) | 1.00 | ")  # noqa: RUF001
    line = benchmarks.report_trained.quality_table([row | {"kind": "target"}]).splitlines()[2]
    assert line.endswith("| 0.500 (0.400, 0.600) | - | - | - |")
