"""Code of ours inside ``torch.compile``: how it leaves the graph when it has to run in Python.

Hooks of a model that is compiled after a metric was attached to it become part of the compiled call. Where nothing is
due they vanish from the graph; where statistics are due the graph ends at the first of them, and the rest of the call
runs in Python, so that the calls can be noted.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Eager:
    """How many forward passes are being watched, in all threads, and the stance that the first of them set."""

    lock = threading.Lock()
    watched = 0
    stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Compiled code runs eagerly inside. Several metrics of one model leave in the order they entered: the last one out
    restores the stance.
    """
    with _Eager.lock:
        if not _Eager.watched and "torch._dynamo" in sys.modules:
            _Eager.stance = torch.compiler.set_stance("force_eager")
            _Eager.stance.__enter__()
        _Eager.watched += 1
    try:
        yield
    finally:
        with _Eager.lock:
            _Eager.watched -= 1
            if not _Eager.watched and _Eager.stance is not None:
                _Eager.stance.__exit__(None, None, None)
                _Eager.stance = None


def go_on_in_python() -> None:
    """While a graph is traced: end it, and run in Python until the end of the compiled call. Elsewhere: nothing."""
    if torch.compiler.is_compiling():
        keep_untraced()
        leave_graph()


def leave_graph() -> None:
    # `torch.compiler.disable` would not do: it sets the callback again when the function returns. The end of the
    # compiled call sets it again in any case
    torch._C._dynamo.eval_frame.set_eval_frame(None)


def keep_untraced() -> None:
    """Called by the compiler while it traces, as it takes the result for a constant. Earlier, it would import the
    compiler for everybody.
    """
    torch._dynamo.decorators.skip(leave_graph)


keep_untraced._dynamo_marked_constant = True  # type: ignore[attr-defined]
