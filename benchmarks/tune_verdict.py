"""How to cut the Triton kernel of ``log_density_ratio``, measured on a GPU: ``python benchmarks/tune_verdict.py``.

Prints a table for every number of tokens, by elements and warps a program. Its values are shares of the bandwidth at
which the library sums up as many bytes. Write the winner into ``ops/density_ratio/triton.py``
(``ELEMENTS``, ``OPTIONS``): results keep their bits.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from cspd_kernels import log_density_ratio
from cspd_kernels.ops.density_ratio import triton as kernel

from common import measure, spread
from judging import _inputs, _replays, _sum
from registry import CHANNELS

ELEMENTS, WARPS = (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)


def shares(tokens: int, runs: int, device: torch.device) -> dict[tuple[int, int], float]:
    """(elements, warps) -> share of the bandwidth of a sum, the best first; every cut gives the same bits."""
    inputs = _inputs(tokens, device)
    source, total = torch.randn(tokens * (5 * CHANNELS + 3), device=device), torch.empty((), device=device)
    functions = {"sum": _replays(partial(_sum, total, source), inputs, device)}
    expected = log_density_ratio(*inputs[0], backend="triton")
    for elements in ELEMENTS:
        for warps in WARPS:
            options = kernel.OPTIONS | {"num_warps": warps}
            with mock.patch.multiple(kernel, ELEMENTS=elements, OPTIONS=options), mock.patch.object(
                kernel, "launch", partial(_unprepared, kernel.launch)
            ):  # fmt: skip
                function = partial(log_density_ratio, backend="triton")
                if not torch.equal(function(*inputs[0]), expected):
                    raise SystemExit(f"{elements} elements and {warps} warps give other bits")
                functions[elements, warps] = _replays(function, inputs, device)
    medians = {name: spread(seconds)[0] for name, seconds in measure(functions, inputs, runs, device).items()}
    found = {name: medians["sum"] / median for name, median in medians.items() if name != "sum"}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _unprepared(launch, kernel, programs, arguments, constants, options, key) -> None:
    """Other options are another compilation."""
    launch(kernel, programs, arguments, constants, options)


def main() -> None:
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device))
    for tokens in (64, 1024, 8192, 131072):
        print(f"N={tokens}: share of the library's sum by (elements, warps) a program")
        for (elements, warps), share in shares(tokens, 31, device).items():
            print(f"  {elements:5d} {warps:2d}  {share:.3f}")


if __name__ == "__main__":
    main()
