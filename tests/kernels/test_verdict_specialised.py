"""A token's bits depend on its values alone: however the compiler lays operands of other strides, alignment or types
out over threads, the kernels that judge tokens do the same arithmetic in the same order. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cspd_kernels.backends import why_unavailable

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
if "is older than" in (reason := why_unavailable("triton") or ""):
    pytest.skip(reason, allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "helpers" / "specialised.py"
CASES = [f"ratio of {c} channels" for c in (3, 16, 256)] + [f"{r} of 16 channels" for r in ("rejection", "closed_form")]


pytestmark = pytest.mark.slow  # all of it is compiled ahead of time


@pytest.fixture(scope="module")
def report():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_every_layout_is_judged_by_the_same_arithmetic(report, case):
    kernels = report[case]
    assert {"plain", "unaligned", "transposed", "one row", "both", "bfloat16"} <= set(kernels)
    for what in ("operations", "instructions", "sums"):
        assert kernels["plain"][what]
        assert {name: kernel[what] for name, kernel in kernels.items() if kernel[what] != kernels["plain"][what]} == {}


@pytest.mark.parametrize("case", CASES)
def test_no_sum_has_an_order_to_choose(report, case):
    """The compiler adds along an axis in the order in which threads hold it; of two summands there is one order."""
    for kernel in report[case].values():
        assert set(kernel["sums"]) <= {1, 2}
        assert 2 in kernel["sums"]


@pytest.mark.parametrize("case", CASES)
def test_products_and_sums_are_fused_nowhere(report, case):
    """Whether they are would be another choice. The fused ones of a logarithm, and those in float64, are its own."""
    for kernel in report[case].values():
        assert kernel["fused"] is False
        assert [i for i in kernel["instructions"] if i.startswith(("fma", "mad")) and i.endswith("f32")] in (
            [],
            ["fma.rn.ftz.f32"],
        )
        if case.startswith("ratio"):
            assert not any(i.startswith(("fma", "mad")) for i in kernel["instructions"])
