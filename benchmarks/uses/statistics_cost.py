"""What the statistics of a metric cost on nets of linear layers, where they have a closed form.

    python -m benchmarks.uses.statistics_cost

The diagonal of the exact kind beside the closed form written out, Σ (g∘g)ᵀ(a∘a) after one backward pass a class, and
EKFAC beside K-FAC; 1,000 data, CPU seconds on one thread, medians of alternating runs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng

NETS = {"784-40-20-10": (784, 40, 20, 10), "784-500-250-10": (784, 500, 250, 10), "64-128-128-10": (64, 128, 128, 10)}
DATA = 1000
ROUNDS = 7
BARS = {"diagonal over closed form": 1.5, "EKFAC over K-FAC": 2.0}


def closed_form(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The diagonal of the exact Fisher matrix of each linear layer, weight and bias beside each other."""
    inputs, outputs = [], []
    h = x
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(torch.cat([h.detach(), torch.ones(len(x), 1)], 1))
            h = layer(h)
            outputs.append(h)
        else:
            h = layer(h)
    p = h.detach().softmax(1)
    squares = [torch.zeros(g.shape[1], a.shape[1]) for g, a in zip(outputs, inputs)]
    twice = [a.square() for a in inputs]
    for k in range(p.shape[1]):
        v = p.clone()
        v[:, k] -= 1
        grads = torch.autograd.grad(outputs[-1], outputs, v * p[:, k : k + 1].sqrt(), retain_graph=True)
        for total, g, a in zip(squares, grads, twice):
            total += g.square().mT @ a
    return [s / len(x) for s in squares]


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, widths in NETS.items():
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
        x = torch.randn(DATA, widths[0])

        def fit(structure: str, model: nn.Module = model, x: Tensor = x) -> ng.Fisher:
            metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure)
            metric.update(x)
            return metric

        expected = torch.cat([t.flatten() for t in closed_form(model, x)])
        found = torch.cat([b.diagonal() for b in fit("diagonal").blocks])
        assert float((found - expected).norm()) < 1e-4 * float(expected.norm())
        runs: dict[str, Callable[[], Any]] = {"closed form": lambda: closed_form(model, x)}  # noqa: B023 -- run at once
        runs |= {s: lambda s=s: fit(s) for s in ("diagonal", "ekfac", "kfac")}  # type: ignore[misc]
        taken: dict[str, list[float]] = {key: [] for key in runs}
        for round in range(ROUNDS + 1):
            for key, one in runs.items():
                took = seconds(one)
                taken[key] += [took] * (round > 0)
        t = {key: statistics.median(values) for key, values in taken.items()}
        ratios = {
            "diagonal over closed form": t["diagonal"] / t["closed form"],
            "EKFAC over K-FAC": t["ekfac"] / t["kfac"],
        }
        print(name + ": " + ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in t.items()))
        for what, ratio in ratios.items():
            print(
                f"  {what} {ratio:.2f}   {'met' if ratio <= BARS[what] else 'not met'} (bar {BARS[what]})", flush=True
            )


if __name__ == "__main__":
    main()
