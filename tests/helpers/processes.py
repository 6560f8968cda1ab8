"""Ranks of a run as torchrun starts them, without its second and a half per process: they are forked from one
process that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
from contextlib import closing
from pathlib import Path

TIMEOUT = 300


def _free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(
    size: int, command: list[str], die: dict[int, int] | None = None, most_bytes: dict[int, int] | None = None
):
    """(exit code, stderr) of each rank of ``cspd`` with these arguments.

    Args:
        die: {rank: n}: it is killed when it makes its n-th batch (from 1). most_bytes: {rank: n}: its files may
            not be longer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cspd.generate.run", "cspd.generate.writer", "cspd.demo.pair", "cspd.demo.picture"])
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder) / str(rank) for rank in range(size)]
        ranks = []
        for rank, error in enumerate(errors):
            trouble = [(table or {}).get(rank) for table in (die, most_bytes)]
            ranks.append(context.Process(target=_rank, args=(rank, size, port, command, str(error), *trouble)))
        for rank in ranks:
            rank.start()
        try:
            for rank in ranks:
                rank.join(TIMEOUT)
                assert rank.exitcode is not None, "a process hangs"
        finally:
            for rank in ranks:
                rank.kill()
        return [(rank.exitcode, error.read_text()) for rank, error in zip(ranks, errors)]


def _rank(rank, size, port, command, stderr, die, most_bytes):
    import torch

    from cspd.cli import main
    from cspd.generate.models import Models

    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(stderr, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    if die is not None:
        make, calls = Models.make, []

        def dying(self, *arguments):
            calls.append(arguments)
            if len(calls) == die:
                os.kill(os.getpid(), signal.SIGKILL)
            return make(self, *arguments)

        Models.make = dying
    sys.exit(main(command))
