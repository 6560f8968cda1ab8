"""Products with weights packed for the CPU: right at every size, never stale, and F.linear where they cannot be."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from cspd_kernels import DiffusionHead, backends, denoise, products
from cspd_kernels.ops.denoise import reference
from cspd_kernels.products import Product, packs
from cspd_kernels.testing import random_inputs, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float64: 1e-12}
WIDTH = 72


@pytest.fixture(autouse=True)
def small_weights_are_packed(monkeypatch):
    monkeypatch.setattr(products, "_SMALLEST", dict.fromkeys(products._SMALLEST, 1 << 12))


@pytest.fixture
def again():
    """What was found out about this PyTorch is forgotten, before and afterwards."""

    def forget():
        products._why_not_packed.cache_clear()
        backends.log_once.cache_clear()

    forget()
    yield
    forget()


def needs_packing(dtype):
    if not packs(dtype):
        pytest.skip(f"this CPU or PyTorch packs no {dtype}")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, bias, activation):
    bias = None if bias is None else bias.double()
    y = F.linear(x.double(), weight.double(), bias).detach()
    return {None: y, "gelu": F.gelu(y), "silu": F.silu(y)}[activation]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(67, 131), (64, 64), (10, 500), (300, 77)])
def test_equals_the_definition_in_float64(outputs, inputs, with_bias, activation, dtype):
    weight, bias = random(outputs, inputs, seed=1).to(dtype), random(outputs, seed=2).to(dtype) if with_bias else None
    product = Product(weight, bias)
    for shape in ((1,), (3,), (2500,), (2, 1, 3, 5)):
        x = random(*shape, inputs, seed=3).to(dtype)
        y = product(x, activation)
        assert (y.shape, y.dtype) == ((*shape, outputs), dtype)
        assert relative_error(y, exact(x, weight, bias, activation)) <= TOLERANCE[dtype]
    assert product(random(0, inputs).to(dtype), activation).shape == (0, outputs)
    wide = random(9, 2 * inputs, seed=4).to(dtype)
    for x in (wide[:, ::2], random(inputs, 9, seed=5).to(dtype).t(), wide[:, 1 : inputs + 1]):
        assert relative_error(product(x, activation), exact(x, weight, bias, activation)) <= TOLERANCE[dtype]
    assert product.is_packed == (packs(dtype) and min(outputs, inputs) >= 64)


def test_a_weight_that_is_not_contiguous_and_of_another_type():
    source, bias = random(90, 80).t(), random(80)
    for dtype in (torch.float32, torch.bfloat16):
        product, x = Product(source, bias, dtype), random(7, 90, seed=1).to(dtype)
        assert relative_error(product(x), exact(x, source.to(dtype), bias.to(dtype), None)) <= TOLERANCE[dtype]
        part = product.part(8, 75)(x)
        assert relative_error(part, exact(x, source[8:75].to(dtype), bias[8:75].to(dtype), None)) <= TOLERANCE[dtype]


def changes(layer):
    """By ``.data``, by an optimiser, by ``load_state_dict``; then of one bias."""

    def by_optimiser():
        optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer(random(4, layer.in_features)).square().sum().backward()
        optimiser.step()

    yield lambda: layer.weight.data[40, -1].add_(3)
    yield by_optimiser
    yield lambda: layer.load_state_dict({k: random(*v.shape, seed=9) for k, v in layer.state_dict().items()})
    yield lambda: layer.bias.data[5].add_(3)
    yield lambda: layer.weight.data.t()[:20].neg_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_follows_its_weight(dtype):
    layer = nn.Linear(96, 80)
    product, x = Product(layer.weight, layer.bias, dtype), random(5, 96).to(dtype)
    part = product.part(3, 70)
    for change in changes(layer):
        before = product(x), part(x)
        change()
        product.look()
        expected = exact(x, layer.weight.to(dtype), layer.bias.to(dtype), None)
        assert relative_error(product(x), expected) <= TOLERANCE[dtype]
        assert relative_error(part(x), expected[:, 3:70]) <= TOLERANCE[dtype]
        assert not torch.equal(product(x), before[0])
        assert not torch.equal(part(x), before[1])


def test_what_has_not_changed_is_not_packed_again():
    needs_packing(torch.float32)
    product = Product(random(80, 96), None)
    product.look()
    assert not product.is_packed
    product(random(1, 96))
    made = product._made
    product.look()
    assert product._made is made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_pickles_make_their_own(dtype):
    product, x = Product(random(80, 96), random(80), dtype), random(3, 96).to(dtype)
    expected = product(x)
    for twin in (copy.copy(product), copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert not twin.is_packed
        assert torch.equal(twin(x), expected)


def test_holds_no_plain_copy_beside_the_packed_one():
    needs_packing(torch.bfloat16)
    product = Product(random(80, 96), random(80), torch.bfloat16)
    assert product.bytes == 0
    product(random(1, 96).bfloat16())
    assert product._made.plain is None
    assert product.bytes == (80 * 96 + 80) * 2
    plain = Product(random(80, 96), random(80), torch.float64)
    plain(random(1, 96).double())
    assert plain.bytes == (80 * 96 + 80) * 8


@pytest.mark.parametrize("missing", ["operators", "right results", "support"])
def test_f_linear_serves_where_it_cannot_be_packed(missing, monkeypatch, again, caplog):
    def raises(*_):
        raise RuntimeError("not on this CPU")

    fakes = {
        "operators": {},
        "right results": {
            "_reorder_linear_weight": lambda w, _: w,
            "_linear_pointwise": lambda x, w, b, *_: F.linear(x, w, b) * 1.1,
        },
        "support": {"_reorder_linear_weight": raises, "_linear_pointwise": raises},
    }
    monkeypatch.setattr(products, "_operators", lambda: SimpleNamespace(**fakes[missing]))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    product, x = Product(random(80, 96), random(80)), random(3, 96)
    with caplog.at_level(logging.INFO, "cspd_kernels"):
        assert torch.equal(product(x), F.linear(x, product.weight, product.bias))
        assert not product.is_packed
        assert product.bytes == 0
        product.look()
    assert len([r for r in caplog.records if "F.linear" in r.message]) == 1


def test_follows_the_switch_of_mkldnn():
    needs_packing(torch.float32)
    product, x = Product(random(80, 96), None), random(3, 96)
    product(x)
    torch._C._set_mkldnn_enabled(False)
    try:
        product.look()
        assert not product.is_packed
        assert torch.equal(product(x), F.linear(x, product.weight))
    finally:
        torch._C._set_mkldnn_enabled(True)
    product.look()
    assert product.is_packed


def test_the_proof_leaves_the_generators_and_modes_alone(again):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        product, x = Product(random(80, 96), random(80)), random(3, 96)
        assert relative_error(product(x), exact(x, product.weight, product.bias, None)) <= 1e-5
    assert torch.equal(torch.get_rng_state(), state)
    product.look()
    assert relative_error(product(x.clone()), exact(x, product.weight, product.bias, None)) <= 1e-5


# --- in the chain ---


@pytest.mark.parametrize("parallel_tol", [None, 1e-6])
@pytest.mark.parametrize("guided", [False, True])
def test_the_chain_equals_its_definition(make_diffloss, guided, parallel_tol):
    head = DiffusionHead.from_module(make_diffloss("mild", 2, width=WIDTH))
    inputs, scale = random_inputs(head, 7, 1, guided=guided), 2.5 if guided else 1.0
    actual = denoise(head, *inputs, cfg_scale=scale, backend="torch", parallel_tol=parallel_tol)
    expected = reference.denoise(head, *inputs, 1.0, scale if guided else None, dtype=torch.float32)
    for a, b in zip(actual, expected):
        assert relative_error(a, b) <= 1e-5
    if packs(torch.float32):
        assert head.shared["layers"].final_mod.is_packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chain_sees_changed_weights_of_a_head(make_diffloss, dtype):
    module = make_diffloss("mild", 2, width=WIDTH)
    head = DiffusionHead.from_module(module, dtype=dtype)
    twin = head.with_schedule(make_diffloss("linear", 1).gen_diffusion.schedule)
    inputs = random_inputs(head, 3, 1)

    def run(head):
        return denoise(head, *(v[: head.num_steps] if v.dim() == 3 else v for v in inputs), backend="torch").sample

    for field in ("weight0", "weight1", "mod_weight"):
        before = run(head), run(twin)
        getattr(head.blocks[1], field).data.mul_(1.5)
        assert not torch.equal(run(head), before[0])
        assert not torch.equal(run(twin), before[1])
        assert torch.equal(run(head), run(copy.deepcopy(head)))
    assert twin.shared is head.shared
    assert head.shared["layers"].final_mod.weight is head.final_mod_weight
