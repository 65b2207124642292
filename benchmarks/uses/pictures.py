"""The pictures of docs/uses/anchor.md and docs/uses/merge.md, on data that ship.

    python -m benchmarks.uses.pictures docs/img

That of docs/uses/nearest.md is by ``python examples/prune_digits.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import nn

import natgrad as ng
from benchmarks.uses.common import accuracy, fisher, load, net, train

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def merge(path: Path) -> None:
    """Two regressions with two weights, each with the ellipse of its metric, their mean, and what they merge to."""
    torch.manual_seed(3)
    truth = torch.tensor([[1.0], [0.5]])
    parts = []
    for count, slope, colour in ((60, 0.9, BLUE), (25, -0.9, ORANGE)):
        x = torch.randn(count, 2) @ torch.tensor([[1.0, slope], [0.0, 0.35]])
        y = x @ truth + torch.randn(count, 1)
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.linalg.lstsq(x, y).solution.mT)
        metric = ng.Fisher(model, nn.MSELoss(), kind="exact")
        metric.update(x, y)
        parts.append((x, y, model, metric, colour))
    merged = ng.merge({str(i): (m.state_dict(), g) for i, (_, _, m, g, _) in enumerate(parts)}, 1e-9)["weight"][0]
    every = torch.linalg.lstsq(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])).solution[:, 0]
    figure, ax = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    turn = torch.linspace(0, 2 * np.pi, 200)
    circle = torch.stack([turn.cos(), turn.sin()])
    points = []
    for i, (x, _, model, metric, colour) in enumerate(parts):
        values, vectors = torch.linalg.eigh(len(x) * metric.dense())
        at = model.weight.detach()[0]
        for radius in (1.0, 2.0, 3.0):
            ring = at[:, None] + vectors @ (values.rsqrt()[:, None] * circle) * 2**0.5 * radius
            ax.plot(ring[0], ring[1], color=colour, lw=1.2, alpha=1.1 - 0.3 * radius)
        ax.plot(*at, "o", color=colour, label=f"model {i + 1}, from {len(x)} data")
        points.append(at)
    ax.plot(*((points[0] + points[1]) / 2), "s", color=GREY, label="their mean")
    ax.plot(*merged, "D", color=GREEN, ms=9, label="ng.merge")
    ax.plot(*every, "x", color="black", ms=7, label="the model of all data")
    ax.set(xlabel="first weight", ylabel="second weight", aspect="equal")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right center")
    figure.savefig(path / "uses_merge.png", dpi=130)


def anchor(path: Path) -> None:
    """Held-out accuracy on the tasks learned so far, digits with their pixels in another order each; penalties of
    weight 10.
    """
    x, y, xv, yv = load("digits")
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(t)) for t in range(6)]
    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for structure, colour, said in (
        (None, GREY, "no anchor"),
        ("diagonal", ORANGE, "diagonal"),
        ("kfac", BLUE, "kfac"),
    ):
        model = net((64, 100, 10), 0)
        near, shown = None, []
        for task, order in enumerate(orders):
            extra = None if near is None else lambda near=near: 10 * near.penalty()
            train(model, x[:, order], y, 20, task, penalty=extra)
            if structure is not None:
                new = ng.anchor(fisher(model, x[:, order], y, structure))
                near = (new if near is None else near + new).at()
            shown.append(np.mean([accuracy(model, xv[:, o], yv) for o in orders[: task + 1]]))
        ax.plot(range(1, len(orders) + 1), shown, "o-", color=colour, label=said)
        print(said, " ".join(f"{a:.1f}" for a in shown), flush=True)
    ax.set(xlabel="tasks learned", ylabel="mean held-out accuracy\nover these tasks (%)", ylim=(0, 100))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower left")
    figure.savefig(path / "uses_anchor.png", dpi=130)


if __name__ == "__main__":
    torch.set_num_threads(1)
    matplotlib.use("Agg")
    merge(Path(sys.argv[1]))
    anchor(Path(sys.argv[1]))
