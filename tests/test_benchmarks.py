"""The benchmarks run, refuse to report a wrong result, and write what they print."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains import counted, kernels_of
from scripts import run_main, shrink
from slow import slow

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead, denoise
from cspd_kernels.testing import random_inputs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_rows_of_a_small_head(benchmarks, monkeypatch, capsys, tmp_path):
    registry = benchmarks.registry
    eager = {"float32": ("eager float32",), "bfloat16": ("eager float32", registry.AUTOCAST)}
    shrink(
        benchmarks,
        monkeypatch,
        registry.Plan("denoise", "cpu", (("small", 3),), eager, ("torch",), 3),
        registry.Plan("log_density_ratio", "cpu", (("", 200),), {"float32": registry.MOVED}, ("torch",), 3),
        registry.Plan(
            "accept_reject", "cpu", (("", 200),), {"float32": registry.LOOP}, ("torch",), 3, registry.RESIDUALS
        ),
        registry.Plan("evaluate", "cpu", (("small", 3),), {"bfloat16": ("eager bfloat16",)}, ("torch",), 3),
    )
    run_main(benchmarks.kernels, monkeypatch, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert capsys.readouterr().out.count("x  ") == 8
    written = json.loads((tmp_path / "r.json").read_text())
    rows = written["rows"]
    assert all(row["error"] <= row["bound"] for row in rows)
    ratios = [row["baseline"] for row in rows if row["op"] == "log_density_ratio"]
    assert ratios == ["copy of as many bytes", "sum of as many bytes"]
    assert [row["op"] for row in rows] == ["denoise"] * 3 + ["log_density_ratio"] * 2 + ["accept_reject"] * 2 + [
        "evaluate"
    ]
    assert {row["backend"] for row in rows if row["op"] == "accept_reject"} == {"torch rejection", "torch closed_form"}
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert 0 < row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert any(name.startswith("bytes a second") for name in written["rates"])
    assert written["environment"]["backends"]["torch"] == "ok"
    assert "failures" not in written
    table = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [(row["op"], float(row["seconds"])) for row in table] == [(row["op"], row["seconds"]) for row in rows]


def test_every_cut_of_the_ratio_is_tried_and_gives_the_same_bits(benchmarks, device_of, monkeypatch):
    device = device_of("triton")
    tune = pytest.importorskip("tune_verdict")

    def at_once(function, inputs, device):  # for a graph
        function(*inputs[0])
        return lambda *_: None

    monkeypatch.setattr(tune, "_replays", at_once)
    cuts = [(elements, warps) for elements in tune.ELEMENTS for warps in tune.WARPS]
    try:
        assert sorted(tune.shares(50, 3, device)) == cuts
        monkeypatch.setattr(tune, "log_density_ratio", lambda *_, **__: torch.rand(50))
        with pytest.raises(SystemExit, match="256 elements and 1 warps give other bits"):
            tune.shares(50, 3, device)
    finally:
        sys.modules.pop("tune_verdict")


def test_the_hosts_part_of_the_ops_that_judge_tokens(benchmarks, capsys):
    pytest.importorskip("triton")
    judging = benchmarks.host_judging
    rows = judging.judging_rows(3, torch.device("cpu"))
    assert {(row["op"], row["backend"]) for row in rows} == {
        (op, backend) for op in ("log_density_ratio", "accept_reject") for backend in ("triton", "cuda")
    }
    for row in rows:
        (median, low, high), bare = row["host seconds"], row["bare launch seconds"]
        assert 0 < low <= median <= high
        assert bare is None
    judging.print_host_rows([*rows, rows[0] | {"bare launch seconds": (1e-6, 1e-6, 2e-6)}])
    assert capsys.readouterr().out.endswith("   1.0 (1.0-2.0)\n")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("op", ["log_density_ratio", "accept_reject"])
def test_a_bare_launch_is_the_calls_own_again(benchmarks, device_of, backend, op):
    device, judging = device_of(backend), benchmarks.host_judging
    (x, draft, target), *_ = judging._inputs(9, device)
    seed = {"seed": 1, "rows": torch.arange(9, device=device)} if op == "accept_reject" else {}
    results = []

    def call():
        results.append(getattr(judging, op)(x, draft, target, backend=backend, **seed))
        return results[-1]

    bare, expected = judging._bare_launch(op, backend, call), call()
    outputs = [results[0]] if op == "log_density_ratio" else list(results[0])
    for output in outputs:
        output.zero_()
    bare()
    for output, value in zip(outputs, [expected] if op == "log_density_ratio" else expected, strict=True):
        assert torch.equal(output, value)
    assert len(results) == 2


def test_only_what_runs_on_a_device_is_measured_beside_torch(benchmarks, monkeypatch):
    registry = benchmarks.registry
    monkeypatch.setattr(registry, "why_unavailable", lambda name, op: None)  # as with an interpreter and an emulation
    assert registry.why_not_measured("denoise", "torch", torch.device("cpu")) is None
    assert registry.why_not_measured("denoise", "cuda", torch.device("cpu")) == "it runs on GPUs"

    def implementation(op, backend, device):
        if backend == "triton":
            raise RuntimeError("made of wood")

    monkeypatch.setattr(registry, "implementation", implementation)
    served = [registry.why_not_measured("denoise", name, torch.device("cuda")) for name in ("torch", "triton", "cuda")]
    assert served == [None, "made of wood", None]


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)  # the one that has such a kernel
def test_persistent_rows_run_the_persistent_kernel(benchmarks, make_head, backend, monkeypatch):
    head, used = make_head(), []
    kinds = kernels_of(backend)
    for kind in (kinds.layered, kinds.persistent):
        monkeypatch.setattr(kind, "run_steps", counted(kind.run_steps, used))
    assert benchmarks.denoising.serves_persistent(backend, head, 2)
    for before in (None, "7"):
        if before:
            monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", before)
        for tokens, kind in ((0, kinds.layered), (16, kinds.persistent)):
            used.clear()
            out = benchmarks.denoising.up_to(tokens, head, *random_inputs(head, 2, 0), backend=backend)
            assert {type(chain) for chain in used} == {kind}
            assert not out.sample.isnan().any()
            assert os.environ.get("CSPD_PERSISTENT_MAX_TOKENS") == before
    assert not benchmarks.denoising.serves_persistent(backend, make_head(depth=0), 2)
    assert not benchmarks.denoising.serves_persistent(backend, head, 17)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@torch.no_grad()
def test_choices_of_products_are_checked_before_they_are_timed(benchmarks, make_head, backend, monkeypatch):
    tiles = benchmarks.tiles
    for dtype, rows in ((torch.bfloat16, 5), (torch.float32, 3)):
        head, bound = make_head(dtype, depth=2), benchmarks.registry.BOUNDS[dtype]
        choices = tiles.choices(rows, dtype)
        assert ("few" in choices) == (rows == 3)
        for choice in {**dict(list(choices.items())[-2:]), **dict(list(choices.items())[:1])}.values():
            for layer in ("first", "second"):
                assert tiles.error_of(tiles.chain_of(choice, head, rows), head, layer) <= bound
                chain = tiles.chain_of(choice, head, rows)
                run = getattr(chain, f"run_{layer}")
                value = chain.activations if layer == "first" else chain.h
                wrong = lambda *arguments, run=run, value=value: (run(*arguments), value[-1].mul_(1.1))  # noqa: E731
                monkeypatch.setattr(chain, f"run_{layer}", wrong)
                assert tiles.error_of(chain, head, layer) > bound


def test_the_table_of_tiles_holds_the_fastest_that_are_right(benchmarks, device_of):
    device_of("triton")
    from cspd_kernels.ops.denoise.triton_config import HALF_TILES, Products, Tile

    first, last = HALF_TILES[0].name, HALF_TILES[-1].name
    seconds = {
        (4, "few"): (1, 1), (4, last): (2, 2),
        (64, last): (1, 2), (64, first): (2, 1), (64, "library"): (None, 9),
        (100, last): (1, 2), (100, first): (2, 1), (100, "library"): (3, 3),
        (200, last): (5, 5), (200, first): (4, 4), (200, "library"): (3, 3),
    }  # fmt: skip
    case = {"width": 1024, "dtype": "bfloat16"}
    results = [
        case | {"rows": rows, "choice": choice, "layer": layer, "seconds": time}
        for (rows, choice), times in seconds.items()
        for layer, time in zip(("first", "second"), times)
    ]
    text = benchmarks.tiles.table(results, (9, 0))
    entries = ((100, Products(HALF_TILES[-1], HALF_TILES[0])), (None, Products(None, None)))
    assert eval(f"{{{text}}}", {"Products": Products, "Tile": Tile}) == {((9, 0), 1024, 2): entries}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_choice_that_raises_costs_no_other_its_time(benchmarks, make_head, kernel_device, monkeypatch, capsys):
    tiles = benchmarks.tiles
    right = {name: tiles.choices(5, torch.bfloat16)[name] for name in list(tiles.choices(5, torch.bfloat16))[-2:]}
    broken, fine = right
    chain_of = tiles.chain_of

    def made(choice, head, rows, seed=0):
        if choice is right[broken]:
            raise RuntimeError("out of resources: shared memory\nmore")
        return chain_of(choice, head, rows, seed)

    monkeypatch.setattr(tiles, "choices", lambda rows, dtype: right)
    monkeypatch.setattr(tiles, "chain_of", made)
    monkeypatch.setattr(tiles, "seconds_of", lambda chain, head, layer: [2e-6, 1e-6, 3e-6])
    monkeypatch.setitem(tiles.HEADS, "small", (2, 48, 8))
    results = tiles.rows_of("small", torch.bfloat16, 5, kernel_device)
    assert [(r["choice"], r["layer"], r["seconds"]) for r in results] == [
        (broken, "both", None), (fine, "first", 2e-6), (fine, "second", 2e-6),
    ]  # fmt: skip
    assert "out of resources: shared memory\n" in capsys.readouterr().out
    assert tiles.winners(results) == {(48, 2): [(5, fine, fine)]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is something to measure")
def test_without_a_gpu_no_tiles_are_timed(benchmarks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tiles.py"])
    with pytest.raises(SystemExit, match="nothing to measure"):
        benchmarks.tiles.main()


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_row_shows_no_speed(benchmarks, capsys, error):
    row = benchmarks.rows.Row("op", "n", "b", "base", 1.25, 1.2, 1.3, 9.75, 9.7, 9.8, 3, error, 1e-5, "of max")
    report = benchmarks.rows.Report()
    report.add(row)
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "1.25" not in out
    assert "7.8" not in out
    with pytest.raises(SystemExit, match="wrong: op n b"):
        report.finish()


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
    actual = benchmarks.baselines.eager_denoise(head, z, x, torch.stack(draws[::-1]))
    assert relative_error(actual, expected) < 1e-6


def test_a_wrong_verdict_is_seen(benchmarks, monkeypatch):
    verdicts = benchmarks.judging
    verdict = verdicts.accept_reject

    def wrong(*chains, **options):
        result = verdict(*chains, **options)
        return result._replace(token=result.token + (torch.arange(len(result.token)) % 50 == 0)[:, None])

    monkeypatch.setattr(verdicts, "accept_reject", wrong)
    registry = benchmarks.registry
    plan = registry.Plan(
        "accept_reject", "cpu", (("", 200),), {"float32": registry.LOOP}, ("torch",), 2, registry.RESIDUALS
    )
    shrink(benchmarks, monkeypatch, plan)
    ended = run_main(benchmarks.kernels, monkeypatch)
    assert [line.split(":")[1] for line in str(ended).splitlines()] == [
        f" accept_reject N=200 C=16 torch {residual}" for residual in registry.RESIDUALS
    ]


@pytest.mark.parametrize(
    "script", ["kernels.py", *map(slow, ("compare.py", "generate.py", "parallel.py", "quality.py"))]
)
def test_help(script):
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ("live", torch.bfloat16),
        slow("live", torch.float32),
        slow("frozen", torch.float32),
        slow("frozen", torch.bfloat16),
    ],
)
def test_what_a_patched_call_costs_beside_its_kernels(benchmarks, monkeypatch, weights, dtype):
    monkeypatch.setitem(benchmarks.registry.HEADS, "small", (1, 32, 16))
    denoise = benchmarks.host.made_calls.denoise
    rows = benchmarks.host.rows_of("small", dtype, weights, 2, torch.device("cpu"))
    assert benchmarks.host.made_calls.denoise is denoise
    assert [(row["tokens"], row["cfg"]) for row in rows] == list(benchmarks.host.CASES)
    for row in rows:
        assert row["error"] < (1e-5 if dtype == torch.float32 else 5e-2)
        assert row["rest seconds"][0] > 0
        assert row["share"] == row["rest seconds"][0] / row["op seconds"][0]
        assert row["ratio"] == row["eager seconds"][0] / row["call seconds"][0]


def test_the_hosts_part_of_a_chain(benchmarks, device_of, capsys):
    device, _ = device_of("triton"), device_of("cuda")
    judging = benchmarks.host_judging
    rows = benchmarks.host_denoise.denoise_rows((1, 48, 8), 4, 3, torch.device("cpu"))
    assert [(row["op"], row["backend"]) for row in rows] == [("denoise", "triton"), ("denoise", "cuda")]
    assert all(0 < row["host seconds"][0] < 1 and row["bare launch seconds"] is None for row in rows)
    judging.print_host_rows(rows)
    assert len(capsys.readouterr().out.splitlines()) == 3
    head = DiffusionHead.from_module(DiffLoss(4, 8, 1, 48, "2").to(device))  # nothing of it stays behind
    assert torch.isfinite(denoise(head, *random_inputs(head, 2, 0), backend="triton").sample).all()
