"""Small problems and loops that the tests of training share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng

F64 = torch.float64
Batch = tuple[Tensor, Tensor]


def classifier(dtype: torch.dtype = F64, seed: int = 1) -> nn.Module:
    """4-6-3, tanh."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


class Scaled(nn.Module):
    """Two linear layers and a gate that no op rule covers."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.rand(6) + 0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.atan(self.first(x).tanh() * self.gate.exp()))


def batches(count: int, size: int = 16, dtype: torch.dtype = F64, seed: int = 3) -> Iterator[Batch]:
    """Random inputs (size, 4) with labels that a fixed linear map gives: learnable."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(4, 3, generator=g, dtype=F64)
    for _ in range(count):
        x = torch.randn(size, 4, generator=g, dtype=F64)
        yield x.to(dtype), (x @ truth).argmax(1)


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    data: Any,
    criterion: nn.Module | None = None,
    between: Callable[[int], None] | None = None,
) -> list[float]:
    """The plain loop; the loss before each step. `between` runs after each backward pass."""
    criterion = criterion or opt.metric.criterion  # type: ignore[attr-defined]
    losses = []
    for i, (x, y) in enumerate(data):
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        if between is not None:
            between(i)
        opt.step()
        losses.append(float(loss.detach()))
    return losses


def natural(
    model: nn.Module, criterion: nn.Module | None = None, kind: str = "exact", **options: Any
) -> ng.NaturalGradient:
    return ng.NaturalGradient(ng.Fisher(model, criterion or nn.CrossEntropyLoss(), kind=kind), **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference over the largest entry."""
    assert a.keys() == b.keys()
    size = max(float(t.abs().max()) for t in a.values())
    return max(float((a[n] - b[n]).abs().max()) for n in a) / size


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())
