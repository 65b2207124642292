"""Function-space problems against their bars, a row each: ``python benchmarks/pinn.py [ROW …] [--csv curves.csv]``.

Runs each problem with the defaults of ``natgrad solve`` on one thread, and prints the error at the step and at the time
that its bar names. With a csv of published curves (columns problem, network, optimizer, seconds, l2_error) the best
published error of the same problem and network stands beside.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from natgrad import NaturalGradient
from natgrad.cli.problems.catalogue import PROBLEMS


@dataclass
class Bar:
    problem: str
    network: str
    step: int
    at_step: float  # largest error at that step
    by_time: float | None = None  # largest error, reached within
    seconds: float | None = None  # so many CPU seconds


BARS = {
    "poisson2d-257": Bar("poisson2d", "small", 100, 2e-6, 1e-7, 60),
    "poisson2d-9873": Bar("poisson2d", "large", 30, 5e-5, 5e-6, 120),
    "poisson2d-9873-best": Bar("poisson2d", "large", 30, 5e-5, 7.9e-7, 300),
    "poisson5d-449": Bar("poisson5d", "small", 300, 1e-5, 1e-6, 300),
    "ising-10": Bar("ising-chain", "rbm", 100, 5e-5),
    "deep-ritz": Bar("deep-ritz", "small", 101, 1e-6),
}


def measure(bar: Bar, whole: bool, solver: str = "auto") -> dict[str, float]:
    """Errors and CPU seconds where the bar looks; `whole` runs out the time instead of stopping at the bar."""
    problem = PROBLEMS[bar.problem]
    setting = problem.prepare(problem.networks[bar.network], 1)
    opt = NaturalGradient(setting.metric(solver))
    step, spent = 0, 0.0
    out: dict[str, float] = {"first loss": float("nan")}

    def waiting() -> bool:
        in_time = bar.seconds is not None and spent < bar.seconds
        return step < bar.step or (in_time and (whole or "reached after" not in out))

    while waiting():
        began = time.process_time()
        loss = opt.step(setting.batch(step))
        spent += time.process_time() - began
        step += 1
        error = setting.error()
        if step == 1:
            out["first loss"] = float(loss)
        if step == bar.step:
            out["error at step"], out["seconds at step"] = error, spent
        if bar.by_time is not None and error <= bar.by_time and "reached after" not in out:
            out["reached after"], out["reached at step"] = spent, step
        out["last error"], out["last step"], out["last seconds"] = error, step, spent
    return out


def published(path: Path | None, bar: Bar) -> str:
    if path is None:
        return ""
    network = "-".join(map(str, PROBLEMS[bar.problem].networks[bar.network]))
    with open(path) as f:
        rows = [r for r in csv.DictReader(f) if (r["problem"], r["network"]) == (bar.problem, network)]
    if not rows:
        return ""
    best = min(rows, key=lambda r: float(r["l2_error"]))
    return f"  published best {float(best['l2_error']):.2e} after {float(best['seconds']):.0f} s ({best['optimizer']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[[], *BARS], help=f"all of {', '.join(BARS)} where none is named")
    parser.add_argument("--csv", type=Path, help="published curves to stand beside")
    parser.add_argument("--whole", action="store_true", help="run out the time of each bar")
    parser.add_argument("--solver", default="auto", help="auto, dense, kernel or cg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.rows or BARS:
        bar, got = BARS[name], measure(BARS[name], args.whole, args.solver)
        met = got["error at step"] <= bar.at_step
        line = f"{name:<20} loss at step 0 {got['first loss']:.10g}"
        line += f"  step {bar.step}: {got['error at step']:.2e} ≤ {bar.at_step:g}, {got['seconds at step']:.1f} CPU s"
        if bar.by_time is not None:
            reached = got.get("reached after")
            met = met and reached is not None
            when = f"{reached:.1f} CPU s at step {got['reached at step']:.0f}" if reached else "no time given"
            line += f"  {bar.by_time:g} reached after {when} (bar {bar.seconds:g} s)"
        line += f"  last: {got['last error']:.2e} at step {got['last step']:.0f}, {got['last seconds']:.0f} CPU s"
        print(f"{'met    ' if met else 'NOT MET'} {line}{published(args.csv, bar)}", flush=True)


if __name__ == "__main__":
    main()
