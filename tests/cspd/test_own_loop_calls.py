"""One call of a network that ``loop="own"`` has taken over: rows, times, types, conditions; and which calls are not."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn
from foreign import CHANNELS, COND, Net, own_messages
from own_loops import SpeechNet, ready

import cspd
from cspd.loop import patch_of
from cspd_kernels.testing import relative_error


def call_of(rows=3, seed=0, time=(1.0, 980.0)):
    generator = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(rows, n, generator=generator) for n in (CHANNELS, COND))
    return x, torch.linspace(*time, rows), c


def assert_served(net, *args, bound=1e-5, **kwargs):
    """The same by its own forward and by the kernels."""
    expected = cspd.unpatch(net)(*args, **kwargs)
    cspd.patch(net, loop="own")
    before = net.evaluations
    actual = net(*args, **kwargs)
    assert net.evaluations == before
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if expected.numel():
        assert relative_error(actual, expected) < bound
    return actual


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("kind", [Net, SpeechNet])
def test_any_number_of_rows(kind, rows):
    assert_served(ready(kind), *call_of(rows))


def test_rows_that_change_at_every_call():
    net, twin = ready(Net), ready(Net)
    cspd.patch(net, loop="own")
    for rows in (1, 2, 3, 1, 17, 2, 0, 5):
        call = call_of(rows, seed=rows)
        torch.testing.assert_close(net(*call), twin(*call), rtol=1e-4, atol=1e-5)
    assert net.evaluations == 0
    kinds = patch_of(net).network.kinds
    assert len(kinds) == 4  # those that were compared at first, of one row and of none


class AnyTime(Net):
    """Times of any kind: numbers, tensors of rank 0 and 1."""

    def forward(self, x, t, c):
        t = torch.as_tensor(t, device=x.device)
        return super().forward(x, t.reshape(-1).expand(len(x)), c)


@pytest.mark.parametrize(
    "t", [3, 0.25, torch.tensor(7), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([7]), torch.tensor([1, 5, 9])]
)
def test_times_as_numbers_and_tensors(t):
    x, _, c = call_of(3)
    assert_served(ready(AnyTime), x, t, c)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int64, torch.int32, torch.float64, torch.bfloat16, torch.float16]
)
def test_times_of_any_type(dtype):
    x, t, c = call_of(3)
    assert_served(ready(Net), x, t.to(dtype), c)


class TwoTimes(nn.Module):
    """Like kyutai-labs/pocket-tts': the condition first, then two times (N, 1), whose embeddings are averaged."""

    evaluations = 0

    class Embedder(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.frequency_embedding_size = 16
            self.mlp = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
            self.register_buffer("freqs", torch.exp(-torch.arange(8) * (torch.log(torch.tensor(10000.0)) / 8)))

        def forward(self, t):
            angles = t * self.freqs
            return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))

    def __init__(self):
        super().__init__()
        plain = Net(learned=False)
        for name in ("cond_embed", "input_proj", "res_blocks", "final_layer"):
            setattr(self, name, getattr(plain, name))
        self.time_embed = nn.ModuleList(self.Embedder(self.input_proj.out_features) for _ in range(2))

    def forward(self, c, s, t, x):
        self.evaluations = self.evaluations + 1
        h = self.input_proj(x)
        y = (self.time_embed[0](s) + self.time_embed[1](t)) / 2 + self.cond_embed(c)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


@pytest.mark.parametrize("rows", [1, 3])
def test_two_times_and_the_condition_first(rows):
    net = ready(TwoTimes)
    x, t, c = call_of(rows, time=(0.1, 0.9))
    assert_served(net, c, t[:, None], t[:, None] + 0.1, x)
    assert_served(net, c, x=x, t=t[:, None], s=t[:, None] / 2)


class Tokens(Net):
    """Like OpenMotionLab/MotionGPT3's: x (N, 1, C), a time for each of N, conditions (N, 1, Z)."""

    def forward(self, x, t, c):
        self.evaluations = self.evaluations + 1
        h, y = self.input_proj(x), self.time_embed(t).unsqueeze(1) + self.cond_embed(c)
        for block in self.res_blocks:
            h = block(h, y)
        return self.final_layer(h, y)


@pytest.mark.parametrize("rows", [1, 4])
def test_tokens_of_rank_3(rows):
    x, t, c = call_of(rows)
    assert_served(ready(Tokens), x[:, None], t, c[:, None])
    assert_served(ready(Tokens), x[:, None].expand(-1, 2, -1), t, c[:, None])


def test_by_keyword_and_with_more_dimensions():
    net = ready(SpeechNet)
    x, t, c = call_of(6)
    assert_served(net, x, timesteps=t, condition=c)
    assert_served(net, noisy_images=x, condition=c, timesteps=t)
    grid = x.view(2, 3, CHANNELS), t[:3], c.view(2, 3, COND)
    assert_served(net, *grid)
    assert_served(net, x.view(2, 3, CHANNELS), t[:3], c[:1])
    assert_served(net, x[:1], t, c)


@pytest.mark.parametrize("strided", [lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]])
def test_strided_arguments(strided):
    x, t, c = call_of(5)
    assert_served(ready(Net), strided(x), t.repeat(2)[::2], strided(c))


@pytest.mark.parametrize("kind", [Net, SpeechNet])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_weights(kind, dtype):
    x, t, c = (value.to(dtype) for value in call_of(3))
    actual = assert_served(ready(kind).to(dtype), x, t, c, bound=3e-2)
    assert actual.dtype == dtype


@pytest.mark.parametrize("kind", [Net])
def test_under_autocast(kind):
    with torch.autocast("cpu", torch.bfloat16):
        actual = assert_served(ready(kind), *call_of(3), bound=3e-2)
    assert actual.dtype == torch.bfloat16


class Float(Net):
    def forward(self, x, t, c):
        return super().forward(x, t, c).float()


def test_a_type_of_its_own():
    x, t, c = (value.bfloat16() for value in call_of(3))
    assert assert_served(ready(Float).bfloat16(), x, t, c, bound=3e-2).dtype == torch.float32


def test_inference_mode_and_back():
    net, call = ready(Net), call_of()
    expected = net(*call)
    cspd.patch(net, loop="own")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            inside = call_of()
            assert relative_error(net(*inside), expected) < 1e-5
    assert net.evaluations == 1


CHANGES = [
    lambda c: c.mul_(0.5),
    lambda c: c.data.mul_(2.5),
    lambda c: c[1:].neg_(),
    lambda c: c.numpy().__imul__(0.75),
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_condition_that_comes_again_and_changes_in_place(change, inference):
    net, twin = cspd.patch(ready(Net), loop="own"), ready(Net)
    with torch.inference_mode(inference):
        x, t, c = call_of()
        for step in range(3):
            assert relative_error(net(x, t + step, c), twin(x, t + step, c)) < 1e-5
        change(c)
        for step in range(2):
            assert relative_error(net(x, t + step, c), twin(x, t + step, c)) < 1e-5
        other = call_of(seed=1)[2]
        assert relative_error(net(x, t, other), twin(x, t, other)) < 1e-5
        assert relative_error(net(x, t, c), twin(x, t, c)) < 1e-5
    assert net.evaluations == 0


def test_results_are_the_callers():
    net = cspd.patch(ready(Net), loop="own")
    x, t, c = call_of()
    first = net(x, t, c)
    kept = first.clone()
    second = net(x + 1, t, c)
    assert torch.equal(first, kept)
    first.zero_()
    assert not torch.equal(second, first)
    assert not first.requires_grad


def record(net, x, t, c):
    net.requires_grad_(True)
    with torch.enable_grad():
        return net(x, t, c)


def record_x(net, x, t, c):
    with torch.enable_grad():
        return net(x.requires_grad_(), t, c)


def extra(net, x, t, c):
    return net(x, t, c, mask=torch.ones(len(x), 1))


def hooked(net, x, t, c):
    net.cond_embed.register_forward_hook(lambda *_: None)
    return net(x, t, c)


def mapped(net, x, t, c):
    return torch.vmap(lambda x, c: net(x[None], t[:1], c[None])[0])(x, c)


def training(net, x, t, c):
    return net.train()(x, t, c)


def on_meta(net, x, t, c):
    return net.to("meta")(x.to("meta"), t.to("meta"), c.to("meta"))


class Masked(Net):
    """With an argument more, and dropout in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, c, mask=None):
        out = super().forward(x, t, self.dropout(c))
        return out if mask is None else out * mask


OWN = {
    "autograd records the weights": (record, "autograd records its calls"),
    "autograd records x": (record_x, "autograd records its calls"),
    "another argument": (extra, "its network is also given mask"),
    "a hook": (hooked, "has a forward hook"),
    "vmap": (mapped, "a torch.func transform"),
    "training": (training, "in training mode"),
    "meta": (on_meta, "on the meta device"),
}


@pytest.mark.parametrize("how", OWN)
def test_calls_that_run_its_own_code_are_told_once(how, caplog):
    call, match = OWN[how]
    net, twin = cspd.patch(ready(Masked), loop="own"), ready(Masked)
    with caplog.at_level(logging.WARNING, "cspd"):
        for _ in range(2):
            arguments = call_of()
            torch.manual_seed(0)
            actual = call(net, *arguments)
            torch.manual_seed(0)
            expected = call(twin, *call_of())
            assert actual.requires_grad == expected.requires_grad
            assert actual.is_meta or torch.equal(actual, expected)
    (message,) = own_messages(caplog)
    assert match in message
    assert net.evaluations == twin.evaluations


def test_errors_are_those_of_its_own_code():
    net = cspd.patch(ready(Net), loop="own")
    x, t, c = call_of()
    for wrong in ((x[:, :2], t, c), (x, t[:2], c), (x, t, c[:, :3]), (x,), (x.double(), t, "c")):
        with pytest.raises((RuntimeError, TypeError)) as ours:
            net(*wrong)
        with pytest.raises(ours.type):
            ready(Net)(*wrong)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_comes_to_what_its_own_code_makes_of_it(where, caplog):
    net, twin = cspd.patch(ready(Net), loop="own"), ready(Net)
    arguments = call_of()
    arguments[where].view(-1)[0] = float("nan")
    with caplog.at_level(logging.WARNING, "cspd"):
        torch.testing.assert_close(net(*arguments), twin(*arguments), rtol=0, atol=0, equal_nan=True)
    assert "expected finite values" in own_messages(caplog)[0]


def test_a_gradient_is_its_own():
    net, twin = cspd.patch(ready(Net), loop="own").requires_grad_(True), ready(Net).requires_grad_(True)
    for each in (net, twin):
        with torch.enable_grad():
            each(*call_of()).square().sum().backward()
    for a, b in zip(net.parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("what", ["sparse x", "times that are true or false"])
def test_tensors_of_another_kind_are_its_own_matter(what):
    x, t, c = call_of()
    call = (x.to_sparse(), t, c) if what == "sparse x" else (x, t > 500, c)

    def outcome(net):
        try:
            return net(*call)
        except Exception as error:  # noqa: BLE001
            return str(error)

    net = ready(Net)
    with torch.no_grad():
        expected = outcome(net)
        actual = outcome(cspd.patch(net, loop="own"))
    assert torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected
