"""Philox noise: published vectors, an implementation in Python integers, addressing, distribution, errors."""

import math
import random

import pytest
import torch
from scipy import stats
from seeds import BAD_SEED_TENSORS, SEEDS, seed_tensor

from cspd_kernels import PhiloxNoise
from cspd_kernels.noise import (
    STREAM_PROPOSAL,
    STREAM_STEP,
    STREAM_X_T,
    check_seed,
    normals,
    philox_4x32,
    uniforms,
    words,
)

P = 1e-4  # a correct generator fails a test of fixed seed below this with this probability

ONES = 0xFFFFFFFF
# Random123's kat_vectors for philox4x32-10: counter, key, output.
PUBLISHED = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_vectors(python_philox, counter, key, expected):
    assert tuple(int(w) for w in philox_4x32(key, tuple(map(torch.tensor, counter)))) == expected
    assert python_philox(key, counter) == expected


def test_words_equal_python_integers_at_every_address(python_philox):
    draw = random.Random(0)
    for _ in range(20):
        seed, index, group, stream = draw.getrandbits(64), draw.getrandbits(32), draw.getrandbits(24), draw.randrange(5)
        rows = [draw.getrandbits(63) for _ in range(5)] + [0, 2**32 - 1, 2**32, 2**63 - 1]
        got = words(seed, torch.tensor(rows), index, group, stream)
        for i, row in enumerate(rows):
            counter = (row % 2**32, row >> 32, index, stream << 24 | group)
            assert tuple(int(w[i]) for w in got) == python_philox((seed % 2**32, seed >> 32), counter)


def test_normals_are_box_muller_of_the_documented_layout(python_philox):
    seed, row, channels = 2**63 + 12345, 2**40 + 7, 7
    noise = PhiloxNoise(seed, torch.tensor([row]), channels)
    for got, index, stream in ((noise.x_T(), 0, 1), (noise.step(9), 9, 0)):
        expected = []
        for group in range(2):
            counter = (row % 2**32, row >> 32, index, stream << 24 | group)
            u = [w * 2.0**-32 + 2.0**-33 for w in python_philox((seed % 2**32, seed >> 32), counter)]
            for radius, angle in ((u[0], u[1]), (u[2], u[3])):
                radius, angle = math.sqrt(-2 * math.log(radius)), 2 * math.pi * angle
                expected += [radius * math.cos(angle), radius * math.sin(angle)]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got[0].double(), torch.tensor(expected[:channels]).double(), rtol=0, atol=1e-5)


def test_uniforms_are_the_documented_word(python_philox):
    rows = torch.arange(4)
    expected = [python_philox((11, 0), (row, 0, 3, 2 << 24))[0] * 2.0**-32 for row in range(4)]
    torch.testing.assert_close(uniforms(11, rows, 3).double(), torch.tensor(expected).double(), rtol=0, atol=1e-7)


def test_uniforms_never_reach_zero(monkeypatch):
    extremes = torch.tensor([0, 1, ONES - 1, ONES])
    monkeypatch.setattr("cspd_kernels.noise.philox_4x32", lambda key, counter: (extremes,) * 4)
    u = uniforms(0, torch.arange(4), 0)
    assert u.dtype == torch.float32
    assert float(u.min()) > 0
    assert float(u.max()) <= 1
    assert torch.isfinite(normals(0, torch.arange(1), 0, 4, STREAM_STEP)).all()


def test_steps_are_the_stack_of_single_steps():
    noise = PhiloxNoise(3, torch.arange(5) + 2**33, 6)
    stacked = torch.stack([noise.step(i) for i in range(2, 7)])
    assert torch.equal(noise.steps(2, 7), stacked)
    assert noise.steps(4, 4).shape == (0, 5, 6)
    assert not torch.equal(stacked[0], stacked[1])


def test_noise_of_a_row_does_not_depend_on_its_batch():
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) + 2**34
    noise = PhiloxNoise(8, rows, 5)
    for part in (torch.tensor([999, 0, 17]), slice(3, 4), torch.arange(1000).flip(0), rows % 2 == 0):
        assert torch.equal(noise[part].step(4), noise.step(4)[part])
        assert torch.equal(noise[part].x_T(), noise.x_T()[part])
    assert len(noise[2:7]) == 5


def test_equal_addresses_give_equal_noise_and_others_do_not():
    noise = PhiloxNoise(0, torch.tensor([4, 9, 4, 4 + 2**32]), 8)
    x = noise.x_T()
    assert torch.equal(x[0], x[2])
    assert len({tuple(row) for row in x.tolist()}) == 3
    assert not torch.equal(x, PhiloxNoise(2**32, noise.rows, 8).x_T())  # the seed's high word counts


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 13])
def test_fewer_channels_are_a_prefix(channels):
    noise = PhiloxNoise(1, torch.arange(6))
    full = noise.step(2, 16)
    assert torch.equal(noise.step(2, channels), full[:, :channels])


def test_no_rows():
    noise = PhiloxNoise(0, torch.arange(0), 5)
    assert (noise.x_T().shape, noise.steps(0, 3).shape) == ((0, 5), (3, 0, 5))


@pytest.mark.parametrize("stream", [STREAM_STEP, STREAM_X_T, STREAM_PROPOSAL])
def test_normals_are_normal(stream):
    x = normals(2024, torch.arange(5000), 1, 4, stream)
    for channel in range(4):
        assert stats.kstest(x[:, channel].double(), "norm").pvalue > P
    assert stats.kstest((x**2).sum(dim=1).double(), stats.chi2(4).cdf).pvalue > P  # and independent in a row


def test_uniforms_are_uniform():
    assert stats.kstest(uniforms(2024, torch.arange(20000), 5).double(), "uniform").pvalue > P


def test_rows_steps_streams_channels_and_seeds_are_uncorrelated():
    rows = torch.arange(20000)
    series = [
        *normals(7, rows, 1, 5, STREAM_STEP).T,
        normals(7, rows, 2, 1, STREAM_STEP)[:, 0],
        normals(7, rows, 1, 1, STREAM_X_T)[:, 0],
        normals(7, rows, 1, 1, STREAM_PROPOSAL)[:, 0],
        normals(7, rows + 1, 1, 1, STREAM_STEP)[:, 0],
        normals(8, rows, 1, 1, STREAM_STEP)[:, 0],
        uniforms(7, rows, 1),
    ]
    corr = torch.corrcoef(torch.stack(series).double()).fill_diagonal_(0)
    pairs = len(series) * (len(series) - 1) / 2
    assert float(corr.abs().max()) < stats.norm.isf(P / pairs / 2) / math.sqrt(len(rows))


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_extreme_seeds(seed):
    x = PhiloxNoise(seed, torch.arange(3), 4).x_T()
    assert torch.isfinite(x).all()
    assert x.unique().numel() == 12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_holds_the_64_bits_of_a_seed(seed, shape):
    rows = torch.arange(5) * 2**33
    number, tensor = PhiloxNoise(seed, rows, 6), PhiloxNoise(seed_tensor(seed).view(shape), rows, 6)
    for draw in (PhiloxNoise.x_T, lambda noise: noise.step(3), lambda noise: noise.steps(0, 4)):
        assert torch.equal(draw(tensor), draw(number))
        assert torch.equal(draw(tensor[1:3]), draw(number[1:3]))
    for index in (2, torch.arange(5)):
        assert torch.equal(uniforms(seed_tensor(seed).view(shape), rows, index), uniforms(seed, rows, index))


def test_a_seed_tensor_is_kept_and_read_when_numbers_are_drawn():
    seed, rows = torch.tensor([3]), torch.arange(4)
    noise, part = PhiloxNoise(seed, rows, 5), PhiloxNoise(seed, rows, 5)[:2]
    seed.fill_(8)
    assert torch.equal(noise.x_T(), PhiloxNoise(8, rows, 5).x_T())
    assert torch.equal(part.x_T(), PhiloxNoise(8, rows, 5).x_T()[:2])


def test_a_seed_tensor_is_not_printed():
    """Its value would have to be waited for; here there is none."""
    noise = PhiloxNoise(torch.empty(1, dtype=torch.int64, device="meta"), torch.arange(3, device="meta"))
    assert repr(noise) == "PhiloxNoise(seed=<on meta>, rows=<3 on meta>, channels=None)"
    assert noise.x_T(7).shape == (3, 7)


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "0", None])
def test_seed_is_checked(seed):
    with pytest.raises(ValueError, match=r"seed to be an int in \[0, 2\*\*64\) or a tensor of one int64 element, got "):
        PhiloxNoise(seed, torch.arange(2))


@pytest.mark.parametrize(("seed", "got"), BAD_SEED_TENSORS)
def test_seed_tensor_is_checked(seed, got):
    with pytest.raises(ValueError, match=f"seed tensor to be of one int64 element on cpu, got {got}"):
        PhiloxNoise(seed, torch.arange(2))


def test_where_no_tensor_is_served_the_error_names_none():
    with pytest.raises(ValueError, match=r"an int in \[0, 2\*\*64\), got torch.int64 \(1,\) on meta"):
        check_seed(torch.empty(1, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (torch.arange(2.0), r"torch.float32 \(2,\)"),
        (torch.arange(2, dtype=torch.int32), r"torch.int32 \(2,\)"),
        (torch.arange(4).view(2, 2), r"torch.int64 \(2, 2\)"),
        ([0, 1], "list"),
    ],
)
def test_rows_are_checked(rows, got):
    with pytest.raises(ValueError, match=rf"int64 tensor of shape \(N,\), got {got}"):
        PhiloxNoise(0, rows)


def test_channels_must_be_known():
    noise = PhiloxNoise(0, torch.arange(2))
    for draw in (noise.x_T, lambda: noise.step(1), lambda: noise.steps(0, 2)):
        with pytest.raises(ValueError, match="number of channels, got none"):
            draw()
    assert noise.x_T(3).shape == (2, 3)


def test_channels_of_a_call_do_not_stick():
    noise = PhiloxNoise(0, torch.arange(3), 8)
    assert noise.step(1, 4).shape == (3, 4)
    assert noise.step(1).shape == (3, 8)
