"""The metric of plain gradient descent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from natgrad.metric.damping import Damping, per_name
from natgrad.metric.metric import Metric, named, sum_of
from natgrad.metric.protocols import Vector


class Euclidean(Metric):
    """ĝ = I: the metric that plain gradient descent takes without saying so.

    Args:
        params: a module, a ``{name: parameter}`` mapping or an iterable of parameters.
    """

    positive_definite = True
    takes_stacks = True
    copies_with_model = True
    step_options: Mapping[str, float] = {"damping": 0.0}

    def __init__(self, params: nn.Module | Mapping[str, Tensor] | Iterable[Tensor]) -> None:
        super().__init__(named(params))

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return self.check(v, "v")

    def sharp(self, df: Mapping[str, Tensor], damping: Damping = 0.0) -> Vector:
        given = self.dampings(damping)
        return {n: g if (d := per_name(given, n)) == 0 else g / (1 + d) for n, g in self.check(df, "df").items()}

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor:
        return sum_of(t.square().sum() for t in increments.values()) / 2

    def diagonal(self) -> Vector:
        return {n: torch.ones_like(p) for n, p in self.parameters.items()}
