"""evaluate: one call of a network, equal to its own forward; what it keeps, and what it refuses."""

import math
import warnings

import pytest
import torch
from networks import KINDS, C, Network, W, Z, inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cspd_kernels import DiffusionHead, Schedule, evaluate
from cspd_kernels.ops.evaluate import kept, reference, torch_backend
from cspd_kernels.testing import relative_error


def make(kind="plain", dtype=torch.float32, **options):
    net = Network(**{**KINDS[kind], **options})
    return net, DiffusionHead.from_network(net, None, dtype=dtype)


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 2500])
def test_equals_the_networks_own_forward(rows):
    net, head = make()
    x, t, c = inputs(net, rows)
    out = evaluate(head, x, t, c)
    assert (out.shape, out.dtype, out.requires_grad) == ((rows, 2 * C), torch.float32, False)
    with torch.no_grad():
        assert relative_error(out, net(x, t, c)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_operand_type(dtype):
    net, head = make(dtype=dtype)
    x, t, c = inputs(net, 9)
    expected = reference.evaluate(head, x, t, c, dtype=torch.float64)
    out = evaluate(head, x, t, c)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(out, expected) <= (2e-2 if dtype.itemsize == 2 else 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evaluate(head, x, t, c), out)  # the head's type decides


@pytest.mark.parametrize("t", [3, 0.25, torch.tensor(0.25), torch.tensor([[7]]), torch.tensor([7], dtype=torch.int32)])
@pytest.mark.parametrize("kind", ["plain", "averaged times"])
def test_one_timestep_for_all_rows(kind, t):
    net, head = make(kind)
    x, _, c = inputs(net, 6)
    each = torch.full((6,) if kind == "plain" else (6, 2), float(t))
    with torch.no_grad():
        assert relative_error(evaluate(head, x, t, c), net(x, each, c)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_timesteps_of_any_type_in_a_column_too(dtype):
    net, head = make()
    x, _, c = inputs(net, 6)
    t = (torch.arange(6) * 100).to(dtype)
    with torch.no_grad():
        expected = net(x, t, c)
    for given in (t, t[:, None], t.repeat(2).view(2, 6).t()[:, 0]):
        assert relative_error(evaluate(head, x, given, c), expected) <= 1e-5


def test_inputs_need_not_be_contiguous_nor_wide():
    net, head = make()
    x, t, c = inputs(net, 9)
    out = evaluate(head, x, t, c)
    strided = [v.repeat_interleave(2, 0)[::2] for v in (x, t, c)]
    assert torch.equal(evaluate(head, *strided), out)
    assert torch.equal(evaluate(head, x.t().contiguous().t(), t, c.t().contiguous().t()), out)
    half = x.bfloat16(), t, c.half()
    assert relative_error(evaluate(head, *half), evaluate(head, half[0].float(), t, half[2].float())) == 0


def test_a_small_workspace_computes_the_same():
    net, head = make("shared")
    x, t, c = inputs(net, 33)
    out = evaluate(head, x, t, c)
    for workspace in (1, 5000):
        assert relative_error(evaluate(head, x, t, c, workspace_bytes=workspace), out) <= 1e-6


# --- what is kept from call to call ---


@pytest.fixture
def made(monkeypatch):
    """How many rows of conditions and of timesteps were embedded."""
    conditions, times = [], []
    embedded, embed = torch_backend.embedded, kept.embed
    monkeypatch.setattr(torch_backend, "embedded", lambda head, c: conditions.append(len(c)) or embedded(head, c))
    monkeypatch.setattr(kept, "embed", lambda weights, t: times.append(len(t)) or embed(weights, t))
    return conditions, times


def test_a_condition_is_embedded_once_and_a_timestep_once_for_all_rows(made):
    net, head = make()
    x, _, c = inputs(net, 10)
    for t in (5, 4, torch.full((10,), 3.0)):
        evaluate(head, x, t, c.clone())  # the values count
    assert made == ([10], [1, 1, 1])
    evaluate(head, x, torch.tensor([1, 2] * 5), c)
    assert made == ([10], [1, 1, 1, 2])
    evaluate(head, x[:9], 3, c[:9])
    evaluate(head, x, 3, c)
    assert made[0] == [10, 9, 10]


CHANGES = {
    "the condition, unseen": lambda net, c: c.data.mul_(2),
    "a value of the condition": lambda net, c: c.data[3, 1:2].add_(1),
    "the condition's weights, unseen": lambda net, c: net.cond_embed.weight.data.view(-1)[3:4].add_(1),
    "the condition's bias": lambda net, c: net.cond_embed.bias.data.add_(1),
    "the time's weights": lambda net, c: net.time_embed.mlp[0].weight.data.mul_(2),
    "a block": lambda net, c: net.res_blocks[1].mlp[2].weight.data.mul_(2),
}


@pytest.mark.parametrize("rows", [8, 10])  # with the weights as they are, and with what was made of them
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_seen(change, rows):
    net, head = make()
    x, _, c = inputs(net, rows)
    before = evaluate(head, x, 5, c)
    assert torch.equal(evaluate(head, x, 5, c), before)
    CHANGES[change](net, c)
    after = evaluate(head, x, 5, c)
    with torch.no_grad():
        assert relative_error(after, net(x, torch.full((rows,), 5), c)) <= 1e-5
    assert relative_error(after, before) > 1e-3


def test_conditions_in_inference_mode(made):
    net, head = make()
    x, t, c = inputs(net, 10)
    out = evaluate(head, x, t, c)
    with torch.inference_mode():
        again = c * 1.0
        assert torch.equal(evaluate(head, x, t, again), out)
        again.mul_(2)
        assert not torch.equal(evaluate(head, x, t, again), out)
    assert made[0] == [10, 10]
    assert torch.equal(evaluate(head, x, t, c), out)


def test_heads_of_several_schedules_share_what_is_kept(made):
    net, _ = make()
    x, t, c = inputs(net, 10)
    head = DiffusionHead.from_network(net, Schedule.linear(4))
    out = evaluate(head, x, t, c)
    assert torch.equal(evaluate(head.with_schedule(Schedule.linear(3)), x, t, c), out)
    assert made[0] == [10]


# --- one operator ---


def test_one_operator_under_the_compiler_for_every_timestep():
    torch._dynamo.reset()
    net, head = make()
    x, _, c = inputs(net, 6)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, t, c: evaluate(head, x * 2, t, c) + 1, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in (torch.full((6,), 3.0), torch.full((6,), 8.0)):
            assert torch.equal(compiled(x, t, c), evaluate(head, x * 2, t, c) + 1)
        assert counter.frame_count == 1
        for t in (3.0, 8.0, 9.0, 10.0):
            assert torch.equal(compiled(x, t, c), evaluate(head, x * 2, t, c) + 1)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5):  # PyTorch 2.4 takes every number for a constant
        assert counter.frame_count <= 3


def test_fake_tensors_know_what_comes_back():
    _, head = make("averaged times", torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = evaluate(head, torch.empty(6, C), torch.empty(6, 2), torch.empty(6, Z))
    assert (out.shape, out.dtype) == ((6, C), torch.float32)


# --- errors ---


def changed(**values):
    def call(head, x, t, c):
        given = {"head": head, "x": x, "timesteps": t, "cond": c, **values}
        return evaluate(given.pop("head"), given.pop("x"), given.pop("timesteps"), given.pop("cond"), **given)

    return call


ERRORS = {
    "no head": (changed(head=3), TypeError, "expected a DiffusionHead, got int"),
    "no tensor": (changed(x=[1.0]), TypeError, r"x as a tensor \(M, 5\), got list"),
    "channels": (changed(x=torch.zeros(6, C + 1)), ValueError, r"x of shape \(M, 5\), got \(6, 6\)"),
    "rank": (changed(x=torch.zeros(6, 1, C)), ValueError, r"x of shape \(M, 5\), got \(6, 1, 5\)"),
    "condition": (changed(cond=torch.zeros(6, W)), ValueError, r"cond of shape \(M, 7\), got \(6, 48\)"),
    "rows": (changed(cond=torch.zeros(5, Z)), ValueError, "cond of as many rows as x, 6, got 5"),
    "whole numbers": (changed(x=torch.zeros(6, C, dtype=torch.int64)), ValueError, "x in a floating dtype no wider"),
    "too wide": (changed(cond=torch.zeros(6, Z, dtype=torch.float64)), ValueError, "convert it with cond.to"),
    "timesteps": (changed(timesteps=torch.zeros(5)), ValueError, r"\(6,\), \(6, 1\) or \(6, 1\), got \(5,\)"),
    "columns": (changed(timesteps=torch.zeros(6, 2)), ValueError, r"timesteps as a number or of shape .* got \(6, 2\)"),
    "no timesteps": (changed(timesteps="3"), TypeError, "timesteps as a tensor or a number, got str"),
    "kind of timesteps": (changed(timesteps=torch.zeros(6, dtype=torch.bool)), ValueError, "got torch.bool"),
    "NaN in x": (changed(x=torch.full((6, C), math.nan)), ValueError, "finite values in x"),
    "NaN in timesteps": (changed(timesteps=math.nan), ValueError, "finite values in timesteps"),
    "infinite condition": (changed(cond=torch.full((6, Z), math.inf)), ValueError, "finite values in cond"),
    "workspace": (changed(workspace_bytes=0), ValueError, "workspace_bytes as an int > 0"),
    "backend": (changed(backend="tpu"), ValueError, "backend one of torch, triton, cuda, got 'tpu'"),
    "meta": (changed(x=torch.zeros(6, C, device="meta")), ValueError, "x on the head's device cpu, got meta"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_raises(name):
    call, error, message = ERRORS[name]
    net, head = make()
    with pytest.raises(error, match=message):
        call(head, *inputs(net, 6))


def test_a_head_without_its_time_embedding_is_refused():
    net, head = make()
    object.__setattr__(head, "time", ())
    with pytest.raises(ValueError, match="evaluate expected a head with its time embedding"):
        evaluate(head, *inputs(net, 2))


def test_overflow_and_weights_that_are_not_finite():
    net, head = make(dtype=torch.float16)
    head.blocks[0].weight0.fill_(6e4)
    with pytest.raises(RuntimeError, match="evaluate overflowed: this call's"):
        evaluate(head, *inputs(net, 2))
    net, head = make()
    net.res_blocks[0].mlp[0].bias.data[3] = math.nan
    with pytest.raises(ValueError, match="evaluate expected finite weights in the head"):
        evaluate(head, *inputs(net, 2))


def test_a_time_embedding_that_is_not_finite():
    net, head = make()
    net.time_embed.mlp[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="evaluate expected finite weights in the head"):
        evaluate(head, *inputs(net, 2))


def test_the_environment_chooses(monkeypatch):
    net, head = make()
    monkeypatch.setenv("CSPD_BACKEND", "nothing")
    with pytest.raises(ValueError, match="CSPD_BACKEND one of torch"):
        evaluate(head, *inputs(net, 2))
