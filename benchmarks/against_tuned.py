"""natgrad as it comes against optimizers with a swept rate, at equal CPU time: ``python -m benchmarks.against_tuned``.

AdamW, SGD with Nesterov momentum, Muon and SOAP have four fixed rates each, a short warm-up and a cosine to zero at the
end of the budget; natgrad has no option set. On every workload each rate is run once on a seed of its own; the rate
with the lowest last training loss, and that with the lowest last held-out metric, are then run on the seeds that
natgrad is run on. Two questions are answered from them, seed by seed: when natgrad is first at the rival's last
training loss, and what its held-out metric is at the end of the same budget.

Beside the workloads of the study there are those of `EXTRA` and the data sets of `benchmarks.fresh`, each of them fixed
before anything was run on it.

One line of JSON a run in ``benchmarks/runs``, resumable. ``--shard i/n`` takes every n-th workload and writes to a file
of its own; ``--table`` prints what the lines say so far.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fresh import FRESH
from benchmarks.harness import TUNING_SEED, append, environment, train
from benchmarks.rivals import RIVALS, Hyper
from benchmarks.workloads import STUDY, WORKLOADS, Workload

EXTRA = ("digits_ae", "mnist_ae_xavier", "power_plant", "wine", "digits_classifier")
FIXED: dict[str, Hyper] = {  # what is not swept: the libraries' defaults
    "adamw": {"weight_decay": 1e-2, "beta1": 0.9, "eps": 1e-8},
    "sgd": {"weight_decay": 0.0, "beta1": 0.9},
    "muon": {"weight_decay": 1e-2, "beta1": 0.95, "adam_share": 0.1},
    "soap": {"weight_decay": 1e-2, "beta1": 0.95, "interval": 10},
}
RATES = {
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "soap": (1e-3, 3e-3, 1e-2, 3e-2),
}
STEPS, TIME, HELD_OUT, TRAIN = range(4)  # entries of a look
Run = dict[str, Any]


ALL: dict[str, Callable[[], Workload]] = {n: WORKLOADS[n] for n in (*STUDY, *EXTRA)} | FRESH


def key_of(run: Run) -> tuple[str, str, float | None, int]:
    return run["workload"], run["optimizer"], run["rate"], run["seed"]


def read(folder: Path) -> dict[tuple[str, str, float | None, int], Run]:
    """The complete lines of all shards."""
    lines = [line for path in sorted(folder.glob("against_tuned*.jsonl")) for line in path.read_text().split("\n")[:-1]]
    return {key_of(run): run for run in map(json.loads, lines)}


def cut_off(path: Path) -> None:
    """Drop the part of a line that a killed process has left at the end."""
    if path.exists():
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])


def last(run: Run, what: int) -> float:
    """The value at the end of the budget; infinite where the run diverged."""
    value = run["curve"][-1][what] if run["final_metric"] is not None else None
    return math.inf if value is None else value


def chosen(done: dict[Any, Run], workload: str, optimizer: str) -> dict[int, float]:
    """The best rate of the sweep by training loss and by held-out metric."""
    sweep = [done[workload, optimizer, rate, TUNING_SEED] for rate in RATES[optimizer]]
    return {what: min(sweep, key=lambda run: last(run, what))["rate"] for what in (TRAIN, HELD_OUT)}


def jobs(workload: str, seeds: int, done: dict[Any, Run]) -> Iterator[tuple[str, float | None, int]]:
    """(optimizer, rate, seed): the sweeps first; `done` is to hold each run before the next is asked for."""
    for optimizer, rates in RATES.items():
        for rate in rates:
            yield optimizer, rate, TUNING_SEED
    for seed in range(seeds):
        yield "natgrad", None, seed
        for optimizer in RATES:
            for rate in sorted(set(chosen(done, workload, optimizer).values())):
                yield optimizer, rate, seed


def study(workloads: Sequence[str], seeds: int, scale: float, folder: Path, name: str = "against_tuned.jsonl") -> None:
    """Do what is not done yet."""
    folder.mkdir(parents=True, exist_ok=True)
    cut_off(folder / name)
    done = read(folder)
    for workload in workloads:
        problem = ALL[workload]()
        for optimizer, rate, seed in jobs(workload, seeds, done):
            if (workload, optimizer, rate, seed) in done:
                continue
            hyper = {} if rate is None else {"lr": rate, **FIXED[optimizer]}
            line = train(problem, RIVALS[optimizer], hyper, seed, problem.seconds * scale)
            head = {"workload": workload, "optimizer": optimizer, "rate": rate, "seed": seed, "hyper": hyper}
            run = {**head, **line, "budget": problem.seconds * scale, "environment": environment()}
            append(folder / name, run)
            done[key_of(run)] = run
            print(f"{workload} {optimizer} {rate} {seed}: training loss {last(run, TRAIN):.4g}", flush=True)


def compare(done: dict[Any, Run], workload: str, optimizer: str, seeds: int) -> tuple[float, float, float] | None:
    """Medians over seeds: natgrad's time to the rival's last training loss over the budget (infinite: not within it),
    natgrad's and the rival's held-out metric at its end. None while runs are missing.
    """
    try:
        rates = chosen(done, workload, optimizer)
        mine = [done[workload, "natgrad", None, s] for s in range(seeds)]
        trained, held = ([done[workload, optimizer, rates[w], s] for s in range(seeds)] for w in (TRAIN, HELD_OUT))
    except KeyError:
        return None
    shares = []
    for ours, theirs in zip(mine, trained):
        goal = last(theirs, TRAIN)
        hit = next((c[TIME] for c in ours["curve"] if c[TRAIN] is not None and c[TRAIN] <= goal), math.inf)
        shares.append(hit / theirs["budget"])
    ours, theirs = (statistics.median(last(run, HELD_OUT) for run in runs) for runs in (mine, held))
    return statistics.median(shares), ours, theirs


def table(done: dict[Any, Run], workloads: Sequence[str], seeds: int) -> str:
    """A Markdown table; a share above 1 is a loss, shown as a miss."""
    rows = ["| workload | rival | natgrad's share of the budget to its training loss | held out, natgrad | rival |"]
    rows.append("|---|---|---|---|---|")
    for workload in workloads:
        for optimizer in RATES:
            if (found := compare(done, workload, optimizer, seeds)) is not None:
                share, ours, theirs = found
                when = f"{share:.2f}" if share <= 1 else "not within it"
                rows.append(f"| {workload} | {optimizer} | {when} | {ours:.4g} | {theirs:.4g} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of every CPU budget; below 1 for a trial run")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="this process of n")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "runs", help="folder of the lines")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is known")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.out), args.workloads, args.seeds))
        return
    shard, shards = map(int, args.shard.split("/"))
    if not 0 <= shard < shards:
        parser.error(f"--shard takes i/n with 0 ≤ i < n, for instance 0/2; got {args.shard}")
    if args.scale != 1 and args.out == parser.get_default("out"):
        parser.error(f"lines of a trial run (--scale {args.scale:g}) do not belong in {args.out}; give another --out")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of rivals, about what is done here on purpose
    began = time.perf_counter()
    name = f"against_tuned.{shard}of{shards}.jsonl" if shards > 1 else "against_tuned.jsonl"
    study(args.workloads[shard::shards], args.seeds, args.scale, args.out, name)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
