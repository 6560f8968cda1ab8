"""The table of what was measured to be fastest, its neighbours, and the switch of the persistent kernel."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cspd_kernels import backends, crossover
from cspd_kernels.backends import BACKENDS
from cspd_kernels.crossover import (
    DEFAULT,
    FASTEST,
    GUIDED,
    PARALLEL,
    PERSISTENT,
    PERSISTENT_LIMIT,
    bucket,
    nearest,
    prefers_parallel,
    prefers_persistent,
    ranked,
    size_of,
    way_of,
)
from cspd_kernels.ops.denoise import automatic_tolerance

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = (9, 0)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def head(width=1024, depth=6, dtype=torch.bfloat16, device=CUDA, steps=100):
    handle = width, depth, dtype, device, steps
    return SimpleNamespace(
        width=width, hidden=width, mlp="silu", depth=depth, dtype=dtype, device=device, num_steps=steps, handle=handle,
        schedule=SimpleNamespace(name="ddpm", clip=None),
    )  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    """``card(capability)``: the device's; without a call that of an H100."""

    def choose(capability):
        monkeypatch.setattr(crossover, "_capability", lambda device: capability)

    choose(HOPPER)
    return choose


@pytest.fixture
def table(monkeypatch):
    """``table(ops)`` takes the place of what was measured on 9.0, and of all others."""

    def write(**ops):
        monkeypatch.setattr(crossover, "FASTEST", {HOPPER: ops})
        crossover._measured_order.cache_clear()

    yield write
    crossover._measured_order.cache_clear()


@pytest.fixture
def serving(monkeypatch):
    """Every backend could serve on every device, but for those that a test names in it."""
    refused = {}
    monkeypatch.setattr(backends, "_remembered", {})
    monkeypatch.setattr(backends, "_why_not", lambda op, backend, *_: refused.get(backend))
    monkeypatch.setattr(backends, "_load", lambda *_: lambda *_: None)
    return refused


def test_the_table_is_well_formed():
    for ops in FASTEST.values():
        for op, sizes in ops.items():
            for size, times in sizes.items():
                assert len(size) == len(size_of(op, head(), 1))
                for name, milliseconds in times.items():
                    assert name.removesuffix(f" {way_of(name)}") in (*BACKENDS, PERSISTENT)
                    assert way_of(name) in ("", PARALLEL, GUIDED)
                    assert milliseconds > 0
                if PERSISTENT in times:
                    assert op == "denoise"
                    assert size[-1] <= PERSISTENT_LIMIT


def measured_rows():
    """(op, size, name, milliseconds) of the result files of 9.0."""
    heads = {"MAR-B": (1024, 6), "MAR-L": (1280, 8), "MAR-H": (1536, 12)}
    for file in ("kernels-h100.json", "denoise-h100.json", "in-parallel-h100.json"):
        for row in json.loads((RESULTS / file).read_text())["rows"]:
            words, (backend, *kind) = row["size"].split(), row["backend"].split()
            number = int(next(word for word in words if word[1] == "=")[2:])
            if row["op"].startswith("denoise"):
                guided = words[-1] == "guided"
                rows = 2 * number if guided else number
                size = (*heads[words[0]], 4 if kind[-1] == "float32" else 2, rows)
                if row["op"] == "denoise":
                    yield "denoise", size, " ".join([backend, *kind[:-1]]), 1e3 * row["seconds"]
                    continue
                yield "denoise", size, " ".join(row["baseline"].split()[:-1]), 1e3 * row["baseline_seconds"]
                if backend != "torch" and kind[0] == "10":
                    yield "denoise", size, f"{backend} {PARALLEL}", 1e3 * row["seconds"]
                # One token is as the others in the middle; of several the call waits for the slowest.
                if backend != "torch" and guided and kind[0] == ("10" if number == 1 else "27"):
                    yield "denoise", size, f"{backend} {GUIDED}", 1e3 * row["seconds"]
            elif row["op"] != "one block" and kind in ([], ["rejection"]):
                yield row["op"], (number,), backend, 1e3 * row["seconds"]


def test_the_table_holds_what_the_result_files_hold():
    files = {}
    for op, size, name, milliseconds in measured_rows():
        files.setdefault((op, size), {}).setdefault(name, []).append(milliseconds)
    table = {(op, size): times for op, sizes in FASTEST[HOPPER].items() for size, times in sizes.items()}
    assert set(table) == set(files)
    for key, times in table.items():
        assert set(times) == set(files[key]), key
        for name, milliseconds in times.items():
            assert any(milliseconds == pytest.approx(value, rel=5e-3) for value in files[key][name]), (key, name)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 6, 2, 2), (1024, 6, 2, 2)),
        ((1100, 6, 2, 1), (1024, 6, 2, 1)),
        ((1024, 6, 4, 32), (1024, 6, 4, 16)),  # as far as from 64: the smaller
        ((1024, 6, 2, 3), (1024, 6, 2, 4)),
        ((1024, 6, 2, 4096), (1536, 12, 2, 512)),
        ((1280, 8, 2, 64), (1024, 6, 2, 64)),
        ((1280, 8, 4, 8), (1024, 6, 4, 8)),
        ((1024, 6, 4, 1024), (1536, 12, 4, 512)),  # float32 says nothing about half precision, nor the reverse
    ],
)
def test_the_nearest_size(size, expected):
    at, found, times = nearest("denoise", HOPPER, size)
    assert (at, found) == (HOPPER, expected)
    assert times is FASTEST[HOPPER]["denoise"][found]


def test_the_nearest_device(monkeypatch):
    one, two = {"denoise": {(64, 2, 2, 1): {"torch": 1.0}}}, {"accept_reject": {(64,): {"cuda": 1.0}}}
    monkeypatch.setattr(crossover, "FASTEST", {(8, 0): one, (10, 0): one | two})
    size = (64, 2, 2, 1)
    nearest_to = {c: nearest("denoise", c, size)[0] for c in ((7, 5), (8, 0), (8, 9), (9, 0), (9, 1), (12, 0))}
    assert nearest_to == {(7, 5): (8, 0), (8, 0): (8, 0), (8, 9): (8, 0), (9, 0): (8, 0), (9, 1): (10, 0),
                          (12, 0): (10, 0)}  # fmt: skip
    assert nearest("accept_reject", (8, 0), (1,))[0] == (10, 0)
    assert nearest("log_density_ratio", (8, 0), (1,)) is None


def test_the_order_is_that_of_the_times(card, table):
    table(denoise={(1024, 6, 2, 2): {"torch": 3.0, "cuda": 2.0, PERSISTENT: 1.0}}, accept_reject={(1,): {"cuda": 1.0}})
    assert ranked("denoise", CUDA, head(), 2) == (PERSISTENT, "cuda", "torch", "triton")
    assert ranked("accept_reject", CUDA, None, 10**6) == ("cuda", "triton", "torch")


def test_what_was_not_measured_has_the_default_order(card, table):
    table(denoise={(1024, 6, 2, 2): {"torch": 1.0}})
    assert ranked("log_density_ratio", CUDA, None, 1) == DEFAULT
    assert ranked("denoise", CPU, head(device=CPU), 2) == DEFAULT
    assert ranked("denoise", CUDA, head()) == DEFAULT  # a size that nobody knows yet
    assert ranked("denoise", CUDA, head(), 2)[0] == "torch"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ((1024, 6), {1: "triton", 2: PERSISTENT, 8: PERSISTENT, 9: "cuda", 16: "cuda", 64: "cuda", 512: "cuda"}),
        ((1280, 8), {1: "triton", 2: PERSISTENT, 64: "cuda", 512: "cuda"}),
        ((1536, 12), {1: "triton", 2: PERSISTENT, 8: "cuda", 64: "cuda", 128: "triton", 512: "cuda"}),
    ],
)
def test_the_released_heads_on_an_h100(card, model, expected):
    assert {n: ranked("denoise", CUDA, head(*model), n)[0] for n in expected} == expected
    taken = {n: prefers_persistent(head(*model), n, groups=1) for n in expected if n > 1}
    assert taken == {n: name == PERSISTENT for n, name in expected.items() if n > 1}
    assert prefers_persistent(head(*model), 1, groups=1)  # the fastest of its backend's


def test_guidance_doubles_the_rows(card):
    assert prefers_persistent(head(), 8, groups=1)
    assert not prefers_persistent(head(), 8, groups=2)
    assert prefers_persistent(head(), 4, groups=2)
    assert size_of("denoise", head(), 5, groups=2) == (1024, 6, 2, 16)


def test_another_operand_type_is_farther_than_any_number_of_rows(card, table):
    table(denoise={(1024, 6, 2, 8): {"triton": 1.0}, (1024, 6, 4, 4096): {"torch": 1.0}})
    assert nearest("denoise", HOPPER, (1024, 6, 4, 8))[1] == (1024, 6, 4, 4096)
    assert ranked("denoise", CUDA, head(dtype=torch.float32), 8)[0] == "torch"


def test_the_persistent_kernel_is_not_tried_beyond_its_rows(card, monkeypatch):
    wide = head(dtype=torch.float32)
    assert nearest("denoise", HOPPER, size_of("denoise", wide, 17))[2].keys() >= {PERSISTENT}  # 32 rows, as of 16
    assert PERSISTENT not in ranked("denoise", CUDA, wide, 17)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "16")
    assert PERSISTENT in ranked("denoise", CUDA, wide, 8, groups=2)
    assert PERSISTENT not in ranked("denoise", CUDA, wide, 9, groups=2)


def test_another_device_takes_the_nearest_one(card):
    for capability in ((8, 0), (10, 0), (12, 0)):
        card(capability)
        assert ranked("denoise", CUDA, head(), 2)[0] == PERSISTENT


def test_the_switch_goes_before_the_table(card, monkeypatch):
    for value in (0, 5, 16):
        monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", str(value))
        for device in (CUDA, CPU):
            taken = [n for n in range(1, 20) if prefers_persistent(head(device=device), n, groups=1)]
            assert taken == list(range(1, value + 1))
            assert [n for n in range(1, 20) if PERSISTENT in ranked("denoise", device, head(), n)] == taken
        assert PERSISTENT not in ranked("log_density_ratio", CUDA, None, 1)
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "")  # counts as not set
    assert not prefers_persistent(head(device=CPU), 1, groups=1)


@pytest.mark.parametrize("value", ["17", "-1", "1.5", "all", "²"])
def test_the_switch_takes_a_small_number(monkeypatch, value):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", value)
    with pytest.raises(
        ValueError, match=f"expected CSPD_PERSISTENT_MAX_TOKENS as a number from 0 to 16, got '{value}'"
    ):
        prefers_persistent(head(device=CPU), 1, groups=1)


def test_buckets():
    assert [bucket(n) for n in (0, 1, 2, 3, 9, 16, 17, 33, 128, 129, 512, 513)] == [
        1, 1, 2, 4, 16, 16, 32, 48, 128, 144, 512, 576
    ]  # fmt: skip
    assert all(n <= bucket(n) <= n * 9 / 8 for n in range(128, 5000))


def test_the_capability_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    assert [crossover._capability.__wrapped__(torch.device("cuda", i)) for i in (0, 1)] == [(9, 0), (9, 1)]


# --- in parallel over the steps ---


def test_sweeps_are_taken_where_they_were_measured_to_be_the_fastest(card, table, serving):
    table(denoise={
        (1024, 6, 2, 2): {
            "cuda parallel": 1.0, PERSISTENT: 3.0, "triton parallel": 4.0, "triton": 6.0, "cuda": 8.0,
            "cuda parallel guided": 2.0,
        },
        (1024, 6, 2, 64): {"cuda": 10.0, "triton": 13.0, "triton parallel": 14.0, "cuda parallel": 20.0},
    })  # fmt: skip
    assert ranked("denoise", CUDA, head(), 2, parallel=None)[:2] == ("cuda parallel", PERSISTENT)
    assert ranked("denoise", CUDA, head(), 2) == (PERSISTENT, "triton", "cuda", "torch")  # step by step
    forced = ("triton parallel", "cuda parallel", "torch parallel")
    assert ranked("denoise", CUDA, head(), 64, parallel=True) == forced
    assert [prefers_parallel(head(), 2, 1, backend) for backend in ("cuda", "triton", "torch")] == [
        True,
        True,
        False,
    ]
    assert [prefers_parallel(head(), 64, 1, backend) for backend in ("cuda", "triton")] == [False, False]
    assert backends.prefers_parallel("cuda", head(), 2, 1) and not backends.prefers_parallel("torch", head(), 2, 1)
    assert prefers_parallel(head(), 1, 2, "cuda")  # two rows


@pytest.mark.parametrize(
    ("model", "alone", "guided"),
    [
        ((1024, 6), {1: True, 4: True, 8: True, 16: True, 17: False, 64: False}, {1: True, 2: True, 4: False}),
        ((1280, 8), {1: True, 2: True, 8: True, 16: True, 64: False}, {1: True, 8: False}),
        ((1536, 12), {1: True, 2: True, 8: True, 16: True, 64: False, 512: False}, {1: True, 2: True, 8: False}),
    ],
)  # fmt: skip
def test_where_the_released_heads_are_made_in_sweeps_on_an_h100(card, serving, model, alone, guided):
    for numbers, groups in ((alone, 1), (guided, 2)):
        assert {n: backends.prefers_parallel(None, head(*model), n, groups) for n in numbers} == numbers
        for backend in ("triton", "cuda"):
            assert prefers_parallel(head(*model), 1, groups, backend)
            assert not prefers_parallel(head(*model), 64, groups, backend)
        assert not prefers_parallel(head(*model), 1, groups, "torch")  # its host waits
    assert prefers_parallel(head(*model, dtype=torch.float16), 1, 1, "cuda")
    assert not backends.prefers_parallel(None, head(*model, dtype=torch.float32), 1, 1)  # nobody measured it


def test_sweeps_are_not_taken_on_another_device(card, serving):
    assert backends.prefers_parallel(None, head(), 1, 1)
    backends._remembered.clear()
    for capability in ((8, 0), (10, 0)):
        card(capability)
        assert not prefers_parallel(head(), 1, 1, "cuda")
        assert ranked("denoise", CUDA, head(), 1, parallel=True)[0].endswith(PARALLEL)  # if asked for
    assert not prefers_parallel(head(device=CPU), 1, 1, "torch")


def test_few_steps_are_made_one_by_one(card, table):
    """Sweeps take no less time for them, and steps do."""
    table(denoise={(1024, 6, 2, 2): {"cuda parallel": 3.0, "cuda": 8.0}})
    taken = {steps: prefers_parallel(head(steps=steps), 2, 1, "cuda") for steps in (1, 37, 38, 100, 1000)}
    assert taken == {1: False, 37: False, 38: True, 100: True, 1000: True}


def test_guided_calls_are_made_in_as_many_sweeps_as_they_need(card, table):
    table(denoise={(1024, 6, 2, 2): {"cuda parallel": 3.0, "cuda": 8.0, "cuda parallel guided": 9.0}})
    assert [prefers_parallel(head(), 1, groups, "cuda") for groups in (1, 2)] == [True, False]
    table(denoise={(1024, 6, 2, 2): {"cuda parallel": 3.0, "cuda": 8.0}})
    assert not prefers_parallel(head(), 1, 2, "cuda")  # not measured


def test_between_two_sizes_sweeps_are_as_at_the_larger_one(card, table):
    table(denoise={
        (1024, 6, 2, 16): {"cuda parallel": 3.0, "cuda": 8.0},
        (1024, 6, 2, 32): {"cuda": 8.0},  # says nothing of sweeps
        (1024, 6, 2, 64): {"cuda parallel": 9.0, "cuda": 8.0},
    })  # fmt: skip
    assert [prefers_parallel(head(), n, 1, "cuda") for n in (16, 32, 64)] == [True, False, False]


def test_sweeps_of_what_does_not_serve_are_no_reason(card, table, serving):
    table(denoise={(1024, 6, 2, 2): {"cuda parallel": 1.0, PERSISTENT: 2.0, "triton": 3.0, "triton parallel": 4.0}})
    assert backends.prefers_parallel(None, head(), 2, 1)
    backends._remembered.clear()
    serving["cuda"] = "nobody built it"
    assert not backends.prefers_parallel(None, head(), 2, 1)
    backends._remembered.clear()
    table(denoise={(1024, 6, 2, 2): {"cuda parallel": 1.0, PERSISTENT: 2.0, "triton": 3.0, "triton parallel": 2.0}})
    assert backends.prefers_parallel(None, head(), 2, 1)


def test_the_switch_of_sweeps(card, table, serving, monkeypatch):
    times = {"cuda parallel": 1.0, "cuda": 8.0}
    table(denoise={(1024, 6, 2, 2): times, (1024, 6, 4, 2): times})
    assert automatic_tolerance(head(), 2, 1, None) == 1e-3
    assert automatic_tolerance(head(dtype=torch.float32), 2, 1, None) == 1e-6
    monkeypatch.setenv("CSPD_PARALLEL", "0")
    assert automatic_tolerance(head(), 2, 1, None) is None
    monkeypatch.setenv("CSPD_PARALLEL", "off")
    with pytest.raises(ValueError, match="expected CSPD_PARALLEL as 0"):
        automatic_tolerance(head(), 1, 2, None)


def test_a_head_of_another_shape_is_that_of_as_many_weights():
    other = head(1536)
    assert size_of("denoise", other, 2) == (1536, 6, 2, 2)
    other.mlp, other.hidden = "swiglu", 4608  # 3 * 1536 * 4608 weights a block, as two squares of 3258
    assert size_of("denoise", other, 2) == (3258, 6, 2, 2)
    other.mlp, other.hidden = "silu", 6144
    assert size_of("denoise", other, 2) == (3072, 6, 2, 2)


def test_sweeps_are_taken_with_the_sampler_that_they_were_measured_with(card):
    for name, clip, taken in (("ddpm", None, True), ("ddim", None, False), ("euler", None, False), ("ddpm", 1, False)):
        other = head()
        other.schedule.name, other.schedule.clip = name, clip
        assert prefers_parallel(other, 1, 1, "triton") == taken
        assert ranked("denoise", other.device, other, 1, parallel=True)[0].endswith(PARALLEL)  # who asks for them


def test_three_groups_are_three_rows_a_token(card):
    assert size_of("denoise", head(), 2, groups=3) == (1024, 6, 2, 6)
    assert prefers_persistent(head(), 4, groups=2)
    assert not prefers_persistent(head(), 8, groups=3)
