"""What weights are and how they change, before a patch and after one: types, memory, optimisers, devices, defaults."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn as nn
from slow import slow
from small_models import sample, small_mar
from states import after, before, everything, listening, model_in, own, rows, served_calls

import cspd
from cspd_kernels.testing import relative_error


def layer(model):
    return model.diffloss.net.cond_embed


@contextlib.contextmanager
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def scaled(model):
    return {name: value * 1.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}


def swap_load(model):
    with swapping():
        model.load_state_dict(scaled(model))


def through_meta(model):
    state = scaled(model)
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


def one_buffer(model):
    """All weights are views of one buffer, which is then changed in place."""
    weights = list(model.diffloss.net.parameters())
    buffer, start = torch.cat([weight.data.flatten() for weight in weights]), 0
    for weight in weights:
        weight.data = buffer[start : start + weight.numel()].view_as(weight)
        start += weight.numel()
    buffer.mul_(1.2)


def not_contiguous(model):
    layer(model).weight.data = layer(model).weight.data.t().contiguous().t()


def tied(model):
    blocks = model.diffloss.net.res_blocks
    blocks[1].mlp[0].weight = blocks[0].mlp[0].weight


def as_buffer(model):
    weight = layer(model).weight.data * 2
    del layer(model).weight
    layer(model).register_buffer("weight", weight)


def optimised(model, **options):
    net = model.diffloss.net.requires_grad_(True)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.05, **options)
    x = torch.ones(2, 4)
    net(x, torch.tensor([1, 2]), torch.ones(2, 32)).square().sum().backward()
    optimiser.step()
    model.requires_grad_(False)


def averaged(model):
    with torch.no_grad():
        for weight in model.diffloss.net.parameters():
            weight.data.mul_(0.9).add_(0.01)


def one_element(model):
    layer(model).weight.data[3, 5] += 4.0


SERVED = {
    "load_state_dict": lambda m: m.load_state_dict(scaled(m)),
    "load_state_dict, assigned": lambda m: m.load_state_dict(scaled(m), assign=True),
    "load_state_dict, swapped": swap_load,
    "through the meta device": through_meta,
    "one flat buffer": one_buffer,
    "not contiguous": not_contiguous,
    "tied": tied,
    "a buffer": as_buffer,
    "one element": one_element,
    "averaged": averaged,
    "fused": lambda m: optimised(m, fused=True),
    "foreach": lambda m: optimised(m, foreach=True),
}


@pytest.mark.parametrize("when", [before, after])
@pytest.mark.parametrize("what", SERVED)
def test_changed_weights_are_served(what, when):
    outcome = when(SERVED[what])
    assert (outcome.what, outcome.told) == ("served", [])


def doubled_by_swap(model):
    with swapping():
        model.double()


@pytest.mark.parametrize("when", [before, after])
@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.diffloss.double(), doubled_by_swap])
def test_wider_heads_are_served(change, when):
    outcome = when(change, sample=rows)
    assert (outcome.what, outcome.told) == ("served", [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_converted_weights_are_followed_one_by_one(dtype):
    model, twin = cspd.patch(model_in(), dtype=dtype), cspd.patch(model_in(), dtype=dtype)
    sample(model)
    for change in (one_element, averaged, one_buffer, optimised):
        before_it = sample(twin)
        change(model)
        change(twin)
        cspd.patch(twin, dtype=dtype)  # packs anew
        assert torch.equal(sample(model), sample(twin))
        assert not torch.equal(sample(twin), before_it)


NOT_READ = {
    "float8": lambda m: setattr(
        layer(m), "weight", nn.Parameter(layer(m).weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    ),
    "int8 buffer": lambda m: (
        layer(m).__delattr__("weight"),
        layer(m).register_buffer("weight", torch.ones(32, 32, dtype=torch.int8)),
    ),
    "quantize_dynamic": lambda m: setattr(
        m.diffloss, "net", torch.ao.quantization.quantize_dynamic(m.diffloss.net, {nn.Linear})
    ),
    "a shard": lambda m: setattr(layer(m), "weight", nn.Parameter(layer(m).weight.data[:5], requires_grad=False)),
    "a subclass of tensors": lambda m: setattr(
        layer(m), "weight", nn.Parameter(layer(m).weight.data.as_subclass(Quantised), requires_grad=False)
    ),
}


class Quantised(torch.Tensor):
    """Stands for torchao's and DTensor."""


@pytest.mark.filterwarnings("ignore:torch.ao.quantization", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("what", NOT_READ)
def test_weights_that_are_not_read(what):
    with torch.no_grad():
        outcome = before(NOT_READ[what], sample=rows)
        assert outcome.what == "refused"
        assert "net.cond_embed.weight" in outcome.told[0] or "not torch.nn.Linear" in outcome.told[0]
        outcome = after(NOT_READ[what], sample=rows)
        assert outcome.what in ("own", "fails")  # some does not run here without its kernels
        assert outcome.told


def test_swapped_into_a_subclass():
    def change(model):
        weight = layer(model).weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight.data.as_subclass(Quantised) * 2, requires_grad=False))

    outcome = after(change)
    assert outcome.what == "own"
    assert "Quantised" in outcome.told[0]


def test_nan_weights():
    def change(model):
        layer(model).weight.data[0, 0] = float("nan")

    outcome = before(change)
    assert outcome.what == "refused"
    assert "NaN or infinity in net.cond_embed.weight" in outcome.told[0]
    model = cspd.patch(model_in())
    change(model)
    tokens, error = own(model, rows)
    assert isinstance(error, ValueError) or bool(tokens.isnan().any())


@pytest.mark.slow
def test_the_meta_device():
    for when in (before, after):
        outcome = when(lambda model: model.to("meta"))
        assert outcome.what == "own"
        assert "meta device" in outcome.told[0]
    model, twin = small_mar(schedule="linear").to("meta"), model_in(3)
    cspd.patch(model)
    model.to_empty(device="cpu").load_state_dict(twin.state_dict())
    expected = sample(twin)
    with served_calls() as served:
        assert relative_error(sample(model), expected) < 1e-5
    assert served


def test_weights_under_inference_mode():
    with torch.inference_mode():
        for when in (before, after):
            assert when(lambda model: layer(model).weight.mul_(0.5)).what == "served"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    model, twin = model_in(), model_in()
    try:
        torch.set_default_dtype(dtype)
        expected, failure = own(twin, rows)
        cspd.patch(model)
        with served_calls() as served:
            actual, error = own(model, rows)
        assert type(error) is type(failure)
        assert failure is not None or relative_error(actual, expected) < 1e-5
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert failure is not None or served
    assert relative_error(rows(model), rows(twin)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_default_device(device):
    model, twin, z = model_in(), model_in(), torch.randn(3, 32)
    noise, messages = torch.randn(3, 4), []

    def run(model):
        torch.manual_seed(0)
        arguments = {"clip_denoised": False, "model_kwargs": {"c": z}, "temperature": 0.9}
        loop = model.diffloss.gen_diffusion.p_sample_loop
        return loop(model.diffloss.net.forward, (3, 4), noise, **arguments)

    plain = run(twin)
    with torch.device(device), listening(messages):
        cspd.patch(model)
        _, failure = own(twin, run)
        actual, error = own(model, run)
        assert own(model, rows)[1] is None or device == "meta"
    assert device == "meta" or failure is None  # there its own code makes its tables on the meta device
    assert error is None or type(error) is type(failure)
    assert error is not None or relative_error(actual, plain) < 1e-5
    with served_calls() as served:
        assert relative_error(run(model), plain) < 1e-5
    assert served


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [("live", torch.bfloat16), ("frozen", None), slow("live", None), slow("frozen", torch.bfloat16)],
)
@pytest.mark.parametrize("move", ["double", "meta", "swap"])
def test_a_model_that_moves_on_leaves_nothing_behind(move, dtype, weights):
    model = cspd.patch(model_in(), dtype=dtype, weights=weights)
    with served_calls() as served:
        sample(model)
    assert served
    patch = model.diffloss.net._cspd_patches[-1]
    (form,) = patch.cache._forms.values()
    held = [weakref.ref(form.first), weakref.ref(form.first.cond_weight)]
    memory = weakref.ref(layer(model).weight.untyped_storage())
    del form, served
    model.diffloss.to("cpu")  # stays where it is, and so does what is packed
    assert all(ref() is not None for ref in held)
    with swapping() if move == "swap" else contextlib.nullcontext():
        model.to("meta") if move == "meta" else model.double()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert memory() is None


def test_frozen_weights_are_looked_at_again_by_the_next_patch():
    model, twin = cspd.patch(model_in(), weights="frozen"), model_in()
    sample(model)
    was = everything(model)
    for change in (one_element, averaged):
        change(model)
        change(twin)
    cspd.patch(model, weights="frozen")
    assert relative_error(sample(model), sample(twin)) < 1e-5
    assert everything(model).keys() == was.keys()
