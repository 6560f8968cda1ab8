"""The noise kernels are compiled to the arithmetic of cuRAND as PyTorch's build has it; needs no GPU."""

import os
import re
import subprocess
import sys

import pytest
from building import compiling

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
