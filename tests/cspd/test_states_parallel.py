"""Models that are wrapped, sharded, replicated or offloaded, in one process and in two."""

from __future__ import annotations

import functools
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from spawned import call
from states import after, before, listening, model_in, own, rows, served_calls
from torch.nn.parallel import DataParallel, DistributedDataParallel

import cspd
from cspd_kernels.testing import relative_error

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp(module, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


def fsdp2(module):
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # PyTorch 2.4
        from torch.distributed._composable.fsdp import fully_shard

    return fully_shard(module, mesh=mesh())


def tensor_parallel(model):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mlp = model.diffloss.net.res_blocks[0].mlp
    parallelize_module(mlp, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def ddp(module):
    return DistributedDataParallel(module.requires_grad_(True))


SERVED = {
    "DDP around the network": lambda m: setattr(m.diffloss, "net", ddp(m.diffloss.net)),
    "DDP around the head": lambda m: ddp(m.diffloss),
    "DDP around the model": ddp,
    "DataParallel": lambda m: setattr(m.diffloss, "net", DataParallel(m.diffloss.net)),
}
SHARDED = {
    "FSDP 1 around the network": lambda m: setattr(m.diffloss, "net", fsdp(m.diffloss.net)),
    "FSDP 1 around the head": lambda m: setattr(m, "diffloss", fsdp(m.diffloss)),
    "FSDP 2 of the network": lambda m: fsdp2(m.diffloss.net),
    "FSDP 2 of the head": lambda m: fsdp2(m.diffloss),
    "FSDP 2 of the model": fsdp2,
    "tensor parallel": tensor_parallel,
}


@pytest.mark.parametrize("when", [before, after])
@pytest.mark.parametrize("what", SERVED)
def test_wrappers_that_compute_nothing_are_served(what, when, group):
    outcome = when(lambda model: SERVED[what](model) and None)
    assert (outcome.what, outcome.told) == ("served", [])


@pytest.mark.parametrize("what", SHARDED)
def test_sharded_weights_are_not_read(what, group):
    outcome = before(lambda model: SHARDED[what](model) and None, sample=rows)
    assert outcome.what == "refused"
    assert "sharded" in outcome.told[0] or "neither as a parameter" in outcome.told[0]
    outcome = after(lambda model: SHARDED[what](model) and None, sample=rows)
    assert outcome.what in ("own", "fails")  # of some its own sample does not run, as it goes past the wrapper
    assert len(outcome.told) == 1


def _two(rank: int, path: str, failures) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
        for what in ("DDP around the network", "DDP around the model"):
            for when in (before, after):
                assert when(lambda model: SERVED[what](model) and None).what == "served", what  # noqa: B023
        for what, change in (
            *SHARDED.items(),
            ("original", lambda m: setattr(m, "diffloss", fsdp(m.diffloss, use_orig_params=True))),
        ):
            model = model_in()
            change(model)
            try:
                cspd.patch(model)
            except ValueError:
                assert not cspd.is_patched(model), what
            else:
                raise AssertionError(f"{what}: patched")
            model, twin, messages = cspd.patch(model_in()), model_in(), []
            rows(model)
            change(model)
            change(twin)
            expected, failure = own(twin, rows)
            with listening(messages), served_calls() as served:
                actual, error = own(model, rows)
            assert not served, what
            assert len(messages) == 1, what
            assert type(error) is type(failure), (what, error, failure)
            assert failure is not None or torch.equal(actual, expected), what
        model = cspd.patch(model_in(seed=rank))
        rows(model)
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        assert relative_error(rows(model), rows(model_in(0))) < 1e-5
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        failures.put(traceback.format_exc())
        raise


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    processes = [
        context.Process(target=call, args=(__file__, "_two", rank, f"{tmp_path}/two", failures)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
        process.kill()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0, 0]


def replica_of(module: nn.Module, scale: float) -> nn.Module:
    """As ``torch.nn.parallel.replicate`` makes one, with weights of its own."""
    replica = module._replicate_for_data_parallel()
    for name, weight in module._parameters.items():
        if weight is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, weight.detach() * scale)
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child, scale)
    return replica


def test_a_replica_samples_with_its_own_weights():
    model, twin, messages, z = cspd.patch(model_in()), model_in(), [], torch.randn(3, 32)
    expected = rows(model)
    replica = replica_of(model, 1.5)

    def run(model):
        torch.manual_seed(0)
        return model.diffloss.sample(z)

    with listening(messages), served_calls() as served:
        assert torch.equal(run(replica), run(replica_of(twin, 1.5)))
    assert not served
    assert "replica" in messages[0]
    assert "sample" not in vars(replica.diffloss)
    with served_calls() as served:
        assert torch.equal(rows(model), expected)
    assert served


class Offload:
    """As accelerate offloads a layer: weights on the meta device, a forward that fetches them."""

    def __init__(self, module):
        self.weights = {name: weight.data for name, weight in module.named_parameters(recurse=False)}
        self.forward = module.forward
        module._hf_hook = self
        for name in self.weights:
            module._parameters[name] = nn.Parameter(self.weights[name].to("meta"), requires_grad=False)
        module.forward = functools.update_wrapper(functools.partial(self.run, module), self.forward)

    def run(self, module, *args):
        for name, value in self.weights.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        out = self.forward(*args)
        for name, value in self.weights.items():
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)
        return out


def offloaded(model):
    for module in model.diffloss.net.modules():
        if any(True for _ in module.parameters(recurse=False)):
            Offload(module)


def hooked_network(model):
    net = model.diffloss.net
    net._hf_hook, original = object(), net.forward
    net.forward = functools.update_wrapper(functools.partial(lambda module, *a, **k: original(*a, **k), net), original)


@pytest.mark.parametrize("change", [offloaded, hooked_network])
def test_hooks_of_accelerate(change):
    outcome = before(change)
    assert outcome.what == "refused"
    assert "has hooks of accelerate" in outcome.told[0]
    outcome = after(change)
    assert outcome.what == "own"
    assert len(outcome.told) == 1
