"""What a patched head makes the host wait for, and what ``torch.compile`` makes of a model around one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from foreign import COND, Head, made
from small_models import CSpDDiffLoss, small_mar
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import cspd
from cspd_kernels.live import LiveWeights
from cspd_kernels.testing import randomize_, relative_error


def cspd_head() -> CSpDDiffLoss:
    torch.manual_seed(0)
    return randomize_(CSpDDiffLoss(4, 32, 2, 32, "12"), 1)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_stand_ins_draw_where_their_network_is(cfg):
    """A head on another device than the CPU, which is all that the tests on a GPU ask of them; meta mixes with none."""
    head, other = cspd_head().to("meta"), made(Head).to("meta")
    z, noise, inter = (torch.empty(shape, device="meta") for shape in ((8, 32), (8, 4), (12, 8, 4)))
    network, kwargs = head._network(z, cfg)
    loops = head.gen_diffusion.p_sample_loop, head.gen_diffusion.p_sample_loop_with_noise
    results = [loop(network, (8, 4), model_kwargs=kwargs) for loop in loops]
    results += [head.sample_with_noise(z, noise, cfg=cfg), head.sample_with_inter_noise(z, noise, inter, cfg=cfg)]
    results += [head.sample(z, cfg=cfg), other.sample(z[:, :COND], cfg=cfg)]
    assert {result.device.type for result in results} == {"meta"}


class HostReads(TorchDispatchMode):
    """Counts the tensors read by the host; what the op does inside is its own matter."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sample", "sample_with_noise", "sample_with_inter_noise"])
@pytest.mark.parametrize("cfg", [1.0, 3, np.float32(3.0), torch.tensor([1.0]), torch.tensor(3.0)])
def test_the_host_reads_nothing_that_the_replaced_code_does_not(method, cfg, monkeypatch):
    head = cspd_head()
    noises = {"sample": (), "sample_with_noise": (8,), "sample_with_inter_noise": (8, 12)}[method]
    noise = [torch.randn(n, 4) if n == 8 else torch.randn(n, 8, 4) for n in noises]

    def reads():
        with HostReads() as host:
            getattr(head, method)(torch.randn(8, 32), *noise, 1.0, cfg)
        return host.count

    before = reads()
    assert bool(before) == isinstance(cfg, torch.Tensor)
    monkeypatch.setattr(LiveWeights, "_compare", LiveWeights._embed)  # on a device a kernel compares the weights
    cspd.patch(head)
    reads()  # packs the head, and compares a kind of call that was not seen
    assert reads() == before


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["upstream", "philox"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_on_a_gpu_the_host_waits_for_nothing_but_a_scale_that_lies_there(noise, cfg):
    head = cspd_head().cuda()
    z = torch.randn(8, 32).cuda()
    torch.manual_seed(0)
    expected = head.sample(z, 1.0, cfg)
    scale = torch.tensor(cfg, device="cuda")

    def waits():
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                head.sample(z, 1.0, scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    before = waits()
    assert before >= 1
    cspd.patch(head, noise=noise)
    torch.manual_seed(0)
    actual = head.sample(z, 1.0, cfg)
    rows = 8 if cfg == 1.0 else 4  # callers drop the unconditional half, which repeats the other one when patched
    difference = relative_error(actual[:rows], expected[:rows])
    assert (difference < 1e-5) == (noise == "upstream")
    head.sample(z, 1.0, torch.tensor(cfg))
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        head.sample(z, 1.0, cfg)
        head.sample(z, 1.0, torch.tensor(cfg))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits() <= before


class Model(nn.Module):
    """A sampler between two layers."""

    def __init__(self, **options):
        super().__init__()
        self.diffloss = cspd.patch(small_mar(schedule="linear").diffloss, **options)
        self.before, self.after = nn.Linear(32, 32), nn.Linear(4, 4)

    def forward(self, z, temperature, cfg):
        return self.after(self.diffloss.sample(self.before(z).tanh(), temperature, cfg))


@pytest.mark.parametrize("noise", ["upstream", "philox"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_a_compiled_model_samples_the_same_and_sees_changed_weights(noise, backend):
    torch._dynamo.reset()
    model, z = Model(noise=noise), torch.randn(8, 32)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    assert torch.isfinite(compiled(z, 1.0, 1.5)).all()
    assert counter.frame_count == 2  # what stands before the sampler, and what stands after it
    weight = model.diffloss.net.final_layer.linear.weight

    def change(_):
        weight.data = torch.randn_like(weight)

    results = []
    for prepare in (lambda _: None, lambda _: weight.mul_(0.5), change, lambda m: m.diffloss.bfloat16()):
        prepare(model)
        for cfg in (3.0, 2.0, 1.0, 4.0, torch.tensor(3.0)):
            torch.manual_seed(1)
            expected = model(z, 1.0, cfg)
            torch.manual_seed(1)
            results.append(compiled(z, 1.0, cfg))
            assert relative_error(results[-1], expected) < 1e-5
    assert len({r.sum().item() for r in results}) == len(results) - 4  # the tensor of 3 equals the number


@pytest.mark.gpu
def test_a_captured_call_follows_weights_that_change_before_the_replay():
    head = cspd.patch(cspd_head().cuda(), dtype=torch.bfloat16, noise="philox")
    z, noise = torch.randn(4, 32).cuda(), torch.randn(4, 4).cuda()

    def call():
        options = {"clip_denoised": False, "model_kwargs": {"c": z}, "temperature": 0.0}
        return head.gen_diffusion.p_sample_loop(head.net.forward, noise.shape, noise, **options)

    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="expected a first call like this one before you capture a CUDA graph"):  # noqa: SIM117
        with torch.cuda.graph(graph):
            call()
    before = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = call()
    graph.replay()
    assert relative_error(tokens, before) < 1e-5
    head.net.cond_embed.weight.data.mul_(0.5)
    graph.replay()
    assert relative_error(tokens, before) > 1e-3
    assert relative_error(tokens, call()) < 1e-5
