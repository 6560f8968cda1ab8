"""The README shows what the committed result files hold."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

COMPILED, LARGE = "torch.compile reduce-overhead bfloat16", "MAR-H N=512 T=100"
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def tables(benchmarks):
    return benchmarks.tables


def test_the_readme_shows_the_committed_results(tables):
    text = README.read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"
    assert tables.filled(text.replace("28.1", "21.8")) == text


@pytest.mark.parametrize("change", [lambda text: text.replace("<!-- END -->", ""), lambda text: text + text])
def test_a_page_without_marks_is_refused(tables, change):
    with pytest.raises(ValueError, match="expected the page to hold the marks"):
        tables.filled(change(README.read_text()))


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


def test_figures_that_the_readme_tells_in_words_are_in_the_files(tables):
    rows = tables.load("kernels-h100.json")["rows"]
    (compiled,) = (r for r in rows if at(r, LARGE, "triton bfloat16", COMPILED))
    (alone,) = (r for r in rows if at(r, LARGE, "cuda bfloat16", "library products alone bfloat16"))
    (wide,) = (r for r in rows if at(r, LARGE, "triton float32", "eager float32"))
    (loop,) = (r for r in rows if at(r, "N=131072 C=16", "torch rejection", "looped torch"))
    values = [one[key] for one in (compiled, alone) for key in ("seconds", "baseline_seconds")]
    triton, compiler, cuda, products = map(tables.milliseconds, values)
    text = README.read_text()
    assert (
        f"the layered Triton kernels took {triton} ms, `torch.compile` {compiler} and the CUDA kernels {cuda}" in text
    )
    assert f"where the library's products alone take {products}" in text
    assert f"Triton took {wide['seconds']:.2f} s and eager code {wide['baseline_seconds']:.2f}" in text
    assert 14 < loop["seconds"] / loop["baseline_seconds"] < 15


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


def at(row, *names):
    return (row["size"], row["backend"], row["baseline"]) == names
