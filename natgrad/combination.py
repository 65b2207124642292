"""Weighted sums of metrics: ``m1 + 0.5 * m2`` is the metric ĝ₁ + ½ ĝ₂.

Metrics with rows (ĝ = JᵀJ) combine by stacking √cᵢ Jᵢ, so that every solver serves the sum. Any other sum is
inverted through its dense matrix, or by conjugate gradients where that will not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.iterative import conjugate_gradient
from natgrad.jacobian import Rows
from natgrad.metric import Metric, Vector
from natgrad.root_metric import RootMetric
from natgrad.solvers import DENSE_PARAMETERS, damped_cholesky

if TYPE_CHECKING:
    from natgrad.steps import StepRule


class Combination(Metric):
    """Σ cᵢ ĝᵢ over metrics of the same parameters.

    Where every part makes its own gradient, so does the sum: `observe` gives each part the same batch, and the loss is
    Σ cᵢ lossᵢ.

    Args:
        parts: (cᵢ, metric) with cᵢ > 0.

    Raises:
        TypeError: a part is not a metric, or a factor not a number.
        ValueError: a factor is not positive, or the metrics have different parameters.
    """

    def __init__(self, parts: list[tuple[float, Metric]]) -> None:
        self.parts: list[tuple[float, Metric]] = []
        for c, m in parts:
            if not isinstance(m, Metric) or not isinstance(c, (int, float)):
                raise TypeError(
                    f"metrics add to metrics and are multiplied by numbers, got {type(c).__name__} times "
                    f"{type(m).__name__}"
                )
            if not 0 < c < float("inf"):
                raise ValueError(f"a metric is multiplied by a positive number, got {c}")
            self.parts += (
                [(c * inner, part) for inner, part in m.parts] if isinstance(m, Combination) else [(float(c), m)]
            )
        first = self.parts[0][1]
        for _, m in self.parts:
            if list(m.parameters) != list(first.parameters) or any(
                m.parameters[n] is not p for n, p in first.parameters.items()
            ):
                raise ValueError(
                    f"metrics add where they have the same parameters; {type(first).__name__} has {first.names}, "
                    f"{type(m).__name__} has {m.names}"
                )
        super().__init__(first.parameters)

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        return self._sum([m.flat(v) for _, m in self.parts])

    def sharp(self, df: Mapping[str, Tensor], damping: float) -> Vector:
        damping = self.check_damping(damping)
        df = self.check(df, "df")
        if (stacked := self._stacked()) is not None:
            return stacked.sharp(df, damping)
        g = self.vector_to_flat(df)
        if g.numel() <= DENSE_PARAMETERS:
            return self.flat_to_vector(torch.cholesky_solve(g[:, None], damped_cholesky(self.dense(), damping))[:, 0])
        solution, _ = conjugate_gradient(
            lambda v: self.vector_to_flat(self.flat(self.flat_to_vector(v))) + damping * v, g
        )
        return self.flat_to_vector(solution)

    def dense(self) -> Tensor:
        return torch.stack([c * m.dense() for c, m in self.parts]).sum(0)

    def diagonal(self) -> Vector:
        return self._sum([m.diagonal() for _, m in self.parts])

    def logdet(self, damping: float) -> Tensor:
        stacked = self._stacked()
        return super().logdet(damping) if stacked is None else stacked.logdet(damping)

    def sample(self, damping: float, generator: torch.Generator | None = None) -> Vector:
        stacked = self._stacked()
        return super().sample(damping, generator) if stacked is None else stacked.sample(damping, generator)

    def drive(self, driver: Any) -> None:
        for _, m in self.parts:
            m.drive(driver)

    def advance(self, decay: float) -> bool:
        changed = [m.advance(decay) for _, m in self.parts]
        return any(changed)

    def discard_pending(self) -> None:
        for _, m in self.parts:
            m.discard_pending()

    def default_step(self) -> StepRule:
        return self.parts[0][1].default_step()

    def observe(self, batch: Any) -> Tensor:
        return torch.stack([c * m.observe(batch) for c, m in self.parts]).sum()

    def gradient(self) -> Vector:
        return self._sum([m.gradient() for _, m in self.parts])

    def direction(self, damping: float, prior: Mapping[str, Tensor] | None = None) -> Vector:
        stacked = self._stacked()
        return super().direction(damping, prior) if stacked is None else stacked.direction(damping, prior)

    def loss_at(self, increments: Mapping[str, Tensor]) -> float:
        return sum(c * m.loss_at(increments) for c, m in self.parts)

    def _sum(self, vectors: list[Vector]) -> Vector:
        return {n: torch.stack([c * v[n] for (c, _), v in zip(self.parts, vectors)]).sum(0) for n in self.parameters}

    def _stacked(self) -> RootMetric | None:
        """The sum as one metric with rows, where every part has rows (and they are what its `flat` applies)."""
        roots = [(c, m) for c, m in self.parts if isinstance(m, RootMetric)]
        if len(roots) != len(self.parts):
            return None
        out = RootMetric(self.parameters, roots[0][1].solver)
        out.rows = Rows.stack([(c, m.linearised()) for c, m in roots])
        if all(m.root is not None for _, m in roots):
            out.root = torch.cat([c**0.5 * m.root for c, m in roots if m.root is not None])
        return out
