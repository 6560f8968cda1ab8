"""The kernels of a chain in parallel over its steps, sweep by sweep beside the definition: on a GPU, or, without one,
in Triton's interpreter and emulated on the CPU."""

import itertools

import pytest
import torch
from chains import addressed, kernels_of
from slow import slow, slowly_interpreted

from cspd_kernels import Schedule, denoise
from cspd_kernels.ops.denoise import parallel_chain, reference
from cspd_kernels.ops.denoise.chain import Tables
from cspd_kernels.ops.denoise.parallel_chain import ParallelChain
from cspd_kernels.testing import grouped_inputs, random_inputs, random_network, relative_error

triton_alone = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def kind(backend, monkeypatch):
    """The backend's chain, of which a test sweeps."""
    monkeypatch.setattr(Sweeping, "kind", kernels_of(backend).layered)


class Sweeping:
    """A chain of ``tokens`` tokens whose launches a test makes one by one, after those before the first sweep."""

    kind = None

    def __init__(self, head, inputs, temperature=0.9, cfg_scale=None, tolerance=1e-4, guess=None, tokens=None):
        cond, x_T, noise = inputs  # noqa: N806
        scales, rows = reference.as_scales(cfg_scale), len(x_T)
        groups = 1 + len(scales)
        self.head, self.tables = head, Tables(head)
        self.whole = ParallelChain(self.kind, head, tokens or rows, groups, noise, True, guess is not None)
        self.whole.load(cond.view(groups, rows, -1), x_T, noise, temperature, scales, tolerance, guess)
        self.chain, self.network, self.state = self.whole.chain, self.whole.network, self.whole.state
        memory = torch.empty(self.whole.memory_bytes, dtype=torch.uint8, device=head.device)
        self.whole.keep_modulations_in(memory)
        self.tables.refresh(head)
        self.chain.start(head)
        self.chain.hoist(head, 0, head.num_steps)
        self.network.sweep(self.tables, self.chain, self.state, begin=True)
        self.network.settle(self.state, begin=True)

    def sweep(self):
        """One sweep."""
        self.network.evaluate(self.head, self.tables)
        self.network.sweep(self.tables, self.chain, self.state, begin=False)
        self.network.settle(self.state, begin=False)

    def tensors(self):
        """Copies of all that a sweep may write."""
        network, state = self.network, self.state
        found = {**vars(state), "h": network.h, "operand": network.operand, "out": network.out, "v": network.v}
        found["activations"] = getattr(network, "activations", None)
        return {name: value.clone() for name, value in found.items() if isinstance(value, torch.Tensor)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a)


def definition(head, inputs, temperature=0.9, cfg_scale=None, guess=None):
    guess = None if guess is None else guess.movedim(1, 0)
    return reference.sweeps(head, *inputs, temperature, cfg_scale, guess, dtype=torch.float64)


def assert_sweeps_agree(head, inputs, sweeps, tolerance=1e-5, **options):
    """``sweeps`` sweeps leave what the definition's do, of every token that has not settled before."""
    ours = Sweeping(head, inputs, tolerance=0.0, **options)
    rows, steps = len(inputs[1]), head.num_steps
    for count, expected in enumerate(itertools.islice(definition(head, inputs, **options), sweeps), start=1):
        ours.sweep()
        state = ours.state
        assert relative_error(state.x[:, :rows], expected.x) <= tolerance, count
        assert relative_error(state.mean[:rows], expected.mean) <= tolerance, count
        if expected.log_std.isfinite().all():
            assert relative_error(state.log_std[:rows], expected.log_std) <= tolerance, count
        else:  # no step adds noise
            assert torch.equal(state.log_std[:rows].double(), expected.log_std), count
        if steps > 1 and expected.path_log_std.isfinite().all():
            assert relative_error(state.path[:rows].sum(1), expected.path_log_std) <= tolerance, count
        elif steps > 1:
            assert torch.equal(state.path[:rows].sum(1).double(), expected.path_log_std), count
        assert relative_error(state.size[:rows].amax(1), expected.size) <= tolerance, count
        if count > 1:  # a first mean may have nothing before it
            difference = (state.change[:rows].amax(1) - expected.change).abs()
            assert (difference <= 2 * tolerance * expected.size).all(), count
        assert state.done.item() == count
        assert state.live.item() == (count < min(steps, state.limit))


@pytest.mark.parametrize("philox", [True, False], ids=["philox", "stored"])
@pytest.mark.parametrize(("cfg_scale", "learned"), [(None, True), (1.5, True), slow(2.5, False), slow(None, False)])
def test_sweep_by_sweep(make_head, cfg_scale, learned, philox):
    head = make_head(steps=5, width=16, learn_sigma=learned)
    cond, x, noise = random_inputs(head, 2, 30, guided=cfg_scale is not None)
    inputs = cond, x, addressed(head, 2) if philox else noise
    assert_sweeps_agree(head, inputs, 4, cfg_scale=cfg_scale)


LINEAR = Schedule.linear(4)


@pytest.mark.parametrize(
    ("schedule", "groups"),
    [
        slow(LINEAR, 3),
        slow(LINEAR.clipped(-0.6, 0.5), 1),
        (LINEAR.clipped([-0.6, -1, -0.2], [0.5, 1, 9]), 3),
        slow(LINEAR.ddim(), 2),
        (Schedule.euler_maruyama([0.0, 0.3, 0.6, 0.9, 1.0]), 2),
    ],
)
def test_groups_limits_and_samplers(backend, kernel_device, schedule, groups):
    head = random_network(schedule, device=kernel_device, channels=3, width=16, hidden=16, outputs=6, seed=1)
    inputs, scales = grouped_inputs(head, 2, groups), (1.5, 0.7)[: groups - 1]
    assert_sweeps_agree(head, inputs, 4, cfg_scale=scales)
    expected = denoise(head, *inputs, **(options := {"cfg_scale": scales[0] if groups == 2 else scales or 1.0}))
    found = denoise(head, *inputs, backend=backend, parallel_tol=1e-6, **options)
    assert relative_error(found.mean, expected.mean) <= 1e-5
    for name in ("log_std", "path_log_std"):  # -inf where steps add no noise
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, slow(33), slow(130)])
def test_any_number_of_steps(make_head, steps):
    head = make_head(steps=steps, width=16, channels=3)
    assert_sweeps_agree(
        head, random_inputs(head, 1, 31, guided=True), min(steps, 2 if steps > 33 else 3), cfg_scale=1.5
    )


@pytest.mark.parametrize("channels", [1, 2, slow(7), slow(64)])
def test_any_number_of_channels(make_head, channels):
    head = make_head(steps=3, width=16, channels=channels)
    assert_sweeps_agree(head, random_inputs(head, 1, 32), 2)


@slowly_interpreted
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_temperatures_and_a_scale_for_every_token(make_head, temperature):
    head = make_head(steps=6)
    cfg_scale = torch.tensor([[0.5], [1.0], [4.0]], device=head.device)
    inputs = random_inputs(head, 3, 33, guided=True)
    assert_sweeps_agree(head, inputs, 4, temperature=temperature, cfg_scale=cfg_scale)


@slowly_interpreted
def test_from_a_guess(make_head):
    head = make_head(steps=6)
    inputs = random_inputs(head, 3, 34)
    guess = torch.randn(3, 6, head.channels, generator=torch.Generator().manual_seed(34)).to(head.device)
    assert_sweeps_agree(head, inputs, 4, guess=guess)


def test_more_rows_of_the_chain_than_of_the_call(make_head):
    head = make_head(steps=4)
    inputs = random_inputs(head, 3, 35)
    ours = Sweeping(head, inputs, tokens=5)
    assert ours.state.settled.tolist() == [0, 0, 0, 1, 1]
    ours.sweep()
    expected = next(definition(head, inputs))
    assert relative_error(ours.state.x[:, :3], expected.x) <= 1e-5
    assert ours.state.settled.tolist() == [0, 0, 0, 1, 1] and ours.state.sweeps.tolist() == [1, 1, 1, 0, 0]


def test_no_row_of_the_chain_is_the_calls(make_head):
    """As for a graph that is captured before a call has loaded anything."""
    head = make_head(steps=3)
    ours = Sweeping(head, random_inputs(head, 2, 36))
    ours.state.count.zero_()
    ours.network.settle(ours.state, begin=True)
    assert (ours.state.live.item(), ours.state.left.item()) == (0, 0)


@slowly_interpreted
def test_tokens_settle_by_their_own_changes_and_stay_as_they_are(make_head):
    """A token that settles leaves the others going, and nothing of it changes any more."""
    head = make_head(steps=10, width=16, channels=4)
    inputs = random_inputs(head, 4, 37)
    expected = list(itertools.islice(definition(head, inputs), 10))
    ratios = torch.stack([sweep.change / sweep.size for sweep in expected])
    middle = ratios[2:5].flatten().sort().values[5:7]
    tolerance = float(middle.mean())  # between two that there are
    ours, settled = Sweeping(head, inputs, tolerance=tolerance), torch.zeros(4, dtype=torch.bool)
    when = torch.zeros(4, dtype=torch.int32)
    for count, sweep in enumerate(expected, start=1):
        before = ours.tensors()
        ours.sweep()
        for name in ("x", "before", "x0", "mean", "log_std", "path", "change", "size", "sweeps"):
            value, old = getattr(ours.state, name), before[name]
            axis = max(0, value.dim() - 2)
            frozen = settled.nonzero().flatten().to(value.device)
            assert torch.equal(value.index_select(axis, frozen), old.index_select(axis, frozen)), name
        when[~settled] = count
        settled |= sweep.settled(tolerance, count).cpu()
        assert ours.state.settled.tolist() == settled.int().tolist()
        assert ours.state.sweeps.tolist() == when.tolist()
        assert ours.state.live.item() == ours.state.left.item() == int(not settled.all())
        if settled.all():
            break
    assert settled.all() and len(set(when.tolist())) > 1  # or the tolerance tells nothing


@slowly_interpreted
@pytest.mark.parametrize("cfg_scale", [None, 2.0])
def test_rows_that_are_not_finite_never_settle_and_touch_no_others(make_head, cfg_scale):
    head = make_head(steps=5)
    cond, x, noise = random_inputs(head, 3, 38, guided=cfg_scale is not None)
    alone = Sweeping(head, (cond, x, noise), cfg_scale=cfg_scale, tolerance=1e9)
    spoilt = x.clone()
    spoilt[1, 2] = float("nan")
    ours = Sweeping(head, (cond, spoilt, noise), cfg_scale=cfg_scale, tolerance=1e9)
    for _ in range(ours.state.limit):
        ours.sweep(), alone.sweep()
    assert ours.state.settled.tolist() == [1, 0, 1] and ours.state.sweeps.tolist() == [2, 5, 2]
    assert (ours.state.live.item(), ours.state.left.item()) == (0, 1)
    assert alone.state.settled.tolist() == [1, 1, 1]
    for name in ("mean", "log_std", "path"):
        a, b = getattr(ours.state, name), getattr(alone.state, name)
        assert torch.equal(a[[0, 2]], b[[0, 2]]), name


@slowly_interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_guess_that_is_not_finite_heals(make_head, value):
    """One step a sweep, as the recursion from step to step; after T sweeps nothing is left of it."""
    head = make_head(steps=5)
    inputs = random_inputs(head, 2, 39)
    guess = torch.zeros(2, 5, head.channels, device=head.device)
    guess[0, 2] = value
    ours = Sweeping(head, inputs, guess=guess, tolerance=0.0)
    for _ in range(5):
        ours.sweep()
    expected = reference.denoise(head, *inputs, 0.9, None, dtype=torch.float64)
    assert relative_error(ours.state.mean, expected[0]) <= 1e-5
    assert ours.state.settled.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_kernels_that_are_called_off_leave_everything_as_it_is(make_head, dtype):
    head = make_head(dtype, steps=4, depth=2)
    ours = Sweeping(head, random_inputs(head, 2, 40, guided=True), cfg_scale=2.0)
    ours.sweep()
    before = ours.tensors()
    ours.state.live.zero_()
    network = ours.network
    for name in {"h", "operand", "activations", "out", "v"} & vars(network).keys():
        getattr(network, name).fill_(7)  # which no kernel would write
    kept = ours.tensors()
    ours.sweep()
    assert same(ours.tensors(), kept)
    ours.state.live.fill_(1)
    ours.sweep()
    changed = {name for name, value in ours.tensors().items() if not torch.equal(value, before[name])}
    assert changed >= {"x", "h", "operand", "out", "v", "mean", "done", "sweeps"}
    assert ("activations" in changed) == hasattr(ours.network, "activations")  # the library's are not called off


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 2), slow(torch.float32, 5), slow(torch.bfloat16, 5)])
def test_a_sequential_chain_that_is_called_off_keeps_its_inputs_and_results(make_head, dtype, rows):
    """A few rows, products of the library, products of kernels."""
    head = make_head(dtype, steps=3, depth=2)
    ours = Sweeping(head, random_inputs(head, rows, 41))
    chain, names = ours.chain, ("x", "h", "log_std", "path")
    for left in (0, 1):
        ours.state.left.fill_(left)
        before = [getattr(chain, name).clone() for name in names]
        chain.run_steps(head, ours.tables, 0, 3)
        for name, value in zip(names, before):
            assert torch.equal(getattr(chain, name).nan_to_num(), value.nan_to_num()) == (left == 0), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cfg_scale", [slow(None), 2.0])
def test_the_network_at_all_steps(make_head, dtype, cfg_scale):
    """Beside float64 with the same operands: out and v of the first group and out of the others, where each belongs."""
    head = make_head(dtype, steps=3, depth=2)
    cond, x, noise = random_inputs(head, 3, 42, guided=cfg_scale is not None)
    ours = Sweeping(head, (cond, x, noise), cfg_scale=cfg_scale)
    inputs = ours.state.x.clone()
    ours.network.evaluate(head, ours.tables)
    wide = head.to(torch.float64)
    c = cond.double() @ wide.cond_weight.double().t() + wide.cond_bias
    for i in range(3):
        now = inputs[i].double()
        rows = now if cfg_scale is None else torch.cat([now, now])
        out = reference.network(wide, rows, wide.time_embedding[i] + c)
        found = [value.view(3, 3, -1)[i] for value in (ours.network.out[0], ours.network.v)]
        expected = [out[:3, : head.channels], out[:3, head.channels :]]
        if cfg_scale is not None:
            found.append(ours.network.out[1].view(3, 3, -1)[i])
            expected.append(out[3:, : head.channels])
        for a, b in zip(found, expected):
            assert relative_error(a, b) <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("rows", [1, slow(3)])
def test_the_whole_call(make_head, rows):
    """Tokens that settle, and tokens that the sequential chain makes."""
    head = make_head(steps=6, width=16, channels=4)
    cond, x, noise = random_inputs(head, rows, 43, guided=True)
    expected = reference.denoise(head, cond, x, noise, 0.9, 1.5, dtype=torch.float64)
    for limit, tolerance in ((6, 1e-6), (2, 0.0)):
        ours = Sweeping(head, (cond, x, noise), cfg_scale=1.5, tolerance=tolerance).whole
        ours.state.limit = limit
        ours.launch(head, Tables(head))
        *found, sweeps, trajectory = ours.results(rows, 0.9, Tables(head))
        for a, b in zip(found, expected):
            assert relative_error(a, b) <= 1e-5
        assert trajectory.shape == (rows, 6, head.channels)
        assert (sweeps <= limit).all() if tolerance else (sweeps == limit + 6).all()


@triton_alone
@pytest.mark.parametrize("steps", [1, 2, 100, 128, 129, 1000, 4000])
def test_a_program_has_all_steps_and_few_values_a_thread(steps):
    from cspd_kernels.ops.denoise.triton_config import sweep_tile

    for channels in (1, 3, 16, 64):
        group, warps = sweep_tile(steps, channels)
        values = (1 << (steps - 1).bit_length()) * group
        assert group in (1, 2, 4) and warps in (1, 2, 4, 8, 16)
        assert values <= 128 * warps or warps == 16


# --- the op ---


@pytest.mark.parametrize("noise", ["stored", "addressed"])
@pytest.mark.parametrize(("rows", "cfg_scale"), [(1, 1.0), slow(3, 2.5), slow(5, 1.0)])
def test_the_op_gives_the_sequential_tokens(backend, make_head, rows, cfg_scale, noise):
    head = make_head(steps=4, width=16, depth=2)
    cond, x, stored = random_inputs(head, rows, 44, guided=cfg_scale != 1)
    inputs = cond, x, stored if noise == "stored" else addressed(head, rows)
    options = dict(cfg_scale=cfg_scale, temperature=0.9, backend=backend)
    expected = denoise(head, *inputs, **options, parallel_tol=None)
    out = denoise(head, *inputs, **options, parallel_tol=1e-6)
    again = denoise(head, *inputs, **options, parallel_tol=1e-6, guess=out.trajectory)
    for found in (out, again):
        for name in ("mean", "log_std", "path_log_std"):
            assert relative_error(getattr(found, name), getattr(expected, name)) <= 1e-5, name
        assert found.sweeps.dtype == torch.int32 and (found.sweeps <= 4).all()
        assert found.trajectory.shape == (rows, 4, head.channels)
    assert (again.sweeps == 2).all()


@slowly_interpreted
def test_blocks_of_tokens_and_scales_of_their_own(backend, make_head):
    head = make_head(steps=3, width=16)
    inputs, scale = random_inputs(head, 4, 45, guided=True), torch.linspace(0.5, 3, 4, device=make_head().device)
    options = dict(cfg_scale=scale, parallel_tol=1e-6, backend=backend)
    expected = denoise(head, *inputs, cfg_scale=scale, parallel_tol=None, backend=backend)
    for workspace_bytes in (1, 1 << 16):
        out = denoise(head, *inputs, **options, workspace_bytes=workspace_bytes)
        assert relative_error(out.mean, expected.mean) <= 1e-5
    nothing = denoise(head, *random_inputs(head, 0, 0), parallel_tol=1e-3, backend=backend)
    assert nothing.mean.shape == (0, head.channels) and nothing.trajectory.shape == (0, 3, head.channels)


@slowly_interpreted
def test_tokens_that_do_not_settle_are_the_sequential_chains(backend, make_head, monkeypatch):
    monkeypatch.setattr(parallel_chain, "most_sweeps", lambda steps: 3)
    head = make_head(steps=8, width=16)
    inputs = random_inputs(head, 3, 46)
    expected = denoise(head, *inputs, parallel_tol=None, backend=backend)
    out = denoise(head, *inputs, parallel_tol=1e-7, backend=backend)
    assert (out.sweeps == 3 + 8).all()
    for name in ("mean", "log_std", "path_log_std"):
        assert relative_error(getattr(out, name), getattr(expected, name)) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16)])
def test_half_precision(backend, make_head, dtype):
    head = make_head(dtype, steps=3, width=16)
    inputs = random_inputs(head, 2, 47, guided=True)
    exact = reference.denoise(head, *inputs, 1.0, 1.5, dtype=torch.float64)
    out = denoise(head, *inputs, cfg_scale=1.5, parallel_tol=1e-3, backend=backend)
    assert relative_error(out.mean, exact[1]) <= 2e-2
    assert relative_error(out.path_log_std, exact[3]) <= 2e-2


@slowly_interpreted
def test_a_tokens_bits_do_not_depend_on_its_batch(backend, make_head):
    """But for the library's products, which CUDA's float32 has; and for the interpreter's, which are numpy's."""
    head = make_head(torch.bfloat16, steps=4, width=16)
    cond, x, noise = random_inputs(head, 3, 48)
    out = denoise(head, cond, x, noise, parallel_tol=1e-2, backend=backend)
    part = torch.tensor([2, 0, 1], device=x.device)
    moved = denoise(head, cond[part], x[part], noise[:, part], parallel_tol=1e-2, backend=backend)
    interpreted = backend == "triton" and not x.is_cuda
    torch.testing.assert_close(moved.mean, out.mean[part], rtol=0, atol=1e-2 if interpreted else 0)
    assert torch.equal(moved.sweeps, out.sweeps[part])
