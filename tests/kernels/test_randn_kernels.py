"""The kernels of PyTorch's normals: the numbers of the published algorithm and of GPUs, the arithmetic of cuRAND."""

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from building import compiling
from torch_normals import StandIn, normal_, philox

from cspd_kernels import released_noise
from cspd_kernels.released_noise import layout

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
BLOCKS = 3  # of the largest launch: 768 threads
SIZES = [1, 33, 255, 256, 257, 768, 769, 1537, 3072, 3073, 7000]
SEED, OFFSET = 0xFEDC_BA98_7654_3210, 4 * (2**32 - 2)  # the counter's high word is reached

# What PyTorch printed on GPUs, from reports to its issue tracker (79496, 158398, 97097, 143086): seed, numel, blocks at
# most, the first values, the last ones, mean and standard deviation.
PUBLISHED = {
    "1.11": (10, 3, 288, [-0.1029, 1.6810, -0.2708], [], 0, 1),
    "A4000, 2.0, a round in part": (
        14, 100_000, 48 * 6, [2.8731, 5.2727, 2.9889], [8.2207, 6.5395, 4.2604], 5, 5**0.5,
    ),
}  # fmt: skip
MANY_ROUNDS = {  # 2.5.1, seed 1
    "H100": (132 * 8, [-0.6970, -0.7780, 0.3267]),
    "A100": (108 * 8, [0.1549, -0.6797, -0.1656]),
}
ROW = [1.4540, -2.7733, -0.8932, -0.4574, 0.8063, 0.1580]  # seed 42, values 2045 .. 2050 of 131,072


def fill(
    backend,
    device,
    numel,
    *,
    calls=3,
    dtype=SINGLE,
    first=None,
    newest_first=False,
    seed=SEED,
    offset=OFFSET,
    blocks=BLOCKS,
):
    out = torch.full((calls, numel), torch.nan, dtype=dtype, device=device)
    kernel = {"cuda": released_noise._by_cuda, "triton": released_noise._by_triton}[backend]
    kernel(out, seed, offset // 4, *layout(numel, blocks), first or dtype, newest_first)
    return out.cpu()


def expected(numel, *, calls=3, seed=SEED, offset=OFFSET):
    generator = StandIn(seed, offset, BLOCKS)
    return torch.stack([generator.normal(numel) for _ in range(calls)])


def assert_close(got, wanted, device):
    # A device's sine is an approximation, off by up to 2^-20.5, times a radius of up to 6.7.
    atol = 1e-6 if device.type == "cpu" else 5e-6
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=atol)


def test_the_model_draws_philox(python_philox):
    draw = random.Random(0)
    for _ in range(20):
        key, counter = [draw.getrandbits(32) for _ in range(2)], [draw.getrandbits(32) for _ in range(4)]
        words = philox(key, [np.uint64([word]) for word in counter])
        assert tuple(int(word[0]) for word in words) == python_philox(tuple(key), tuple(counter))


@pytest.mark.parametrize("numel", SIZES)
def test_a_kernel_fills_in_what_the_calls_would(backend, kernel_device, numel):
    assert_close(fill(backend, kernel_device, numel), expected(numel), kernel_device)


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (5, 8), (2**63, 2**35), (2**64 - 1, 2**63 - 8), (2**32, 4)])
def test_every_word_of_the_state_counts(backend, kernel_device, seed, offset):
    got = fill(backend, kernel_device, 900, seed=seed, offset=offset)
    assert_close(got, expected(900, seed=seed, offset=offset), kernel_device)


def test_many_calls_and_the_first_one_last(backend, kernel_device):
    got = fill(backend, kernel_device, 33, calls=100, newest_first=True)
    assert_close(got, expected(33, calls=100).flip(0), kernel_device)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("numel", [33, 3080])
def test_narrow_types_are_float32_rounded(backend, kernel_device, dtype, numel):
    single = fill(backend, kernel_device, numel)
    # Triton's interpreter cuts bfloat16 off where a device rounds it.
    cut = backend == "triton" and kernel_device.type == "cpu" and dtype is BRAIN
    one_place = {"rtol": 2.0**-7 if cut else 0, "atol": 0}
    torch.testing.assert_close(fill(backend, kernel_device, numel, dtype=dtype), single.to(dtype), **one_place)
    for newest_first in (False, True):
        got = fill(backend, kernel_device, numel, first=dtype, newest_first=newest_first)
        wanted = single.clone()
        wanted[0] = wanted[0].to(dtype).float()
        torch.testing.assert_close(got, wanted.flip(0) if newest_first else wanted, **one_place)
        assert torch.equal(got[1], single[1])
        narrow = got[-1 if newest_first else 0]
        assert torch.equal(narrow, narrow.to(dtype).float())


def test_no_zero_is_negative(backend, kernel_device):
    # Found by search: a uniform that rounds to 1, so that the radius is -0, and a positive sine.
    got = fill(backend, kernel_device, 256, calls=1, seed=7, offset=4 * 231335)[0]
    assert got[200] == 0
    assert not torch.signbit(got[200])


@pytest.mark.parametrize(("seed", "numel", "blocks", "start", "end", "mean", "std"), PUBLISHED.values(), ids=PUBLISHED)
def test_numbers_that_gpus_gave(backend, kernel_device, seed, numel, blocks, start, end, mean, std):
    got = mean + std * fill(backend, kernel_device, numel, calls=1, seed=seed, offset=0, blocks=blocks)[0]
    for values, wanted in ((got[: len(start)], start), (got[numel - len(end) :], end)):
        torch.testing.assert_close(values, torch.tensor(wanted), rtol=0, atol=1e-4)


def test_a_row_that_gpus_gave(backend, kernel_device):
    # Where every thread has one value, it does not depend on how many there are.
    got = fill(backend, kernel_device, 2051, calls=1, seed=42, offset=0, blocks=9)[0, 2045:]
    torch.testing.assert_close(got, torch.tensor(ROW), rtol=0, atol=1e-4)


@pytest.mark.parametrize("blocks", [864, 1056])
def test_the_model_gives_what_gpus_gave_in_many_rounds(blocks):
    wanted = {blocks: end for blocks, end in MANY_ROUNDS.values()}[blocks]
    values, moved = normal_(49 * 12 * 112 * 144, 1, 0, blocks)
    assert np.abs(values[:3] - [-0.2963, 2.6764, -0.1408]).max() < 1e-4
    assert np.abs(values[-3:] - wanted).max() < 1e-4
    assert moved == 4 * layout(len(values), blocks)[1] > 4


# --- the compiled arithmetic ---

compile_py = compiling()
# 2^-32, 2^-33 and the same times 2 pi, of the uniforms; 2^23 and ln 2 of the logarithm, whose polynomial begins so.
CONSTANTS = {"2F800000", "2F000000", "30C90FDB", "30490FDB", "3F317218", "BE055027", "3E1039F6"}

TRITON = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from cspd_kernels.triton_randn import randn
from cspd_kernels.triton_report import recorded_launches
with recorded_launches() as launches:
    randn(torch.empty(2, 5000, device="meta"), 0, 0, 1, 5, torch.float32, True)
(launch,) = launches
source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants))
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options)).asm["ptx"])
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    def of(backend):
        if backend == "triton":
            pytest.importorskip("triton")
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            command = [sys.executable, "-c", TRITON]
            environment["PYTHONPATH"] = os.pathsep.join(sys.path)
            return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        if reason := compile_py.why_not():
            pytest.skip(reason)
        path = tmp_path_factory.mktemp("ptx") / "randn.ptx"
        command = [compile_py.find_nvcc(), *compile_py.flags("nvcc"), "-I", compile_py.HERE / "include", "-arch=sm_90"]
        subprocess.run([*command, "-ptx", compile_py.HERE / "randn.cu", "-o", path], check=True, capture_output=True)
        (kernel,) = re.findall(r"\.entry \w*randn_kernelIffE\w*\(.*?\n}", path.read_text(), re.DOTALL)
        return kernel

    return of


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_uniforms_are_fused_and_sine_and_cosine_those_of_the_special_function_unit(ptx, backend):
    text = ptx(backend)
    assert set(re.findall(r"\b0f([0-9A-F]{8})\b", text)) >= CONSTANTS
    unit = re.findall(r"\b(?:sin|cos|sqrt|rsqrt|lg2|ex2)\.[\w.]+", text)
    assert set(unit) == {"sin.approx.f32", "cos.approx.f32", "sqrt.rn.f32"}
    # A pair of normals: a radius, an angle, one sine and one cosine. Triton's threads have two of every element.
    of_a_thread = 2 if backend == "triton" else 1
    assert [unit.count(f"{name}.f32") for name in ("sin.approx", "cos.approx", "sqrt.rn")] == [2 * of_a_thread] * 3
    # Nothing is left to the assembler to fuse, and a sum with 0 takes the sign from zeros.
    assert re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32", text) == []
    assert len(re.findall(r"\badd\.rn\.f32\s.*, 0f00000000;", text)) == 4 * of_a_thread
