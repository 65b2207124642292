"""A metric in other units: with θ = S φ, S diagonal, ĝ becomes S ĝ S and df becomes S df.

Damping that is absolute in φ is λ S⁻² in θ, so a step rule whose damping is relative to the diagonal works in the units
S = diag(ĝ)^(−½).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.function_space.jacobian import JacobianOperator
from natgrad.function_space.jacobian_metric import JacobianMetric
from natgrad.linalg.cholesky import damped_cholesky
from natgrad.linalg.krylov import conjugate_gradient
from natgrad.metric.metric import DENSE_PARAMETERS, Metric, Vector


def in_units(metric: Metric, units: Mapping[str, Tensor]) -> Metric:
    """Return a metric that makes its own gradient, at its last observation, in the coordinates θ / units."""
    return RowsInUnits(metric, units) if isinstance(metric, JacobianMetric) else InUnits(metric, units)


class InUnits(Metric):
    """Of any metric, by products with it."""

    def __init__(self, metric: Metric, units: Mapping[str, Tensor]) -> None:
        super().__init__(metric.parameters)
        self.metric, self.units = metric, metric.check(units, "units")

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return scaled(self.metric.flat(scaled(v, self.units)), self.units)

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        g = self.vector_to_flat(self.check(df, "df"))
        if g.numel() <= DENSE_PARAMETERS:
            scale = self.vector_to_flat(self.units)
            matrix = scale[:, None] * self.metric.dense() * scale
            return self.flat_to_vector(torch.cholesky_solve(g[:, None], damped_cholesky(matrix, damping))[:, 0])
        found, _ = conjugate_gradient(lambda v: self.vector_to_flat(self.flat(self.flat_to_vector(v))) + damping * v, g)
        return self.flat_to_vector(found)

    def gradient(self) -> Vector:
        return scaled(self.metric.gradient(), self.units)


class RowsInUnits(JacobianMetric):
    """Of a metric with rows: those of J S, solved as the metric solves."""

    def __init__(self, metric: JacobianMetric, units: Mapping[str, Tensor]) -> None:
        super().__init__(metric.parameters, metric.solver)
        self.metric, self.units = metric, metric.check(units, "units")
        scale, rows = metric.columns(self.units), metric.linearised()
        self.rows = JacobianOperator(
            rows.count,
            rows.parameters,
            lambda: (chunk * scale for chunk in rows.chunks()),
            lambda v: rows.jvp(scale * v),
            lambda c: scale * rows.vjp(c),
            rows.like,
        )
        self.root, self.point = metric.root, metric.point

    def gradient(self) -> Vector:
        return scaled(self.metric.gradient(), self.units)

    def moved(self, increments: Mapping[str, Tensor]) -> Vector:
        return self.metric.moved(scaled(increments, self.units))

    def _values_at(self, params: Vector) -> Tensor:
        return self.metric._values_at(params)

    def _values_here(self) -> Tensor:
        return self.metric._values_here()


def by_diagonal(diagonal: Mapping[str, Tensor]) -> Vector:
    """Return the units in which this diagonal is 1; 1 where it is not positive."""
    return {n: torch.where(d > 0, d, torch.ones_like(d)).rsqrt() for n, d in diagonal.items()}


def scaled(v: Mapping[str, Tensor], units: Mapping[str, Tensor]) -> Vector:
    return {n: units[n] * t for n, t in v.items()}
