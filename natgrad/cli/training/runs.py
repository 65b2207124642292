"""What a training run leaves: points on a curve, and the arithmetic that compares two curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """One evaluation. `cpu_seconds` counts training alone, not the evaluations."""

    step: int
    cpu_seconds: float
    train: float
    test: float
    rate: float  # the learning rate in force


@dataclass
class Run:
    """The curve of one optimizer at one learning rate; `rate` is None where its defaults were used."""

    optimizer: str
    rate: float | None
    points: list[Point] = field(default_factory=list)
    complete: bool = False  # whether it spent its budget
    journal: list[dict[str, Any]] = field(
        default_factory=list
    )  # what the optimizer did (`natgrad.optim.journal`), if it says

    @property
    def label(self) -> str:
        """The name with the rate it was given."""
        return self.optimizer if self.rate is None else f"{self.optimizer} at {self.rate:g}"

    @property
    def last(self) -> Point:
        """The final evaluation."""
        return self.points[-1]

    @property
    def score(self) -> float:
        """The final training loss, by which rates are chosen; a run that diverged counts as infinite."""
        return self.last.train if math.isfinite(self.last.train) else math.inf

    def lines(self, seed: int) -> Iterable[dict[str, Any]]:
        """One flat record for each point. JSON has no NaN, so a loss that is not finite is null."""
        for point in self.points:
            record = {"optimizer": self.optimizer, "rate_given": self.rate, "seed": seed, **asdict(point)}
            yield {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def best(runs: Sequence[Run]) -> list[Run]:
    """For each optimizer, in the order of appearance, its run with the lowest final training loss."""
    chosen: dict[str, Run] = {}
    for run in runs:
        if run.optimizer not in chosen or run.score < chosen[run.optimizer].score:
            chosen[run.optimizer] = run
    return list(chosen.values())


def first_at(run: Run, target: float) -> Point | None:
    """The first evaluation with a training loss at or below the target: an upper bound of the arrival."""
    return next((p for p in run.points if p.train <= target), None)


@dataclass(frozen=True)
class Race:
    """When the leader reached what a rival ended with, and when the rival did."""

    leader: Point | None  # None: it never got there
    rival: Point

    @property
    def time_ratio(self) -> float | None:
        """Rival's CPU seconds over the leader's."""
        return None if self.leader is None else ratio(self.rival.cpu_seconds, self.leader.cpu_seconds)

    @property
    def step_ratio(self) -> float | None:
        """Rival's steps over the leader's."""
        return None if self.leader is None else ratio(self.rival.step, self.leader.step)


def ratio(rival: float, leader: float) -> float:
    """`rival / leader`; a leader that needed nothing at all counts as infinitely faster."""
    return rival / leader if leader > 0 else math.inf


def race(leader: Run, rival: Run) -> Race | None:
    """The leader against one rival, to the rival's final training loss; None where the rival diverged."""
    if not math.isfinite(rival.score):
        return None
    arrived = first_at(rival, rival.last.train)
    assert arrived is not None  # its last point qualifies
    return Race(first_at(leader, rival.last.train), arrived)
