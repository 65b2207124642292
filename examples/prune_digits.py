"""Prune a net and keep what it knows: accuracy against sparsity, with no training after it.

python examples/prune_digits.py --out runs/prune

The data are scikit-learn's digits. It prints a table, and draws `prune.png` with matplotlib.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn

import natgrad as ng

FRACTIONS = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/prune"))
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:-360], order[-360:]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(args.epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()

    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact")
    metric.update(x[train], y[train])  # one pass over the data: all that pruning needs to know of them

    def accuracy(state: dict[str, Tensor]) -> float:
        twin = copy.deepcopy(model)
        twin.load_state_dict(state)
        return 100 * float((twin(x[test]).argmax(1) == y[test]).float().mean())

    table = []
    for fraction in FRACTIONS:
        _, pruned = ng.prune(metric, fraction)
        table.append((fraction, accuracy(smallest_gone(model, fraction)), accuracy(pruned)))
        print("{:4.0%} removed: {:5.1f} % by magnitude, {:5.1f} % by natgrad.prune".format(*table[-1]), flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    matplotlib.use("Agg")
    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    share = [100 * row[0] for row in table]
    ax.plot(share, [row[2] for row in table], "o-", color="#0072B2", label="natgrad.prune")
    ax.plot(share, [row[1] for row in table], "s--", color="#D55E00", label="smallest weights removed")
    ax.set(xlabel="weights removed (%)", ylabel="held-out accuracy (%)", ylim=(0, 100))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(args.out / "prune.png", dpi=130)
    print(f"Wrote {args.out / 'prune.png'}")


def smallest_gone(model: nn.Module, fraction: float) -> dict[str, Tensor]:
    """The weights without those of least magnitude."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = torch.cat([t.abs().flatten() for t in state.values()])
    least = flat.sort().values[round(fraction * len(flat))]
    return {n: t * (t.abs() >= least) for n, t in state.items()}


if __name__ == "__main__":
    main()
