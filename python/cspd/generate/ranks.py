"""The processes of a run: one, or those that torchrun has started. They share notes, no data of images."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ..cli_support import one_line
from ..errors import CallError, InvalidInput

T = TypeVar("T")
_FAILED, _DONE = "failed", "done"
_PATIENCE = timedelta(days=1)  # ranks wait for the slowest one; one that is gone is noticed at once


def _attempt() -> str:
    """What keeps this start's notes from those of the one before, which failed: torchrun may keep its store."""
    return f"cspd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class LostError(CallError):
    """A rank is gone, and could not say why."""

    def __init__(self):
        super().__init__("a process of this run ended before its work was done")


class Ranks:
    """A context manager around all work.

    The first rank that fails says why, the others end without a word: ``SystemExit(2)``. A rank that was killed is
    noticed where the others next wait for it.

    Attributes:
        rank, size, local: number of this process, how many there are, and its number on this machine.
    """

    def __init__(self):
        several = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        self.rank, self.size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if several else (0, 1)
        self.local = int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else 0
        self._store = None
        self._told = False  # this rank's failure is known to the others already
        self._done = 0

    def device(self, name: str) -> torch.device:
        """Where this rank computes, from ``--device``; it becomes the current device.

        Raises:
            ValueError: torch has no such device here, or fewer GPUs than ranks.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            try:
                device = torch.device(name)
            except RuntimeError:  # whose message lists all that torch has a name for
                raise InvalidInput("there is no such device") from None
            if device.type == "meta":
                raise InvalidInput("it computes nothing")
            if device.type == "cuda" and self.size > 1:
                if device.index is not None:
                    raise InvalidInput(f"each of {self.size} processes takes a GPU of its own: pass --device cuda")
                if self.local >= (count := torch.cuda.device_count()):
                    raise InvalidInput(f"there are more processes on this machine than GPUs ({count})")
                device = torch.device("cuda", self.local)
            torch.empty(0, device=device)
        except (ValueError, RuntimeError, AssertionError) as error:  # torch without that device asserts
            raise InvalidInput(
                f"expected a --device that torch has on this machine, got {name}: {one_line(error)}"
            ) from error
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return device

    def __enter__(self) -> Ranks:
        if self.size > 1:
            try:
                # The store is torchrun's, or rank 0's.
                store, _, _ = next(dist.rendezvous("env://", self.rank, self.size))
                self._store = dist.PrefixStore(_attempt(), store)
                dist.init_process_group(
                    "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=_PATIENCE
                )
            except ValueError as error:
                raise CallError(f"rank {self.rank}: {one_line(error)}") from error
        return self

    def __exit__(self, kind, error, _) -> None:
        if self._store is None:
            return
        try:
            self._tell(error)
        finally:
            dist.destroy_process_group()  # its threads end; left alone they abort the process at its end

    def _tell(self, error: BaseException | None) -> None:
        """Let the others know of this rank's failure, unless they do or have failed before."""
        if error is None or isinstance(error, SystemExit) or self._told:
            return
        if not self._first_to_fail():
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from error
        lost = isinstance(error, LostError) or isinstance(error.__cause__, LostError)
        if (
            isinstance(error, (OSError, ValueError, RuntimeError))
            and not lost
            and not isinstance(error, BrokenPipeError)
        ):
            raise CallError(f"rank {self.rank}: {one_line(error)}") from error

    def _first_to_fail(self) -> bool:
        try:
            return self._store.compare_set(_FAILED, "", str(self.rank)).decode() == str(self.rank)
        except RuntimeError:  # gone with rank 0, whose store it was: one of the others says it
            return self.rank <= 1

    def check(self) -> None:
        """End this rank where another one has failed."""
        if self._store is not None and self._ask(lambda store: store.check([_FAILED])):
            raise SystemExit(2)

    def _ask(self, question: Callable[[dist.Store], T]) -> T:
        try:
            return question(self._store)
        except RuntimeError as error:
            raise LostError from error

    def lead(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, on all of them. Where it raises, rank 0 raises and the others end."""
        if self._store is None:
            return function()
        answer = [None, False]
        failure = None
        if self.rank == 0:
            try:
                answer = [function(), True]
            except Exception as error:  # noqa: BLE001
                failure = error
        with self._waiting():
            dist.broadcast_object_list(answer, src=0)
        self._end_if(failure, None if answer[1] else 0)
        return answer[0]

    def together(self, function: Callable[[], T]) -> T:
        """What the function returns on this rank. Where it raises on any, the first of these raises, the others end."""
        if self._store is None:
            return function()
        result = failure = None
        try:
            result = function()
        except Exception as error:  # noqa: BLE001
            failure = error
        reasons: list[str | None] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(reasons, failure and f"{type(failure).__name__}: {one_line(failure)}")
        failed = [rank for rank, reason in enumerate(reasons) if reason]
        if failure is not None and len(failed) < self.size and isinstance(failure, (OSError, ValueError, RuntimeError)):
            failure = CallError(f"rank {self.rank}: {one_line(failure)}")  # it is not all ranks' failure
        self._end_if(failure, failed[0] if failed else None)
        return result

    def _end_if(self, failure: Exception | None, first: int | None) -> None:
        """End all ranks where one has failed, which all know."""
        if first is not None:
            self._told = True
            if self.rank == first:
                raise failure
            raise SystemExit(2)

    def add(self, count: int) -> None:
        """Tell the others that this rank has made so many images more."""
        if self._store is None:
            self._done += count
        else:
            self._ask(lambda store: store.add(_DONE, count))

    def done(self) -> int:
        """How many images all ranks have made."""
        return self._done if self._store is None else self._ask(lambda store: store.add(_DONE, 0))

    def wait(self, show: Callable[[], None]) -> None:
        """Wait until all ranks are here; rank 0 calls ``show`` meanwhile. For the others rank 0 may be gone then."""
        if self._store is not None:
            with self._waiting():
                work = dist.barrier(async_op=True)
                while not work.is_completed():
                    if self.rank == 0:  # the store may end with it as soon as all are here
                        self.check()
                        show()
                    time.sleep(0.02)
                work.wait()
        if self.rank == 0:
            show()

    @contextlib.contextmanager
    def _waiting(self):
        """If a rank that is waited for has ended, it says why itself, if it had time to."""
        try:
            yield
        except RuntimeError as error:
            self.check()
            raise error if isinstance(error, LostError) else LostError from error
