"""Data, nets and intervals of the benchmarks of uses.

MNIST's 10,000 test images come from the folder that ``NATGRAD_DATA`` names, scikit-learn's digits from scikit-learn.
Defaults were chosen on the digits, and the tables are of MNIST.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

import natgrad as ng
from benchmarks.workloads import DATA

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels to train on, and held out

HELD_OUT = {"t10k": 2000, "digits": 360}


def load(name: str) -> Data:
    """Images (data, pixels) in [0, 1] and labels: "t10k" or "digits"."""
    if name == "digits":
        digits = load_digits()
        x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    else:
        folder = DATA / "mnist_t10k"
        if not folder.is_dir():
            raise SystemExit(f"{folder} is not there: name the folder that holds mnist_t10k with NATGRAD_DATA")
        raw = [gzip.decompress((folder / f"t10k-{n}-ubyte.gz").read_bytes()) for n in ("images-idx3", "labels-idx1")]
        x = torch.from_numpy(np.frombuffer(raw[0], np.uint8, offset=16).copy()).reshape(-1, 784).float() / 255
        y = torch.from_numpy(np.frombuffer(raw[1], np.uint8, offset=8).copy()).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, held = x[order], y[order], HELD_OUT[name]
    return x[:-held], y[:-held], x[-held:], y[-held:]


def net(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, rate: float = 1e-3, penalty=None) -> None:
    """Adam on the cross-entropy in batches of 128, and a penalty where there is one."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(128):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent of labels."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def fisher(model: nn.Module, x: Tensor, y: Tensor, structure: str, kind: str = "exact") -> ng.Fisher:
    """The metric over all data."""
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind=kind, structure=structure)
    metric.fit([(a, b) for a, b in zip(x.split(1000), y.split(1000))], progress=False)
    return metric


def interval(values: Sequence[float]) -> str:
    """The mean of paired differences and its 95 % interval, by Student's t."""
    v = np.asarray(values)
    half = stats.t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5
    return f"{v.mean():+.2f} ({v.mean() - half:+.2f} to {v.mean() + half:+.2f})"
