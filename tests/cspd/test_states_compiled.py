"""``torch.compile`` of a head, of its parts and of their methods, before a patch and after one."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn as nn
from field.flow_heads import FlowMatchingHead
from field.other_networks import DiffHead
from foreign import conditions, made
from slow import mostly_slow, slow
from small_models import sample
from states import after, before, listening, model_in, served_calls

import cspd
from cspd_kernels.testing import relative_error


def head(model, compiled):
    model.diffloss = compiled(model.diffloss)


def net(model, compiled):
    model.diffloss.net = compiled(model.diffloss.net)


def net_in_place(model, compiled):
    model.diffloss.net.compile(**compiled.keywords)


def head_in_place(model, compiled):
    model.diffloss.compile(**compiled.keywords)


def forward(model, compiled):
    model.diffloss.net.forward = compiled(model.diffloss.net.forward)


def a_layers_forward(model, compiled):
    layer = model.diffloss.net.cond_embed
    layer.forward = compiled(layer.forward)


def sample_method(model, compiled):
    model.diffloss.sample = compiled(model.diffloss.sample)


def loop(model, compiled):
    diffusion = model.diffloss.gen_diffusion
    diffusion.p_sample_loop = compiled(diffusion.p_sample_loop)


def whole_model(model, compiled):
    return compiled(model)


def models_method(model, compiled):
    model.sample_tokens = compiled(model.sample_tokens)


CHANGES = [
    head, net, net_in_place, head_in_place, forward, a_layers_forward, sample_method, loop, whole_model, models_method,
]  # fmt: skip


# Three differ from others only in what is compiled in place of what: one backend is enough for those.
COMPILED = [(change, "eager") for change in CHANGES]
COMPILED += [(c, "aot_eager") for c in CHANGES if c not in (head_in_place, a_layers_forward, models_method)]
FAST = [(change, "eager") for change in (head, net_in_place, forward, loop, whole_model)]


@pytest.mark.parametrize("when", [before, after])
@pytest.mark.parametrize(
    ("change", "backend"), mostly_slow(COMPILED, fast=FAST), ids=lambda value: getattr(value, "__name__", value)
)
def test_compiled_parts_are_served(change, backend, when):
    torch._dynamo.reset()
    outcome = when(lambda model: change(model, partial(torch.compile, backend=backend)))
    assert (outcome.what, outcome.told) == ("served", [])


def test_a_compiled_block_is_refused_before_and_runs_its_own_code_after():
    def change(model):
        model.diffloss.net.res_blocks[0] = torch.compile(model.diffloss.net.res_blocks[0], backend="eager")

    torch._dynamo.reset()
    outcome = before(change)
    assert outcome.what == "refused"
    assert "net.res_blocks.0" in outcome.told[0]
    outcome = after(change)
    assert outcome.what == "own"
    assert "net.res_blocks.0" in outcome.told[0]


def test_a_hook_of_a_compiled_network_is_no_part_of_what_the_kernels_compute():
    def change(model):
        model.diffloss.net = torch.compile(model.diffloss.net, backend="eager")
        model.diffloss.net.register_forward_hook(lambda module, args, out: out * 2)
        diffusion = model.diffloss.gen_diffusion  # its own sample gives net.forward, past its hooks: here, the network
        model.diffloss.sample = lambda z, temperature=1.0, cfg=1.0: diffusion.p_sample_loop(
            model.diffloss.net, (len(z), 4), torch.ones(len(z), 4), False, model_kwargs={"c": z}
        )

    torch._dynamo.reset()

    def run(model):
        torch.manual_seed(0)
        return model.diffloss.sample(torch.ones(2, 32))

    outcome = after(change, sample=run)
    assert outcome.what == "own"
    assert "around its net has forward hooks" in outcome.told[0]


@pytest.mark.parametrize("part", [slow("model"), slow("sample"), "loop"])
def test_a_frame_follows_patch_and_unpatch(part):
    """Compiled and run before the patch, then after it and after ``unpatch``: always the tokens of its own code."""
    torch._dynamo.reset()
    model = model_in()
    compiled = partial(torch.compile, backend="eager")
    if part == "model":
        frame = compiled(lambda z: model.diffloss.sample(z, 0.9))
    elif part == "sample":
        function = compiled(model.diffloss.sample)

        def frame(z):
            return function(z, 0.9)
    else:
        diffusion = model.diffloss.gen_diffusion
        frame = compiled(
            lambda z: diffusion.p_sample_loop(
                model.diffloss.net.forward, (3, 4), torch.ones(3, 4), False, model_kwargs={"c": z}, temperature=0.9
            )
        )
    z = torch.randn(3, 32)

    def run():
        torch.manual_seed(0)
        with torch.no_grad():
            return frame(z)

    expected = run()
    counts = []
    for change in (cspd.patch, cspd.unpatch, cspd.patch, cspd.patch, cspd.unpatch):
        change(model)
        with served_calls() as served:
            assert relative_error(run(), expected) < 1e-5
        counts.append(len(served))
    assert counts == [1, 0, 1, 1, 0]


def test_a_copy_whose_compiled_forward_still_runs_its_original_is_not_served():
    """A deep copy of a model shares compiled methods with it, so that they run the original's weights."""
    torch._dynamo.reset()
    model, messages = model_in(), []
    model.diffloss.net.forward = torch.compile(model.diffloss.net.forward, backend="eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.diffloss.net.cond_embed.weight.mul_(2)
    expected = sample(model)
    with listening(messages), pytest.raises(ValueError, match="net had its forward replaced"):
        cspd.patch(twin)
    assert torch.equal(sample(twin), expected)


def test_a_patched_sample_can_be_compiled_copied_and_read():
    model = model_in()
    signature, doc = inspect.signature(model.diffloss.sample), model.diffloss.sample.__doc__
    cspd.patch(model)
    assert inspect.signature(model.diffloss.sample) == signature
    assert (model.diffloss.sample.__name__, model.diffloss.sample.__doc__) == ("sample", doc)
    expected = sample(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.diffloss.sample.__self__.module is twin.diffloss
        assert inspect.signature(twin.diffloss.sample) == signature
        with served_calls() as served:
            assert torch.equal(sample(twin), expected)
        assert served
        assert all(call.net is twin.diffloss.net for call in served)
        cspd.unpatch(twin)
        assert "sample" not in vars(twin.diffloss)
    assert cspd.is_patched(model)


def test_a_patched_layer_list_stays_a_module_list():
    model = cspd.patch(model_in())
    assert isinstance(model.diffloss.net.res_blocks, nn.ModuleList)
    assert type(model.diffloss) is type(model_in().diffloss)


def test_a_sampler_compiled_in_one_graph_that_is_not_served(caplog):
    """As in stepfun-ai/NextStep-1: the graph must be a whole one, and a wrapper hides that it is compiled."""
    whole = torch.compile(FlowMatchingHead.sample, fullgraph=True, backend="eager")

    class Compiled(FlowMatchingHead):
        @functools.wraps(FlowMatchingHead.sample)
        def sample(self, *args, **kwargs):
            return whole(self, *args, **kwargs)

        sample.original = FlowMatchingHead.sample

    def call(head):
        torch.manual_seed(5)
        return head.sample(conditions(), num_sampling_steps=6)

    expected = call(made(FlowMatchingHead))
    head = cspd.patch(made(Compiled))
    assert relative_error(call(head), expected) < 1e-5
    assert not cspd.describe(head).heads[0].own_code
    head.net.res_blocks[0].register_forward_hook(lambda *_: None)
    assert relative_error(call(head), expected) < 1e-5
    assert "has a forward hook" in caplog.text


def test_nothing_is_compiled_to_be_compared():
    """Of a head with a loop of its own, whose code base compiles its sample in the class."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    class Compiled(DiffHead):
        sample = torch.compile(DiffHead.sample, backend=backend)

    head = cspd.patch(made(Compiled))
    with torch.no_grad():
        tokens = head.sample(conditions(), 2.5, 5)
        around = torch.compile(lambda z: head.sample(z, 2.5, 5) + 1.0, backend=backend)
        assert around(conditions()).shape == tokens.shape
        compiled.clear()  # what is around the call
    assert cspd.describe(head).heads[0].own_loop is None
    assert (head.net.evaluations, len(compiled)) == (0, 0)
    assert tokens.shape == (6, head.ch_target)
