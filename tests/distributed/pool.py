"""Processes that stand in for ranks: they stay up from test to test, since starting one costs seconds."""

from __future__ import annotations

import faulthandler
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 40.0  # seconds that a task may take; a hang fails the test
COLLECTIVE = timedelta(seconds=10)  # that a rank waits for the others


def serve(rank: int, size: int, store: str, tasks: Any, answers: Any, timeout: timedelta) -> None:
    """What each process runs."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while (task := tasks.get()) is not None:
        function, args = task
        faulthandler.dump_traceback_later(0.8 * PATIENCE)  # where a hang hangs
        try:
            answers.put((rank, "value", function(rank, size, *args)))
        except BaseException as error:
            answers.put((rank, "error", f"{type(error).__name__}: {error}", traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


class Pool:
    """`size` processes of one process group."""

    def __init__(self, size: int, timeout: timedelta = COLLECTIVE) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self._answers = context.Queue()
        self._tasks = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(
                target=serve, args=(r, size, f"{self._folder.name}/store", t, self._answers, timeout), daemon=True
            )
            for r, t in enumerate(self._tasks)
        ]
        for p in self._processes:
            p.start()

    def run(self, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        """``function(rank, size, *args)`` on every rank; values in the order of ranks, all of which must succeed."""
        answers = self.outcomes(function, *args, patience=patience)
        for answer in answers:
            assert answer[1] == "value", f"rank {answer[0]}: {answer[-1]}"
        return [answer[2] for answer in answers]

    def errors(self, function: Callable[..., Any], *args: Any) -> list[str]:
        """What every rank raised; all of them must."""
        answers = self.outcomes(function, *args)
        for answer in answers:
            assert answer[1] == "error", f"rank {answer[0]} returned {answer[2]!r} instead of raising"
        return [answer[2] for answer in answers]

    def outcomes(
        self, function: Callable[..., Any], *args: Any, patience: float = PATIENCE, answers: int | None = None
    ) -> list[Any]:
        """(rank, "value" or "error", …) of every rank, or of the first `answers` that have one."""
        for tasks in self._tasks:
            tasks.put((function, args))
        found = []
        try:
            for _ in range(self.size if answers is None else answers):
                found.append(self._answers.get(timeout=patience))
        except queue.Empty:
            self.kill()
            raise AssertionError(
                f"ranks {sorted(set(range(self.size)) - {a[0] for a in found})} hang; {found}"
            ) from None
        return sorted(found)

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def kill(self) -> None:
        for p in self._processes:
            p.kill()

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for p in self._processes:
            p.join(10)
        self.kill()
        self._folder.cleanup()
