"""What a network's result depends on beside its weights: attributes, buffers, its mode."""

import logging

import pytest
import torch
import torch.nn as nn
from foreign import COND, STEPS, WIDTH, Head, Net, conditions, made, own_messages, run

import cspd

Z = conditions()


class Gain(Net):
    """The output times an attribute that is 1 when it is patched."""

    def __init__(self):
        super().__init__()
        self.gain = 1.0

    def forward(self, x, t, c):
        return self.gain * super().forward(x, t, c)


class Shifted(Net):
    """A buffer is added to the condition, zeros when it is patched."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(COND))

    def forward(self, x, t, c):
        return super().forward(x, t, c + self.shift)


class Dropping(Net):
    """Dropout in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, c):
        return super().forward(x, t, self.dropout(c))


class DroppingByFunction(Net):
    def forward(self, x, t, c):
        return super().forward(x, t, nn.functional.dropout(c, 0.5, self.training))


def head_with(kind):
    class Own(Head):
        net_class = kind

    return made(Own).eval()


def change_gain(net):
    net.gain = 1.5


def change_buffer(net):
    net.shift.add_(0.5)


def change_buffer_unseen(net):
    net.shift.data[3] = 2.0


CASES = [(Gain, change_gain), (Shifted, change_buffer), (Shifted, change_buffer_unseen)]
CASES += [(Dropping, nn.Module.train), (DroppingByFunction, nn.Module.train)]


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_what_changes_after_the_patch_runs_its_own_code_and_is_told(kind, change, caplog):
    head = cspd.patch(head_with(kind))
    assert run(head, lambda h: h.sample(Z))[2] == 0
    before = run(head, lambda h: h.sample(Z))[0]
    change(head.net)
    with caplog.at_level(logging.WARNING, "cspd"):
        for _ in range(2):
            actual, rng, evaluations = run(head, lambda h: h.sample(Z))
            assert evaluations == STEPS
    assert len(own_messages(caplog)) == 1
    expected = run(cspd.unpatch(head), lambda h: h.sample(Z))
    assert torch.equal(actual, expected[0])
    assert torch.equal(rng, expected[1])
    assert not torch.equal(actual, before)


def test_served_again_when_it_is_as_it_was():
    head = cspd.patch(head_with(Gain))
    head.net.gain = 1.5
    assert run(head, lambda h: h.sample(Z))[2] == STEPS
    head.net.gain = 1.0
    assert run(head, lambda h: h.sample(Z))[2] == 0
    head = cspd.patch(head_with(Dropping))
    for training in (True, False):
        head.train(training)
        assert run(head, lambda h: h.sample(Z))[2] == (STEPS if training else 0)


class Idle(Net):
    """Dropout that drops nothing, and an attribute that is not used."""

    def __init__(self):
        super().__init__()
        self.dropout, self.label = nn.Dropout(0.0), "a"

    def forward(self, x, t, c):
        return super().forward(x, t, self.dropout(c))


def test_training_mode_alone_is_served():
    for kind in (Idle, Net):
        head = cspd.patch(head_with(kind)).train()
        assert run(head, lambda h: h.sample(Z))[2] == 0
    head.net.label = "b"
    assert run(head, lambda h: h.sample(Z))[2] == 0
    assert head.net.input_proj.out_features == WIDTH
