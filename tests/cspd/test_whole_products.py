"""Whole images on a CPU by packed products: right, and never of weights that have changed since."""

import copy
import pickle

import numpy as np
import pytest
import torch
from small_models import sample, small_mar

import cspd
from cspd import transformer
from cspd.whole import passes
from cspd.whole.weights import Weights
from cspd_kernels import products
from cspd_kernels.products import packs
from cspd_kernels.testing import relative_error

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_weights_are_packed(monkeypatch):
    monkeypatch.setattr(products, "_SMALLEST", dict.fromkeys(products._SMALLEST, 1 << 12))


def inputs(model, known):
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(model.seq_len, generator=generator) for _ in range(2)])
    tokens = torch.randn(2, model.seq_len, model.token_embed_dim, generator=generator)
    embedding = torch.randn(4, model.fake_latent.shape[1], generator=generator)
    return tokens, order[:, :known], order, order[:, known : known + 3], embedding


def both(model, weights, known):
    """The conditions by packed weights, and by the model's own layers in float64."""
    tokens, known, order, where, embedding = inputs(model, known)
    actual = passes.conditions(weights, tokens, known, order.argsort(1), where, embedding)
    wide = copy.deepcopy(model).double()
    repeated = (tokens.double().repeat(2, 1, 1), known.repeat(2, 1), embedding.double(), where.repeat(2, 1))
    with torch.no_grad():
        return actual, transformer.conditions(wide, *repeated)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("known", [0, 1, 9])
def test_conditions_equal_the_models_own(known, dtype):
    model = small_mar(width=72)
    weights = Weights(model, dtype)
    actual, expected = both(model, weights, known)
    assert relative_error(actual, expected) <= BOUND[dtype]
    assert weights.encoder[0].fc1.is_packed == packs(dtype)


@pytest.mark.parametrize("dtype", BOUND)
def test_a_refresh_follows_every_layer(dtype):
    model = small_mar(width=72)
    weights = Weights(model, dtype)
    both(model, weights, 5)
    for name, parameter in model.named_parameters():
        if not name.startswith(("diffloss.", "class_emb", "fake_latent")):
            parameter.data.mul_(1.1).add_(0.01)
    stale = both(model, weights, 5)
    weights.refresh()
    actual, expected = both(model, weights, 5)
    assert relative_error(actual, expected) <= BOUND[dtype]
    assert relative_error(stale[0], expected) > BOUND[dtype]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_images_follow_changed_weights_and_copies_draw_the_same(dtype):
    model = small_mar(width=72)
    cspd.patch(model, whole=True, dtype=dtype)
    first = sample(model, cfg=2.0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(sample(twin, cfg=2.0), first)
    model.decoder_blocks[0].mlp.fc2.weight.data.mul_(-2)
    second = sample(model, cfg=2.0)
    assert not torch.equal(second, first)
    model.diffloss.net.res_blocks[1].mlp[0].weight.data.mul_(-2)
    third = sample(model, cfg=2.0)
    assert not torch.equal(third, second)
    torch.manual_seed(0)
    np.random.seed(0)
    fresh = cspd.sample_tokens(
        copy.deepcopy(cspd.unpatch(model)), 3, num_iter=6, cfg=2.0, labels=torch.tensor([1, 4, 9]), dtype=dtype
    )
    assert torch.equal(third, fresh)
