"""denoise as one operator: under torch.compile, with fake tensors, and the handle that stands for its head."""

import copy
import gc
import io
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from slow import slow
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from cspd_kernels import DiffusionHead, PhiloxNoise, denoise
from cspd_kernels.ops.denoise import WORKSPACE_BYTES
from cspd_kernels.testing import random_inputs, relative_error

OP = torch.ops.cspd_kernels.denoise.default
PYTORCH = tuple(map(int, torch.__version__.split(".")[:2]))
KINDS = ["stored", "addressed", "seed on the device", "guided", "guided per token", "strided"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test sees what another one compiled, nor that an error in it has left gradients off, as under PyTorch 2.4;
    the compiler's own deprecation warnings are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        yield


def arguments(head, kind, rows=5, seed=0):
    """(cond, x_T, noise, cfg_scale) of one kind of call."""
    cond, x, noise = random_inputs(head, rows, seed, guided=kind.startswith("guided"))
    if kind == "addressed":
        noise = PhiloxNoise(2**64 - 1, torch.arange(rows) * 2**31)
    if kind == "seed on the device":
        noise = PhiloxNoise(torch.tensor([-1]), torch.arange(rows) * 2**31)
    if kind == "strided":
        cond, x, noise = (v.transpose(0, -1).contiguous().transpose(0, -1) for v in (cond, x, noise))
    scale = {"guided": 2.5, "guided per token": torch.linspace(0.5, 3, rows)}.get(kind, 1.0)
    return cond, x, noise, scale


def op_arguments(head, cond, x, noise, scale):
    addressed = isinstance(noise, PhiloxNoise)
    stored, rows = (None, noise.rows) if addressed else (noise, None)
    scale = torch.tensor(scale) if isinstance(scale, float) else scale
    call = head.handle, cond, x, stored, rows, -1 if addressed else 0, 0.9, scale, None, WORKSPACE_BYTES
    return (*call, None, None, noise.seed) if addressed and torch.is_tensor(noise.seed) else call


def middle(head):
    """A function with a denoise between other operations, of (cond, x_T, noise, cfg_scale) or a seed for the noise."""

    def function(cond, x, noise, scale, rows=None):
        noise = noise if rows is None else PhiloxNoise(noise, rows)
        out = denoise(head, cond.tanh(), x * 2, noise, temperature=0.9, cfg_scale=scale)
        return out.sample * 3 + out.mean + out.log_std, out.path_log_std.exp()

    return function


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_registration(head, kind, rows):
    result = torch.library.opcheck(OP, op_arguments(head, *arguments(head, kind, rows)))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_fake_results_look_like_the_real_ones(make_diffloss, dtype, kind, rows):
    head = DiffusionHead.from_module(make_diffloss(), dtype=dtype)
    cond, x, noise, scale = arguments(head, kind, rows)
    real = denoise(head, cond, x, noise, cfg_scale=scale)
    with FakeTensorMode() as mode:
        if isinstance(noise, PhiloxNoise):
            seed = mode.from_tensor(noise.seed) if torch.is_tensor(noise.seed) else noise.seed
            noise = PhiloxNoise(seed, mode.from_tensor(noise.rows))
        cond, x, noise, scale = (mode.from_tensor(v) if torch.is_tensor(v) else v for v in (cond, x, noise, scale))
        fake = denoise(head, cond, x, noise, cfg_scale=scale)
    assert fake.sample is fake.mean
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_meta_head_gives_meta_tensors(make_diffloss):
    head = DiffusionHead.from_module(make_diffloss(), device="meta")
    out = denoise(head, *(v.to("meta") for v in random_inputs(head, 3, 0, guided=True)), cfg_scale=2.0)
    assert [v.shape for v in out] == [(3, 5), (3, 5), (3, 5), (3,)]
    assert {v.device.type for v in out} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_traced_symbolically_it_is_one_node_for_any_number_of_rows(head, kind):
    scale = arguments(head, kind)[3]

    def function(cond, x, noise, scale_or_rows):
        if kind == "addressed":
            noise = PhiloxNoise(2**63 + 7, scale_or_rows)
        elif kind == "seed on the device":
            noise = PhiloxNoise(noise, scale_or_rows)
        return tuple(denoise(head, cond, x, noise, cfg_scale=scale_or_rows if torch.is_tensor(scale) else scale))

    def inputs(rows):
        cond, x, noise, scale = arguments(head, kind, rows)
        if kind == "addressed":
            return cond, x, x, torch.arange(rows)
        if kind == "seed on the device":
            return cond, x, noise.seed, noise.rows
        return cond, x, noise, scale if torch.is_tensor(scale) else x

    # Equal sizes become one symbol: 8 and 16 are not those of anything else here.
    graph = make_fx(function, tracing_mode="symbolic")(*inputs(8))
    calls = [node for node in graph.graph.nodes if node.target is OP]
    assert len(calls) == 1
    assert calls[0].meta["val"][0].shape[0].node.expr.is_symbol  # nothing has fixed N
    for rows in (3, 11):
        assert_close(graph(*inputs(rows)), function(*inputs(rows)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [slow("eager"), "aot_eager"])
def test_compiled_in_the_middle_of_a_function(head, kind, backend):
    function = middle(head)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for rows in (5, 1, 0, 8, 9):
        assert_close(compiled(*arguments(head, kind, rows)), function(*arguments(head, kind, rows)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", [slow("stored"), "addressed", slow("guided")])
def test_compiled_by_inductor(head, kind):
    function = middle(head)
    compiled = torch.compile(function, fullgraph=True)
    for rows in (5, 8):
        assert_close(compiled(*arguments(head, kind, rows)), function(*arguments(head, kind, rows)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_numbers_of_rows_seeds_and_scales_do_not_compile_again(head, backend):
    counter = CompileCounterWithBackend(backend)
    function = middle(head)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    compilations = []
    for rows, seed, scale in zip(range(3, 15), (7, 2**62, 2**40, *range(2, 11)), torch.linspace(2, 5, 12).tolist()):
        cond, x, _ = random_inputs(head, rows, rows, guided=True)
        if PYTORCH < (2, 5):
            scale = torch.tensor(scale)  # its compiler takes numbers for constants
        inputs = cond, x, seed, scale, torch.arange(rows)
        assert_close(compiled(*inputs), function(*inputs))
        compilations.append(counter.frame_count)
    assert compilations[2:] == [compilations[1]] * 10  # the second call makes rows, seed and scale variable
    cond, x, _ = random_inputs(head, 6, 0)
    for seed in (2**63, 2**64 - 1):  # these travel as negative numbers, and a scale of 1 means no guidance
        if PYTORCH < (2, 5):
            torch._dynamo.reset()  # its compiler cannot make such an int variable
        inputs = cond, x, seed, 1.0, torch.arange(6)
        assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_value_of_a_seed_tensor_does_not_compile_again(head, backend):
    counter = CompileCounterWithBackend(backend)
    function = middle(head)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    cond, x, _ = random_inputs(head, 4, 0)
    seed = torch.tensor([7])
    for value in (7, 2**62, -1):
        seed.fill_(value)
        expected = function(cond, x, value % 2**64, 1.0, torch.arange(4))
        assert_close(compiled(cond, x, seed, 1.0, torch.arange(4)), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sizes_that_were_equal_and_are_not_any_more(head, backend):
    """The compiler holds some sizes as symbols and others as numbers; the check of the rows must see through that."""
    function = middle(head)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for rows, scale in ((6, 2.0), (6, 3.0), (12, 1.0), (3, 4.0), (6, 1.0), (7, 1.0), (7, torch.tensor(2.0))):
        inputs = *random_inputs(head, rows, 0, guided=scale != 1.0), scale
        assert_close(compiled(*inputs), function(*inputs))


def test_a_compiled_function_tells_heads_apart(make_diffloss):
    one, two = (DiffusionHead.from_module(make_diffloss(seed=seed)) for seed in (0, 1))

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(head, cond, x, noise):
        return denoise(head, cond, x, noise).sample

    inputs = random_inputs(one, 3, 0)
    for head in (one, two, one):
        assert torch.equal(compiled(head, *inputs), denoise(head, *inputs).sample)


def test_errors_of_values_and_of_the_backend_are_the_same_when_compiled(head):
    cond, x, noise = random_inputs(head, 4, 0)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x, backend=None):
        return denoise(head, cond, x + 1, noise, backend=backend).sample

    with pytest.raises(ValueError, match="finite values in x_T"):
        compiled(x / 0)
    with pytest.raises(ValueError, match="expected backend one of torch, triton, cuda, got 'metal'"):
        compiled(x, "metal")
    with pytest.raises(ValueError, match="expected backend one of torch, triton, cuda, got ''"):
        compiled(x, "")


def test_errors_of_shapes_and_numbers_raise_when_compiled(head):
    cond, x, noise = random_inputs(head, 4, 0)

    @torch.compile(backend="eager")
    def compiled(x, **options):
        return denoise(head, cond, x + 1, noise, **options).sample

    with pytest.raises(ValueError, match=r"x_T of shape \(N, 5\), got \(4, 4\)"):
        compiled(x[:, :4])
    with pytest.raises(ValueError, match=r"cond to have 8 .*got 4"):
        compiled(x, cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"finite temperature >= 0, got -1\.0"):
        compiled(x, temperature=-1.0)


def test_inputs_that_require_gradients_record_nothing(head):
    cond, x, noise = (v.requires_grad_() for v in random_inputs(head, 3, 0))
    for function in (denoise, torch.compile(denoise, backend="aot_eager", fullgraph=True)):
        assert not any(v.requires_grad for v in function(head, cond, x, noise))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_of_the_caller_changes_nothing_when_compiled(head, backend):
    inputs = random_inputs(head, 4, 14)
    expected = denoise(head, *inputs)
    compiled = torch.compile(denoise, backend=backend, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, compiled(head, *inputs), expected))


def test_a_handle_dies_with_its_head(make_diffloss):
    head = DiffusionHead.from_module(make_diffloss())
    call = op_arguments(head, *arguments(head, "stored"))
    assert DiffusionHead.of_handle(head.handle) is head
    assert torch.isfinite(OP(*call)[0]).all()
    handle = head.handle
    del head
    gc.collect()
    with pytest.raises(RuntimeError, match=f"expected the handle of a DiffusionHead of this process, got {handle}"):
        OP(*call)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match="handle of a DiffusionHead of this process"),
    ):
        OP(*call)


def twins(head):
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    yield copy.copy(head)
    yield copy.deepcopy(head)
    yield pickle.loads(pickle.dumps(head))
    yield torch.load(buffer, weights_only=False)
    yield head.to(head.dtype)


def test_copies_have_handles_of_their_own(head):
    inputs = random_inputs(head, 3, 0)
    expected = denoise(head, *inputs)
    copies = list(twins(head))
    assert len({twin.handle for twin in copies} | {head.handle}) == len(copies) + 1
    for twin in copies:
        assert DiffusionHead.of_handle(twin.handle) is twin
        assert all(map(torch.equal, denoise(twin, *inputs), expected))
    shared, deep = copies[:2]
    assert shared.input_weight is head.input_weight
    assert deep.input_weight.data_ptr() != head.input_weight.data_ptr()


def test_sample_is_the_mean_and_no_output_shares_memory_with_anything_else(head):
    for kind in KINDS:
        cond, x, noise, scale = arguments(head, kind)
        out = denoise(head, cond, x, noise, cfg_scale=scale)
        assert out.sample is out.mean
        values = [cond, x, *out[1:]] + [v for v in (noise, scale) if torch.is_tensor(v)]
        assert len({v.untyped_storage().data_ptr() for v in values}) == len(values)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_arrive_as_they_are(head, seed):
    cond, x, _ = random_inputs(head, 3, 0)
    noise = PhiloxNoise(seed, torch.arange(3))
    stored = torch.stack([noise.step(i, head.channels) for i in range(head.num_steps)])
    expected = denoise(head, cond, x, noise)
    assert_close(expected, denoise(head, cond, x, stored))
    held = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    on_device = PhiloxNoise(held, noise.rows)
    assert all(map(torch.equal, denoise(head, cond, x, on_device), expected))
    compiled = torch.compile(lambda x: denoise(head, cond, x, on_device).sample, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected.sample)
    held.fill_(7)  # a value, and no constant of what was compiled
    assert torch.equal(compiled(x), denoise(head, cond, x, PhiloxNoise(7, noise.rows)).sample)


def test_workspaces_beyond_64_bits(head):
    inputs = random_inputs(head, 3, 0)
    assert torch.equal(denoise(head, *inputs, workspace_bytes=2**70).sample, denoise(head, *inputs).sample)


AGAIN = """
import gc, importlib, sys, torch

def round():
    import cspd, cspd_kernels
    from cspd_kernels.testing import random_inputs, randomize_

    torch.manual_seed(len(rounds))
    head = cspd_kernels.DiffusionHead.from_module(randomize_(cspd.models.DiffLoss(5, 7, 1, 48, "4"), 0, 0.2))
    return cspd_kernels.denoise, head, random_inputs(head, 3, 0)

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] in ("cspd", "cspd_kernels")]:
        del sys.modules[name]
    gc.collect()

rounds, first = [], []
for _ in range(3):
    rounds.append(round())
    denoise, head, inputs = rounds[-1]
    first.append(denoise(head, *inputs).sample)
    forget()
assert {head.handle for _, head, _ in rounds} == {1}  # the same for all: whose head it is depends on the operator
assert not torch.equal(first[0], first[1])
for (denoise, head, inputs), sample in zip(rounds, first):
    assert torch.equal(denoise(head, *inputs).sample, sample)
    assert torch.equal(torch.compile(denoise, backend="aot_eager", fullgraph=True)(head, *inputs).sample, sample)
    torch._dynamo.reset()
import cspd_kernels.ops.denoise as module
importlib.reload(module)
denoise, head, inputs = round()
assert torch.isfinite(denoise(head, *inputs).sample).all()
print("done")
"""


@pytest.mark.slow
def test_the_package_can_be_imported_again(tmp_path):
    """As notebooks and test runners do; what came from the modules before stays of use."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", AGAIN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
