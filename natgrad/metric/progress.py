"""How far a long loop is, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def counted(batches: Iterable[T], what: str, show: bool = True) -> Iterator[T]:
    """Yield the batches, and count them in one line of standard error, which is cleared at the end.

    Nothing is written where standard error is no terminal: logs would fill with it.
    """
    if not (show and sys.stderr.isatty()):
        yield from batches
        return
    total = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    line = ""
    try:
        for i, batch in enumerate(batches, 1):
            yield batch
            line = f"{what}: {i}{total} batches"
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
    finally:
        sys.stderr.write(f"\r{' ' * len(line)}\r")
        sys.stderr.flush()
