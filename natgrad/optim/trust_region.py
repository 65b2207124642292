"""Steps no longer than a radius in the metric's norm, which follows the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric, Vector
from natgrad.optim.line_search import SearchRule, dot
from natgrad.optim.step_rule import StepContext

SIGMAS = 4.0  # one-sided normal tail 3e-5
ROUNDING = 1e-12  # relative decreases of the loss below this say nothing about the model


class TrustRegion(SearchRule):
    """Δθ = −η (ĝ + λI)⁻¹df, shortened to ‖Δ‖ ≤ radius in the norm of ĝ + εI, with a radius that follows the loss.

    At tiny λ the direction is long where ĝ is nearly singular, and neither its length nor its sense can be trusted
    there; ε bounds it. The gain ratio ρ = (decrease seen at the next observation) / (decrease of the quadratic model)
    doubles the radius where ρ > 0.75 and the bound was met, up to the given one, and quarters it where ρ < 0.25; a
    step that raised the loss by more than the model promised to lower it (ρ < −1) is undone. Where the metric does
    not know the loss the radius stays.

    A loss that is a mean over draws (`sampling_variance` of the metric is not 0) is known up to its standard error, and
    the difference of two of them up to σ = √(σ₁² + σ₂²). What noise can do in one of some ten thousand steps, `SIGMAS`
    σ, is no reason to shrink or to undo: ρ then takes the decrease to be that much larger. The metric is a mean over
    the same draws, and λ is at least ε then.

    Args:
        radius: the largest ‖Δ‖.
        floor: ε. Of 1e-3, 3e-3, 1e-2 and 2e-2 as the λ of sampled Ising chains the last two end lowest
            (`python -m benchmarks.sampled_ising`).
    """

    def __init__(self, lr: float = 0.1, damping: float = 1e-3, radius: float = 0.1, floor: float = 1e-2) -> None:
        super().__init__()
        self.lr, self.damping, self.radius, self.floor = lr, damping, radius, floor
        self._radius = radius
        self._last: Vector = {}
        # loss before the step, its decrease, bound met, variance of the loss
        self._promise: tuple[float, float, bool, float] | None = None

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Vector:
        options = context.options
        lr, _, damping = self.options(options)
        loss = getattr(metric, "loss", None)
        variance = float(getattr(metric, "sampling_variance", None) or 0.0)
        if variance > 0:
            damping = max(damping, self.floor)
        ratio = self._follow(loss, variance)
        if ratio is not None and ratio < -1:
            undo = {n: -d for n, d in self._last.items()}
            self._promise = None
            self.note(metric, damping=damping, length=0.0, radius=self._radius, ratio=ratio, undone=True)
            return undo
        direction = descent(metric, df, damping)
        lowered = metric.flat(direction)
        square, plain, slope = dot(lowered, direction), dot(direction, direction), dot(df, direction)
        norm = math.sqrt(max(float(square + max(damping, self.floor) * plain), 0.0))
        if not math.isfinite(norm):
            raise ValueError(
                f"the direction is not finite at damping {damping:g}; take a larger damping or look at the batch for "
                "inf and NaN"
            )
        length = min(lr, self._radius / max(norm, 1e-300))
        predicted = length * float(slope) - 0.5 * length**2 * float(square)
        self._last = {n: -length * d for n, d in direction.items()}
        self._promise = None if loss is None else (float(loss), predicted, length < lr, variance)
        self.note(
            metric,
            damping=damping,
            length=length,
            norm=norm * length,
            radius=self._radius,
            ratio=ratio,
            undone=False,
        )
        return dict(self._last)

    def _follow(self, loss: Tensor | None, variance: float) -> float | None:
        """The gain ratio of the last step, after the radius has followed it."""
        if loss is None or self._promise is None:
            return None
        before, predicted, bounded, its_variance = self._promise
        if predicted <= ROUNDING * abs(before):
            return None
        ratio = (before - float(loss) + SIGMAS * math.sqrt(variance + its_variance)) / predicted
        if ratio < 0.25:
            self._radius = self._radius / 4
        elif ratio > 0.75 and bounded:
            self._radius = min(2 * self._radius, self.radius)
        return ratio

    def state_dict(self) -> dict[str, Any]:
        return {"radius": self._radius, "last": dict(self._last), "promise": self._promise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._radius, self._last = state["radius"], dict(state["last"])
        self._promise = None if state["promise"] is None else tuple(state["promise"])


def descent(metric: Metric, df: Mapping[str, Tensor], damping: float) -> Vector:
    """(ĝ + λI)⁻¹df: by the metric's own well-conditioned way where it made df, by `sharp` where loss.backward() did."""
    if type(metric).gradient is not Metric.gradient:
        return metric.direction(damping)
    return metric.sharp({n: df.get(n, torch.zeros_like(p)) for n, p in metric.parameters.items()}, damping)
