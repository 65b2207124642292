"""How much natgrad's defaults matter: ``python -m benchmarks.sensitivity [--seeds 2] [--workloads …] [--scale 1]``.

The learning rate, the damping, the refresh interval and the batch size, one at a time, at ×¼, ×½, ×2 and ×4 of their
defaults, on two autoencoders. Measured is the CPU time until the training loss that the default of the same seed
reaches at half its budget, relative to the default's own time; a run has as long as the default, so that a variant
which takes more than twice as long has missed. The training loss and not the held-out one, which these small data
sets let rise long before a run ends. One line of JSON a run, resumable; a run that was disturbed is marked.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import natgrad as ng
from benchmarks.harness import read
from benchmarks.workloads import WORKLOADS, Workload

SECONDS = {"digits_ae": 4.0, "mnist_ae": 12.0}  # CPU budget of a run
KNOBS = ("lr", "damping", "refresh", "batch")
FACTORS = (0.25, 0.5, 2.0, 4.0)
DEFAULT = "default"  # the knob of the line that the others are compared with
LOOKS = 60  # a run; the resolution of a time is a sixtieth of the budget
OUT = Path(__file__).parent / "runs" / "sensitivity.jsonl"
DISTURBED = 1.2  # wall over CPU time from which on the machine was busy with something else
WARM_UP = 2  # steps of a throw-away run, so that no run pays for what PyTorch loads on first use

Line = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """natgrad with one knob at a multiple of its default."""

    knob: str = DEFAULT
    factor: float = 1.0

    def optimizer(self, model: torch.nn.Module, criterion: torch.nn.Module) -> ng.NaturalGradient:
        if self.knob in (DEFAULT, "batch"):
            return ng.NaturalGradient(ng.Fisher(model, criterion))
        # of a copy: a second metric on the model itself would take statistics of its own on every step
        default = ng.NaturalGradient(ng.Fisher(copy.deepcopy(model), copy.deepcopy(criterion)))
        if self.knob == "refresh":
            return ng.NaturalGradient(ng.Fisher(model, criterion), refresh=round(default.refresh * self.factor))
        options = {self.knob: default.defaults[self.knob] * self.factor}
        return ng.NaturalGradient(ng.Fisher(model, criterion), **options)

    def batch(self, workload: Workload) -> int:
        return round(workload.batch * self.factor) if self.knob == "batch" else workload.batch

    def value(self, workload: Workload) -> float | None:
        """What the knob is set to."""
        if self.knob == DEFAULT:
            return None
        if self.knob == "batch":
            return self.batch(workload)
        opt = self.optimizer(workload.model(), workload.criterion)
        return opt.refresh if self.knob == "refresh" else opt.param_groups[0][self.knob]


VARIANTS = (Variant(), *(Variant(knob, factor) for knob in KNOBS for factor in FACTORS))


def train(workload: Workload, variant: Variant, seed: int, budget: float, steps: float = math.inf) -> Line:
    """One run of `budget` CPU seconds; looks at the training loss are not counted."""
    workload.batch = variant.batch(workload)
    torch.manual_seed(seed)
    model = workload.model()
    opt = variant.optimizer(model, workload.criterion)
    generator = torch.Generator().manual_seed(seed)
    spent, step, next_look, error = 0.0, 0, 0.0, None
    first = workload.evaluate(model, workload.train_eval)
    curve = [(0, 0.0, first)]
    wall, cpu = time.perf_counter(), time.process_time()
    while spent < budget and step < steps and error is None:
        start = time.process_time()
        x, y = workload.draw(generator)
        opt.zero_grad()
        workload.loss(model, x, y).backward()
        try:
            opt.step()
        except (ArithmeticError, RuntimeError) as given_up:  # no finite gradient, or a matrix that cannot be inverted
            error = str(given_up).partition("\n")[0]
        spent += time.process_time() - start
        step += 1
        if spent >= next_look or spent >= budget or error:
            curve.append((step, spent, workload.evaluate(model, workload.train_eval)))
            next_look = spent + budget / LOOKS
    stretch = (time.perf_counter() - wall) / (time.process_time() - cpu)
    last = curve[-1][2]
    return {
        "steps": step,
        "cpu_seconds": spent,
        "budget": budget,
        "marked": stretch > DISTURBED,
        "diverged": error is not None or not math.isfinite(last) or last > first,
        "error": error,
        "curve": [(n, t, loss if math.isfinite(loss) else None) for n, t, loss in curve],
    }


def key(line: Line) -> tuple[Any, ...]:
    return line["workload"], line["knob"], line["factor"], line["seed"]


def time_to(curve: list[list[float]], target: float) -> float | None:
    """CPU seconds at the first look at or below `target`."""
    return next((t for _, t, loss in curve if loss is not None and loss <= target), None)


def target_of(default: Line) -> float:
    """The lowest loss that the default has reached at half its budget."""
    return min(loss for _, t, loss in default["curve"] if t <= default["budget"] / 2 and loss is not None)


def ratios(lines: list[Line]) -> dict[tuple[str, str, float], list[float]]:
    """{(workload, knob, factor): time to the target over the default's, one a seed}; a miss is ∞, divergence NaN."""
    defaults = {(r["workload"], r["seed"]): r for r in lines if r["knob"] == DEFAULT}
    found: dict[tuple[str, str, float], list[float]] = {}
    for line in lines:
        default = defaults.get((line["workload"], line["seed"]))
        if line is default or default is None:
            continue
        target = target_of(default)
        own, mine = time_to(default["curve"], target), time_to(line["curve"], target)
        if not own:  # the default was at its best before its first step: there is nothing to be relative to
            continue
        ratio = math.nan if line["diverged"] else math.inf if mine is None else mine / own
        found.setdefault((line["workload"], line["knob"], line["factor"]), []).append(ratio)
    return found


def cell(seeds: list[float]) -> str:
    """The median over seeds in words; one diverged run is said, whatever the others did."""
    if not seeds:
        return "–"
    if any(math.isnan(r) for r in seeds):
        return "diverged"
    middle = statistics.median_high(seeds)
    return "> 2, missed" if math.isinf(middle) else f"{middle:.2f}"


def jobs(workloads: list[str], seeds: int) -> Iterator[tuple[str, int, Variant]]:
    for name in workloads:
        for seed in range(seeds):
            for variant in VARIANTS:
                yield name, seed, variant


def show(lines: list[Line]) -> None:
    found = ratios(lines)
    marked = sum(line["marked"] for line in lines)
    title = "CPU time to the target relative to the default's, median over seeds"
    table = Table(title=title, caption=f"{marked} of {len(lines)} runs were disturbed (wall over CPU > {DISTURBED})")
    for column in ("workload", "knob", *(f"×{f:g}" for f in FACTORS)):
        table.add_column(column)
    for name in dict.fromkeys(workload for workload, _, _ in found):
        for knob in KNOBS:
            table.add_row(name, knob, *(cell(found.get((name, knob, f), [])) for f in FACTORS))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--scale", type=float, default=1.0, help="of every CPU budget")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {key(line) for line in read(args.out)}
    warm = ""
    for name, seed, variant in jobs(args.workloads, args.seeds):
        head = {"workload": name, "knob": variant.knob, "factor": variant.factor, "seed": seed}
        if key(head) in done:
            continue
        workload = WORKLOADS[name]()
        if warm != name:
            train(workload, Variant(), 0, math.inf, steps=WARM_UP)
            warm = name
        line = {**head, "value": variant.value(workload)}
        line |= train(workload, variant, seed, SECONDS[name] * args.scale)
        with args.out.open("a") as file:  # whole lines, so that an interrupted study goes on where it was
            file.write(json.dumps(line) + "\n")
        print(f"{name} {variant.knob} ×{variant.factor:g} seed {seed}: {line['curve'][-1][2]} in training", flush=True)
    show(read(args.out))


if __name__ == "__main__":
    main()
