"""Curves, races, the table and the picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from natgrad.cli.training.report import comparison_table, draw_curves
from natgrad.cli.training.runs import Point, Run, best, first_at, race


def run(name: str, rate: float | None, losses: list[float]) -> Run:
    points = [Point(10 * i, 0.5 * i, loss, loss + 1, rate or 0.1) for i, loss in enumerate(losses)]
    return Run(name, rate, points, complete=True)


LEADER = run("natgrad", None, [40.0, 18.0, 15.0, 14.0, 13.0])
SLOW = run("adamw", 0.01, [40.0, 30.0, 25.0, 20.0, 18.0])
SLOWER = run("adamw", 0.001, [40.0, 35.0, 30.0, 29.0, 28.0])
BROKEN = run("sgd", 1.0, [40.0, 400.0, math.nan])


def text_of(runs: list[Run], **options: list[str]) -> str:
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        console.print(comparison_table(runs, "natgrad", **options))
    return captured.get()


def test_the_best_rate_counts_and_a_diverged_one_never() -> None:
    assert best([SLOWER, LEADER, SLOW]) == [SLOW, LEADER]
    assert best([BROKEN, run("sgd", 0.1, [40.0, 39.0])])[0].rate == 0.1


def test_a_race_is_timed_at_the_first_evaluation_that_is_low_enough() -> None:
    result = race(LEADER, SLOW)
    assert result is not None
    assert result.leader == LEADER.points[1]
    assert result.rival == SLOW.points[4]
    assert result.time_ratio == pytest.approx(4)
    assert result.step_ratio == pytest.approx(4)
    assert first_at(SLOW, 13.0) is None


def test_a_rival_that_was_at_its_final_loss_earlier_is_timed_there() -> None:
    bouncing = run("adamw", 0.01, [40.0, 17.0, 25.0, 18.0])
    result = race(LEADER, bouncing)
    assert result is not None
    assert result.rival == bouncing.points[1]


def test_the_table_says_reached_not_reached_and_diverged() -> None:
    text = text_of([LEADER, SLOW, BROKEN], edges=["adamw"])
    assert "0.50 s (4.0× sooner), 10 steps (4.0× fewer)" in text
    assert "0.01*" in text
    assert "rival diverged" in text
    assert "1.00 s (2.0× later), 20 steps (2.0× more)" in text_of([LEADER, run("sgd", 0.1, [40.0, 16.0])])
    assert "not reached" in text_of([run("natgrad", None, [40.0, 39.0]), SLOW])
    assert "20, cut short" in text_of([Run("sgd", 0.1, SLOW.points[:3])])
    assert "reaches" not in text_of([SLOW])


@pytest.mark.parametrize(
    "runs",
    [
        [LEADER, SLOW, SLOWER, BROKEN],
        [LEADER],
        [BROKEN],
        [run("adamw", 0.01, [40.0])],
        [run("sgd", 1.0, [0.0, 0.0])],
    ],
    ids=["all", "one", "diverged", "one point", "zero"],
)
def test_the_picture_is_drawn_whatever_the_curves(tmp_path: Path, runs: list[Run]) -> None:
    draw_curves(tmp_path / "c.png", runs, "natgrad", "title", "loss")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
