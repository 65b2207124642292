"""Merging two fine-tunes without data: accuracy on the data of both.

    python -m benchmarks.uses.merge                     # MNIST's test images, five seeds
    python -m benchmarks.uses.merge --data digits --seeds 10 11 12 --dampings 1e-4 1e-3 1e-2 1e-1 1

One net is trained on upright digits, and goes on from there in two copies: one on upright digits, one on digits turned
by a quarter. Rivals are the mean, and the regression mean (RegMean, arXiv:2212.09849): W = (Σ Gᵢ)⁻¹ Σ Gᵢ Wᵢ with
Gᵢ = Xᵢᵀ Xᵢ over the inputs of a layer, its off-diagonal entries times 0.9, biases averaged. It is written out here.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.uses.common import accuracy, fisher, interval, load, net, train

SIZES = {"t10k": (784, 128, 64, 10), "digits": (64, 128, 64, 10)}
SHRINK = 0.9  # RegMean's factor for entries off the diagonal


def turned(x: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    return torch.rot90(x.reshape(-1, side, side), 1, (1, 2)).reshape(len(x), -1)


@torch.no_grad()
def regression_mean(models: list[nn.Sequential], data: list[Tensor]) -> dict[str, Tensor]:
    state = {n: torch.stack([m.state_dict()[n] for m in models]).mean(0) for n in models[0].state_dict()}
    grams = []
    for model, x in zip(models, data):
        found = {}
        for i, layer in enumerate(model):
            if isinstance(layer, nn.Linear):
                g = x.mT @ x
                found[f"{i}.weight"] = SHRINK * g + (1 - SHRINK) * g.diagonal().diag()
            x = layer(x)
        grams.append(found)
    for n in grams[0]:
        right = sum(g[n].double() @ m.state_dict()[n].double().mT for g, m in zip(grams, models))
        total = sum(g[n].double() for g in grams)
        state[n] = torch.linalg.lstsq(total, right, driver="gelsd").solution.mT.float()  # pixels that are always dark
    return state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="t10k", choices=SIZES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--dampings", nargs="+", type=float, default=[1e-2])
    parser.add_argument("--kind", default="exact")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y, xv, yv = load(args.data)
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        start = net(SIZES[args.data], seed)
        train(start, x, y, 5, seed)
        models = {"upright": copy.deepcopy(start), "turned": copy.deepcopy(start)}
        data, held = {"upright": x, "turned": turned(x)}, {"upright": xv, "turned": turned(xv)}
        for name, model in models.items():
            train(model, data[name], y, 10, seed + 100)

        def score(state: dict[str, Tensor], start=start, held=held) -> float:
            twin = copy.deepcopy(start)
            twin.load_state_dict(state)
            return sum(accuracy(twin, v, yv) for v in held.values()) / 2

        states = {n: m.state_dict() for n, m in models.items()}
        rows = {f"{n} alone, its own data": accuracy(m, held[n], yv) for n, m in models.items()}
        rows["mean"] = score({k: torch.stack([s[k] for s in states.values()]).mean(0) for k in states["upright"]})
        rows["regression mean"] = score(regression_mean(list(models.values()), list(data.values())))
        for held_as, used in (("kfac", "input"), ("kfac", "kfac"), ("ekfac", "ekfac"), ("diagonal", "diagonal")):
            metrics = {n: fisher(m, data[n], y, held_as, args.kind) for n, m in models.items()}
            for damping in args.dampings:
                merged = ng.merge({n: (states[n], metrics[n]) for n in models}, damping, used)
                rows[f"natgrad.merge, {used}" + (f" at {damping:g}" if len(args.dampings) > 1 else "")] = score(merged)
        for name, value in rows.items():
            found.setdefault(name, []).append(value)
        print(f"seed {seed} done", flush=True)
    for name, each in found.items():
        print(f"{name:36s} {sum(each) / len(each):5.1f}   " + " ".join(f"{v:.1f}" for v in each))
    if len(args.seeds) > 1:
        for name in found:
            if name.startswith("natgrad"):
                gain = [a - b for a, b in zip(found[name], found["regression mean"])]
                print(f"{name} above the regression mean, 95 %: {interval(gain)}")


if __name__ == "__main__":
    main()
