"""Memory that graphs share: few blocks, none kept longer than somebody holds it."""

import gc
import threading
import time

import torch

from cspd_kernels.devices import one_a_device
from cspd_kernels.scratch import Scratch, scratch

CPU = torch.device("cpu")


def test_a_request_is_served_by_the_smallest_block_that_is_large_enough():
    memory = Scratch(CPU)
    small, large = memory.take(100, 1000), memory.take(600, 1000)
    assert (len(small), len(large)) == (128, 1000)  # a power of two, and no more than the limit
    assert memory.take(128, 1000) is small
    assert memory.take(129, 1000) is large
    assert memory.take(1000, 10) is large
    assert len(memory.take(1001, 10)) == 1001  # what is asked for is given all the same
    assert len(memory.take(0, 10)) == 128 or memory.take(0, 10) is small


def test_a_block_goes_with_the_last_who_holds_it():
    memory = Scratch(CPU)
    block = memory.take(64, 64)
    view, at = block[:10].view(torch.float16), id(block)
    assert id(memory.take(1, 64)) == at
    del block
    gc.collect()
    other = memory.take(64, 64)
    assert other.data_ptr() != view.data_ptr()


def test_each_device_has_its_own():
    assert scratch(CPU) is scratch(CPU)
    assert scratch(CPU) is not scratch(torch.device("meta"))


def test_threads_that_ask_at_the_same_time_get_the_same():
    """Of two turns of one device each would let its own graphs run beside the other's."""
    made, together = [], threading.Barrier(4)

    @one_a_device
    def make(device):
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    def ask():
        together.wait()
        answers.append(make(CPU))

    answers = []
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == made * 4
    make.cache_clear()
    assert make(CPU) is not made[0]
