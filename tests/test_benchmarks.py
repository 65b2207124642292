"""What the benchmark says of runs whose answer is known, and that its smoke slice runs, resumes and is fair."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import analysis
from benchmarks.analysis import Study

Line = dict[str, Any]


def line(workload: str, optimizer: str, seed: int, hit: float | None, **more: Any) -> Line:
    """A final run with a budget of 12 CPU seconds at ten steps a second."""
    curve = [[10 * t, float(t), 10.0 - t / 2, 9.0 - t / 2] for t in range(1, 13)]
    return {
        "workload": workload,
        "optimizer": optimizer,
        "phase": "final",
        "trial": 0,
        "seed": seed,
        "hyper": {},
        "steps": 120,
        "passes": 120,
        "cpu_seconds": 12.0,
        "wall_seconds": 12.1,
        "marked": False,
        "target": 5.0,
        "steps_to_target": None if hit is None else round(10 * hit),
        "cpu_to_target": hit,
        "final_metric": 4.0,
        "best_metric": 4.0,
        "final_train": 3.0,
        "state_bytes": 200,
        "parameter_bytes": 100,
        "budget": 12.0,
        "curve": curve,
        "environment": {},
        **more,
    }


def study(times: dict[str, dict[str, list[float | None]]]) -> Study:
    """{workload: {optimizer: time to the target on each seed}}."""
    return Study([line(w, o, s, t) for w, by in times.items() for o, ts in by.items() for s, t in enumerate(ts)])


def test_speed_up_is_the_ratio_of_medians_to_the_best_first_order_rival() -> None:
    found = study({"a": {"natgrad": [1, 2, 3], "adamw": [7, 6, 8], "sgd": [9, 9, 9], "soap": [1, 1, 1]}})
    ratio = found.ratio("a", analysis.FIRST_ORDER)
    assert ratio is not None
    assert ratio.rival == "adamw"
    assert ratio.value == pytest.approx(7 / 2)
    assert found.ratio("a", ["soap"]).value == pytest.approx(1 / 2)  # type: ignore[union-attr]
    assert found.ratio("a", ["muon"]) is None


def test_intervals_of_three_seeds_are_the_range_of_all_draws() -> None:
    """By hand: draws of one seed thrice have probability 1/27 > 2.5 %, so that the extremes are those of all draws."""
    found = study({"a": {"natgrad": [1, 2, 4], "adamw": [2, 8, 6]}}).ratio("a", ["adamw"])
    assert found is not None
    ratios = [
        np.median([[2, 8, 6][i] for i in d]) / np.median([[1, 2, 4][i] for i in d]) for d in analysis.draws(3).tolist()
    ]
    assert (found.low, found.high) == (pytest.approx(min(ratios)), pytest.approx(max(ratios)))
    assert len(ratios) == 27


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [([1, 1, 2], [2, 3, 3], "win"), ([2, 3, 3], [1, 1, 2], "loss"), ([1, 3, 2], [2, 2, 2], "undecided")],
)
def test_a_win_is_claimed_where_the_interval_excludes_one(ours: list, theirs: list, verdict: str) -> None:
    found = study({"a": {"natgrad": ours, "adamw": theirs}}).ratio("a", ["adamw"])
    assert found is not None
    assert found.verdict == verdict


def test_an_interval_of_many_seeds_agrees_with_normal_theory() -> None:
    """40 seeds with log-normal noise: the median's standard error is √(π/2) that of the mean."""
    generator = np.random.default_rng(3)
    theirs = np.exp(generator.normal(0.7, 0.3, 400))
    found = study({"a": {"natgrad": [1.0] * 400, "adamw": theirs.tolist()}}).ratio("a", ["adamw"])
    assert found is not None
    half = 1.96 * math.sqrt(math.pi / 2) * 0.3 / math.sqrt(400)
    assert math.log(found.high / found.low) / 2 == pytest.approx(half, rel=0.3)


def test_a_miss_counts_as_four_thirds_of_the_budget_on_both_sides() -> None:
    found = study(
        {
            "ours": {"natgrad": [None, None, 4], "adamw": [8, 8, 8]},
            "theirs": {"natgrad": [4, 4, 4], "adamw": [None, 8, None]},
            "both": {"natgrad": [None] * 3, "adamw": [None] * 3},
        }
    )
    ours, theirs, both = (found.ratio(w, ["adamw"]) for w in ("ours", "theirs", "both"))
    assert ours is not None
    assert theirs is not None
    assert both is not None
    assert (ours.value, ours.misses) == (pytest.approx(8 / 16), "‡")
    assert (theirs.value, theirs.misses) == (pytest.approx(16 / 4), "†")
    assert (both.value, both.verdict) == (pytest.approx(1), "neither reached it")
    mean, count = found.geometric_mean(["adamw"])  # type: ignore[misc]
    assert (mean.value, count) == (pytest.approx((8 / 16 * 16 / 4 * 1) ** (1 / 3)), 3)
    assert mean.misses == both.misses == "†‡"
    assert found.misses("ours", "natgrad") == (2, 3)


def test_the_geometric_mean_is_over_the_workloads_that_both_ran_on() -> None:
    found = study({"a": {"natgrad": [1], "adamw": [4], "lbfgs": [2]}, "b": {"natgrad": [2], "adamw": [2]}})
    mean, count = found.geometric_mean(["adamw"])  # type: ignore[misc]
    assert (mean.value, mean.low, mean.high, count) == (pytest.approx(2), pytest.approx(2), pytest.approx(2), 2)
    assert found.geometric_mean(["lbfgs"])[1] == 1  # type: ignore[index]
    assert found.geometric_mean(["muon"]) is None


def test_steps_count_every_forward_backward() -> None:
    ours = line("a", "natgrad", 0, 3.0, passes=180)
    assert analysis.passes(ours) == pytest.approx(30 * 1.5)
    late = line("a", "natgrad", 0, None, passes=240, steps=160, cpu_seconds=16.0)
    assert analysis.passes(late) == pytest.approx(240)  # it went on to 4/3 of the budget by itself


def test_the_metric_at_equal_time_does_not_see_overtime() -> None:
    curve = [[10, 6.0, 5.0, 5.0], [20, 11.9, 4.0, 4.0], [30, 15.9, 1.0, 1.0]]
    assert analysis.at_budget(line("a", "natgrad", 0, 3.0, curve=curve, cpu_seconds=15.9)) == 4.0
    ends = [[10, 6.0, 5.0, 5.0], [20, 12.05, 3.0, 4.0]]
    assert analysis.at_budget(line("a", "adamw", 0, 3.0, curve=ends, cpu_seconds=12.05)) == 3.0
    lost = [[10, 6.0, 5.0, 5.0], [20, 11.0, None, None]]
    assert math.isinf(analysis.at_budget(line("a", "adamw", 0, 3.0, curve=lost)))


def test_the_profile_is_of_problems_that_somebody_solved() -> None:
    found = study(
        {
            "a": {"natgrad": [1, 4], "adamw": [2, 2], "lbfgs": [1, 1]},
            "b": {"natgrad": [3, None], "adamw": [None, None]},
        }
    )
    profile = found.profile()
    assert set(profile) == {"natgrad", "adamw"}  # lbfgs did not run on b
    assert profile["natgrad"] == [1, 1, 2]
    assert profile["adamw"] == [1, 2, math.inf]
    assert analysis.share_within(profile["adamw"], 2) == pytest.approx(2 / 3)


def test_state_and_faults_are_counted() -> None:
    runs = [
        line("a", "natgrad", 0, 1.0),
        line("a", "natgrad", 1, 1.0, state_bytes=400, marked=True),
        line("a", "natgrad", 2, None, state_bytes=300, final_metric=None),
    ]
    found = Study(runs)
    assert found.state_ratio("a", "natgrad") == 3
    assert (found.not_finite("natgrad"), found.marked("natgrad")) == (1, 1)


def test_final_lines_alone_are_read_and_each_once(tmp_path: Path) -> None:
    final = line("a", "natgrad", 0, 1.0)
    other = [{**final, "phase": "tune"}, {"workload": "a", "knob": "lr"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (final, *other)))
    assert analysis.read_finals(tmp_path) == [final]
    (tmp_path / "b.jsonl").write_text(json.dumps(final) + "\n")
    with pytest.raises(ValueError, match="two final runs"):
        analysis.read_finals(tmp_path)
