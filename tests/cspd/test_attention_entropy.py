"""How spread out the attention to the known tokens is: against a softmax written out."""

from __future__ import annotations

import pytest
import torch
from ragged import BOUNDS, alone, inputs, made, model, places, spoilt
from small_models import small_mar
from torch.utils._python_dispatch import TorchDispatchMode

from cspd import transformer
from cspd.whole import passes
from cspd.whole.transformers import ByWeights
from cspd.whole.weights import Weights
from cspd_kernels.testing import relative_error


def plain_entropy(mar, tokens, known, where, embedding) -> torch.Tensor:
    """(1, n), from scores of the model's own modules and a softmax written out."""
    block, seen = mar.decoder_blocks[-1], []
    hook = block.attn.qkv.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        transformer.conditions(mar, tokens, known, embedding, where)
    finally:
        hook.remove()
    (out,), heads = seen, block.attn.num_heads  # (1, buffer + L, 3 D)
    q, k = (part.view(part.shape[1], heads, -1) for part in out.chunk(3, dim=2)[:2])
    keys = [*range(mar.buffer_size), *(mar.buffer_size + known[0]).tolist()]
    found = []
    for position in where[0]:
        total = 0.0
        for head in range(heads):
            scores = (k[keys, head] @ q[mar.buffer_size + position, head]) / q.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum()
            total += float(-(weights * weights.log()).sum() / torch.tensor(float(len(keys))).log())
        found.append(total / heads)
    return torch.tensor([found])


@pytest.mark.parametrize("guided", [False, True])
def test_entropy_is_that_of_a_plain_softmax_over_what_is_known(guided):
    plan, mar = made(guided=guided), model().double()
    with torch.no_grad():
        mar.decoder_blocks[-1].attn.qkv.weight.mul_(2.5)  # attention that is no longer nearly uniform
    at, image = places(plan)
    taken = plan.ragged(at, image, 16, 2)
    tokens, embedding = inputs(6, taken.doubled, torch.float64)
    for dtype, bound in BOUNDS:
        weights = Weights(mar, dtype)
        z, entropy = ByWeights(weights, "torch").conditions(spoilt(tokens, taken, torch.nan), taken, embedding, True)
        assert torch.equal(z, ByWeights(weights, "torch").conditions(tokens, taken, embedding))
        assert entropy.dtype == weights.stream and entropy.shape == taken.where.shape
        assert entropy.min() >= 0 and entropy.max() <= 1
        assert entropy.min() < 0.8
        for row in range(6):
            known, rank, where, _ = alone(plan, row, at, image, 2)
            with torch.no_grad():
                expected = plain_entropy(mar, tokens[row : row + 1], known, where, embedding[row : row + 1])
            assert relative_error(entropy[row : row + 1, taken.valid[row]], expected) < max(bound, 1e-6)
            _, own = passes.conditions(
                weights, tokens[row : row + 1], known, rank, where, embedding[row : row + 1], attention=True
            )
            assert relative_error(own, entropy[row : row + 1, taken.valid[row]]) < max(bound, 1e-6)


def test_entropy_of_even_and_of_sharp_attention():
    plan, mar = made(16), model()
    at, image = torch.tensor([0, 7, 15]), torch.tensor([0, 1, 2])
    taken = plan.ragged(at, image, 16)
    tokens, embedding = inputs(3, 2)
    qkv = mar.decoder_blocks[-1].attn.qkv

    def entropy():
        return ByWeights(Weights(mar, torch.float32), "torch").conditions(tokens, taken, embedding, attention=True)[1]

    with torch.no_grad():
        qkv.weight[:96].mul_(1000.0)
        assert entropy().max() < 0.3
        qkv.weight[:48].zero_()
        qkv.bias[:48].zero_()  # all scores are zero
        even = entropy()
    assert even.max() <= 1 and relative_error(even, torch.ones(3, 1)) < 1e-6
    single = small_mar(buffer_size=1)
    _, entropies = ByWeights(Weights(single, torch.float32), "torch").conditions(
        tokens, taken, embedding, attention=True
    )
    assert entropies[0] == 0.0  # one key has it all
    assert 0.0 < entropies[1] <= 1.0


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ragged", [False, True])
def test_entropy_costs_nothing_where_it_is_not_asked_for(ragged):
    plan, weights = made(), Weights(model(), torch.float32)
    taken = plan.ragged(*places(plan), 16) if ragged else plan.step(3)
    tokens, embedding = inputs(len(taken.where), 2)
    with Counted() as off:
        z = ByWeights(weights, "torch").conditions(tokens, taken, embedding)
    with Counted() as on:
        same, _ = ByWeights(weights, "torch").conditions(tokens, taken, embedding, attention=True)
    assert torch.equal(z, same)
    own = ("special_entr.default", "_softmax.default", "constant_pad_nd.default")
    assert not any(name in off.names for name in own)
    assert all(on.names.count(name) == 1 for name in own)
