"""Run the benchmark: ``python -m benchmarks.harness --phase tune --trials 8 --out benchmarks/runs/tune.jsonl``.

One line of JSON a run, resumable: a run whose (workload, optimizer, phase, trial, seed) stands in the file is not done
again. The clock is CPU time of one thread; evaluation is not counted. The phases:

- ``tune``    every rival, `trials` trials, one seed;
- ``target``  the best trial of each first-order rival again, on five seeds: the target is the median of their best
  held-out loss;
- ``final``   the best trial of every rival and natgrad's defaults on five seeds, with the time to the target.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.rivals import RIVALS, Hyper, Rival, cosine_with_warmup
from benchmarks.workloads import WORKLOADS, Workload

FIRST_ORDER = ("adamw", "nadamw", "sgd")
SEEDS = 5
TUNING_SEED = 100  # apart from the seeds that are reported
EVALUATIONS = 30  # a run


def environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
    }


def run(
    workload: Workload, rival: Rival, hyper: Hyper, seed: int, budget: float, target: float | None
) -> dict[str, Any]:
    """One training run within a budget of CPU seconds."""
    torch.manual_seed(seed)
    model = workload.model()
    optimizers = rival.build(model, workload.criterion, hyper)
    rates = [[g["lr"] for g in opt.param_groups] for opt in optimizers]
    scheduled = bool(rival.knobs) and rival.name != "schedule_free"
    generator = torch.Generator().manual_seed(seed)
    spent, steps, wall, next_look = 0.0, 0, time.perf_counter(), 0.0
    curve: list[tuple[int, float, float]] = []
    while spent < budget:
        x, y = workload.draw(generator)
        start = time.process_time()
        if scheduled:
            for opt, before in zip(optimizers, rates):
                for group, lr in zip(opt.param_groups, before):
                    group["lr"] = lr * cosine_with_warmup(spent / budget)
        for opt in optimizers:
            opt.zero_grad()
        workload.loss(model, x, y).backward()
        for opt in optimizers:
            opt.step()
        spent += time.process_time() - start
        steps += 1
        if spent >= next_look or spent >= budget:
            curve.append((steps, spent, look(workload, model, optimizers)))
            next_look = spent + budget / EVALUATIONS
    hit = next(((n, t) for n, t, loss in curve if target is not None and loss <= target), (None, None))
    return {
        "steps": steps,
        "cpu_seconds": spent,
        "wall_seconds": time.perf_counter() - wall,
        "target": target,
        "steps_to_target": hit[0],
        "cpu_to_target": hit[1],
        "final_metric": curve[-1][2],
        "best_metric": min(loss for _, _, loss in curve),
        "state_bytes": sum(state_bytes(opt) for opt in optimizers),
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "environment": environment(),
    }


def look(workload: Workload, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> float:
    """Held-out loss; optimizers that train other weights than they evaluate by are asked for the latter."""
    modes = [opt for opt in optimizers if hasattr(opt, "eval")]
    for opt in modes:
        opt.eval()
    loss = workload.evaluate(model, workload.valid)
    for opt in modes:
        opt.train()
    return loss


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""

    def tensors(tree: Any) -> Iterator[torch.Tensor]:
        if isinstance(tree, torch.Tensor):
            yield tree
        elif isinstance(tree, dict):
            for value in tree.values():
                yield from tensors(value)
        elif isinstance(tree, (list, tuple)):
            for value in tree:
                yield from tensors(value)

    return sum(t.numel() * t.element_size() for t in tensors(opt.state_dict()))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_trial(runs: list[dict[str, Any]], workload: str, optimizer: str) -> tuple[int, Hyper]:
    """The trial of the lowest held-out loss in the tuning phase."""
    tried = [r for r in runs if r["phase"] == "tune" and r["workload"] == workload and r["optimizer"] == optimizer]
    if not tried:
        raise SystemExit(f"no tuning runs of {optimizer} on {workload}; run --phase tune first")
    best = min(tried, key=lambda r: r["best_metric"] if r["best_metric"] == r["best_metric"] else float("inf"))
    return best["trial"], best["hyper"]


def target_of(runs: list[dict[str, Any]], workload: str) -> float:
    """The best of the first-order rivals' medians over seeds."""
    medians = [
        statistics.median(r["best_metric"] for r in mine)
        for name in FIRST_ORDER
        if (mine := [r for r in runs if (r["phase"], r["workload"], r["optimizer"]) == ("target", workload, name)])
    ]
    if not medians:
        raise SystemExit(f"no target runs on {workload}; run --phase target first")
    return min(medians)


def jobs(
    args: argparse.Namespace, runs: list[dict[str, Any]]
) -> Iterator[tuple[str, Rival, int, int, Hyper, float | None]]:
    """(workload, rival, trial, seed, options, target) of a phase."""
    for workload in args.workloads:
        for name in args.optimizers:
            rival = RIVALS[name]
            if args.phase == "tune":
                for trial in range(args.trials if rival.knobs else 0):
                    yield workload, rival, trial, TUNING_SEED, rival.trial(trial), None
                continue
            if args.phase == "target" and name not in FIRST_ORDER:
                continue
            trial, hyper = best_trial(runs, workload, name) if rival.knobs else (0, {})
            target = target_of(runs, workload) if args.phase == "final" else None
            for seed in range(args.seeds):
                yield workload, rival, trial, seed, hyper, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("tune", "target", "final"), required=True)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--optimizers", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="of every CPU budget; below 1 for a smoke run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = read(args.out)
    done = {(r["workload"], r["optimizer"], r["phase"], r["trial"], r["seed"]) for r in runs}
    for name, rival, trial, seed, hyper, target in jobs(args, runs):
        if (name, rival.name, args.phase, trial, seed) in done:
            continue
        workload = WORKLOADS[name]()
        budget = workload.seconds * args.scale * (4 / 3 if args.phase == "final" else 1)
        head = {
            "workload": name,
            "optimizer": rival.name,
            "phase": args.phase,
            "trial": trial,
            "seed": seed,
            "hyper": hyper,
        }
        line = {**head, **run(workload, rival, hyper, seed, budget, target)}
        with args.out.open("a") as file:  # one whole line at a time, so that an interrupted study goes on where it was
            file.write(json.dumps(line) + "\n")
        print(f"{name} {rival.name} {args.phase} {trial} {seed}: best {line['best_metric']:.4g}", flush=True)


if __name__ == "__main__":
    main()
