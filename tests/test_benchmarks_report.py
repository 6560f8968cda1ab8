"""The pages and the charts show what the committed result files hold."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
IMAGES = (
    "seconds", "seconds-images", "time-split", "latency-h100", "latency-cpu", "quality-calls", "quality-seconds",
    "parallel",
)  # fmt: skip
LABELS = {  # what the axes or the bars of a chart are of, and its baseline
    "seconds": ("(seconds)", "(milliseconds)", "your loop, eager (baseline)"),
    "seconds-images": ("(seconds)", "target alone (baseline)"),
    "time-split": ("transformer", "head", "your loop, eager"),
    "latency-h100": ("tokens N", "milliseconds", "eager autocast (baseline)", "library products alone"),
    "latency-cpu": ("tokens N", "milliseconds", "eager, float32 (baseline)"),
    "quality-calls": ("target calls, one after the other, of an image", "target alone, fewer steps (baseline)"),
    "quality-seconds": ("seconds a batch", "target alone, fewer steps (baseline)"),
    "parallel": ("sweeps", "largest distance of a token, of the largest value"),
}


@pytest.fixture
def report(benchmarks):
    return benchmarks.report


def test_pages_and_charts_are_those_of_the_committed_files(report):
    """If it fails: python benchmarks/report.py."""
    assert set(report.IMAGES) == set(IMAGES)
    for path, text in report.made(ROOT).items():
        assert path.read_bytes() == text.encode(), f"run python benchmarks/report.py: {path.name} differs"
    pages = "".join(page.read_text(encoding="utf-8") for page in report.pages(ROOT))
    assert [name for name in report.BLOCKS if f"<!-- {name} -->\n" not in pages] == []
    assert [name for name in IMAGES if f"(images/{name}.svg)" not in pages] == []


def test_another_result_makes_another_page(report, monkeypatch, tmp_path):
    results = ROOT / "benchmarks" / "results"
    for file in results.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(report.report_tables, "RESULTS", tmp_path)
    before = report.made(ROOT)
    result = json.loads((tmp_path / "generate-cpu.json").read_text())
    for row in result["rows"]:
        if row["backend"] == "whole float32":
            row |= {"seconds": 33.3, "ratio": row["baseline_seconds"] / 33.3}
    (tmp_path / "generate-cpu.json").write_text(json.dumps(result))
    differs = {path.name for path, text in report.made(ROOT).items() if before[path] != text}
    assert differs - {"README.md"} == {"benchmarks.md", "seconds.svg", "seconds-images.svg"}
    assert "33.3 s" in report.IMAGES["seconds"]()


def test_the_command_writes_and_checks(report, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "BLOCKS", {"DEMO": lambda: "new\n"})
    monkeypatch.setattr(report, "IMAGES", {"one": lambda: "<svg/>\n"})
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- DEMO -->\nold\n<!-- /DEMO -->\nz\n")
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "differs: README.md, docs/images/one.svg\n"
    assert "old" in page.read_text()
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    assert page.read_text() == "a\n<!-- DEMO -->\nnew\n<!-- /DEMO -->\nz\n"
    assert (tmp_path / "docs" / "images" / "one.svg").read_text() == "<svg/>\n"
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    report.main()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- DEMO -->\n", "to begin and end once"),
        ("<!-- /DEMO -->\n<!-- DEMO -->\n", "to begin and end once"),
        (2 * "<!-- DEMO -->\n<!-- /DEMO -->\n", "to begin and end once"),
        ("<!-- DEMO -->\n<!-- HOST -->\n<!-- /DEMO -->\n<!-- /HOST -->\n", "to begin and end once"),
        ("<!-- NONE -->\n<!-- /NONE -->\n", "among HEADLINE, .* got NONE"),
    ],
)
def test_marks_that_do_not_fit_are_refused(report, text, message):
    with pytest.raises(ValueError, match=message):
        report.filled(text)


@pytest.mark.parametrize("name", IMAGES)
def test_a_chart_is_legible(benchmarks, name):
    """Well-formed, with title, description, labels and both schemes; no text covers another or leaves the chart."""
    text = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert len(text) < 25_000
    assert root.get("role") == "img"
    assert len(root.find(f"{SVG}title").text) > 10
    assert len(root.find(f"{SVG}desc").text) > 60
    light, dark = root.find(f"{SVG}style").text.split("@media (prefers-color-scheme: dark)")
    rules = [set(re.findall(r"(?:^|})([.\w]+)\{", scheme.lstrip("{"))) for scheme in (light, dark)]
    assert {".bg", ".dim", ".grid", ".axis"} <= rules[1] <= rules[0]
    used = {f".{style}" for part in root.iter() for style in part.get("class", "").split()}
    assert used <= rules[0] | {".text"}
    boxes = [(part.text, box_of(benchmarks.report_svg, part)) for part in root.iter(f"{SVG}text")]
    written = [text for text, _ in boxes]
    assert all(any(label in text for text in written) for label in LABELS[name])
    width, height = float(root.get("width")), float(root.get("height"))
    for n, (text, box) in enumerate(boxes):
        assert box[0] >= 0, text
        assert box[2] <= width, text
        assert 0 <= box[1] < box[3] <= height, text
        assert not [other for other, at in boxes[:n] if benchmarks.report_svg.overlap(box, at)], text


def box_of(svg, part) -> tuple[float, float, float, float]:
    size, x, y = (float(part.get(key, 12)) for key in ("font-size", "x", "y"))
    width = svg.text_width(part.text, size)
    left = x - {"start": 0, "middle": width / 2, "end": width}[part.get("text-anchor", "start")]
    return left, y - 0.8 * size, left + width, y + 0.25 * size


def test_labels_make_room_for_each_other(benchmarks):
    svg = benchmarks.report_svg
    canvas = svg.Canvas(300, 200, "t", "d")
    canvas.keep_clear([(0, 100), (300, 100)])
    for x in (100, 110, 150, 160):
        canvas.label(x, 100, "a label", (0, 30, 300, 200))
    boxes = canvas.taken[-4:]
    assert not any(svg.overlap(one, other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert all(box[3] < 100 or box[1] > 100 for box in boxes)
    with pytest.raises(ValueError, match="no room for the label"):
        canvas.label(5, 5, "a label", (0, 0, 20, 10))


def test_axes(benchmarks):
    axis = benchmarks.report_svg.Axis
    linear = axis(0.0, 16.0, 10, 110)
    assert (linear(0), linear(8), linear(16)) == (10, 60, 110)
    assert linear.ticks == [0, 5, 10, 15]
    log = axis(1, 100, 0, 200, log=True)
    assert (log(1), log(10), log(100)) == (0, 100, 200)
    assert log.ticks == [1, 2, 5, 10, 20, 50, 100]
    assert axis(1e-7, 10, 0, 1, log=True, ticks=[1e-7, 10]).label(1e-7) == "10⁻⁷"


def test_what_was_not_measured_or_is_wrong_is_said(benchmarks):
    plots = benchmarks.report_plots
    result = copy.deepcopy(plots.load("generate-h100.json"))
    (_, rows), *_ = plots.images(result).items()
    assert "torch.compile" not in rows
    assert plots.image_bar(rows.get("torch.compile"), "c", 0) == ("c", None, "not measured", 0)
    assert plots.image_bar(rows["patched"], "p", 0)[2] == "4.33 s*  (22.9x)"
    assert plots.image_bar(rows["patched"] | {"ratio": None}, "p", 0)[1:3] == (None, "wrong: no speed is shown")
    assert ">not measured<" in plots.seconds()


def test_the_floor_is_bytes_for_few_tokens_and_operations_for_many(benchmarks):
    curves = benchmarks.report_curves
    ceilings = {"copy TB/s": 3.0, "dense bf16 TFLOP/s": 800}
    blocks = 6 * 2 * 1024**2
    few = curves.floor("MAR-B", 2, ceilings)
    assert few == pytest.approx(1e3 * 100 * 2 * blocks / 3e12, rel=0.05)
    assert curves.floor("MAR-B", 1, ceilings) == few
    many = curves.floor("MAR-B", 8192, ceilings)
    assert many == pytest.approx(2 * curves.floor("MAR-B", 4096, ceilings))
    assert curves.floor("MAR-B", 8192, ceilings | {"dense bf16 TFLOP/s": 400}) == pytest.approx(2 * many)


def test_figures_that_the_pages_tell_in_words_are_in_the_files(benchmarks):
    load = benchmarks.report_tables.load
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    row = load("generate-h100.json")["rows"][0]
    assert f"took {row['seconds']:.1f} s for an image of MAR-B" in page
    assert f"split into parts it took {row['details']['seconds']['total']:.1f} s" in page
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    alone = next(row for row in load("generate-h100.json")["rows"] if row["op"] == "run")
    assert f"needs {alone['seconds']:.2f} s for one image of MAR-H" in page
    digits, cloth = ({r["name"]: r for r in load(f"quality-{pair}-cpu.json")["rows"]} for pair in ("digits", "cloth"))
    ddim, four = digits["target, DDIM, 40 to 5 denoising steps"], digits["exact, gamma 4"]
    assert f"{ddim['figure']:.3f} beside {digits['target, 16 steps']['figure']:.3f}" in page
    assert f"{ddim['seconds']:.2f} s where the target alone needs {ddim['plain_seconds']:.2f} s" in page
    assert f"{ddim['seconds_ratio']:.2f} times as fast" in page
    assert f"gamma 4: {four['target_calls']:.1f} calls instead of 16" in page
    window, strict = (digits[f"{kind}, relaxation 42, gamma 4"]["figure"] for kind in ("window", "strict"))
    assert f"{window:.3f}, strict {strict:.3f}" in page
    tree = cloth["2 branches, gamma 4, relaxation by context"]
    assert f"as good at {tree['plain_calls']:.1f} calls, and this takes {tree['target_calls']:.1f}" in page
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    secant, plain, rounded = load("parallel-cpu.json")["rows"][:3]
    assert f"1e-3 of the step-by-step chain's after {secant['reached']['1e-03']} sweeps" in page
    assert f"plain iteration needs {plain['reached']['1e-03']} sweeps for 1e-3" in page
    assert rounded["kind"] == "bfloat16"
