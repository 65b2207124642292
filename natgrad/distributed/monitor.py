"""Who came to a meeting of the ranks: a collective that fails says which ranks it failed for.

Before each collective a rank notes its number in the store that torch.distributed started from, one small message.
Where the collective then fails, since a rank has died or not come within the time-out, the notes tell which ranks never
got there and where they were last. Nothing is read while all goes well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

GRACE = 2.0  # seconds that a failed meeting waits for notes of ranks that are on their way


class Monitor:
    """The notes of one process group.

    Args:
        group: whose meetings they are.
        ranks: the global ranks of the group, by which it is spoken of them.
        timeout: the group's own, for the message.
    """

    def __init__(self, group: Any, ranks: Sequence[int], timeout: timedelta | None) -> None:
        self.store = dist.PrefixStore(f"natgrad {group.group_name}", _get_default_store())
        self.ranks, self.mine, self.timeout = list(ranks), dist.get_rank(), timeout
        self.count = 0
        self.moment = "the making of the metric"
        self._note("the start")  # a note from before a restart may be in the store

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Around a collective.

        Raises:
            RuntimeError: it failed; the message names the ranks that did not come.
        """
        self.count += 1
        try:
            self._note(what)
            yield
        except RuntimeError as error:
            raise RuntimeError(self._story(what, error)) from error

    def _note(self, what: str) -> None:
        self.store.set(str(self.mine), f"{self.count}:{self.moment}, {what}")

    def _story(self, what: str, error: RuntimeError) -> str:
        begin = f"rank {self.mine} waited in vain for the others at {self.moment}, in the exchange of {what}: "
        try:
            absent = self._absent()
        except RuntimeError:
            why = "the store of the process group does not answer, so rank 0, which keeps it, has probably ended"
        else:
            why = "; ".join(f"rank {rank} did not come, it was last {where}" for rank, where in absent.items())
            why = why or "every rank had come, so one of them has ended or given up since"
        limit = "" if self.timeout is None else f" (here {self.timeout.total_seconds():g} s)"
        return (
            f"{begin}{why}. A rank that did not come has ended, raised an error or fallen behind: look at its own "
            f"output. Where ranks are only slow, give init_process_group a longer timeout{limit}; else start all of "
            f"them again from a checkpoint, as torchrun --max-restarts does. torch says: {first_line(error)}"
        )

    def _absent(self) -> dict[int, str]:
        """Where the ranks were last that have not come to the present meeting."""
        until = time.monotonic() + GRACE
        while True:
            absent = {}
            for rank in self.ranks:
                if not self.store.check([str(rank)]):
                    absent[rank] = "not seen at all"
                    continue
                count, where = self.store.get(str(rank)).decode().split(":", 1)
                if int(count) < self.count:
                    absent[rank] = f"seen at {where}"
            if not absent or time.monotonic() > until:
                return absent
            time.sleep(0.1)


def timeout_of(group: Any, device: torch.device) -> timedelta | None:
    """The time-out that a process group was made with, None where its backend does not tell."""
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
