"""SPRING: damping pulls to the last step instead of to zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from natgrad.metric.metric import Metric, Vector
from natgrad.optim.line_search import SearchRule, dot
from natgrad.optim.step_rule import StepContext


class Spring(SearchRule):
    """SPRING: φ = argmin ½⟨ĝφ, φ⟩ − ⟨df, φ⟩ + ½λ‖φ − μφ_last‖², Δθ = −ηφ (Goldshlager, Abrahamsen & Lin 2024,
    https://arxiv.org/abs/2401.10190).

    Primal form φ = (ĝ + λI)⁻¹(df + λμφ_last); metrics with rows take φ = μφ_last + Jᵀ(JJᵀ + λI)⁻¹(c − μJφ_last).

    Args:
        momentum: μ.
        radius: the longest ‖Δθ‖ (Euclidean); None is unbounded.
    """

    def __init__(
        self, lr: float = 0.1, momentum: float = 0.95, damping: float = 1e-3, radius: float | None = None
    ) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping, self.radius = lr, momentum, damping, radius
        self._last: Vector = {}

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Vector:
        options = context.options
        lr, mu, damping = self.options(options)
        prior = {n: mu * p for n, p in self._last.items()} or None
        self._last = metric.direction(damping, prior)
        length = lr
        if self.radius is not None:
            length = min(lr, self.radius / max(float(dot(self._last, self._last).sqrt()), 1e-300))
        self.note(metric, damping=damping, length=length)
        return {n: -length * p for n, p in self._last.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last = dict(state["last"])
