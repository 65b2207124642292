"""Ctrl-C that waits for the end of a short stretch of code, so that nothing is left half-written or half-entered."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the end of the block, then hand it to the handler that was there.

    Does nothing outside the main thread, which is the only one that Python interrupts, or where SIGINT is ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])


@contextmanager
def entered(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter contexts, and leave them whatever ends the block; Ctrl-C waits while they are entered and left."""
    with ExitStack() as stack:
        try:
            with uninterrupted():
                for context in contexts:
                    stack.enter_context(context)
            yield
        finally:
            with uninterrupted():
                stack.close()
