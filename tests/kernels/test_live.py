"""Packed weights follow their module's by their values, whatever moved those."""

import pytest
import torch
import torch.nn as nn

from cspd_kernels import DiffusionHead
from cspd_kernels.live import LiveWeights, fingerprint, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_weight_is_followed(make_diffloss, dtype):
    module = make_diffloss("mild", 2)
    head = DiffusionHead.from_module(module, dtype=dtype)
    live = LiveWeights(head)
    for name, parameter in module.net.named_parameters():
        parameter.data.view(-1)[-1] += 0.5  # no version counter moves
        live.refresh([head])
        expected = DiffusionHead.from_module(module, dtype=dtype)
        for a, b in zip((head, *head.blocks), (expected, *expected.blocks)):
            for field, value in vars(a).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, getattr(b, field)), (name, field)


def test_the_embeddings_of_all_schedules_are_followed(make_diffloss):
    module, other = make_diffloss("mild", 1), make_diffloss("linear", 1)
    head = DiffusionHead.from_module(module)
    twin = head.with_schedule(other.gen_diffusion.schedule)
    assert twin.cond_weight is head.cond_weight
    assert twin.num_steps == other.gen_diffusion.num_timesteps
    live = LiveWeights(head)
    module.net.time_embed.mlp[2].bias.data += 1
    live.refresh([head, twin])
    for one in (head, twin):
        expected = head.with_schedule(one.schedule)
        assert torch.equal(one.time_embedding, expected.time_embedding)


def test_what_has_not_changed_is_not_written(make_diffloss):
    module = make_diffloss("mild", 1)
    head = DiffusionHead.from_module(module, dtype=torch.bfloat16)
    live = LiveWeights(head)
    head.cond_weight[0, 0] = 99.0  # a mark
    live.refresh([head])
    assert head.cond_weight[0, 0] == 99.0
    module.net.cond_embed.weight.data[1, 1] += 1
    live.refresh([head])
    assert torch.equal(head.cond_weight, module.net.cond_embed.weight.bfloat16())


def test_only_what_was_converted_or_copied_is_looked_at(make_diffloss):
    module = make_diffloss("mild", 1)
    assert DiffusionHead.from_module(module).copies == ()
    with torch.no_grad():
        module.net.cond_embed.weight = nn.Parameter(module.net.cond_embed.weight.t().contiguous().t())
    ((packed, source),) = DiffusionHead.from_module(module).copies
    assert source is module.net.cond_embed.weight
    assert packed.is_contiguous()
    assert DiffusionHead.from_module(module).to(torch.bfloat16).copies == ()  # of no module


EVERYWHERE = [lambda w: w.neg_(), lambda w: w.mul_(0.5), lambda w: w.zero_()]


@pytest.mark.parametrize("change", EVERYWHERE)
def test_a_change_of_every_value_shows(change):
    for dtype in (torch.float64, torch.float32):
        weight = torch.ones(200, 200, dtype=dtype)
        before = fingerprint(weight)
        change(weight)
        assert not same(before, fingerprint(weight))


# --- on a device: the Triton kernel, in its interpreter where there is none ---


def pairs_of(source, packed, device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 100), (5,), (1, 4096), (4097,), (33, 300)]
    sources = [torch.randn(shape, generator=generator).to(device, source) for shape in shapes]
    sources.append(torch.randn(20, 30, generator=generator).to(device, source).t())
    return tuple((value.clone(memory_format=torch.contiguous_format).to(packed), value) for value in sources)


@pytest.mark.parametrize("packed", [torch.float32, torch.float16])  # the interpreter's bfloat16 is wrong
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64])
def test_the_kernel_copies_what_has_changed_and_writes_nothing_else(source, packed, triton_device):
    from cspd_kernels.triton_refresh import Refresh

    pairs = pairs_of(source, packed, triton_device)
    refresh = Refresh(pairs)
    refresh()

    def right():
        return [torch.equal(copy, value.to(packed)) for copy, value in pairs]

    assert all(right())
    for _, value in pairs:
        value[(-1,) * value.dim()] = 7.0
    assert not any(right())
    refresh()
    assert all(right())
    first, second = pairs[0][1][0, :2].clone()  # an exchange leaves every sum as it is
    pairs[0][1][0, 0], pairs[0][1][0, 1] = second, first
    refresh()
    assert all(right())
    pairs[0][0][0, 0] = 99.0  # a mark
    refresh()
    assert pairs[0][0][0, 0] == 99.0
    pairs[0][1][60, 60] = 3.0  # in another block of the same weight
    refresh()
    assert pairs[0][0][60, 60] == 3.0
    assert pairs[0][0][0, 0] == 99.0


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change", [lambda w: w.neg_(), lambda w: w.mul_(0.5), lambda w: w.zero_(), lambda w: w.add_(0.5)]
)
def test_the_kernel_sees_a_change_of_every_value_also_before_its_first_call(source, change, triton_device):
    from cspd_kernels.triton_refresh import Refresh

    # Of few bits: float32 holds them after the change, too. Others are rounded once or twice on the way from float64 to
    # half, which libraries do differently.
    for values in (torch.ones(3, 4096), torch.randn(3, 4096).bfloat16()):
        value = values.to(triton_device, source)
        copy = value.half()
        refresh = Refresh(((copy, value),))
        change(value)
        refresh()
        assert torch.equal(copy, value.half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_followed_on_a_gpu_without_a_wait(make_diffloss, dtype):
    module = make_diffloss("mild", 2).cuda()
    head = DiffusionHead.from_module(module, dtype=dtype)
    live = LiveWeights(head)
    live.refresh([head])
    for parameter in module.net.parameters():
        parameter.data.view(-1)[-1] += 0.5
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        live.refresh([head])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = DiffusionHead.from_module(module, dtype=dtype)
    for a, b in zip((head, *head.blocks), (expected, *expected.blocks)):
        assert all(torch.equal(v, getattr(b, k)) for k, v in vars(a).items() if isinstance(v, torch.Tensor))


@pytest.mark.gpu
def test_a_captured_refresh_sees_weights_that_changed_before_the_replay(make_diffloss):
    module = make_diffloss("mild", 1).cuda()
    head = DiffusionHead.from_module(module, dtype=torch.bfloat16)
    live = LiveWeights(head)
    live.refresh([head])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        live.refresh([head])
    module.net.cond_embed.weight.data += 1
    graph.replay()
    assert torch.equal(head.cond_weight, module.net.cond_embed.weight.bfloat16())
