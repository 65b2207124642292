"""Ten tasks one after the other, and what is left of the first: permuted MNIST, one head, 784-100-100-10.

    python -m benchmarks.uses.anchor                                    # five seeds, each weight as chosen below
    python -m benchmarks.uses.anchor --seeds 100 --weights 1 3 10 30 100     # by which they were chosen

Each task has the pixels in another order; labels stay. After each task a penalty holds the net near where it is. Shown
is the mean held-out accuracy over all ten tasks at the end. Runs of one seed share data, order and batches.

- avalanche: the penalty of avalanche-lib 0.6.0's EWCPlugin, mode "separate", λ Σₜ Σᵢ Fₜᵢ (θᵢ − θₜᵢ)², F the mean over
  batches of the squared gradient of the batch's mean loss. Written out here: the package does not import beside torch
  2.13. "online": its mode of that name with decay_factor=1, Σₜ Fₜ around the last point.
- diagonal: `near + ng.anchor(metric)` with structure="diagonal".
- diagonal, online and kfac, online: the same, then `.at()`, the online Laplace approximation.

The weight of a method is that which did best on seed 100, of powers of ten, and for the online ones of 3, 30 … beside
the best of these. natgrad's metrics are of the exact kind, and n times them is the curvature of a task's loss: 1 would
be the weight if Laplace's approximation were exact.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import natgrad as ng
from benchmarks.uses.common import accuracy, fisher, interval, load, net, train

SIZES, TASKS, EPOCHS, BATCH = (784, 100, 100, 10), 10, 3, 128
CHOSEN = {
    "avalanche": 1e4,
    "avalanche, online": 3e3,
    "diagonal": 10.0,
    "diagonal, online": 30.0,
    "kfac": 1.0,
    "kfac, online": 3.0,
}


def importances(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """As avalanche takes them: squared gradients of batches, averaged."""
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    batches = list(zip(x.split(BATCH), y.split(BATCH)))
    for a, b in batches:
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(a), b), list(model.parameters()))
        for n, g in zip(total, grads):
            total[n] += g.square() / len(batches)
    return total


class Avalanche:
    def __init__(self, model: nn.Module, online: bool) -> None:
        self.model, self.online, self.tasks = model, online, []

    def learn(self, x: Tensor, y: Tensor) -> None:
        held = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        found = importances(self.model, x, y)
        if self.online and self.tasks:
            found = {n: f + self.tasks[-1][0][n] for n, f in found.items()}
            self.tasks.clear()
        self.tasks.append((found, held))

    def penalty(self) -> Tensor:
        now = dict(self.model.named_parameters())
        return torch.stack([(f[n] * (now[n] - t[n]).square()).sum() for f, t in self.tasks for n in now]).sum()


class Natgrad:
    def __init__(self, model: nn.Module, structure: str, online: bool) -> None:
        self.model, self.structure, self.online = model, structure, online
        self.near: ng.Anchor | None = None

    def learn(self, x: Tensor, y: Tensor) -> None:
        near = ng.anchor(fisher(self.model, x, y, self.structure))
        self.near = near if self.near is None else self.near + near
        if self.online:
            self.near = self.near.at()

    def penalty(self) -> Tensor:
        assert self.near is not None
        return self.near.penalty()


def run(method: str, weight: float, seed: int) -> tuple[float, float]:
    """Mean accuracy over the tasks, and CPU seconds."""
    x, y, xv, yv = load("t10k")
    g = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(784, generator=g) for _ in range(TASKS)]
    model = net(SIZES, seed)
    start = time.process_time()
    structure, online = method.split(",")[0], "online" in method
    held = Avalanche(model, online) if structure == "avalanche" else Natgrad(model, structure, online)
    for task, order in enumerate(orders):
        extra = None if task == 0 else lambda: weight * held.penalty()
        train(model, x[:, order], y, EPOCHS, seed * 100 + task, penalty=extra)
        held.learn(x[:, order], y)
    return sum(accuracy(model, xv[:, order], yv) for order in orders) / TASKS, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(CHOSEN))
    parser.add_argument("--weights", nargs="+", type=float, help="instead of the chosen one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    for method in args.methods:
        for weight in args.weights or [CHOSEN[method]]:
            each = [run(method, weight, seed) for seed in args.seeds]
            found[method] = [a for a, _ in each]
            shown = " ".join(f"{a:.1f}" for a, _ in each)
            seconds = sum(s for _, s in each) / len(each)
            mean = sum(a for a, _ in each) / len(each)
            print(
                f"{method:18s} weight {weight:<8g} {mean:5.1f}   {shown}   {seconds:.0f} CPU seconds a run", flush=True
            )
    if not args.weights and len(args.seeds) > 1:
        pairs = [("kfac" + how, "diagonal" + how) for how in (", online", "")]
        pairs += [("diagonal" + how, "avalanche" + how) for how in (", online", "")]
        for a, b in (p for p in pairs if set(p) <= set(found)):
            gain = interval([u - v for u, v in zip(found[a], found[b])])
            print(f"{a} above {b}, 95 %: {gain}")


if __name__ == "__main__":
    main()
