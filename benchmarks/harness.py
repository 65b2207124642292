"""The comparison of optimizers: ``python -m benchmarks.harness study --processes 2``.

One line of JSON a run, resumable: a run whose (workload, optimizer, phase, trial, seed) stands in the file is not done
again. The clock is CPU time of one thread; evaluation is not counted. The phases, in this order:

- ``tune``    every rival, the same number of trials each, on a seed of its own;
- ``target``  the best trial of each first-order rival on the seeds that are reported: the target is the lowest of the
  medians of their best held-out losses;
- ``final``   the best trial of every rival and natgrad's defaults on the same seeds, with the time to the target.

A scheduled rival's run ends with its schedule, whose horizon is the workload's budget; natgrad and the other optimizers
without a schedule may go on to 4/3 of it. The final run of a first-order rival is its target run: same options, same
seed, same budget.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.rivals import RIVALS, Hyper, Rival, cosine_with_warmup
from benchmarks.workloads import STUDY, WORKLOADS, Workload

FIRST_ORDER = ("adamw", "nadamw", "sgd")
TUNING_SEED = 100  # apart from the seeds that are reported
OVERTIME = 4 / 3  # of the budget, for optimizers without a horizon
PATIENCE = 20  # steps in a row with a loss that is not finite
Run = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    workload: str
    optimizer: str
    phase: str
    trial: int
    seed: int
    hyper: tuple[tuple[str, float], ...]
    target: float | None = None
    scale: float = 1.0  # of the budget

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.workload, self.optimizer, self.phase, self.trial, self.seed

    @property
    def seconds(self) -> float:
        """What the run may take."""
        over = self.phase == "final" and not RIVALS[self.optimizer].scheduled
        return BUDGETS[self.workload] * self.scale * (OVERTIME if over else 1)

    def do(self) -> Run:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")  # of rivals, about what this protocol does on purpose
        line = train(WORKLOADS[self.workload](), RIVALS[self.optimizer], dict(self.hyper), self.seed, self.seconds)
        head = dict(zip(("workload", "optimizer", "phase", "trial", "seed"), self.key), hyper=dict(self.hyper))
        line["budget"] = BUDGETS[self.workload] * self.scale
        return {**head, **line, **time_to(line["curve"], self.target), "environment": environment()}


BUDGETS: dict[str, float] = {}  # CPU seconds of each workload, filled when a study begins


def train(workload: Workload, rival: Rival, hyper: Hyper, seed: int, seconds: float) -> Run:
    """One training run of so many CPU seconds. The seed fixes the initial weights and the order of the data."""
    torch.manual_seed(seed)
    model = workload.model()
    opts = workload.build(rival, model, hyper)
    rates = [[g["lr"] for g in opt.param_groups] for opt in opts]
    generator = torch.Generator().manual_seed(seed)
    spent = wall = next_look = 0.0
    steps = passes = lost = 0
    curve: list[tuple[int, float, float | None, float | None]] = []
    failure = None
    while spent < seconds and lost < PATIENCE:
        x, y = workload.draw(generator)
        start, began = time.process_time(), time.perf_counter()
        if rival.scheduled:
            set_rates(opts, rates, cosine_with_warmup(spent / seconds))
        try:
            loss, calls = workload.step(opts, model, x, y)
        except (ArithmeticError, RuntimeError) as error:  # a decomposition that fails, say: a run lost, not the study
            failure, lost = f"{type(error).__name__}: {str(error)[:200]}", PATIENCE
            curve.append((steps, round(spent, 4), None, None))
            break
        spent += time.process_time() - start
        wall += time.perf_counter() - began
        steps += 1
        passes += calls
        lost = 0 if math.isfinite(float(loss)) else lost + 1
        if spent >= next_look or spent >= seconds:
            curve.append((steps, round(spent, 4), *look(workload, model, opts)))
            next_look = min(max(spent * 1.08, spent + seconds / 400), spent + seconds / 40)
    held_out = [value for _, _, value, _ in curve if value is not None]
    drawn = sum(getattr(opt, "refreshes", 0) for opt in opts)  # forward-backwards for the statistics
    return {
        "steps": steps,
        "passes": passes + drawn,
        "cpu_seconds": spent,
        "wall_seconds": wall,
        "marked": wall > 1.2 * spent,
        "failure": failure,
        "final_metric": curve[-1][2] if lost < PATIENCE else None,
        "final_train": curve[-1][3] if lost < PATIENCE else None,
        "best_metric": min(held_out) if held_out else None,
        "state_bytes": state_bytes(opts, model),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "curve": curve,
    }


def set_rates(opts: Sequence[torch.optim.Optimizer], rates: list[list[float]], factor: float) -> None:
    for opt, before in zip(opts, rates):
        for group, lr in zip(opt.param_groups, before):
            group["lr"] = lr * factor


def look(
    workload: Workload, model: nn.Module, opts: Sequence[torch.optim.Optimizer]
) -> tuple[float | None, float | None]:
    """Held-out metric and training loss, None where not finite, at the weights the optimizer would be judged by."""
    modes = [opt for opt in opts if hasattr(opt, "eval")]
    for opt in modes:
        opt.eval()
    found = [workload.evaluate(model, data) for data in (workload.valid, workload.train_eval)]
    for opt in modes:
        opt.train()
    held_out, train_loss = (float(f"{value:.5g}") if math.isfinite(value) else None for value in found)
    return held_out, train_loss


def time_to(curve: Sequence[Sequence[Any]], target: float | None) -> Run:
    """When the held-out metric first was at the target; None where it never was."""
    hit = next((c for c in curve if target is not None and c[2] is not None and c[2] <= target), None)
    return {
        "target": target,
        "steps_to_target": None if hit is None else hit[0],
        "cpu_to_target": None if hit is None else hit[1],
    }


def state_bytes(opts: Sequence[torch.optim.Optimizer], model: nn.Module) -> int:
    """Bytes of all tensors that the optimizers keep alive from step to step, beside parameters and gradients."""
    seen: set[int] = set()
    held: dict[int, int] = {}
    own = {t.data_ptr() for p in model.parameters() for t in (p, p.grad) if t is not None}

    def walk(thing: Any) -> None:
        if id(thing) in seen or isinstance(thing, (nn.Module, str, bytes, int, float, type(None))):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() and thing.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, (list, tuple, set, frozenset)):
            for value in thing:
                walk(value)
        elif type(thing).__module__.startswith(("natgrad", "singd", "pytorch_optimizer", "heavyball")):
            walk(vars(thing) if hasattr(thing, "__dict__") else None)

    for opt in opts:
        opt.zero_grad()
        walk({k: v for k, v in vars(opt).items() if k != "param_groups"})
    return sum(held.values())


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def read(path: Path) -> list[Run]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_trial(runs: list[Run], workload: str, optimizer: str) -> tuple[int, Hyper]:
    """The trial of the lowest held-out loss in the tuning phase."""
    tried = [r for r in runs if (r["phase"], r["workload"], r["optimizer"]) == ("tune", workload, optimizer)]
    if not tried:
        raise SystemExit(f"no tuning runs of {optimizer} on {workload}; run the phase tune first")
    best = min(tried, key=lambda r: math.inf if r["best_metric"] is None else r["best_metric"])
    return best["trial"], best["hyper"]


def target_of(runs: list[Run], workload: str, seeds: int) -> float:
    """The lowest of the first-order rivals' medians over seeds."""
    medians = []
    for name in FIRST_ORDER:
        mine = [r for r in runs if (r["phase"], r["workload"], r["optimizer"]) == ("target", workload, name)]
        best = [math.inf if r["best_metric"] is None else r["best_metric"] for r in mine if r["seed"] < seeds]
        medians += [statistics.median(best)] if best else []
    if not medians:
        raise SystemExit(f"no target runs on {workload}; run the phase target first")
    return min(medians)


def jobs(args: argparse.Namespace, phase: str, runs: list[Run]) -> Iterator[Job]:
    """The runs of a phase, balanced: a study that is cut short has as much of one workload as of another."""
    rivals = [RIVALS[name] for name in args.optimizers]
    repeats = range(args.trials if phase == "tune" else args.seeds)
    for number in repeats:
        for workload in args.workloads:
            for rival in rivals:
                if not rival.applies(workload):
                    continue
                if phase == "tune":
                    if rival.knobs:
                        hyper = tuple(rival.trial(number).items())
                        yield Job(workload, rival.name, phase, number, TUNING_SEED, hyper, scale=args.scale)
                    continue
                if (phase == "target") != (rival.name in FIRST_ORDER):
                    continue
                trial, best = best_trial(runs, workload, rival.name) if rival.knobs else (0, {})
                target = target_of(runs, workload, args.seeds) if phase == "final" else None
                yield Job(workload, rival.name, phase, trial, number, tuple(best.items()), target, args.scale)


def finals_from_targets(args: argparse.Namespace, runs: list[Run]) -> Iterator[Run]:
    """The target runs again as final runs, now that the target is known."""
    for run in runs:
        if run["phase"] == "target" and run["workload"] in args.workloads and run["seed"] < args.seeds:
            yield {**run, "phase": "final", **time_to(run["curve"], target_of(runs, run["workload"], args.seeds))}


def retarget(path: Path, seeds: int) -> None:
    """Where target runs were made again: what the final runs' curves say of the target as it is now."""
    runs = read(path)
    targets = {w: target_of(runs, w, seeds) for w in {r["workload"] for r in runs if r["phase"] == "target"}}
    finals = [run for run in runs if run["phase"] == "final" and run["workload"] in targets]
    if all(run["target"] == targets[run["workload"]] for run in finals):
        return
    for run in finals:
        run.update(time_to(run["curve"], targets[run["workload"]]))
    beside = path.with_suffix(".partial")
    beside.write_text("".join(json.dumps(run) + "\n" for run in runs))
    beside.replace(path)


def key_of(run: Run) -> tuple[str, str, str, int, int]:
    return run["workload"], run["optimizer"], run["phase"], run["trial"], run["seed"]


def append(path: Path, line: Run) -> None:
    """One whole line at a time, so that an interrupted study goes on where it was."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def study(args: argparse.Namespace) -> None:
    """The phases that are asked for, each run once."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    BUDGETS.update({name: WORKLOADS[name]().seconds for name in args.workloads})
    for phase in args.phases:
        runs = read(args.out)
        done = {key_of(r) for r in runs}
        todo = [job for job in jobs(args, phase, runs) if job.key not in done]
        if phase == "final":
            retarget(args.out, args.seeds)
            for line in finals_from_targets(args, runs):
                if key_of(line) not in done:
                    append(args.out, line)
        print(f"{phase}: {len(todo)} runs, {sum(job.seconds for job in todo):.0f} CPU s", flush=True)
        with ProcessPoolExecutor(args.processes, initializer=BUDGETS.update, initargs=(dict(BUDGETS),)) as pool:
            futures = [pool.submit(job.do) for job in todo]
            for future in as_completed(futures):
                line = future.result()
                append(args.out, line)
                name = " ".join(map(str, key_of(line)))
                print(f"{name}: best {line['best_metric']}, {line['cpu_to_target']} s to target", flush=True)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("command", choices=("study",))
    out.add_argument("--phases", nargs="+", choices=("tune", "target", "final"), default=["tune", "target", "final"])
    out.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(STUDY))
    out.add_argument("--optimizers", nargs="+", choices=RIVALS, default=list(RIVALS))
    out.add_argument("--trials", type=int, default=4)
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--scale", type=float, default=1.0, help="of every CPU budget; below 1 for a smoke run")
    out.add_argument("--processes", type=int, default=2, help="runs at a time; at most one a core")
    out.add_argument("--out", type=Path, default=Path(__file__).parent / "runs" / "study.jsonl")
    return out


if __name__ == "__main__":
    study(parser().parse_args())
