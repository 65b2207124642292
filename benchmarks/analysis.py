"""What the final runs say: pure functions of the lines that `benchmarks.harness` writes.

Times are CPU seconds to the target; a miss counts as 4/3 of the budget for every optimizer alike and is marked. Seeds
are paired: seed s has the same initial weights and batches under every optimizer. Intervals are bootstrap percentiles
(Efron & Tibshirani 1993, section 13.3) over seeds that are drawn for both optimizers at once; with up to five seeds all
draws are enumerated, so that an interval is exact and the same every time.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FIRST_ORDER = ("adamw", "nadamw", "sgd")
OURS = "natgrad"
OVERTIME = 4 / 3  # of the budget: what a miss counts as
ENUMERATED = 5  # seeds up to which all draws are gone through (5⁵ = 3125)
DRAWS = 10_000  # beyond
LEVEL = 0.95

Line = dict[str, Any]
Cost = Callable[[Line], float]


def read_finals(folder: Path) -> list[Line]:
    """The lines of phase "final" in all files of a folder, sorted by what they are runs of.

    Raises:
        ValueError: a run stands there twice.
    """
    lines = [json.loads(text) for path in sorted(folder.glob("*.jsonl")) for text in path.read_text().splitlines()]
    finals = [line for line in lines if line.get("phase") == "final"]
    seen: set[tuple[str, str, int]] = set()
    for line in finals:
        key = line["workload"], line["optimizer"], line["seed"]
        if key in seen:
            raise ValueError(f"{folder} holds two final runs of {key}; keep the one that is meant")
        seen.add(key)
    return finals


def seconds(line: Line) -> float:
    """CPU seconds to the target, at most 4/3 of the budget, which is what a miss counts as."""
    limit = OVERTIME * line["budget"]
    return limit if missed(line) else min(line["cpu_to_target"], limit)


def passes(line: Line) -> float:
    """Forward-backwards to the target, those that the curvature took included, in proportion to the steps.

    A miss counts as what the run would have made in 4/3 of the budget; ∞ where its first step failed.
    """
    if missed(line):
        if not line["cpu_seconds"]:
            return math.inf
        return line["passes"] * OVERTIME * line["budget"] / line["cpu_seconds"]
    return line["steps_to_target"] * line["passes"] / line["steps"]


def missed(line: Line) -> bool:
    return line["cpu_to_target"] is None


def at_budget(line: Line) -> float:
    """Held-out metric of the last look at the budget or before; ∞ where it was not finite or the run was lost by then.

    A run ends with the step that crosses its budget, so that one mean step beyond still counts.
    """
    end = line["budget"] + line["cpu_seconds"] / max(1, line["steps"])
    if line["final_metric"] is None and line["cpu_seconds"] <= end:
        return math.inf
    looks = [value for _, t, value, *_ in line["curve"] if t <= end]
    return finite(looks[-1]) if looks else math.inf


def finite(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


@dataclass(frozen=True)
class Ratio:
    """How many times sooner natgrad was: above 1 it was faster. With its interval, and who missed the target."""

    value: float
    low: float
    high: float
    seeds: int
    ours_missed: bool = False
    rival_missed: bool = False
    rival: str = ""

    @property
    def verdict(self) -> str:
        """A win or a loss only where the interval excludes 1 and somebody reached the target."""
        if self.ours_missed and self.rival_missed:
            return "neither reached it"
        return "win" if self.low > 1 else "loss" if self.high < 1 else "undecided"

    @property
    def misses(self) -> str:
        """† where the rival missed the target, ‡ where natgrad did."""
        return "†" * self.rival_missed + "‡" * self.ours_missed


@dataclass
class Study:
    """Final runs by workload and optimizer."""

    lines: list[Line]
    runs: dict[tuple[str, str], dict[int, Line]] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = {}
        for line in self.lines:
            self.runs.setdefault((line["workload"], line["optimizer"]), {})[line["seed"]] = line

    @property
    def workloads(self) -> list[str]:
        """Those that natgrad ran on."""
        return list(dict.fromkeys(w for w, o in self.runs if o == OURS))

    @property
    def optimizers(self) -> list[str]:
        names = list(dict.fromkeys(o for _, o in self.runs))
        return sorted(names, key=lambda n: (n != OURS, n not in FIRST_ORDER, n))

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.optimizers if name != OURS]

    def of(self, workload: str, optimizer: str) -> list[Line]:
        return list(self.runs.get((workload, optimizer), {}).values())

    def median(self, workload: str, optimizer: str, cost: Callable[[Line], float]) -> float:
        """Over seeds; NaN where there are no runs."""
        values = [cost(line) for line in self.of(workload, optimizer)]
        return statistics.median(values) if values else math.nan

    def misses(self, workload: str, optimizer: str) -> tuple[int, int]:
        """Runs that never reached the target, and runs."""
        runs = self.of(workload, optimizer)
        return sum(map(missed, runs)), len(runs)

    def mostly_missed(self, workload: str, optimizer: str) -> bool:
        """Whether the median is a miss."""
        none, every = self.misses(workload, optimizer)
        return 2 * none >= every + (every % 2)

    def first_order(self, workload: str, cost: Cost = seconds) -> list[str]:
        """First-order rivals that ran on a workload, the best first."""
        return sorted(
            (name for name in FIRST_ORDER if self.of(workload, name)),
            key=lambda name: self.median(workload, name, cost),
        )

    def paired(self, workload: str, rivals: Sequence[str], cost: Cost) -> tuple[list[str], np.ndarray] | None:
        """Rivals that ran, and logarithms of costs (1 + rivals, seeds), natgrad first, on the seeds that all have.

        None where there is nothing to compare.
        """
        names = [name for name in rivals if self.of(workload, name)]
        if not names or not self.of(workload, OURS):
            return None
        tables = [self.runs[workload, name] for name in (OURS, *names)]
        seeds = sorted(set.intersection(*(set(t) for t in tables)))
        return (names, np.log([[cost(t[s]) for s in seeds] for t in tables])) if seeds else None

    def ratio(self, workload: str, rivals: Sequence[str], cost: Cost = seconds) -> Ratio | None:
        """natgrad over the fastest of `rivals`, which is picked anew in every draw of the bootstrap."""
        if (found := self.paired(workload, rivals, cost)) is None:
            return None
        names, logs = found
        seeds = logs.shape[1]
        best = names[int(np.argmin(np.median(logs[1:], axis=1)))]
        value = float(log_ratios(logs, np.arange(seeds)[None])[0])
        low, high = interval(log_ratios(logs, draws(seeds)))
        lost = self.mostly_missed(workload, OURS), self.mostly_missed(workload, best)
        return Ratio(math.exp(value), math.exp(low), math.exp(high), seeds, *lost, best)

    def geometric_mean(self, rivals: Sequence[str], cost: Cost = seconds) -> tuple[Ratio, int] | None:
        """Over the workloads on which both ran, and their number; seeds are drawn in each workload by themselves."""
        generator = np.random.default_rng(0)
        spread, found = np.zeros(DRAWS), []
        for workload in self.workloads:
            pairs, one = self.paired(workload, rivals, cost), self.ratio(workload, rivals, cost)
            if pairs is None or one is None:
                continue
            seeds = pairs[1].shape[1]
            spread += log_ratios(pairs[1], generator.integers(seeds, size=(DRAWS, seeds)))
            found.append(one)
        if not found:
            return None
        value = math.exp(statistics.mean(math.log(r.value) for r in found))
        low, high = interval(spread / len(found))
        lost = any(r.ours_missed for r in found), any(r.rival_missed for r in found)
        return Ratio(value, math.exp(low), math.exp(high), min(r.seeds for r in found), *lost), len(found)

    def profile(self) -> dict[str, list[float]]:
        """{optimizer: sorted times relative to the fastest optimizer of the same workload and seed}; a miss is ∞.

        Performance profiles: [Dolan & Moré 2002](https://arxiv.org/abs/cs/0102001). Optimizers that ran on all
        workloads; problems that nobody solved are left out.
        """
        names = [o for o in self.optimizers if all(self.of(w, o) for w in self.workloads)]
        out: dict[str, list[float]] = {name: [] for name in names}
        for workload in self.workloads:
            for seed in set.intersection(*(set(self.runs[workload, o]) for o in names)):
                times = {o: self.runs[workload, o][seed]["cpu_to_target"] for o in names}
                solved = [t for t in times.values() if t is not None]
                for name, t in times.items() if solved else ():
                    out[name].append(math.inf if t is None else t / min(solved))
        return {name: sorted(values) for name, values in out.items()}

    def state_ratio(self, workload: str, optimizer: str) -> float:
        """Bytes of state per byte of parameters."""
        return self.median(workload, optimizer, lambda line: line["state_bytes"] / line["parameter_bytes"])

    def not_finite(self, optimizer: str) -> int:
        """Runs that ended with a metric that is not finite, or with an error."""
        return sum(math.isinf(finite(line["final_metric"])) for line in self.lines if line["optimizer"] == optimizer)

    def marked(self, optimizer: str) -> int:
        """Runs that the machine disturbed."""
        return sum(bool(line["marked"]) for line in self.lines if line["optimizer"] == optimizer)


def draws(seeds: int) -> np.ndarray:
    """Bootstrap draws of seeds, (draws, seeds)."""
    if seeds <= ENUMERATED:
        return np.array(list(itertools.product(range(seeds), repeat=seeds)))
    return np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))


def log_ratios(logs: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """log of (fastest rival's median time over natgrad's) in each draw.

    Args:
        logs: logarithms of times, (1 + rivals, seeds), natgrad first.
        drawn: seeds of each draw, (draws, seeds).
    """
    medians = np.median(logs[:, drawn], axis=2)  # (1 + rivals, draws); of logs: a median is the same under any scale
    return medians[1:].min(axis=0) - medians[0]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The central 95 %, by values that occurred: no interpolation between the few that there are."""
    tail = (1 - LEVEL) / 2
    ordered = np.asarray(list(values))
    return float(np.quantile(ordered, tail, method="lower")), float(np.quantile(ordered, 1 - tail, method="higher"))


def share_within(profile: Sequence[float], factor: float) -> float:
    """The share of problems solved within `factor` times the fastest time."""
    return sum(value <= factor for value in profile) / len(profile) if profile else math.nan
