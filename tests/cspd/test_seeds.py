"""Seeds and generators of a call's own; the global generators stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import small_mar

import cspd
from cspd.errors import InvalidInput, WrongType
from cspd_kernels.testing import relative_error


@pytest.fixture(scope="module")
def pair():
    return small_mar(0, width=16, schedule="linear"), small_mar(1, width=32, schedule="linear")


def runs(pair):
    runner = cspd.SpecDecodeRunner(*pair)
    strict = cspd.SpecDecodeRunner(*pair, verify="strict")
    return {
        "run": lambda **given: runner.run(2, 5, 2, cfg=2.0, **given),
        "strict": lambda **given: strict.run(2, 5, 2, **given),
        "sample_tokens": lambda **given: cspd.sample_tokens(pair[1], 2, 5, cfg=2.0, **given),
        "philox": lambda **given: cspd.sample_tokens(pair[1], 2, 5, noise="philox", **given),
    }


KINDS = ["run", "strict", "sample_tokens", "philox"]


@pytest.fixture(params=KINDS)
def run(request, pair):
    return runs(pair)[request.param]


def states():
    return torch.get_rng_state(), np.random.get_state()[1].copy()


def test_a_generator_decides(run):
    generator = torch.Generator().manual_seed(7)
    before = states()
    first, second = run(generator=generator), run(generator=generator)
    assert all(np.array_equal(now, was) for now, was in zip(states(), before))  # the global ones are not touched
    assert not torch.equal(first, second)
    generator.manual_seed(7)
    assert torch.equal(run(generator=generator), first)
    assert torch.equal(run(generator=generator), second)
    generator.manual_seed(7)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    assert torch.equal(run(seed=seed), first)


def test_a_seed_leaves_the_global_generators(run):
    before = states()
    first = run(seed=3)
    assert all(np.array_equal(now, was) for now, was in zip(states(), before))
    assert torch.equal(run(seed=3), first)
    assert not torch.equal(run(seed=4), first)
    assert torch.isfinite(run(seed=2**64 - 1)).all()


def test_a_refused_call_leaves_the_generator(pair):
    generator, runner = torch.Generator().manual_seed(7), cspd.SpecDecodeRunner(*pair)
    state = generator.get_state()
    for refused in (
        lambda: runner.run(2, 0, 2, generator=generator),
        lambda: cspd.sample_tokens(pair[1], 2, 0, generator=generator),
        lambda: cspd.sample_tokens(pair[1], -1, 3, generator=generator),
    ):
        with pytest.raises(cspd.CspdError):
            refused()
        assert torch.equal(generator.get_state(), state)


def test_both_are_refused_before_anything_happens(run):
    generator = torch.Generator().manual_seed(7)
    state, before = generator.get_state(), states()
    with pytest.raises(InvalidInput, match="expected seed or generator, got both"):
        run(seed=1, generator=generator)
    with pytest.raises(WrongType, match=r"expected generator as a torch\.Generator, got int"):
        run(generator=3)
    with pytest.raises(ValueError, match="expected seed to be an int"):
        run(seed=-1)
    assert torch.equal(generator.get_state(), state)
    assert all(np.array_equal(now, was) for now, was in zip(states(), before))


@pytest.mark.parametrize("options", [{}, {"noise": "philox"}])
def test_a_seed_means_the_model_s_own_images(pair, options):
    """What sample_tokens draws by a seed is what the global generators with that seed would give."""
    model, seed = pair[1], 2**40 + 5
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    expected = cspd.sample_tokens(model, 2, 6, cfg=2.0, **options)
    assert torch.equal(cspd.sample_tokens(model, 2, 6, cfg=2.0, seed=seed, **options), expected)
    if not options:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        assert relative_error(model.sample_tokens(2, 6, cfg=2.0), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    models = [small_mar(seed, width=16, schedule="linear").cuda() for seed in (0, 1)]
    run = runs(models)[kind]
    for device in ("cpu", "cuda"):
        generator = torch.Generator(device).manual_seed(7)
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        first, second = run(generator=generator), run(generator=generator)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(torch.cuda.get_rng_state(), before[1])
        assert not torch.equal(first, second)
        generator.manual_seed(7)
        # The first calls of a size compile and capture; what counts is the graph's from the first one on.
        assert torch.equal(run(generator=generator), first)
        assert torch.equal(run(generator=generator), second)
    if kind == "sample_tokens":
        torch.manual_seed(11)
        np.random.seed(11)
        assert torch.equal(run(), run(seed=11))
