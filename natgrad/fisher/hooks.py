"""Hooks that watch a model and its criterion on the forward passes that refresh a metric.

A pre-hook of the root module opens a tape, a hook after it closes the tape. The draw happens

1. in a hook on the criterion, if the user calls that module: it sees the output and the labels as the loss sees them;
2. else when the output is backpropagated, just before its own backward pass begins: with a functional loss, or a loss
   computed inside the model.

Statistics count once their loss is backpropagated to parameters, and are dropped otherwise, with the random numbers
that they took. A backward pass for the gradient of the inputs alone is none of training (`natgrad.capture.purpose`).
The hooks hold the metric weakly, and what they leave on the graph holds what a draw says and no graph, so no cycle
keeps a graph alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from natgrad._tree import leaves_of
from natgrad.blocks.batch_statistics import BatchStatistics
from natgrad.capture.purpose import ACCUMULATED, purpose_of_pass
from natgrad.capture.tape import Hook, Tape, edge_of, in_backward, in_transform

_unwatched: ContextVar[bool] = ContextVar("unwatched", default=False)
LIVE_TAPES = 8  # forward passes that may wait for their loss at once


Called = dict[str, tuple[Any, Any]]  # head → (args, kwargs) of the call of its criterion; the only head is ""


@contextmanager
def unwatched() -> Iterator[None]:
    """Forward passes in here are a metric's own: no other metric of the model takes them for training."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


class Watched(Protocol):
    """What the watcher asks of a metric."""

    def wants_statistics(self) -> bool: ...
    def parameter_names(self) -> Mapping[int, str]: ...
    def draw_at_criterion(self, called: Called, tapes: list[Tape]) -> BatchStatistics | None: ...
    def draw_at_output(self, output: Any, received: tuple[Any, Any], tapes: list[Tape]) -> BatchStatistics | None: ...
    def look_at_gradient(self, output: Any, g: Tensor) -> None: ...
    def lacks_labels(self) -> bool: ...
    def count(self, draw: BatchStatistics, purpose: str) -> None: ...


class CriterionHooks:
    """Opens tapes on the root's forward passes and asks the metric for draws."""

    def __init__(self, metric: Watched, root: nn.Module, criteria: Mapping[str, nn.Module]) -> None:
        self._metric = weakref.ref(metric)
        self.root = root
        self.tapes: list[Tape] = []
        self._open: Tape | None = None
        self._inside: list[tuple[str, Any, Any, Any]] = []  # calls of a criterion inside the root's forward
        self._called: Called = {}  # of the criteria of several heads, until all have been called
        self._losses: dict[str, Any] = {}  # and what they returned
        self.criterion_is_called = False  # whether it ever was, after a forward pass that was watched
        self._listeners = [Listener(self, key) for key in criteria]
        before, after = Hook(self._before, root), Hook(self._after, root)
        at_criteria = [Hook(listener.called, c) for c, listener in zip(criteria.values(), self._listeners)]
        self._hooks = [before, after, *at_criteria]
        self._handles = [
            root.register_forward_pre_hook(before, with_kwargs=True),
            root.register_forward_hook(after, with_kwargs=True, always_call=True),
            *(c.register_forward_hook(hook, with_kwargs=True) for c, hook in zip(criteria.values(), at_criteria)),
        ]

        # a metric that is gone leaves nothing on the model
        weakref.finalize(metric, remove, self._handles)

    def remove(self) -> None:
        remove(self._handles)
        self.forget()

    def expect(self, due: bool) -> None:
        """Have compiled code run the hooks, or leave them out."""
        for hook in self._hooks:
            hook.due = due

    def forget(self) -> None:
        """Let go of forward passes whose loss has not come."""
        if self._open is not None:
            self._open.close()
        self._open = None
        self.tapes = []
        self._called, self._losses = {}, {}

    # hooks ---------------------------------------------------------------------------------------------

    def _before(self, args: Any, kwargs: Any) -> None:
        metric = self._metric()
        if in_backward() or in_transform() or _unwatched.get():
            return  # a recomputation of checkpointing, a transform of torch.func, or another metric's update
        if self._open is not None:  # the last forward raised
            self.forget()
        if not torch.is_grad_enabled():
            return  # a look at the model in between, after which losses may still come
        if metric is None or not metric.wants_statistics():
            self.tapes = []
            return
        # last, so that hooks of the user which rewrite the output have run
        self.root._forward_hooks.move_to_end(self._handles[1].id)  # type: ignore[attr-defined]
        self._inside = []
        self._open = Tape(metric.parameter_names())
        self._open.open(args, kwargs)

    def _after(self, args: Any, kwargs: Any, output: Any) -> None:
        tape, self._open = self._open, None
        if tape is None:
            return
        tape.close()
        metric = self._metric()
        leaves = [t for t in leaves_of(output) if t.requires_grad]
        if metric is None or not leaves:  # none: forward raised, or all that it used is frozen
            return
        tape.outputs = {e for t in leaves if (e := edge_of(t)) is not None}
        if len(self.tapes) == LIVE_TAPES:  # those that have been drawn, as in a validation, go first
            self.tapes.remove(next((t for t in self.tapes if t.drawn), self.tapes[0]))
        self.tapes.append(tape)
        inside, self._inside = self._inside, []
        for call in inside:
            self.criterion_called(*call)
        if not tape.drawn:
            tape.at_output = (output, (args, kwargs))
            fire = Once(self, tape)
            for t in leaves:
                t.register_hook(fire)

    def criterion_called(self, key: str, args: Any, kwargs: Any, loss: Any) -> None:
        metric = self._metric()
        if metric is None or in_backward() or in_transform() or _unwatched.get():
            return
        if self._open is not None:
            self._inside.append((key, args, kwargs, loss))
            return
        if not self.tapes or not torch.is_grad_enabled():
            return
        self._called[key], self._losses[key] = (args, kwargs), loss
        if len(self._called) < len(self._listeners):
            return
        called, losses, self._called, self._losses = self._called, self._losses, {}, {}
        names = {i: n for tape in self.tapes for i, n in tape.names.items()}
        self.criterion_is_called = True
        before = [tape for tape in self.tapes if not tape.drawn]
        draw = metric.draw_at_criterion(called, self.tapes)
        if draw is not None:
            waiting = Waiting(draw)
            for tape in before:
                tape.waiting = waiting if tape.drawn else None
            self._count_on_backward(waiting, leaves_of(losses), names)

    def _count_on_backward(self, waiting: Waiting, losses: Sequence[Tensor], names: Mapping[int, str]) -> None:
        """Count when the losses themselves are backpropagated: the output is reached by gradient penalties too."""
        watcher = weakref.ref(self)

        def count(_: Tensor) -> None:
            waiting.claimed = True
            here = watcher()
            metric = None if here is None else here._metric()
            if here is None or metric is None or (purpose := purpose_of_pass(names)) is None:
                return
            waiting.count(metric, purpose)
            here.forget_drawn()

        for loss in losses:
            if loss.requires_grad:
                loss.register_hook(count)

    def forget_drawn(self) -> None:
        """Their loss is being backpropagated: let the graph be freed."""
        self.tapes = [t for t in self.tapes if not t.drawn]


@dataclass
class Waiting:
    """What was drawn where the criterion was called, until its loss is backpropagated."""

    draw: BatchStatistics | None
    claimed: bool = False  # whether the loss has been backpropagated, for whatever

    def count(self, metric: Watched, purpose: str) -> None:
        if self.draw is not None:
            metric.count(self.draw, purpose)
            if purpose == ACCUMULATED:
                self.draw = None  # the graph need not hold it any longer


class Listener:
    """Tells the watcher which head's criterion was called."""

    def __init__(self, watcher: CriterionHooks, key: str) -> None:
        self._watcher, self.key = weakref.ref(watcher), key

    def called(self, args: Any, kwargs: Any, result: Any) -> None:
        if (watcher := self._watcher()) is not None:
            watcher.criterion_called(self.key, args, kwargs, result)


def remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class Once:
    """Draws at the output when it is backpropagated, unless the criterion has drawn before.

    What the criterion has drawn counts here where its own loss was not backpropagated at all: the gradient of the
    output comes from elsewhere, as from a loss that is written out again.
    """

    def __init__(self, watcher: CriterionHooks, tape: Tape) -> None:
        # weak: the tape holds the graph, and the graph holds this hook
        self._watcher, self._tape = weakref.ref(watcher), weakref.ref(tape)

    def __call__(self, g: Tensor) -> None:
        watcher, tape = self._watcher(), self._tape()
        if watcher is None or tape is None or tape not in watcher.tapes:
            return
        waiting = tape.waiting
        if tape.drawn and (waiting is None or waiting.claimed):
            return
        metric = watcher._metric()
        if metric is None or (purpose := purpose_of_pass(tape.names)) is None:
            return
        if waiting is not None:
            waiting.count(metric, purpose)
            return
        if watcher.criterion_is_called and metric.lacks_labels():
            return  # a term beside the criterion, as of a consistency between two outputs: it has no labels
        output, received = tape.at_output
        with torch.enable_grad():
            metric.look_at_gradient(output, g)
            draw = metric.draw_at_output(output, received, [tape])
        watcher.tapes = [t for t in watcher.tapes if t is not tape]
        if draw is not None:
            metric.count(draw, purpose)
