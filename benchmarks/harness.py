"""Run the benchmark: ``python -m benchmarks.harness study --shard 0/2`` and ``1/2`` beside it.

One line of JSON a run. Every shard appends to a file of its own in ``benchmarks/runs`` and reads those of all; a run
whose (workload, optimizer, phase, trial, seed) stands in one of them is not done again, so a study that was interrupted
goes on where it was. Phases:

- ``tune``    every rival, the same number of trials, on a seed of their own;
- ``target``  the best trial of each first-order rival on the seeds that are reported. The target is the best of their
  medians over the first three seeds of the best held-out metric;
- ``final``   the best trial of every rival, and natgrad's defaults, with the time to the target. For a first-order
  rival this is the run of the phase before: the same options, seed and budget.

A rival with a schedule ends with it; what has no horizon runs on to 4/3 of the budget.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals import FIRST_ORDER, RIVALS, Hyper
from benchmarks.running import EXTENSION, arrival, run
from benchmarks.workloads import STUDY, WORKLOADS, Workload

RUNS = Path(__file__).parent / "runs"
TRIALS, SEEDS = 6, 5
WAVE = 3  # seeds that are run first, and that the target is taken from
TUNING_SEED = 100  # apart from the seeds that are reported
POLL = 5.0  # seconds between looks at the files of other shards
Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    workload: str
    optimizer: str
    phase: str
    seed: int
    number: int = 0  # the trial, in the tuning phase

    @property
    def key(self) -> tuple[Any, ...]:
        """The trial of later phases is known only once the earlier ones are done, and there is one alone."""
        return (self.workload, self.optimizer, self.phase, self.seed, self.number if self.phase == "tune" else None)


def key_of(line: Line) -> tuple[Any, ...]:
    trial = line["trial"] if line["phase"] == "tune" else None
    return (line["workload"], line["optimizer"], line["phase"], line["seed"], trial)


@dataclass
class Plan:
    """What a study covers."""

    workloads: list[str]
    optimizers: list[str]
    trials: int = TRIALS
    seeds: int = SEEDS
    scale: float = 1.0  # of every CPU budget

    def __post_init__(self) -> None:
        self._made: dict[str, Workload] = {}

    def workload(self, name: str) -> Workload:
        if name not in self._made:
            self._made[name] = WORKLOADS[name]()
        return self._made[name]

    def budget(self, name: str) -> float:
        return self.workload(name).seconds * self.scale

    @property
    def first_order(self) -> list[str]:
        return [n for n in FIRST_ORDER if n in self.optimizers]

    @property
    def target_seeds(self) -> range:
        return range(min(WAVE, self.seeds))

    def pairs(self) -> list[tuple[str, str]]:
        return [(w, o) for w in self.workloads for o in self.optimizers if RIVALS[o].applies(self.workload(w))]

    def jobs(self) -> Iterator[Job]:
        """In the order of work; each wave of seeds covers all workloads, so that what is there is balanced."""
        for number in range(self.trials):
            for w, o in self.pairs():
                if RIVALS[o].knobs:
                    yield Job(w, o, "tune", TUNING_SEED, number)
        for wave in (self.target_seeds, range(len(self.target_seeds), self.seeds)):
            for phase in ("target", "final"):
                for seed in wave:
                    for w, o in self.pairs():
                        if phase == "final" or o in self.first_order:
                            yield Job(w, o, phase, seed)

    def needs(self, job: Job) -> list[Job]:
        """Jobs that must be done before this one."""
        if job.phase == "tune":
            return []
        found = []
        if RIVALS[job.optimizer].knobs:
            found += [Job(job.workload, job.optimizer, "tune", TUNING_SEED, n) for n in range(self.trials)]
        if job.phase == "final":
            found += [Job(job.workload, o, "target", s) for o in self.first_order for s in self.target_seeds]
            if job.optimizer in self.first_order:
                found.append(Job(job.workload, job.optimizer, "target", job.seed))
        return found

    def cost(self, job: Job) -> float:
        """CPU seconds that the job takes, without evaluation."""
        if job.phase == "final" and job.optimizer in self.first_order:
            return 0.0
        longer = job.phase == "final" and not RIVALS[job.optimizer].scheduled
        return self.budget(job.workload) * (EXTENSION if longer else 1.0)

    def do(self, job: Job, done: dict[tuple[Any, ...], Line]) -> Line:
        """Run the job; its line."""
        rival, workload = RIVALS[job.optimizer], self.workload(job.workload)
        if job.phase == "tune":
            trial, hyper = job.number, rival.trial(job.number)
        else:
            trial, hyper = self.best_trial(job, done) if rival.knobs else (0, {})
        head = {
            "workload": job.workload,
            "optimizer": job.optimizer,
            "phase": job.phase,
            "trial": trial,
            "seed": job.seed,
            "hyper": hyper,
        }
        if job.phase == "final" and job.optimizer in self.first_order:
            body = done[Job(job.workload, job.optimizer, "target", job.seed).key]
        else:
            body = run(workload, rival, hyper, job.seed, self.budget(job.workload), extended=job.phase == "final")
        target = self.target(job.workload, done) if job.phase == "final" else None
        line = {**body, **head, **arrival(body, target)}
        if job.phase == "tune":
            del line["curve"], line["curve_passes"]
        return line

    def best_trial(self, job: Job, done: dict[tuple[Any, ...], Line]) -> tuple[int, Hyper]:
        """The trial of the lowest held-out metric in the tuning phase."""
        tried = [done[Job(job.workload, job.optimizer, "tune", TUNING_SEED, n).key] for n in range(self.trials)]
        best = min(tried, key=lambda r: infinite(r["best_metric"]))
        return best["trial"], best["hyper"]

    def target(self, workload: str, done: dict[tuple[Any, ...], Line]) -> float | None:
        """The best of the first-order rivals' medians over the first seeds; None where all of them diverged."""
        medians = [
            statistics.median(
                infinite(done[Job(workload, o, "target", s).key]["best_metric"]) for s in self.target_seeds
            )
            for o in self.first_order
        ]
        best = min(medians, default=math.inf)
        return best if math.isfinite(best) else None


def infinite(value: float | None) -> float:
    return math.inf if value is None else value


def read(folder: Path) -> list[Line]:
    """All complete lines in the files of a folder; a line that a process was killed in is not one."""
    found = []
    for path in sorted(folder.glob("study*.jsonl")):
        *whole, _ = path.read_text().split("\n")
        found += [json.loads(line) for line in whole if line]
    return found


def done_in(folder: Path) -> dict[tuple[Any, ...], Line]:
    return {key_of(line): line for line in read(folder)}


def append(path: Path, line: Line) -> None:
    """Add a whole line; what an interrupted write has left behind is cut off."""
    with path.open("a+b") as file:
        file.seek(0)
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
        file.write((json.dumps(line) + "\n").encode())


def study(plan: Plan, folder: Path, shard: int = 0, shards: int = 1, say: Any = print) -> None:
    """Do the jobs of one shard, waiting for those of others where they are needed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"study.{shard}of{shards}.jsonl" if shards > 1 else "study.jsonl")
    for index, job in enumerate(plan.jobs()):
        if index % shards != shard:
            continue
        done = done_in(folder)
        if job.key in done:
            continue
        waiting = False
        while missing := [n for n in plan.needs(job) if n.key not in done]:
            if shards == 1:
                raise RuntimeError(f"{job} needs {missing[0]}, which the order of work should have done")
            if not waiting:
                say(f"waiting for {len(missing)} runs of other shards, the first of them {missing[0]}")
            waiting = True
            time.sleep(POLL)
            done = done_in(folder)
        line = plan.do(job, done)
        append(path, line)
        best = "diverged" if line["best_metric"] is None else f"best {line['best_metric']:.4g}"
        say(f"{job.workload} {job.optimizer} {job.phase} {line['trial']} {job.seed}: {best}")


def estimate(plan: Plan, folder: Path) -> str:
    """What the study takes, and what of it is left."""
    jobs, done = list(plan.jobs()), done_in(folder)
    whole = sum(plan.cost(j) for j in jobs)
    left = sum(plan.cost(j) for j in jobs if j.key not in done)
    return f"{len(jobs)} runs, {whole:.0f} CPU seconds without evaluation, of which {left:.0f} are left"


def parse_shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    if not (shard.isdigit() and shards.isdigit() and int(shard) < int(shards)):
        raise argparse.ArgumentTypeError(f"--shard takes i/n with 0 ≤ i < n, for instance 0/2; got {text!r}")
    return int(shard), int(shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("study", "estimate"))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(STUDY))
    parser.add_argument("--optimizers", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="of every CPU budget; below 1 for a trial run")
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="i/n")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(args.workloads, args.optimizers, args.trials, args.seeds, args.scale)
    print(estimate(plan, args.out), flush=True)
    if args.what == "study":
        study(plan, args.out, *args.shard, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
