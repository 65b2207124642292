"""Nets and numbers that the tests of uses share. Nothing here knows how natgrad computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import natgrad as ng

F64 = torch.float64
STRUCTURES = ("dense", "block", "diagonal", "kfac", "ekfac", "input")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=g, dtype=F64), torch.randint(3, (count,), generator=g)


def fisher(structure: str = "kfac", seed: int = 0, count: int = 20, **options: object) -> ng.Fisher:
    metric = ng.Fisher(net(seed), nn.CrossEntropyLoss(), kind="exact", structure=structure, **options)  # type: ignore[arg-type]
    metric.update(*data(count, seed))
    return metric


def flat(metric: ng.Fisher, vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector[n].detach().reshape(-1) for n in metric.names])


def values(metric: ng.Fisher) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in metric.parameters.items()}


def noise(metric: ng.Fisher, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=F64) for n, p in metric.parameters.items()}


def masks(metric: ng.Fisher, share: float = 0.5, seed: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=g) < share for n, p in metric.parameters.items()}


def damped(metric: ng.Fisher, damping: float) -> Tensor:
    matrix = metric.dense()
    return matrix + damping * torch.eye(len(matrix), dtype=F64)
