"""What kernels.py measures: one table, told by --list, cut by --only; what was compiled; the floor under each row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripts import run_main, shrink

from cspd.models import DiffLoss
from cspd_kernels import DiffusionHead

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_every_case_has_a_name_of_its_own_on_its_device(benchmarks):
    cases = benchmarks.registry.all_cases()
    names = [(case.device, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 4 and " " not in name for _, name in names)
    for device in ("cpu", "cuda"):
        quick = [case for case in cases if case.quick and case.device == device]
        ops = {case.op for case in cases if case.device == device}
        assert {case.op for case in quick} == ops
        assert len({(case.op, case.head, case.tokens) for case in quick}) == len(ops)


def test_cases_that_are_measured_together_agree(benchmarks):
    registry = benchmarks.registry
    for device in ("cpu", "cuda"):
        for group in registry.groups([case for case in registry.all_cases() if case.device == device]):
            assert len({(case.op, case.head, case.tokens, case.variant, case.runs) for case in group}) == 1


def test_the_committed_files_hold_the_cases_of_the_table(benchmarks):
    """The sizes of the pages' tables are measured again by a run without options."""
    cases, sizes = benchmarks.registry.all_cases(), {}
    for case in cases:
        kind = " guided" if case.variant == "guided" else ""
        unit = {"one block": f"M={case.tokens}", "evaluate": f"N={case.tokens}"}.get(
            case.op, f"N={case.tokens} T=100{kind}"
        )
        sizes.setdefault(case.device, set()).add(f"{case.head} {unit}" if case.head else f"N={case.tokens} C=16")
    for name, device in (
        ("kernels-cpu", "cpu"),
        ("kernels-h100", "cuda"),
        ("denoise-h100", "cuda"),
        ("in-parallel-h100", "cuda"),
    ):
        rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        assert {row["size"] for row in rows} <= sizes[device]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["MAR-L/2/"], {("denoise", "MAR-L", 2)}),
        (["denoise/MAR-B/2/*", "one-block/MAR-B/100/"], {("denoise", "MAR-B", 2), ("one block", "MAR-B", 100)}),
        (["accept_reject/*/64/*"], {("accept_reject", "", 64)}),
        (["nothing of this name"], set()),
    ],
)
def test_only_takes_parts_of_names_and_globs(benchmarks, patterns, expected):
    found = benchmarks.registry.selected(benchmarks.registry.all_cases(), patterns)
    assert {(case.op, case.head, case.tokens) for case in found} == expected


def test_the_list_says_what_runs_here_and_why_the_rest_does_not(benchmarks, monkeypatch, capsys):
    assert run_main(benchmarks.kernels, monkeypatch, "--list", "--only", "denoise/MAR-B/2/") is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 8
    assert lines[0].split()[:4] == ["denoise/MAR-B/2/float32/torch", "cpu", "runs", "here"]
    assert all("  cuda  no: it is measured on GPUs  [against eager float32" in line for line in lines[2:])


def test_the_list_of_a_gpu_names_the_reason_of_a_backend(benchmarks, monkeypatch):
    registry = benchmarks.registry
    reasons = {"torch": None, "triton": "too old", "cuda": "not built"}

    def implementation(op, backend, device):
        if reasons[backend]:
            raise RuntimeError(reasons[backend])

    monkeypatch.setattr(registry, "implementation", implementation)
    cases = registry.selected(registry.all_cases(), ["denoise/MAR-B/2/bfloat16", "accept_reject/C=16-rejection/64"])
    found = {case.backend: registry.why_not_here(case, GPU) for case in cases if case.device == "cuda"}
    assert found == {
        "torch": None, "triton": "too old", "cuda": "not built", "cuda persistent": "not built",
        "torch, replayed": None, "triton, replayed": "too old", "cuda, replayed": "not built",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "message"), [("no such case", "expected --only to name some"), ("one-block", "it is measured on GPUs")]
)
def test_a_run_of_nothing_is_refused(benchmarks, monkeypatch, pattern, message):
    assert message in str(run_main(benchmarks.kernels, monkeypatch, "--only", pattern))


# --- torch.compile as a baseline ---


def plan_of(registry):
    baselines = {"float32": ("eager float32", f"{registry.COMPILED_ON_CPU} float32")}
    return registry.Plan("denoise", "cpu", (("small", 2),), baselines, ("torch",), 3)


def test_a_compiled_loop_is_a_baseline_on_the_cpu(benchmarks, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)  # its import takes seconds
    shrink(benchmarks, monkeypatch, plan_of(benchmarks.registry))
    assert run_main(benchmarks.kernels, monkeypatch, "--json", tmp_path / "r.json") is None
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["baseline"] for row in rows] == ["eager float32", "torch.compile float32"]
    assert compiled == [{"mode": "default", "dynamic": False}]


def test_compilations_end_with_their_time_or_without_a_compiler(benchmarks, monkeypatch, capsys):
    baselines = benchmarks.baselines
    made, compilations = [], baselines.Compilations(CPU)
    monkeypatch.setenv("CXX", "a compiler that is not there")
    assert compilations.compiled("one", lambda: made.append(1), [()]) is None
    assert "one: not measured, torch.compile needs a C++ compiler" in capsys.readouterr().out
    monkeypatch.setattr(baselines.shutil, "which", lambda name: name)
    monkeypatch.setitem(baselines.COMPILE_SECONDS, "cpu", 1e-9)
    assert compilations.compiled("one", lambda: lambda: made.append(1), [()]) is not None
    assert compilations.compiled("two", lambda: lambda: made.append(2), [()]) is None
    assert "two: not measured, compilations have had their 0 seconds" in capsys.readouterr().out
    assert made == [1]


# --- the floor ---


def head_of(dtype=torch.float32, depth=2, width=32, channels=4, cond=8, steps=5):
    return DiffusionHead.from_module(DiffLoss(channels, cond, depth, width, steps), dtype=dtype)


def test_the_work_of_a_chain_is_counted_from_its_sizes(benchmarks):
    floors, head = benchmarks.floors, head_of(torch.bfloat16)
    d, w, c, z, t, n = 2, 32, 4, 8, 5, 3
    block = 2 * 2 * (w * w + w) + 4 * 2 * w  # two products in bfloat16, a norm in float32
    ends = 4 * (w * c + w + 2 * c * w + 2 * c)
    modulations = 2 * (d * (3 * w * w + 3 * w) + 2 * w * w + 2 * w)
    once = modulations + 2 * (w * z + w) + 4 * t * w
    values = 4 * (n * z + n * (c * (t + 3) + 1))
    work = floors.chain_work(head, n)
    assert work.bytes == once + t * (d * block + ends) + values
    assert work.among == d * block + ends
    step = 2 * (w * c + d * 2 * w * w + 2 * c * w)
    mods = 2 * (d * 3 * w * w + 2 * w * w)
    assert work.operations == n * (t * (step + mods) + 2 * w * z)
    swept = floors.chain_work(head, n, groups=2, sweeps=3)
    assert swept.bytes == once + 3 * (d * block + ends) + values + 4 * n * z  # the second condition
    assert swept.operations == 2 * n * ((5 + 4 + 3) * step + t * mods + 2 * w * z)


def test_the_work_of_single_calls_and_verdicts(benchmarks):
    floors, head = benchmarks.floors, head_of()
    w, c = 32, 4
    block = floors.block_work(head, 7)
    assert block.operations == 7 * 2 * 2 * w * w
    assert block.bytes == 4 * 2 * w * w + 7 * w * 12  # the residual stream may stay on the chip
    call = floors.evaluate_work(head, 7)
    stepped = floors.chain_work(head, 7)
    time = head.time[0]
    assert call.operations == 7 * (
        2 * (w * c + 2 * 2 * w * w + 2 * c * w + 2 * 3 * w * w + 2 * w * w) + 2 * (time.weight0.numel() + w * w)
    )
    assert stepped.among < call.bytes < stepped.bytes
    assert floors.ratio_work(10, 16).bytes == 10 * 4 * 83
    assert floors.verdict_work(10, 16).bytes == 10 * (4 * 82 + 8 + 4 * 16 + 9)
    assert floors.verdict_work(10, 16, shared_sigma=True).bytes == 10 * (4 * 66 + 8 + 4 * 16 + 9)


def test_the_floor_is_the_larger_of_two_times(benchmarks, monkeypatch):
    floors = benchmarks.floors
    rates = floors.Rates(CPU)
    monkeypatch.setattr(rates, "bandwidth", lambda size: 1e3)
    monkeypatch.setattr(rates, "throughput", lambda dtype: 1e6)
    assert rates.floor(floors.Work(2e3, 1e6, torch.float32, 1)) == floors.Floor(2.0, "bytes")
    assert rates.floor(floors.Work(2e3, 3e6, torch.float32, 1)) == floors.Floor(3.0, "products")
    assert rates.floor(floors.Work(2e3, 0, torch.float32, 1)).of == "bytes"


def test_memory_is_measured_at_the_size_that_is_read_again(benchmarks):
    floors = benchmarks.floors
    mib = floors.MIB

    def size(device, among, once):
        return floors.Rates(device)._size(floors.Work(1, 0, torch.float32, among, once))

    assert [size(CPU, among, True) // mib for among in (5, 3 * mib, 4 * mib, 1 << 40)] == [1, 2, 4, 256]
    assert size(GPU, 3 * mib, False) == 32 * mib
    assert size(GPU, 40 * mib, False) == 32 * mib  # down: a floor at the rate of more memory would be too high
    assert size(GPU, 3 * mib, True) == 256 * mib  # the cache is empty


def test_rates_are_measured_once_and_kept_for_the_file(benchmarks, monkeypatch):
    floors = benchmarks.floors
    monkeypatch.setitem(floors.SQUARE, "cpu", 32)
    rates, timed = floors.Rates(CPU), []
    monkeypatch.setattr(rates, "_seconds", lambda function: timed.append(function()) or 0.5 / len(timed))
    assert rates.bandwidth(1 << 20) == (1 << 20) / 0.25  # the faster of a copy and a sum
    assert rates.bandwidth(1 << 20) == (1 << 20) / 0.25
    assert rates.throughput(torch.bfloat16) == 2 * 32**3 / (0.5 / 4)  # the faster of a plain and a packed product
    assert len(timed) == 4
    assert list(rates.measured) == ["bytes a second, 1 MiB", "operations a second, bfloat16 products"]


def test_rates_of_this_machine_are_positive(benchmarks, monkeypatch):
    monkeypatch.setitem(benchmarks.floors.SQUARE, "cpu", 32)
    rates = benchmarks.floors.Rates(CPU)
    assert rates.bandwidth(1 << 20) > 1e6
    assert rates.throughput(torch.float32) > 1e6


@pytest.mark.gpu
def test_rates_of_a_gpu_are_those_of_a_gpu(benchmarks):
    rates = benchmarks.floors.Rates(torch.device("cuda", torch.cuda.current_device()))
    assert rates.bandwidth(32 << 20) >= 0.5 * rates.bandwidth(256 << 20) > 1e10
    assert rates.throughput(torch.bfloat16) > rates.throughput(torch.float32) > 1e11


def test_a_row_shows_its_share_and_a_wrong_one_none(benchmarks):
    fields = ("op", "n", "b", "base", 2.0, 1.9, 2.1, 9.0, 8.9, 9.1, 3)
    make = benchmarks.rows.Row
    right = make(*fields, 0.0, 1e-5, "of max", floor_seconds=0.5, floor_of="bytes")
    assert right.share == 0.25
    assert "25%" in right.cells()
    assert right.record()["share"] == 0.25
    wrong = make(*fields, 1.0, 1e-5, "of max", floor_seconds=0.5, floor_of="bytes")
    assert wrong.share is None
    assert wrong.record()["ratio"] is None
    without = make(*fields, 0.0, 1e-5, "of max").record()
    assert not {"share", "floor_seconds", "floor_of"} & set(without)
    assert [benchmarks.rows.percent(share) for share in (1.2, 0.104, 0.0312, 0.0004)] == [
        "120%",
        "10%",
        "3.1%",
        "0.04%",
    ]
