"""Pruning in one shot, with no training after it: accuracy against sparsity.

    python -m benchmarks.uses.prune                     # MNIST's test images, 784-128-64-10, three seeds
    python -m benchmarks.uses.prune --data digits --dampings 1e-4 1e-3 1e-2 1e-1 1 --seeds 10 11

Rivals: magnitude, and optimal brain damage (θ² times the diagonal, nothing moved). Between them and `natgrad.prune`
stand the mask of either with `natgrad.nearest`, and natgrad's mask with nothing moved. The default damping was chosen
by the second command.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

import natgrad as ng
from benchmarks.uses.common import accuracy, fisher, load, net, train

SIZES = {"t10k": (784, 128, 64, 10), "digits": (64, 128, 64, 10)}


def smallest(scores: dict, fraction: float) -> dict:
    """Masks without the share of entries whose score is least."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.argsort()[: round(fraction * len(flat))]] = False
    parts = keep.split([s.numel() for s in scores.values()])
    return {n: part.reshape(s.shape) for part, (n, s) in zip(parts, scores.items())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="t10k", choices=SIZES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    parser.add_argument("--dampings", nargs="+", type=float, help="over the mean eigenvalue, instead of the default")
    parser.add_argument("--structure", default="kfac")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y, xv, yv = load(args.data)
    found: dict[tuple[float, str], list[float]] = {}
    for seed in args.seeds:
        model = net(SIZES[args.data], seed)
        train(model, x, y, 20, seed)
        start = time.process_time()
        metric, diagonal = fisher(model, x, y, args.structure), fisher(model, x, y, "diagonal").diagonal()
        fitted = time.process_time() - start
        theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        mean = float(metric.trace()) / sum(t.numel() for t in theta.values())
        print(f"seed {seed}: {accuracy(model, xv, yv):.1f} whole; both metrics took {fitted:.1f} s", flush=True)

        def score(point: dict, model=model) -> float:
            twin = copy.deepcopy(model)
            twin.load_state_dict(point)
            return accuracy(twin, xv, yv)

        for fraction in args.fractions:
            magnitude = smallest({n: t.abs() for n, t in theta.items()}, fraction)
            damage = smallest({n: t.square() * diagonal[n] for n, t in theta.items()}, fraction)
            rows = {
                "magnitude": score({n: t * magnitude[n] for n, t in theta.items()}),
                "brain damage": score({n: t * damage[n] for n, t in theta.items()}),
            }
            for relative in args.dampings or [None]:
                said = "" if relative is None else f" at {relative:g}"
                damping = (1e-2 if relative is None else relative) * mean
                start = time.process_time()
                masks, moved = ng.prune(metric, fraction, None if relative is None else damping)
                seconds = time.process_time() - start
                rows[f"natgrad's mask{said}"] = score({n: t * masks[n] for n, t in theta.items()})
                rows[f"magnitude + nearest{said}"] = score(ng.nearest(metric, theta, magnitude, damping))
                rows[f"brain damage + nearest{said}"] = score(ng.nearest(metric, theta, damage, damping))
                rows[f"natgrad.prune{said}"] = score(moved)
            for name, value in rows.items():
                found.setdefault((fraction, name), []).append(value)
            print(f"  {fraction:.0%} done, prune took {seconds:.1f} s", flush=True)
    for (fraction, name), each in found.items():
        print(f"{fraction:6.0%}  {name:32s} {sum(each) / len(each):5.1f}   " + " ".join(f"{v:.1f}" for v in each))


if __name__ == "__main__":
    main()
