"""What the ranks do in the tests, and the same on one process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from natgrad.linalg import kronecker
from natgrad.linalg.kronecker import FactorisationError

BATCH = 16
Result = dict[str, Any]


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 1, 2, 3)
        return self.head(self.conv(x).tanh().mean((2, 3)))


class Branches(nn.Module):
    """Uses `rare` only where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rare, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if bool(x[0, 0] > 0):
            h = h + self.rare(h).tanh()
        return self.head(h)


class Moved(nn.Module):
    """A parameter that no op rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.power = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).sigmoid() ** self.power)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


MODELS = {"mlp": mlp, "conv": Conv, "branches": Branches, "moved": Moved}
CRITERIA = {
    "cross-entropy": lambda: nn.CrossEntropyLoss(),
    "weighted": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0])),
    "squared": lambda: nn.MSELoss(),
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
}


def data(step: int, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + x[:, 3:]).argmax(1)


def shard(rows: int, sizes: Sequence[int], rank: int) -> slice:
    start = sum(sizes[:rank])
    assert sum(sizes) == rows
    return slice(start, start + sizes[rank])


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model]().double()


def criterion_of(name: str) -> nn.Module:
    return CRITERIA[name]().double()


def labels(criterion: nn.Module, y: Tensor) -> Tensor:
    return nn.functional.one_hot(y, 3).double() if isinstance(criterion, nn.MSELoss) else y


def train(
    rank: int,
    size: int,
    model: str = "mlp",
    criterion: str = "cross-entropy",
    sizes: Sequence[int] | None = None,
    steps: int = 20,
    micro: int = 1,
    ddp: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> Result:
    """Train and tell what came out. With `size` 1 there is no wrapper, and the batch is the whole one.

    `sizes`: of the ranks' shards; on one process, of the parts whose mean losses are averaged.
    """
    net, loss_of = build(model), criterion_of(criterion)
    torch.manual_seed(rank)
    inner = net
    net = DistributedDataParallel(net, **(ddp or {})) if size > 1 else net
    sizes = sizes or ([BATCH // size] * size if size > 1 else None)
    metric = ng.Fisher(net, loss_of, **{"kind": "exact", **(options or {})})
    opt = ng.NaturalGradient(metric, **{"refresh": 4, **(optimizer or {})})
    losses = []
    for step in range(steps):
        x, y = data(step)
        mine = shard(BATCH, sizes, rank) if size > 1 else slice(None)
        x, y = x[mine], labels(loss_of, y)[mine]
        opt.zero_grad()
        parts = sizes if size == 1 and sizes else [len(x) // micro] * micro
        for i, (a, b) in enumerate(zip(x.split(list(parts)), y.split(list(parts)))):
            last = i == len(parts) - 1
            held = contextlib.nullcontext() if size == 1 or last else net.no_sync()
            with held:
                loss = loss_of(net(a), b) / len(parts)
                loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return {
        "parameters": {n: p.detach().clone().numpy() for n, p in inner.named_parameters()},
        "metric": metric.dense().numpy(),
        "seen": metric.seen,
        "info": {k: v for k, v in opt.info.items() if k != "share_of_time"},
        "losses": losses,
        "messages": {} if metric.strategy.size == 1 else dict(metric.strategy.ranks.messages),
    }


def steps_with_failures(one_step: Callable[[int], None], at: tuple[int, ...], steps: int = 6) -> Iterator[int]:
    """Takes steps, at some of which the 9 × 9 factor cannot be inverted; yields after each."""
    inverse = kronecker.damped_inverse

    def failing_inverse(m: Tensor, damping: Any) -> Tensor:
        if m.shape[-1] == 9:
            raise FactorisationError("for the test")
        return inverse(m, damping)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(steps):
            kronecker.damped_inverse = failing_inverse if step in at else inverse
            try:
                one_step(step)
            finally:
                kronecker.damped_inverse = inverse
            yield step
