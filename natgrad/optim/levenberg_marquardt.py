"""Full steps, with a damping that follows how well the quadratic model foretells the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric, Vector
from natgrad.optim.line_search import SearchRule, dot, finite_loss
from natgrad.optim.step_rule import StepContext


class LevenbergMarquardt(SearchRule):
    """Full steps with a damping that follows the gain ratio ρ = (actual decrease) / (decrease of the quadratic model).

    λ falls by `factor` where ρ > 0.75 and grows by it where ρ < 0.25; a step with ρ ≤ 0 is not taken but tried again
    with more damping, `tries` times (Nocedal & Wright, section 10.3). λ stays between `smallest` and 1 / `smallest`: at
    a minimum no step lowers the loss by more than rounding, and λ would grow without end.
    """

    damping_meaning = "absolute: (ĝ + λI)⁻¹, λ adapted by the gain ratio from the given start"

    def __init__(
        self,
        lr: float = 1.0,
        damping: float = 1e-3,
        factor: float = 3.0,
        tries: int = 12,
        smallest: float = 1e-14,
    ) -> None:
        super().__init__()
        self.lr, self.damping = lr, damping
        self.factor, self.tries, self.smallest = factor, tries, smallest
        self._damping: float | None = None

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Vector:
        options = context.options
        lr, _, first = self.options(options)
        damping = first if self._damping is None else self._damping
        start = metric.loss_at({})
        for attempt in range(self.tries + 1):
            step = {n: -lr * d for n, d in metric.direction(damping).items()}
            predicted = -float(dot(df, step)) - 0.5 * float(metric.inner(step, step))
            loss = finite_loss(metric, step)
            ratio = (start - loss) / predicted if predicted > 0 else -math.inf
            if ratio > 0.75:
                self._damping = max(damping / self.factor, self.smallest)
            elif ratio < 0.25:
                self._damping = damping = min(damping * self.factor, 1 / self.smallest)
            else:
                self._damping = damping
            if ratio > 0:
                self.note(
                    metric,
                    damping=self._damping,
                    ratio=ratio,
                    tries=attempt,
                    loss=start,
                    loss_after=loss,
                    accepted=True,
                )
                return step
        self.note(
            metric,
            damping=self._damping,
            ratio=ratio,
            tries=self.tries,
            loss=start,
            loss_after=start,
            accepted=False,
        )
        return {n: torch.zeros_like(p) for n, p in metric.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"damping": self._damping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._damping = state["damping"]
