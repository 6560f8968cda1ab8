"""The table of what was measured to be fastest, and the switch of the persistent kernels."""

import pytest
import torch

from cspd_kernels import crossover
from cspd_kernels.backends import BACKENDS
from cspd_kernels.crossover import FASTEST, PERSISTENT_LIMIT, fastest, prefers_persistent

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHAIN = ((2, "cuda persistent"), (4, "cuda"), (8, "triton persistent"), (64, "torch"))


@pytest.fixture
def card(monkeypatch):
    """A device that the table knows."""
    monkeypatch.setattr(crossover, "_name", lambda device: "Card A")
    table = {"denoise": CHAIN, "accept_reject": ((None, "cuda"),)}
    monkeypatch.setattr(crossover, "FASTEST", {"Card A": table, "Card B": {"denoise": ((None, "torch"),)}})


def test_the_table_is_well_formed():
    for ops in FASTEST.values():
        for op, entries in ops.items():
            assert op in ("denoise", "log_density_ratio", "accept_reject")
            limits = [float("inf") if limit is None else limit for limit, _ in entries]
            assert limits == sorted(set(limits))
            for limit, (choice, *persistent) in zip(limits, (choice.split() for _, choice in entries)):
                assert choice in BACKENDS
                if persistent:
                    assert (op, persistent) == ("denoise", ["persistent"])
                    assert choice != "torch"
                    assert limit <= PERSISTENT_LIMIT


def test_a_choice_holds_up_to_its_number_of_tokens(card):
    chosen = {n: fastest("denoise", CUDA, n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65)}
    first, second, third, fourth = (choice for _, choice in CHAIN)
    assert chosen == {
        1: first, 2: first, 3: second, 4: second, 5: third, 8: third, 9: fourth, 64: fourth, 65: None,
    }  # fmt: skip
    assert fastest("accept_reject", CUDA, 10**6) == "cuda"


def test_what_was_not_measured_has_no_choice(card, monkeypatch):
    assert fastest("log_density_ratio", CUDA, 1) is None
    assert fastest("denoise", CPU, 1) is None
    assert fastest("accept_reject", CUDA, None) is None
    monkeypatch.setattr(crossover, "_name", lambda device: "Card C")
    assert fastest("denoise", CUDA, 1) is None


def test_the_persistent_kernel_is_taken_where_the_table_names_it(card):
    taken = {backend: [n for n in range(1, 17) if prefers_persistent(backend, CUDA, n)] for backend in BACKENDS}
    assert taken == {"torch": [], "triton": [5, 6, 7, 8], "cuda": [1, 2]}
    assert not prefers_persistent("triton", CPU, 5)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_switch_goes_before_the_table(card, monkeypatch, backend):
    for value in (0, 5, 16):
        monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", str(value))
        for device in (CUDA, CPU):
            assert [n for n in range(1, 20) if prefers_persistent(backend, device, n)] == list(range(1, value + 1))
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", "")  # counts as not set
    assert not prefers_persistent(backend, CPU, 1)


@pytest.mark.parametrize("value", ["17", "-1", "1.5", "all", "²"])
def test_the_switch_takes_a_small_number(monkeypatch, value):
    monkeypatch.setenv("CSPD_PERSISTENT_MAX_TOKENS", value)
    with pytest.raises(
        ValueError, match=f"expected CSPD_PERSISTENT_MAX_TOKENS as a number from 0 to 16, got '{value}'"
    ):
        prefers_persistent("cuda", CUDA, 1)


def test_the_name_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert [crossover._name.__wrapped__(torch.device("cuda", i)) for i in (0, 1)] == ["Card 0", "Card 1"]
