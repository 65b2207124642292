"""What the benchmark says of runs whose answer is known, and that its smoke slice runs, resumes and is fair."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import analysis, bench, harness, report, sensitivity
from benchmarks.analysis import Study
from benchmarks.rivals import RIVALS
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
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
        "failure": None,
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


def needs_data(workloads: tuple[str, ...]) -> None:
    """Skip where the files that workloads read are not there."""
    if lacking := bench.without_data(workloads):
        pytest.skip(f"set NATGRAD_DATA to a folder with {', '.join(sorted(set(lacking.values())))}")


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


def test_a_run_that_failed_has_no_metric_however_good_its_last_look_was() -> None:
    gone = {"final_metric": None, "failure": "LinAlgError: singular"}
    assert math.isinf(analysis.at_budget(line("a", "soap", 0, 3.0, **gone)))
    late = line("a", "natgrad", 0, 3.0, **gone, cpu_seconds=15.0)  # in overtime: what it had at the budget stands
    assert analysis.at_budget(late) == 4.0
    first = line("a", "soap", 0, None, **gone, steps=0, passes=0, cpu_seconds=0.0, curve=[[0, 0.0, None, None]])
    assert analysis.seconds(first) == pytest.approx(16)
    assert math.isinf(analysis.passes(first))
    assert math.isinf(analysis.at_budget(first))
    assert Study([first]).not_finite("soap") == 1


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


def sensitivity_line(knob: str, seed: int, curve: list[list[float]], diverged: bool = False) -> Line:
    head = {"workload": "a", "knob": knob, "factor": 1.0 if knob == sensitivity.DEFAULT else 2.0, "seed": seed}
    return {**head, "budget": 4.0, "curve": curve, "diverged": diverged, "marked": False}


def test_sensitivity_is_relative_to_where_the_default_is_at_half_its_budget() -> None:
    default = sensitivity_line(sensitivity.DEFAULT, 0, [[0, 0.0, 9.0], [1, 1.0, 5.0], [2, 2.0, 3.0], [4, 4.0, 1.0]])
    slow = sensitivity_line("lr", 0, [[0, 0.0, 9.0], [3, 3.0, 3.0], [4, 4.0, 2.0]])
    never = sensitivity_line("damping", 0, [[0, 0.0, 9.0], [4, 4.0, 3.5]])
    lost = sensitivity_line("batch", 0, [[0, 0.0, 9.0], [1, 1.0, 2.0], [2, 2.0, None]], diverged=True)
    unpaired = sensitivity_line("lr", 1, [[0, 0.0, 9.0], [1, 1.0, 1.0]])
    found = sensitivity.ratios([default, slow, never, lost, unpaired])
    assert found["a", "lr", 2.0] == [1.5]
    assert found["a", "damping", 2.0] == [math.inf]
    assert math.isnan(found["a", "batch", 2.0][0])
    assert [sensitivity.cell(found["a", k, 2.0]) for k in ("lr", "damping", "batch")] == [
        "1.50",
        "> 2, missed",
        "diverged",
    ]


def test_a_variant_sets_its_knob_and_no_other() -> None:
    workload = WORKLOADS["digits_classifier"]()

    def options(variant: sensitivity.Variant) -> dict[str, float]:
        opt = variant.optimizer(workload.model(), workload.criterion)
        group = opt.param_groups[0]
        return {
            "lr": group["lr"],
            "damping": group["damping"],
            "refresh": opt.refresh,
            "batch": variant.batch(workload),
        }

    default = options(sensitivity.Variant())
    for knob in sensitivity.KNOBS:
        assert options(sensitivity.Variant(knob, 4.0)) == {**default, knob: pytest.approx(4 * default[knob])}


def test_every_optimizer_starts_and_is_fed_alike() -> None:
    """natgrad draws labels from the global generator; the batches must not depend on it."""
    seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for name in bench.SMOKE_OPTIMIZERS:
        workload = WORKLOADS["digits_classifier"]()
        start: list[torch.Tensor] = []
        batches: list[torch.Tensor] = []
        build, draw = workload.build, workload.draw

        def building(rival, model, hyper, build=build, start=start):  # type: ignore[no-untyped-def]
            start += [p.detach().clone() for p in model.parameters()]
            return build(rival, model, hyper)

        def drawing(generator, draw=draw, batches=batches):  # type: ignore[no-untyped-def]
            batches.append((pair := draw(generator))[0])
            return pair

        workload.build, workload.draw = building, drawing  # type: ignore[method-assign]
        harness.train(workload, RIVALS[name], RIVALS[name].trial(0), seed=3, seconds=0.1)
        seen[name] = start, batches
    (first, order), *others = seen.values()
    for start, batches in others:
        assert all(torch.equal(a, b) for a, b in zip(first, start, strict=True))
        common = min(len(order), len(batches))
        assert common >= 3
        assert all(torch.equal(a, b) for a, b in zip(order[:common], batches[:common]))


def test_the_smoke_slice_runs_resumes_and_writes_the_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    needs_data(bench.SMOKE)
    words = ["--smoke", "--scale", "0.02", "--out", str(tmp_path)]
    file = tmp_path / "smoke.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.bench", *words], cwd=ROOT, start_new_session=True)
    try:
        end = time.monotonic() + 300
        while len(harness.read(file)) < 5 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does on Ctrl-C
        assert process.wait(timeout=60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    before = harness.read(file)
    assert "the same command goes on" in capfd.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    assert bench.main() == 0
    shown = capfd.readouterr().out
    assert "digits_classifier" in shown
    assert "concrete" in shown
    after = harness.read(file)
    seeds, trials = range(bench.SMOKE_SEEDS), range(bench.SMOKE_TRIALS)
    assert 5 <= len(before) < len(after)
    assert after[: len(before)] == before
    keys = [harness.key_of(run) for run in after]
    assert len(set(keys)) == len(keys)
    found = {(w, o, p, s) for w, o, p, _, s in keys}
    rivals = [o for o in bench.SMOKE_OPTIMIZERS if o != "natgrad"]
    assert found == {
        *((w, o, "tune", harness.TUNING_SEED) for w in bench.SMOKE for o in rivals),
        *((w, o, "target", s) for w in bench.SMOKE for o in rivals for s in seeds),
        *((w, o, "final", s) for w in bench.SMOKE for o in bench.SMOKE_OPTIMIZERS for s in seeds),
    }
    assert sum(p == "tune" for _, _, p, _, _ in keys) == len(bench.SMOKE) * len(rivals) * len(trials)
    expected = set(line("a", "natgrad", 0, 1.0))
    for run in after:
        assert set(run) == expected
        assert run["steps"] > 0
        assert run["passes"] >= run["steps"]
        assert run["state_bytes"] >= 0
        assert run["parameter_bytes"] > 0
        assert all(len(look) == 4 for look in run["curve"])
        hit = [t for _, t, value, _ in run["curve"] if run["target"] is not None and value <= run["target"]]
        assert run["cpu_to_target"] == (hit[0] if hit else None)
        assert (run["target"] is not None) == (run["phase"] == "final")


def test_bench_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "DATA", tmp_path)
    assert bench.without_data(bench.SMOKE) == {"concrete": "uci/concrete.txt"}
    (tmp_path / "file").touch()
    for words, message in ((["--scale", "0"], "no part of a budget"), (["--out", str(tmp_path / "file")], "is a file")):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit, match="2"):
            bench.main()
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert bench.main() == 2
    assert "concrete cannot run: uci/concrete.txt is missing" in capsys.readouterr().err


def test_the_smoke_slice_does_not_write_among_the_studys_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--smoke", "--out", str(bench.RUNS / "here")])
    assert bench.main() == 2
    assert "give --smoke another --out" in capsys.readouterr().err


@pytest.mark.parametrize("runs", [True, False])
def test_the_page_shows_losses_and_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    needs_data(bench.STUDY)
    found = study({"concrete": {"natgrad": [None] * 3, "adamw": [4, 5, 6], "soap": [8, 8, 8]}})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "study.jsonl").write_text("".join(json.dumps(x) + "\n" for x in found.lines if runs))
    monkeypatch.setattr(sys, "argv", ["report", "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)])
    report.main()
    page = (tmp_path / "benchmarks.md").read_text()
    drawn = {path.name for path in (tmp_path / "img").iterdir() if path.stat().st_size > 5000}
    if not runs:
        assert report.NOTHING in page
        assert not drawn
        return
    assert drawn == {"benchmarks_speed.png", "benchmarks_profile.png"}
    row = next(text for text in page.splitlines() if text.startswith("| concrete | missed |"))
    assert "adamw, 5.00 s" in row
    assert f"{5 / 16:.2f}‡" in row
    assert "| loss |" in row
    assert "natgrad on concrete (3 of 3)" in page


def test_target_runs_that_were_made_again_move_the_target_of_the_final_runs(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    curve = [[1, 0.1, 9.0, 9.0], [2, 0.2, 5.0, 5.0], [3, 0.3, 4.0, 4.0]]
    head = {"workload": "w", "trial": 0, "seed": 0}
    target = {**head, "phase": "target", "optimizer": "adamw", "best_metric": 4.5}
    final = {**head, "phase": "final", "optimizer": "natgrad", "curve": curve}
    known = {**final, **harness.time_to(curve, 6.0)}
    path.write_text("".join(json.dumps(run) + "\n" for run in (target, known)))
    harness.retarget(path, 1)
    after = harness.read(path)
    assert after[0] == target
    assert (after[1]["target"], after[1]["steps_to_target"], after[1]["cpu_to_target"]) == (4.5, 3, 0.3)
    assert after[1]["curve"] == curve
    assert [p.name for p in tmp_path.iterdir()] == ["study.jsonl"]
