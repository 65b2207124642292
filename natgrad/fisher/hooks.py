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

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from natgrad.blocks.batch_statistics import BatchStatistics
from natgrad.capture.compile import go_on_in_python
from natgrad.capture.purpose import ACCUMULATED, purpose_of_pass
from natgrad.capture.tape import Hook, Tape, in_backward, in_transform
from natgrad.linalg.tree import leaves_of
from natgrad.metric.interrupts import uninterrupted

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


def is_unwatched() -> bool:
    """Whether this is a forward pass of a metric's own."""
    return _unwatched.get()


class Watched(Protocol):
    """What the watcher asks of a metric."""

    def wants_statistics(self) -> bool: ...
    def parameter_names(self) -> Mapping[int, str]: ...
    def draw_at_criterion(self, called: Called, tapes: list[Tape]) -> BatchStatistics | None: ...
    def draw_at_output(self, output: Any, received: tuple[Any, Any], tapes: list[Tape]) -> BatchStatistics | None: ...
    def look_at_gradient(self, output: Any, g: Tensor) -> None: ...
    def lacks_labels(self) -> bool: ...
    def count(self, draw: BatchStatistics, purpose: str) -> None: ...


class Passes:
    """The forward passes of one thread that wait for their loss."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.open: Tape | None = None
        self.inside: list[tuple[str, Any, Any, Any]] = []  # calls of a criterion inside the root's forward
        self.called: Called = {}  # of the criteria of several heads, until all have been called
        self.losses: dict[str, Any] = {}  # and what they returned

    def abandon(self) -> None:
        """Close the forward pass that is open, and forget it."""
        with uninterrupted():
            tape, self.open, self.inside = self.open, None, []
            if tape is not None:
                tape.close()

    def forget(self) -> None:
        """Let go of forward passes whose loss has not come."""
        self.abandon()
        self.tapes, self.called, self.losses = [], {}, {}

    def forget_drawn(self) -> None:
        """Their loss is being backpropagated: let the graph be freed."""
        self.tapes = [t for t in self.tapes if not t.drawn]


class CriterionHooks:
    """Opens tapes on the root's forward passes and asks the metric for draws.

    Forward passes of one thread are watched: of that which last cleared the gradients or took a step, and of the one
    that made the metric before. A thread that evaluates the model meanwhile, or makes data by it, leaves no trace.
    """

    def __init__(self, metric: Watched, root: nn.Module, criteria: Mapping[str, nn.Module]) -> None:
        self._metric = weakref.ref(metric)
        self.root = root
        self.trainer = threading.get_ident()
        self._passes: dict[int, Passes] = {}
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
        self._guard = Guard(self, root)

        # a metric that is gone leaves nothing on the model
        weakref.finalize(metric, remove, self._handles, self._guard)

    @property
    def here(self) -> Passes:
        """The passes of this thread."""
        return self._passes.setdefault(threading.get_ident(), Passes())

    def remove(self) -> None:
        remove(self._handles, self._guard)
        self.forget()

    def expect(self, due: bool) -> None:
        """Have compiled code run the hooks, or leave them out."""
        for hook in self._hooks:
            hook.due = due
        with uninterrupted():
            self._guard.enter() if due else self._guard.leave()

    def forget(self) -> None:
        """Let go of this thread's forward passes whose loss has not come."""
        self.here.forget()

    def train_here(self) -> bool:
        """Watch the forward passes of this thread from now on; whether those of another one were watched."""
        before, self.trainer = self.trainer, threading.get_ident()
        mine = self.here
        # who is in a forward pass has to close it in its own thread
        self._passes = {t: p for t, p in self._passes.items() if p is mine or p.open is not None}
        return before != self.trainer

    # hooks ---------------------------------------------------------------------------------------------

    def _before(self, args: Any, kwargs: Any) -> None:
        metric = self._metric()
        if in_backward() or in_transform() or torch.jit.is_tracing() or is_unwatched():
            return  # a recomputation of checkpointing, a transform of torch.func, or another metric's update
        if self.trainer != threading.get_ident():
            return
        here = self.here
        if here.open is not None:  # the last forward raised
            here.forget()
        if not torch.is_grad_enabled():
            return  # a look at the model in between, after which losses may still come
        if metric is None or not metric.wants_statistics():
            here.tapes = []
            return
        # last, so that hooks of the user which rewrite the output have run
        self.root._forward_hooks.move_to_end(self._handles[1].id)  # type: ignore[attr-defined]
        here.inside = []
        here.open = Tape(metric.parameter_names())
        here.open.open(args, kwargs)

    def _after(self, args: Any, kwargs: Any, output: Any) -> None:
        here = self.here
        tape, here.open = here.open, None
        if tape is None:
            return
        tape.close()
        metric = self._metric()
        leaves = [t for t in leaves_of(output) if t.requires_grad]
        if metric is None or not leaves:  # none: forward raised, or all that it used is frozen
            return
        tape.returned(leaves)
        if len(here.tapes) == LIVE_TAPES:  # those that have been drawn, as in a validation, go first
            here.tapes.remove(next((t for t in here.tapes if t.drawn), here.tapes[0]))
        here.tapes.append(tape)
        inside, here.inside = here.inside, []
        for call in inside:
            self.criterion_called(*call)
        if not tape.drawn:
            tape.at_output = (output, (args, kwargs))
            fire = Once(self, here, tape)
            for t in leaves:
                if not t.is_leaf:  # a parameter that is returned, as a codebook, would keep the hook for good
                    t.register_hook(fire)

    def criterion_called(self, key: str, args: Any, kwargs: Any, loss: Any) -> None:
        metric, here = self._metric(), self.here
        if self.trainer != threading.get_ident() or metric is None:
            return
        if in_backward() or in_transform() or is_unwatched():
            return
        if here.open is not None:
            here.inside.append((key, args, kwargs, loss))
            return
        if not here.tapes or not torch.is_grad_enabled():
            return
        here.called[key], here.losses[key] = (args, kwargs), loss
        if len(here.called) < len(self._listeners):
            return
        called, losses, here.called, here.losses = here.called, here.losses, {}, {}
        names = {i: n for tape in here.tapes for i, n in tape.names.items()}
        self.criterion_is_called = True
        before = [tape for tape in here.tapes if not tape.drawn]
        draw = metric.draw_at_criterion(called, here.tapes)
        if draw is not None:
            waiting = Waiting(draw)
            for tape in before:
                tape.waiting = waiting if tape.drawn else None
            self._count_on_backward(waiting, leaves_of(losses), names, here)

    def _count_on_backward(
        self, waiting: Waiting, losses: Sequence[Tensor], names: Mapping[int, str], passes: Passes
    ) -> None:
        """Count when the losses themselves are backpropagated: the output is reached by gradient penalties too."""
        watcher, held = weakref.ref(self), weakref.ref(passes)

        def count(_: Tensor) -> None:
            waiting.claimed = True
            here, mine = watcher(), held()
            metric = None if here is None else here._metric()
            if mine is None or metric is None or (purpose := purpose_of_pass(names)) is None:
                return  # without passes: their thread trains no more
            with uninterrupted():
                waiting.count(metric, purpose)
                mine.forget_drawn()

        for loss in losses:
            if loss.requires_grad:
                loss.register_hook(count)


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


class Guard:
    """Stands in for the call of a module while its forward passes are watched, and closes what one leaves open.

    torch runs the hook after a forward pass that an Exception ended, and not after one that Ctrl-C did, or another
    BaseException. The place is the one where a module keeps its compiled call, which copies and pickles leave out.
    """

    PLACE = "_compiled_call_impl"

    def __init__(self, watcher: CriterionHooks, root: nn.Module) -> None:
        self._watcher, self._root = weakref.ref(watcher), weakref.ref(root)
        self.inner: Any = None  # what stood there before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        go_on_in_python()
        root: Any = self._root()
        watcher = self._watcher()
        # held, so that no collection of garbage takes the metric away while its pass is open
        metric = None if watcher is None else watcher._metric()
        try:
            return (root._call_impl if self.inner is None else self.inner)(*args, **kwargs)
        except BaseException:
            if watcher is not None:
                watcher.here.abandon()
            raise
        finally:
            del metric

    def enter(self) -> None:
        root = self._root()
        if root is not None and self not in self._chain():
            self.inner = getattr(root, self.PLACE)
            vars(root)[self.PLACE] = self

    def leave(self) -> None:
        """Guards of several metrics stand around each other, and leave in any order."""
        chain, root = self._chain(), self._root()
        if root is None or self not in chain:
            return
        before = chain.index(self) - 1
        if before >= 0:
            chain[before].inner = self.inner
        else:
            vars(root)[self.PLACE] = self.inner
        self.inner = None

    def _chain(self) -> list[Guard]:
        found = []
        at = getattr(self._root(), self.PLACE, None)
        while isinstance(at, Guard):
            found.append(at)
            at = at.inner
        return found

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()


def remove(handles: list[RemovableHandle], guard: Guard) -> None:
    for handle in handles:
        handle.remove()
    guard.leave()


class Once:
    """Draws at the output when it is backpropagated, unless the criterion has drawn before.

    What the criterion has drawn counts here where its own loss was not backpropagated at all: the gradient of the
    output comes from elsewhere, as from a loss that is written out again.
    """

    def __init__(self, watcher: CriterionHooks, passes: Passes, tape: Tape) -> None:
        # weak: the tape holds the graph, and the graph holds this hook
        self._watcher, self._passes, self._tape = weakref.ref(watcher), weakref.ref(passes), weakref.ref(tape)

    def __call__(self, g: Tensor) -> None:
        watcher, passes, tape = self._watcher(), self._passes(), self._tape()
        if watcher is None or passes is None or tape is None or tape not in passes.tapes:
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
        with uninterrupted():
            with torch.enable_grad():
                if purpose == ACCUMULATED:  # who asks for gradients may look at any function of the output
                    metric.look_at_gradient(output, g)
                draw = metric.draw_at_output(output, received, [tape])
            passes.tapes = [t for t in passes.tapes if t is not tape]
            if draw is not None:
                metric.count(draw, purpose)
