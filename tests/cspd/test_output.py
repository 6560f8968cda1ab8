"""What runs return: a tensor with statistics, which is a plain tensor to everybody else."""

from __future__ import annotations

import copy
import io
import pickle
import types

import numpy as np
import pytest
import torch
from small_models import small_mar
from torch.fx.experimental.proxy_tensor import make_fx

import cspd
from cspd.output import SampleOutput
from cspd.stats import Recorder


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


@pytest.fixture
def output():
    return SampleOutput.of(torch.arange(6.0).view(2, 3), types.SimpleNamespace(line="a line"))


def test_runs_return_it(pair):
    runner = cspd.SpecDecodeRunner(*pair)
    out = runner.run(2, 6, 3, seed=1)
    assert isinstance(out, cspd.SampleOutput)
    assert isinstance(out, torch.Tensor)
    assert type(out.images) is torch.Tensor
    assert out.stats is runner.stats
    assert out.images.data_ptr() == out.data_ptr()
    later = runner.run(2, 6, 3, seed=2)
    assert out.stats is not later.stats  # each its own
    drawn = cspd.sample_tokens(pair[1], 2, 4, seed=1)
    assert isinstance(drawn, cspd.SampleOutput)
    assert drawn.stats is None
    with cspd.patched(pair[1], whole=True):
        assert type(pair[1].sample_tokens(2, 4)) is torch.Tensor


OPERATIONS = {
    "add": lambda x: x + 1, "radd": lambda x: 1 - x, "index": lambda x: x[0], "view": lambda x: x.view(-1),
    "cat": lambda x: torch.cat([x, x]), "stack": lambda x: torch.stack([x, x]), "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(), "data": lambda x: x.data, "to": lambda x: x.to(torch.float64),
    "split": lambda x: x.split(1)[0], "loop": lambda x: next(iter(x)), "function": torch.nn.functional.relu,
    "like": torch.zeros_like, "new": lambda x: x.new_zeros(2), "module": torch.nn.Linear(3, 2),
    "max": lambda x: x.max(),
    "images": lambda x: x.images, "copy": copy.copy, "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_plain_tensors(output, name):
    plain = torch.arange(6.0).view(2, 3)
    operation = OPERATIONS[name]
    expected = plain if name == "images" else operation(plain)
    assert type(operation(output)) is torch.Tensor
    assert torch.equal(operation(output), expected)


def test_operations_run_no_python(output):
    """They take the way of a plain tensor: a mode that sees every call of ``torch`` sees the same ones."""
    assert type(output).__torch_function__ is torch._C._disabled_torch_function_impl
    assert not torch.overrides.has_torch_function((output,))


def test_files_hold_a_plain_tensor(output):
    file = io.BytesIO()
    torch.save({"images": output}, file)
    file.seek(0)
    images = torch.load(file, weights_only=True)["images"]
    assert type(images) is torch.Tensor
    assert torch.equal(images, output)
    assert np.array_equal(np.asarray(output), images.numpy())
    pair = copy.deepcopy([output, output])
    assert pair[0] is pair[1]


def test_compiled_and_traced_callers_take_it(output):
    def function(x):
        return (x * 2).sum() + x[0]

    expected = function(output.images)
    compiled = torch.compile(function, backend="eager")
    for given in (output, output.images):
        assert type(compiled(given)) is torch.Tensor
        assert torch.equal(compiled(given), expected)
    traced = make_fx(function)(output)
    assert torch.equal(traced(output), expected)
    assert torch.equal(torch.fx.symbolic_trace(function)(output), expected)
    assert torch.equal(torch.compile(function, backend="aot_eager")(output.images), expected)


def test_it_says_what_it_is(output):
    assert repr(output) == "SampleOutput((2, 3), float32, cpu, a line)"
    assert str(output) == f"{output}" == repr(output)
    assert repr(SampleOutput.of(torch.zeros(1, dtype=torch.float16))) == "SampleOutput((1,), float16, cpu)"


def test_showing_it_does_not_wait_for_a_device():
    recorder = Recorder(torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 4))
    recorder._cuda = True  # finish would ask for a device
    out = SampleOutput.of(torch.zeros(1), recorder)
    assert "statistics not read yet" in repr(out)
    recorder._cuda = False
    recorder.stop()
    assert "nothing drafted, 0 target calls" in repr(out)
    assert out.stats is recorder.finish() is out.stats
