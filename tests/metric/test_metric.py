"""Euclidean, and a metric of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import mlp
from torch import Tensor, nn

import natgrad as ng

Close = Callable[[Tensor, Tensor, float], None]


def vector_like(metric: ng.Metric, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in metric.parameters.items()}


def test_euclidean_is_the_identity(close: Close) -> None:
    model = mlp()
    metric = ng.Euclidean(model)
    v, size = vector_like(metric), 31
    assert metric.names == [n for n, _ in model.named_parameters()]
    close(metric.dense(), torch.eye(size).double(), 1e-15)
    flat = metric.vector_to_flat(v)
    close(metric.vector_to_flat(metric.flat(v)), flat, 1e-15)
    close(metric.vector_to_flat(metric.sharp(v)), flat, 1e-15)
    close(metric.vector_to_flat(metric.sharp(v, 0.25)), flat / 1.25, 1e-15)
    close(metric.trace(), torch.tensor(float(size)).double(), 1e-15)
    close(metric.logdet(0.5), torch.tensor(1.5).double().log() * size, 1e-12)
    close(metric.norm(v), flat.norm(), 1e-14)
    assert ng.Euclidean(model.parameters()).names == [f"param{i}" for i in range(4)]


class Weighted(ng.Metric):
    """ĝ = diag(1, 2, 3, …): flat and sharp alone."""

    def weights(self) -> dict[str, Tensor]:
        size = sum(p.numel() for p in self.parameters.values())
        return self.flat_to_vector(torch.arange(1, size + 1).double())

    def flat(self, v: Any) -> dict[str, Tensor]:
        return {n: t * w for (n, t), w in zip(self.check(v, "v").items(), self.weights().values())}

    def sharp(self, df: Any, damping: float) -> dict[str, Tensor]:
        damping = self.check_damping(damping)
        return {n: t / (w + damping) for (n, t), w in zip(self.check(df, "df").items(), self.weights().values())}


def test_a_metric_of_ones_own_has_every_verb(close: Close) -> None:
    model = nn.Linear(2, 1).double()
    metric = Weighted(dict(model.named_parameters()))
    weights = torch.tensor([1.0, 2.0, 3.0]).double()
    v = vector_like(metric)
    flat = metric.vector_to_flat(v)
    close(metric.dense(), weights.diag(), 1e-15)
    close(metric.vector_to_flat(metric.diagonal()), weights, 1e-15)
    close(metric.trace(), weights.sum(), 1e-15)
    close(metric.logdet(0.5), (weights + 0.5).log().sum(), 1e-14)
    close(metric.inner(v, v), (weights * flat * flat).sum(), 1e-14)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([metric.vector_to_flat(metric.sample(0.5, g)) for _ in range(4000)])
    assert torch.allclose(draws.var(0), 1 / (weights + 0.5), rtol=0.1)
    # natural gradient descent by it
    opt = ng.NaturalGradient(metric, lr=0.1, damping=1e-3)
    before = metric.vector_to_flat({n: p.detach().clone() for n, p in metric.parameters.items()})
    model(torch.ones(1, 2).double()).sum().backward()
    opt.step()
    after = metric.vector_to_flat({n: p.detach() for n, p in metric.parameters.items()})
    close(after - before, -0.1 / (weights + 1e-3), 1e-12)
