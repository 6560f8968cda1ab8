"""What the compiler makes of the verdict kernels for operands of every layout, without a GPU: ``python specialised.py``
prints it as JSON. A process of its own: what the interpreter runs cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import torch
from verdicts import LAYOUTS, LINES

from cspd_kernels import Denoised
from cspd_kernels.triton_report import Launch, binary, recorded_launches

CASES = ((3, None), (16, None), (256, None), (16, "rejection"), (16, "closed_form"))  # None: the density ratio
ROWS = 70
_REDUCE = re.compile(r'"tt\.reduce"\(.*?axis = (\d+).*?\(\{(.*?)\}\) : \(tensor<([\dx]+)x([a-z]\d+)>', re.DOTALL)
_FLOAT = re.compile(r"\b((?:arith|math)\.\w+|tt\.extern_elementwise)\b.*[x ](f\d+)\b")
_PTX = re.compile(r"\b((?:add|sub|mul|fma|mad|div|sqrt|ex2|lg2|rcp|min|max)(?:\.\w+)*\.f\d\d(?:x2)?)\b")


def operands(channels: int):
    """(name, x, draft, target, rows) in layouts between which a compiler may choose other orders of a sum."""
    matrix, line, rows = torch.zeros(ROWS, channels), torch.zeros(ROWS), torch.arange(ROWS)
    whole = Denoised(*[matrix] * 3, line)
    layouts = {name: LAYOUTS[name] for name in ("unaligned", "transposed", "one row", "every second row", "both")}
    for name, layout in {"plain": lambda v: v, **layouts, "bfloat16": lambda v: v.bfloat16()}.items():
        chain = Denoised(*[layout(matrix)] * 3, LINES["every third"](line) if name == "both" else line)
        yield name, layout(matrix), chain, chain, rows
        if name == "transposed":
            yield "one operand transposed", layout(matrix), whole, whole, rows


def launches(channels: int, residual: str | None) -> dict[Launch, str]:
    """Every specialisation of a kernel, named by a layout that takes it there."""
    op = "density_ratio" if residual is None else "accept_reject"
    module = importlib.import_module(f"cspd_kernels.ops.{op}.triton")
    found = {}
    for name, x, draft, target, rows in operands(channels):
        with recorded_launches() as made:
            if residual is None:
                module.log_density_ratio(x, draft, target, 2.0, "paper")
            else:
                module.accept_reject(x, draft, target, 0, rows, 2.0, "paper", 9, residual)
        found.setdefault(*made, name)
    return found


def arithmetic(launch: Launch) -> dict:
    """The floating-point arithmetic of a kernel, and how long the axes are that it adds up over."""
    made = binary(launch, 90)
    sums = [
        int(shape.split("x")[int(axis)])
        for axis, body, shape, kind in _REDUCE.findall(made.asm["ttir"])
        if kind[0] == "f"
    ]
    # Constants come in any order, and what makes float32 of other types is exact or rounds once.
    left_out = ("arith.constant", "arith.extf", "arith.truncf")
    operations = [op for op in _FLOAT.findall(made.asm["ttir"]) if op[0] not in left_out]
    return {
        "sums": sums,
        "operations": [" ".join(op) for op in operations],
        "instructions": sorted(set(_PTX.findall(made.asm["ptx"]))),
        "fused": made.metadata.enable_fp_fusion,
    }


def main() -> None:
    report = {}
    for channels, residual in CASES:
        case = f"{residual or 'ratio'} of {channels} channels"
        report[case] = {name: arithmetic(launch) for launch, name in launches(channels, residual).items()}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
