"""The study and its smoke slice: ``python -m benchmarks.bench [--smoke] [--scale S] [--out DIR]``, from a checkout.

The study says first what it lacks (exit code 2) and what it costs, and goes on where it was interrupted.

The smoke slice is the harness with two small workloads, three optimizers, two tuning trials and a part of the budgets.
It shows that everything runs; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import analysis, harness
from benchmarks.analysis import Study
from benchmarks.rivals import RIVALS
from benchmarks.workloads import DATA, STUDY, WORKLOADS

RUNS = Path(__file__).parent / "runs"
SMOKE = ("digits_classifier", "concrete")
SMOKE_OPTIMIZERS = ("natgrad", "adamw", "sgd")
SMOKE_TRIALS, SMOKE_SEEDS, SMOKE_SCALE = 2, 2, 0.5
NEEDS = {  # workload: file of the data folder; the others draw their data or take scikit-learn's
    "mnist_ae": "mnist_t10k/t10k-images-idx3-ubyte.gz",
    "mnist_ae_xavier": "mnist_t10k/t10k-images-idx3-ubyte.gz",
    "convnet": "mnist_t10k/t10k-labels-idx1-ubyte.gz",
    "transformer_32": "tinyshakespeare.txt",
    "transformer_256": "tinyshakespeare.txt",
    "concrete": "uci/concrete.txt",
    "power_plant": "uci/power-plant.txt",
    "wine": "uci/wine-quality-red.txt",
}
PACKAGES = {"soap": "pytorch_optimizer", "shampoo": "pytorch_optimizer", "psgd": "heavyball",
            "schedule_free": "schedulefree", "singd": "singd"}  # fmt: skip


def without_data(workloads: tuple[str, ...]) -> dict[str, str]:
    """{workload: the file that it lacks}."""
    return {w: NEEDS[w] for w in workloads if w in NEEDS and not (DATA / NEEDS[w]).exists()}


def without_package(optimizers: tuple[str, ...]) -> dict[str, str]:
    """{optimizer: the package that it lacks}."""
    return {o: PACKAGES[o] for o in optimizers if o in PACKAGES and importlib.util.find_spec(PACKAGES[o]) is None}


def cost(args: argparse.Namespace) -> tuple[int, float]:
    """Runs of a study and their CPU seconds, evaluation apart."""
    runs, total = 0, 0.0
    for workload in args.workloads:
        budget = WORKLOADS[workload]().seconds * args.scale
        for rival in (RIVALS[name] for name in args.optimizers):
            if rival.only and workload not in rival.only:
                continue
            trials = args.trials if rival.knobs else 0
            over = 1 if rival.scheduled else harness.OVERTIME
            runs += trials + args.seeds
            total += budget * (trials + args.seeds * over)
    return runs, total


def smoke(out: Path | None, scale: float) -> int:
    """Run the slice and show a table."""
    lacking = without_data(SMOKE)
    for workload, file in lacking.items():
        print(f"{workload} is left out: {DATA / file} is not there; set NATGRAD_DATA to the folder with the data")
    folder = Path(tempfile.mkdtemp(prefix="natgrad-bench-")) if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    args = harness.parser().parse_args(
        ["study", "--workloads", *(w for w in SMOKE if w not in lacking), "--optimizers", *SMOKE_OPTIMIZERS,
         "--trials", str(SMOKE_TRIALS), "--seeds", str(SMOKE_SEEDS), "--scale", str(SMOKE_SCALE * scale),
         "--processes", "1", "--out", str(folder / "smoke.jsonl")]
    )  # fmt: skip
    runs, total = cost(args)
    print(f"smoke slice: {runs} runs, {total:.0f} CPU s and evaluation; lines go to {args.out}", flush=True)
    harness.study(args)
    Console(width=None if sys.stdout.isatty() else 110).print(summary(Study(analysis.read_finals(folder))))
    print("These budgets are too small to compare anything by: the slice shows that the benchmark runs.")
    return 0


def summary(study: Study) -> Table:
    table = Table(title="Medians over seeds")
    for column in ("workload", "optimizer", "CPU s to target", "missed", "best held out", "state / parameters"):
        table.add_column(column, justify="left" if column in ("workload", "optimizer") else "right")
    for workload in study.workloads:
        for name in study.optimizers:
            none, every = study.misses(workload, name)
            best = study.median(workload, name, lambda line: analysis.finite(line["best_metric"]))
            table.add_row(
                workload,
                name,
                "–" if study.mostly_missed(workload, name) else f"{study.median(workload, name, analysis.seconds):.2f}",
                f"{none} of {every}",
                f"{best:.4g}" if math.isfinite(best) else "not finite",
                f"{study.state_ratio(workload, name):.1f}",
            )
        table.add_section()
    return table


def full(out: Path | None, scale: float) -> int:
    """Say what the study costs, and run it."""
    missing = {**without_data(STUDY), **without_package(tuple(RIVALS))}
    for name, what in missing.items():
        print(f"{name} cannot run: {what} is missing", file=sys.stderr)
    if missing:
        print(
            f'benchmarks.bench: install the packages (pip install -e ".[bench]") and set NATGRAD_DATA to the folder '
            f"with the data (now {DATA}), or choose what there is: python -m benchmarks.harness study --help",
            file=sys.stderr,
        )
        return 2
    args = harness.parser().parse_args(
        ["study", "--scale", str(scale), *([] if out is None else ["--out", str(out / "study.jsonl")])]
    )
    runs, total = cost(args)
    print(
        f"{runs} runs, {total / 3600:.1f} CPU hours and evaluation, {args.processes} at a time; lines go to "
        f"{args.out}; a study that is interrupted goes on where it was",
        flush=True,
    )
    harness.study(args)
    print("python -m benchmarks.report writes docs/benchmarks.md from the lines in benchmarks/runs")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the lines")
    parser.add_argument("--scale", type=float, default=1.0, help="of every CPU budget")
    args = parser.parse_args()
    if not (math.isfinite(args.scale) and args.scale > 0):
        parser.error(f"--scale {args.scale:g} is no part of a budget; give a positive number")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder")
    if args.smoke and args.out is not None and args.out.resolve().is_relative_to(RUNS.resolve()):
        print(f"benchmarks.bench: {RUNS} holds the study's runs; give --smoke another --out", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    handler = signal.signal(signal.SIGINT, stop)
    try:
        return smoke(args.out, args.scale) if args.smoke else full(args.out, args.scale)
    finally:
        signal.signal(signal.SIGINT, handler)


def stop(*_: object) -> None:
    """On Ctrl-C, in this process and in its workers: a pool would go through all its runs before it gave up."""
    if multiprocessing.parent_process() is None:
        print("interrupted; the runs that were complete are kept, and the same command goes on", file=sys.stderr)
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
