"""Whatever ends a forward or a backward pass leaves the process as it was; other threads leave no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import CtrlC
from test_leaks import alive
from torch import Tensor, nn
from training_cases import batches, classifier, distance, natural, train, weights

import natgrad as ng
from natgrad.fisher.hooks import Guard
from natgrad.metric.interrupts import entered
from tests.interrupts import left_behind


class Stop(BaseException):
    """As those of test runners and event loops: no Exception."""


class Armed(nn.Module):
    """The identity, and a hook, and a callable: raises where it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None

    def fire(self, *_: Any) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def forward(self, x: Tensor) -> Tensor:
        self.fire()
        return x

    def picked(self, output: Any) -> Any:
        self.fire()
        return output


def watch(out: Tensor, armed: Armed) -> None:
    if out.requires_grad:
        out.register_hook(armed.fire)


def build(place: str) -> tuple[nn.Module, ng.NaturalGradient, Armed]:
    torch.manual_seed(0)
    armed = Armed()
    model = nn.Sequential(nn.Linear(4, 6), armed if place == "forward" else nn.Tanh(), nn.Linear(6, 3)).double()
    criterion = nn.CrossEntropyLoss()
    picked = armed.picked if place == "output=" else None
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, kind="exact", output=picked), refresh=3)
    if place == "pre-hook":
        model.register_forward_pre_hook(armed.fire)
    elif place == "inner pre-hook":
        model[2].register_forward_pre_hook(armed.fire)
    elif place == "hook":
        model.register_forward_hook(armed.fire)
    elif place == "backward hook":
        model[2].register_full_backward_hook(armed.fire)
    elif place == "tensor hook":  # runs in the metric's own backward pass too
        model[2].register_forward_hook(lambda module, args, out: watch(out, armed))
    elif place == "criterion":
        criterion.register_forward_pre_hook(armed.fire)
    elif place == "criterion's hook":
        criterion.register_forward_hook(armed.fire)
    return model, opt, armed


PLACES = (
    "forward",
    "pre-hook",
    "inner pre-hook",
    "hook",
    "criterion",
    "criterion's hook",
    "tensor hook",
    "backward hook",
    "output=",
)


def one(model: nn.Module, opt: ng.NaturalGradient, x: Tensor, y: Tensor, functional: bool) -> None:
    opt.zero_grad()
    output = model(x)
    loss = nn.functional.cross_entropy(output, y) if functional else opt.metric.criterion(output, y)  # type: ignore[attr-defined]
    loss.backward()
    opt.step()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_entered_is_left(place: str, error: type[BaseException]) -> None:
    functional = place == "output="  # draws at the output, where output= is called
    model, opt, armed = build(place)
    (x, y), *rest = batches(9)
    armed.error = error()
    with pytest.raises(error):
        one(model, opt, x, y, functional)
    assert left_behind() == []
    watcher = opt.metric._watcher  # type: ignore[attr-defined]
    assert watcher.here.open is None
    kept = len(watcher.here.tapes)
    for _ in range(30):  # nobody notes what runs now
        nn.functional.linear(x, model[0].weight).sum().backward()  # type: ignore[arg-type, union-attr, index]
    assert len(watcher.here.tapes) == kept <= 1
    assert not watcher.here.inside
    for x, y in rest:
        one(model, opt, x, y, functional)
    assert opt.refreshes >= 2
    other, straight, _ = build(place)
    for x, y in rest:
        one(other, straight, x, y, functional)
    assert distance(weights(model), weights(other)) == 0


def test_calls_after_an_interrupt_are_not_kept() -> None:
    model, opt, armed = build("forward")
    (x, y) = next(batches(1))
    armed.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        one(model, opt, x, y, functional=False)
    counts = []
    for _ in range(3):
        for _ in range(100):
            nn.functional.linear(x, model[0].weight).sum().backward()  # type: ignore[arg-type, union-attr, index]
        model[0].weight.grad = None  # type: ignore[union-attr, index]
        gc.collect()
        counts.append(alive())
    assert counts[0] == counts[1] == counts[2]


def test_ctrl_c_at_every_operation_of_a_watched_pass() -> None:
    data = list(batches(8))
    k, interrupted = 0, True
    straight = classifier()
    train(straight, natural(straight, kind="sampled"), data)
    while interrupted:
        k += 3
        model = classifier()
        opt = natural(model, kind="sampled")
        x, y = data[0]
        try:
            with CtrlC(k):
                opt.zero_grad()
                opt.metric.criterion(model(x), y).backward()
            interrupted = False
        except KeyboardInterrupt:
            pass
        assert left_behind() == []
        if interrupted:  # a draw that did not count took no random numbers
            opt.zero_grad()
            counted = bool(opt.metric.estimator.generators) and not torch.equal(
                opt.metric.estimator.generator(x.device).get_state(),
                torch.Generator().manual_seed(opt.metric.estimator.seed).get_state(),
            )
            train(model, opt, data)
            assert counted or distance(weights(model), weights(straight)) == 0
    assert k > 60


def test_signals_at_random_times() -> None:
    """``python -m tests.interrupts`` sends 50. In a process of its own, as the signals are for all threads of one."""
    command = [sys.executable, "-m", "tests.interrupts", "--times", "6", "--seed", "3"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 interrupts: nothing left behind, every file loads, training goes on" in done.stdout


def test_contexts_are_left_in_order_and_a_ctrl_c_waits_for_them() -> None:
    said: list[str] = []

    class Context:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            said.append(f"enter {self.name}")

        def __exit__(self, *_: Any) -> None:
            said.append(f"leave {self.name}")

    with pytest.raises(KeyboardInterrupt), entered(Context("a"), Context("b")):
        said.append("inside")
    assert said == ["enter a", "enter b", "leave b", "leave a"]


# the guard -------------------------------------------------------------------------------------------------------


def test_guards_of_several_metrics_come_and_go() -> None:
    model = classifier()
    one, two = natural(model, refresh=2), natural(model, refresh=5)
    for x, y in batches(24):
        for opt in (one, two):
            opt.zero_grad()
        one.metric.criterion(model(x), y).backward()  # type: ignore[attr-defined]
        one.step()
        two.step()
        due = one.refresh_due + two.refresh_due
        at, found = model._compiled_call_impl, 0
        while isinstance(at, Guard):
            at, found = at.inner, found + 1
        assert (found, at) == (due, None)
    assert one.refreshes > two.refreshes
    one.metric._watcher.expect(True)  # type: ignore[attr-defined]
    assert isinstance(model._compiled_call_impl, Guard)
    del one, two, opt
    gc.collect()
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_watched_model_are_not_guarded(copied: Callable[[Any], Any]) -> None:
    model = classifier()
    opt = natural(model)
    assert isinstance(model._compiled_call_impl, Guard)
    twin = copied(model)
    assert twin._compiled_call_impl is None
    x, _ = next(batches(1))
    assert torch.equal(twin(x), model(x))
    assert copied(model._compiled_call_impl) is None
    assert opt.refresh_due


# threads ---------------------------------------------------------------------------------------------------------


def beside(work: Callable[[], None], model: nn.Module, opt: ng.NaturalGradient, data: list[Any]) -> list[str]:
    """Train while another thread works, over and over, each time in between and in the middle of a pass."""
    errors: list[str] = []
    go, went, over = threading.Event(), threading.Event(), threading.Event()

    def loop() -> None:
        while True:
            go.wait()
            go.clear()
            if over.is_set():
                return
            try:
                work()
            except BaseException as error:
                errors.append(repr(error))
            went.set()

    thread = threading.Thread(target=loop)
    thread.start()

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is thread:
            return  # its own pass
        went.clear()
        go.set()
        assert went.wait(20)

    handles = [model[1].register_forward_hook(meanwhile), opt.metric.criterion.register_forward_pre_hook(meanwhile)]  # type: ignore[attr-defined, index, union-attr]
    try:
        train(model, opt, data, between=meanwhile)
    finally:
        for handle in handles:
            handle.remove()
        over.set()
        go.set()
        thread.join()
    return errors


@pytest.mark.parametrize("work", ["evaluates", "with gradients", "a loss", "saliency"])
@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_a_thread_that_runs_the_model_meanwhile_leaves_no_trace(work: str, kind: str) -> None:
    straight = classifier()
    reference = natural(straight, kind=kind, refresh=3)
    data = list(batches(14))
    train(straight, reference, data)

    model = classifier()
    opt = natural(model, kind=kind, refresh=3)
    criterion = opt.metric.criterion  # type: ignore[attr-defined]
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])

    def act() -> None:
        if work == "evaluates":
            with torch.no_grad():
                criterion(model(x), y)
        elif work == "with gradients":
            model(x)
        elif work == "a loss":
            criterion(model(x), y)
        else:
            given = x.clone().requires_grad_()
            torch.autograd.grad(criterion(model(given), y), given)

    assert beside(act, model, opt, data) == []
    assert distance(weights(model), weights(straight)) == 0
    assert opt.info["data_seen"] == reference.info["data_seen"]
    assert len(opt.metric._watcher._passes) == 1  # type: ignore[attr-defined]
    assert left_behind() == []


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def test_an_optimizer_is_made_in_one_thread_and_steps_in_another() -> None:
    straight = classifier()
    losses = train(straight, natural(straight), batches(9))
    model = classifier()
    opt = natural(model)
    data = list(batches(9))
    assert in_thread(lambda: train(model, opt, data[:4])) == losses[:4]
    assert in_thread(lambda: train(model, opt, data[4:])) == losses[4:]


def test_steps_that_move_to_another_thread_take_a_missed_refresh_later() -> None:
    """Without a zero_grad before the forward pass nothing says that another thread trains now."""
    model = classifier()
    opt = natural(model)
    data = list(batches(6))

    def step(x: Tensor, y: Tensor) -> bool:
        opt.metric.criterion(model(x), y).backward()  # type: ignore[attr-defined]
        opt.step()
        refreshed = opt.refreshed
        model.zero_grad()
        return refreshed

    assert step(*data[0])
    assert [in_thread(lambda: step(*data[1])), step(*data[2]), step(*data[3])] == [False, False, True]


class Collects(nn.Module):
    """Garbage is collected in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        gc.collect()
        return self.layer(x)


def test_a_metric_that_nobody_holds_leaves_no_mode_on_the_stack() -> None:
    """Metric and optimizer hold each other, so that they go at a collection of garbage, which may come at any time."""
    gc.disable()
    try:
        model = Collects()
        opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
        del opt
        model(torch.randn(4, 3))
        assert torch.overrides._get_current_function_mode_stack() == []
        gc.collect()
        model(torch.randn(4, 3))
        assert not model._forward_hooks
    finally:
        gc.enable()
