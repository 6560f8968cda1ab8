"""Launches of the verdict kernels through Triton's real launcher on a driver that runs nothing: ``python prepared.py``
fails where a prepared launch differs from the one that Triton binds itself. A process of its own, as the interpreter
has no launcher.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cspd_kernels import Denoised, triton_launch
from cspd_kernels.ops.accept_reject import triton as accept_reject
from cspd_kernels.ops.density_ratio import triton as density_ratio
from cspd_kernels.triton_report import recorded_launches


class Launcher:
    """Stands in for what hands a kernel to the device."""

    launched: list[tuple] = []

    def __init__(self, *_):
        pass

    def __call__(self, *args):
        self.launched.append(args)


class Driver:
    utils = SimpleNamespace(
        load_binary=lambda name, *_: (name, name, 32, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )
    launcher_cls = Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def operands(rows: int, channels: int, dtype: torch.dtype, layout):
    matrix, line = layout(torch.zeros(rows, channels, dtype=dtype)), torch.zeros(rows)
    return matrix, Denoised(matrix, matrix, matrix, line), Denoised(*[matrix.clone()] * 3, line)


def calls():
    """Functions that make a call each, several of a kind."""
    layouts = (lambda v: v, lambda v: torch.cat([v, v])[: len(v)], lambda v: torch.cat([v, v], 1)[:, : v.shape[1]])
    layouts += (lambda v: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape),)
    for rows in (1, 32):
        for channels in (1, 16):
            for dtype in (torch.float32, torch.bfloat16):
                for layout in layouts:
                    x, draft, target = operands(rows, channels, dtype, layout)
                    for relaxation in (1.0, 42.0, torch.ones(rows), torch.ones(rows + 1)[1:]):
                        for sigma in ("paper", "released") if channels == 16 else ("paper",):
                            yield lambda: density_ratio.log_density_ratio(x, draft, target, relaxation, sigma)  # noqa: B023
                    address = torch.arange(rows)
                    at = torch.zeros(3, dtype=torch.int64)
                    seeds = ((0, 1), (2**64 - 1, 100), (at[:1], 1), (at[2:], 100), (at[1:2], 1))
                    for seed, most in seeds if channels == 16 else ():
                        yield lambda: accept_reject.accept_reject(
                            x, draft, target, seed, address, 1.0, "paper", most, "rejection"  # noqa: B023
                        )  # fmt: skip


def calls_of_candidates():
    """Likewise with candidates, in two orders in memory, of a chain that they share or of one each."""
    for rows in (1, 32):
        for count in (1, 4):
            x = torch.zeros(rows, count, 16)
            turned = torch.zeros(count, rows, 16).transpose(0, 1)
            chains = [Denoised(*[torch.zeros(rows, k, 16)] * 3, torch.zeros(rows, k)) for k in (1, count)]
            for tokens in (x, turned):
                for chain, relaxation in itertools.product(chains, (1.0, torch.ones(rows, count))):
                    yield lambda: accept_reject.accept_reject(
                        tokens, chain, chain, 0, torch.arange(rows), relaxation, "paper", 9, "closed_form"  # noqa: B023
                    )  # fmt: skip


def arguments(launched: tuple) -> list:
    """What a launcher was given, in a form that compares: outputs are other tensors every time."""
    given = [v.data if isinstance(v, LazyDict) else v for v in launched]
    return [(v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for v in given]


def main() -> None:
    driver.set_active(Driver())
    specialisations, bound, run = {}, [], JITFunction.run
    launch = triton_launch.launch

    def recorded(kernel, programs, values, constants, options, key=None):
        with recorded_launches() as made:
            launch(kernel, programs, values, constants, options, key)
        (specialised,) = made
        if key is not None:
            known = specialisations.setdefault((kernel, key, *constants.values()), specialised)
            assert known == specialised, f"{key} stands for two compilations"

    def counted(self, *args, **kwargs):
        bound.append(self)
        return run(self, *args, **kwargs)

    for module in (density_ratio, accept_reject):
        module.launch = recorded
    for call in itertools.chain(calls(), calls_of_candidates()):
        call()
    assert len(specialisations) == 22, len(specialisations)
    for module in (density_ratio, accept_reject):
        module.launch = launch

    # Every call as Triton binds it, then as it was prepared.
    prepared = 0
    for call in itertools.chain(calls(), calls_of_candidates()):
        triton_launch._compiled.clear()
        Launcher.launched.clear()
        JITFunction.run = triton_launch._RUN = counted
        bound.clear()
        call()
        call()
        assert arguments(Launcher.launched[0]) == arguments(Launcher.launched[1])
        prepared += len(bound) == 1
        JITFunction.run = run  # somebody who replaces it sees every launch
        with recorded_launches() as made:
            call()
        assert len(made) == 1
        assert len(Launcher.launched) == 2
    assert prepared > 100
    print(f"{len(specialisations)} compilations, {prepared} calls prepared")


if __name__ == "__main__":
    main()
