"""What a step costs, in parts: ``python benchmarks/step_cost.py [--steps 60]``.

Forward and backward of the plain model are the floor; the same with a metric watching shows what hooks cost on steps
that do not refresh; the step is split into the products that apply the metric and everything else; refresh steps stand
apart. CPU time of one thread, median over steps, all in one process; ratios are to the plain forward + backward.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad as ng


def autoencoder() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """784-400-200-100-50-25-6-mirror, 842k parameters, batch 512."""
    sizes = [784, 400, 200, 100, 50, 25, 6]
    sizes += sizes[-2::-1]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    x = torch.rand(512, 784)
    return nn.Sequential(*layers[:-1]), nn.BCEWithLogitsLoss(), x, x


def convnet() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Two convolutions and two linear layers on 28 × 28 images, batch 128."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return model, nn.CrossEntropyLoss(), torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))


def tabular() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """8-128-128-128-1 with batch 128."""
    model = nn.Sequential(
        nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    return model, nn.MSELoss(), torch.randn(128, 8), torch.randn(128, 1)


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor, Tensor]]] = {
    "autoencoder": autoencoder,
    "convnet": convnet,
    "tabular": tabular,
}


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


class Loop:
    """One training step after the other, with the time of each part in ms."""

    def __init__(
        self, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, opt: torch.optim.Optimizer
    ) -> None:
        self.model, self.criterion, self.x, self.y, self.opt = model, criterion, x, y, opt

    def step(self) -> dict[str, float]:
        held: list[Tensor] = []
        self.opt.zero_grad()
        forward = timed(lambda: held.append(self.criterion(self.model(self.x), self.y)))
        backward = timed(lambda: held[0].backward())
        return {"forward": forward, "backward": backward, "step": timed(self.opt.step)}


def median(rows: list[dict[str, float]], part: str) -> float:
    return statistics.median(r[part] for r in rows)


def precondition_cost(opt: ng.NaturalGradient) -> float:
    """The matrix products alone: every block's inverse applied to its gradient."""
    blocks = opt.metric.blocks  # type: ignore[attr-defined]
    grads = {n: p.grad for n, p in opt.metric.parameters.items() if p.grad is not None}
    pairs = [(b.relative_inverse(0.1), b.pack(grads)) for b in blocks]
    return statistics.median(timed(lambda: [inverse.apply(g) for inverse, g in pairs]) for _ in range(20))


def measure(name: str, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, criterion, x, y = MODELS[name]()
    plain_model, watched_model = copy.deepcopy(model), copy.deepcopy(model)
    plain = Loop(plain_model, criterion, x, y, torch.optim.AdamW(plain_model.parameters(), lr=1e-4))
    own_criterion = copy.deepcopy(criterion)
    opt = ng.NaturalGradient(ng.Fisher(watched_model, own_criterion))
    watched = Loop(watched_model, own_criterion, x, y, opt)
    base, ordinary, refresh = [], [], []
    for i in range(steps):
        base.append(plain.step())
        row = watched.step()
        if i >= 3:
            (refresh if opt.info["refreshed"] else ordinary).append(row)
    products = precondition_cost(opt)
    return {
        "forward + backward, plain": median(base, "forward") + median(base, "backward"),
        "AdamW step": median(base, "step"),
        "forward + backward, watched": median(ordinary, "forward") + median(ordinary, "backward"),
        "products that apply the metric": products,
        "momentum, norms, writing": median(ordinary, "step") - products,
        "refresh: forward + backward": median(refresh, "forward") + median(refresh, "backward"),
        "refresh: step": median(refresh, "step"),
        "mean of all steps": statistics.mean(sum(r.values()) for r in ordinary + refresh),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    results = {name: measure(name, steps) for name in MODELS}
    table = Table(title="CPU ms a step (ratio to plain forward + backward)")
    table.add_column("part")
    for name in results:
        table.add_column(name, justify="right")
    for part in next(iter(results.values())):
        cells = [f"{r[part]:.2f} ({r[part] / r['forward + backward, plain']:.2f})" for r in results.values()]
        table.add_row(part, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
