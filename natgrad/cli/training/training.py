"""The training loop of the command line, and a clock that evaluations stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.cli.tasks.task import Data, Task
from natgrad.cli.training.contenders import Contender, Setup
from natgrad.cli.training.runs import Point, Run
from natgrad.cli.training.workers import Workers
from natgrad.optim import journal
from natgrad.optim.optimizer import NaturalGradient

EVALUATED = 1500  # training examples in an evaluation, the first ones: large data sets then cost no minutes
GROWTH = 1.1  # an evaluation when the budget used has grown by a tenth or by a 40th of the whole
REDRAW = 0.2  # wall seconds between two looks at the display


@dataclass(frozen=True)
class Budget:
    """How long one run lasts: CPU seconds or steps."""

    seconds: float | None
    steps: int | None

    def used(self, step: int, seconds: float) -> float:
        """The fraction of the budget that is spent."""
        return step / self.steps if self.steps is not None else seconds / (self.seconds or 1.0)

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g} CPU seconds"


class Clock:
    """CPU seconds of this process, all threads together, while it is not paused."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = time.process_time()  # None while it stands still

    def seconds(self) -> float:
        return self._spent + (0.0 if self._since is None else time.process_time() - self._since)

    def pause(self) -> None:
        self._spent, self._since = self.seconds(), None

    def resume(self) -> None:
        self._since = time.process_time()


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: every epoch in a new order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(data.inputs))
    while True:
        order = torch.randperm(len(data.inputs), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield data.inputs[chosen], data.targets[chosen]


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, data: Data) -> tuple[float, float]:
    """The reported number on (training, held-out) examples."""
    model.eval()
    train = task.measure(model(data.inputs[:EVALUATED]), data.targets[:EVALUATED])
    test = task.measure(model(data.test_inputs), data.test_targets)
    model.train()
    return float(train), float(test)


def train(
    task: Task,
    data: Data,
    model: nn.Module,
    contender: Contender,
    run: Run,
    budget: Budget,
    seed: int,
    show: Callable[[Run, float], None],
    crew: Workers | None = None,
) -> Setup:
    """Train `model` until the budget is spent, appending to ``run.points`` as it goes.

    An interrupted run so keeps what it had. `show` is called with the fraction of the budget that is spent,
    off the clock. Ranks of a crew take the same steps; the first one's clock counts.
    """
    crew = crew or Workers()
    criterion = task.criterion()
    stream = batches(data, task.batch_size, seed)
    clock = Clock()
    called = crew.wrapped(model)
    setup = contender.make(called, criterion, run.rate)
    groups = setup.optimizer.param_groups
    step, used, due = 0, 0.0, 0.0
    shown = time.monotonic()
    while True:
        if used >= due or used >= 1:
            clock.pause()
            train_loss, test_loss = crew.told(*(evaluate(task, model, data) if crew.leads else (0.0, 0.0)))
            run.points.append(
                Point(step, round(clock.seconds(), 4), train_loss, test_loss, rate=float(groups[0]["lr"]))
            )
            if step and isinstance(setup.optimizer, NaturalGradient):
                run.journal.append(journal.record(setup.optimizer))
            due = max(0.004, min(used * GROWTH, used + 0.025))
            show(run, min(used, 1.0))
            clock.resume()
        elif time.monotonic() - shown > REDRAW:
            clock.pause()
            show(run, used)
            shown = time.monotonic()
            clock.resume()
        if used >= 1 or not math.isfinite(run.last.train):
            break
        if run.rate is not None:
            for group in groups:
                group["lr"] = run.rate * (1 + math.cos(math.pi * used)) / 2
        inputs, targets = map(crew.part, next(stream))
        setup.optimizer.zero_grad()
        loss = criterion(called(inputs), targets)
        loss.backward()
        setup.optimizer.step()
        step += 1
        (used,) = crew.told(budget.used(step, clock.seconds()))
    run.complete = True
    return setup
