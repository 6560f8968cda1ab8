"""The speculative runner on a GPU: no wait for the device, windows in CUDA graphs, the numbers of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from dispatch_modes import no_wait_for_cuda
from small_models import small_mar

import cspd
from cspd.demo.pair import load_pair
from cspd.transformer import why_not_by_tables
from cspd.window import prefill, run_window

pytestmark = pytest.mark.gpu

LABELS = torch.tensor([3, 1, 4])


@pytest.fixture(scope="module")
def pair():
    models = small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")
    return tuple(model.cuda() for model in models)


@pytest.fixture(scope="module")
def digits():
    """(draft, target) whose tokens are neither all accepted nor all rejected."""
    target, draft = load_pair()
    return draft, target


def by_entropy(window):
    return 1.0 + 41.0 * torch.sigmoid(window.target_log_std.mean(dim=-1))


TREE = {"verify": "strict", "criterion": "last_step", "num_candidates": 3, "branches": 2, "target_sigma": True}
# What lies on the CPU here travels through pinned memory.
OPTIONS = {
    "plain": ({}, {}),
    "labels": ({}, {"labels": LABELS}),
    "guided": ({}, {"cfg": 3.0, "labels": LABELS}),
    "guided, constant": ({}, {"cfg": 3.0, "cfg_schedule": "constant", "labels": LABELS}),
    "no pre-filling": ({"prefill": 0.0, "sigma": "released"}, {"temperature": 0.7}),
    "pre-filling only": ({"prefill": 1.0}, {"cfg": 3.0}),
    "few tries": ({"max_tries": 3}, {}),
    "tensor": ({"relaxation": torch.linspace(1, 40, 16)}, {"cfg": 2.0}),
    "similarity": ({"relaxation": cspd.SimilarityRelaxation()}, {"cfg": 2.0, "labels": LABELS}),
    "entropy": ({"relaxation": by_entropy}, {}),
    "orders": ({}, {"orders": torch.stack([torch.randperm(16) for _ in range(3)])}),
    "closed form": ({"residual": "closed_form", "target_sigma": True}, {"cfg": 2.0}),
    "bfloat16 head": ({"dtype": torch.bfloat16}, {}),
    "torch": ({"backend": "torch"}, {"cfg": 2.0}),
    "sweeps": ({"parallel_tol": 1e-3}, {"cfg": 2.0, "labels": LABELS}),
    "candidates": ({"num_candidates": 3, "target_sigma": True}, {"cfg": 2.0}),
    "strict": ({"verify": "strict"}, {"labels": LABELS}),
    "strict, last step": ({"verify": "strict", "criterion": "last_step", "prefill": 0.0}, {"cfg": 2.0}),
    "strict, tree": (TREE, {"cfg": 2.0, "labels": LABELS}),
    "strict, policy": ({**TREE, "relaxation": cspd.ContextRelaxation()}, {"cfg": 2.0}),
    "strict, sweeps": ({"verify": "strict", "parallel_tol": 1e-3}, {}),
    "sweeps of a bfloat16 head": ({"parallel_tol": 1e-3, "dtype": torch.bfloat16}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_does_not_wait_for_the_device(pair, name):
    options, arguments = OPTIONS[name]
    runner = cspd.SpecDecodeRunner(*pair, **options)
    for seed in range(2):  # compiles, uploads the tables of the heads; then captures the heads' graphs
        runner.run(3, 8, 3, seed=seed, **arguments)
    for seed in range(2, 4):
        with no_wait_for_cuda():
            images = runner.run(3, 8, 3, seed=seed, **arguments)
        assert torch.isfinite(images).all()
        again = runner.run(3, 8, 3, seed=seed, **arguments)
        assert torch.equal(images, again)
    assert runner.stats.seconds["total"] > 0


def test_masks_are_seen_to_wait(pair, monkeypatch):
    """The check can fail."""
    for name in ("why_not_by_weights", "why_not_by_tables"):
        monkeypatch.setattr(f"cspd.whole.chosen.{name}", lambda *_: "asked for by this test")
    runner = cspd.SpecDecodeRunner(*pair)
    runner.run(3, 8, 3, seed=0)
    with no_wait_for_cuda(), pytest.raises(RuntimeError, match="synchronizing"):
        runner.run(3, 8, 3, seed=1)


@pytest.mark.parametrize(("backend", "tolerance"), [(None, None), ("torch", None), (None, 1e-6)])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("relaxation", [8.0, cspd.SimilarityRelaxation()], ids=["number", "similarity"])
def test_a_window_in_a_graph_of_the_caller(digits, backend, tolerance, cfg, relaxation):
    runner = cspd.SpecDecodeRunner(
        *(copy.deepcopy(model).cuda() for model in digits),
        relaxation,
        prefill=0.25,
        backend=backend,
        parallel_tol=tolerance,
    )
    state = runner.begin(3, 16, labels=LABELS, cfg=cfg, seed=5)
    for i in range(state.prefilled):
        prefill(state, state.plan.step(i))
    window = state.plan.window(state.prefilled, state.prefilled + 4)
    buffers = [state.tokens, state.outcome, *([state.previous_target_z] if callable(relaxation) else [])]
    before = [buffer.clone() for buffer in buffers]

    def restore():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and whatever libraries do at first
        for _ in range(2):
            restore()
            run_window(state, window)
    torch.cuda.current_stream().wait_stream(side)
    restore()
    plain = [value.clone() for value in run_window(state, window)]
    after = [buffer.clone() for buffer in buffers]
    assert not any(map(torch.equal, before, after))
    restore()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        judged = run_window(state, window)
    assert all(map(torch.equal, buffers, before))  # capturing runs nothing
    for _ in range(3):
        restore()
        graph.replay()
        # To rounding: kernels may be cut otherwise in a capture. The log ratios magnify it.
        for got, wanted, bound in ((buffers, after, 1e-4), (judged, plain, 1e-2)):
            assert all(torch.allclose(a.float(), b.float(), bound, bound) for a, b in zip(got, wanted, strict=True))


def test_a_window_that_waits_is_refused_in_a_graph(pair, monkeypatch):
    for name in ("why_not_by_weights", "why_not_by_tables"):
        monkeypatch.setattr(f"cspd.whole.chosen.{name}", lambda *_: "asked for by this test")
    runner = cspd.SpecDecodeRunner(*pair, prefill=0.0)
    state = runner.begin(2, 8, seed=0)
    window = state.plan.window(0, 2)
    run_window(state, window)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="own methods do"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run_window(state, window)


def test_sweeps_that_wait_are_refused_in_a_graph(pair):
    runner = cspd.SpecDecodeRunner(*pair, prefill=0.0, backend="torch", parallel_tol=1e-3)
    state = runner.begin(2, 8, seed=0)
    window = state.plan.window(0, 2)
    run_window(state, window)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="its sweeps synchronise"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run_window(state, window)


@pytest.mark.parametrize("residual", ["rejection", "closed_form"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_images_are_those_of_the_cpu(digits, cfg, residual):
    images, outcomes = [], []
    for device in ("cpu", "cuda"):
        models = [copy.deepcopy(model).to(device) for model in digits]
        runner = cspd.SpecDecodeRunner(*models, 8.0, residual=residual)
        arguments = {"labels": torch.arange(40) % 10, "cfg": cfg, "seed": 7}
        images.append(models[1].patchify(runner.run(40, 16, 4, **arguments)).cpu())
        outcomes.append(runner.stats.outcome.cpu())
    # A verdict within rounding of its threshold may turn, and with it every token after it in its image.
    assert (outcomes[0] == outcomes[1]).float().mean() > 0.95
    near = (images[0] - images[1]).abs().amax(-1) < 1e-3
    assert near.float().mean() > 0.9
    assert {1, 2} <= set(outcomes[0].unique().tolist())


@pytest.mark.parametrize("gamma", [3, cspd.EntropyDraft(4)], ids=["number", "entropy"])
@pytest.mark.parametrize(
    "options", [{"num_candidates": 1}, {"num_candidates": 3, "branches": 2}], ids=["chain", "tree"]
)
def test_strict_images_are_those_of_the_cpu(digits, options, gamma):
    """By graphs on the device. An image whose decisions are the same is the same."""
    strict = {"verify": "strict", "criterion": "last_step", "target_sigma": True, "residual": "closed_form", **options}
    images, outcomes = [], []
    for device in ("cpu", "cuda"):
        models = [copy.deepcopy(model).to(device) for model in digits]
        runner = cspd.SpecDecodeRunner(*models, 2.0, **strict)
        for _ in range(2):  # captured, then replayed
            drawn = runner.run(20, 16, gamma, labels=torch.arange(20) % 10, cfg=2.0, seed=7)
            images.append(models[1].patchify(drawn).cpu())
            outcomes.append(runner.stats.outcome.cpu())
    assert torch.equal(images[2], images[3])
    same = (outcomes[0] == outcomes[3]).all(1)
    assert same.float().mean() > 0.7
    assert (images[0] - images[3])[same].abs().max() < 1e-2
    assert {1, 2} <= set(outcomes[0].unique().tolist())


def test_adaptive_windows_are_reproducible(digits):
    runner = cspd.SpecDecodeRunner(*(copy.deepcopy(model).cuda() for model in digits), 8.0)
    policy = cspd.AdaptiveDraft(0.5)
    images = [runner.run(8, 16, policy, labels=torch.arange(8), seed=1) for _ in range(2)]
    assert torch.equal(*images)
    assert sum(runner.stats.gammas) == runner.stats.draft_calls > len(runner.stats.gammas)


def test_released_methods_agree_with_the_tables(pair):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert why_not_by_tables(copy.deepcopy(pair[1]).to(dtype)) is None
