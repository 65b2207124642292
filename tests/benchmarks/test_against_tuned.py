"""The comparison of natgrad's defaults with swept rates: what it computes from lines, and that it goes on."""

import json
import math

import pytest
import torch

from benchmarks import against_tuned as study
from benchmarks import fresh
from benchmarks.harness import train
from benchmarks.rivals import Rival


def line(optimizer, rate, seed, curve):
    return {
        "workload": "w", "optimizer": optimizer, "rate": rate, "seed": seed, "budget": 10.0, "curve": curve,
        "final_metric": curve[-1][study.HELD_OUT],
    }  # fmt: skip


@pytest.fixture
def lines(monkeypatch):
    """Rate 1 trains best, rate 2 holds out best; natgrad is at the training loss of rate 1 after 2 and 4 seconds."""
    monkeypatch.setattr(study, "RATES", {"sgd": (1.0, 2.0, 3.0)})
    runs = [line("sgd", 3.0, study.TUNING_SEED, [[9, 10.0, None, None]])]  # diverged
    for seed in (study.TUNING_SEED, 0, 1):
        runs += [line("sgd", 1.0, seed, [[9, 10.0, 0.9, 0.2]]), line("sgd", 2.0, seed, [[9, 10.0, 0.5, 0.4]])]
    for seed, at in ((0, 2.0), (1, 4.0)):
        runs.append(line("natgrad", None, seed, [[1, 1.0, 1.0, 0.3], [2, at, 0.8, 0.2], [3, 10.0, 0.6 + seed, 0.1]]))
    return {study.key_of(run): run for run in runs}


def test_each_question_has_the_rate_that_is_best_for_it(lines):
    assert study.chosen(lines, "w", "sgd") == {study.TRAIN: 1.0, study.HELD_OUT: 2.0}


def test_medians_over_seeds(lines):
    share, ours, theirs = study.compare(lines, "w", "sgd", 2)
    assert (share, ours, theirs) == (pytest.approx(0.3), pytest.approx(1.1), 0.5)
    assert "| w | sgd | 0.30 | 1.1 | 0.5 |" in study.table(lines, ["w"], 2)


def test_a_miss_is_shown_as_one(lines):
    for seed in (0, 1):
        lines["w", "natgrad", None, seed]["curve"] = [[1, 10.0, 0.6, 0.3]]
    assert study.compare(lines, "w", "sgd", 2)[0] == math.inf
    assert "not within it" in study.table(lines, ["w"], 2)


def test_nothing_is_said_while_runs_are_missing(lines):
    del lines["w", "natgrad", None, 1]
    assert study.compare(lines, "w", "sgd", 2) is None


def test_goes_on_after_a_kill_without_a_run_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RATES", {"sgd": (0.03, 0.1)})
    path = tmp_path / "against_tuned.jsonl"
    study.study(["diabetes"], 1, 0.005, tmp_path)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:40])  # killed while it wrote the second line
    study.study(["diabetes"], 1, 0.005, tmp_path)
    runs = [json.loads(text) for text in path.read_text().splitlines()]
    keys = [study.key_of(run) for run in runs]
    assert len(keys) == len(set(keys)) >= 4
    assert keys[0] == study.key_of(json.loads(whole[0]))
    assert {run["optimizer"] for run in runs} == {"natgrad", "sgd"}


TABLES = sorted(set(fresh.FRESH) - {"digits_conv", "next_letter", "mnist_mlp", "other_half", "letters_gru"})


@pytest.mark.parametrize("name", TABLES)
def test_fresh_tables_are_standardised_and_the_same_each_time(name):
    problem, again = fresh.FRESH[name](), fresh.FRESH[name]()
    x, y = (torch.cat([seen, kept]) for seen, kept in zip(problem.train, problem.valid))
    assert torch.equal(problem.train[0], again.train[0])
    torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(x.shape[1]), atol=1e-3, rtol=0)
    assert math.isfinite(float(problem.loss(problem.model(), *problem.valid).detach()))
    assert len(y) == len(x) > 400


def test_small_images_train_and_held_out_data_are_apart():
    problem = fresh.digits_conv()
    assert problem.train[0].shape[1:] == (1, 8, 8)
    assert len(problem.train[0]) + len(problem.valid[0]) == 1797
    assert float(problem.loss(problem.model(), *problem.valid).detach()) == pytest.approx(math.log(10), abs=0.3)


@pytest.mark.skipif(not (fresh.DATA / "tinyshakespeare.txt").exists(), reason="needs tiny Shakespeare in NATGRAD_DATA")
@pytest.mark.parametrize(("name", "before"), [("next_letter", 8), ("letters_gru", 24)])
def test_letters_follow_those_before(name, before):
    problem = fresh.FRESH[name]()
    x, y = problem.train
    assert x.shape == (len(y), before)
    start = before - 5  # windows start five letters apart, so each tells the label of the one before
    assert torch.equal(y[:-1], x[1:, start])
    assert float(problem.loss(problem.model(), *problem.valid).detach()) == pytest.approx(math.log(65), abs=0.3)


def test_an_optimizer_that_raises_loses_its_run_alone():
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0].setdefault("count", 0) == 3:
                raise torch.linalg.LinAlgError("no decomposition")
            self.param_groups[0]["count"] += 1
            return super().step(closure)

    rival = Rival("breaks", lambda model, criterion, hyper: [Breaks(model.parameters(), 0.01)], scheduled=False)
    run = train(fresh.diabetes(), rival, {}, 0, 5.0)
    assert run["steps"] == 3
    assert "no decomposition" in run["failure"]
    assert run["final_metric"] is None
    assert math.isfinite(run["best_metric"])
