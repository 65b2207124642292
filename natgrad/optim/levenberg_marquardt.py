"""Full steps, with a damping that follows how well the quadratic model foretells the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.function_space.units import by_diagonal, in_units, scaled
from natgrad.metric.metric import Metric, Vector
from natgrad.optim.line_search import SearchRule, along, dot, finite_loss
from natgrad.optim.step_rule import StepContext

BENT = 0.75  # of ‖v‖: a longer acceleration says that the path has left what the metric knows (Transtrum & Sethna)


class LevenbergMarquardt(SearchRule):
    """Δθ = v + ½a, v = −η (ĝ + λD²)⁻¹df, D² the largest diagonal of ĝ so far, a the geodesic acceleration.

    λ follows the gain ratio ρ = (decrease of the loss) / (decrease of the quadratic model): it falls by `factor` where
    ρ > ¾ and grows by it where ρ < ¼. Where ρ ≤ 0, or ‖Da‖ > ¾ ‖Dv‖ (Transtrum & Sethna 2012,
    https://arxiv.org/abs/1201.5885, §5), the step is tried again with 2, 4, 8 … times more (Nielsen 1999,
    IMM-REP-1999-05). Where no λ up to 1 / `smallest` helps, or the model promises less than the rounding of the loss,
    the parameters are at a minimum as far as the loss can tell. A step that does not raise the loss is still taken, and
    λ stays.

    D measures the damping in the parameters' own units (Moré 1978, §3): the iterates are the same in other units of
    single parameters, and for a loss that is multiplied by a number.

    Args:
        damping: the first λ, relative to the diagonal.
        factor: by which λ follows ρ.
        smallest: the smallest λ.
        geodesic: whether to follow the metric's second-order path where it has one; a = 0 if not.

    Raises:
        ValueError: `factor` is not above 1, or `smallest` not between 0 and 1.
    """

    damping_meaning = "relative to the diagonal: (ĝ + λ diag ĝ)⁻¹, λ adapted by the gain ratio from the given start"

    def __init__(
        self,
        lr: float = 1.0,
        damping: float = 1e-3,
        factor: float = 3.0,
        smallest: float = 1e-14,
        geodesic: bool = True,
    ) -> None:
        super().__init__()
        if not (1 < factor < math.inf and 0 < smallest < 1):
            raise ValueError(f"factor must be above 1 and smallest between 0 and 1, got {factor!r} and {smallest!r}")
        self.lr, self.damping = lr, damping
        self.factor, self.smallest, self.geodesic = factor, smallest, geodesic
        self._damping: float | None = None
        self._diagonal: Vector = {}  # D², the largest so far

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Vector:
        lr, _, first = self.options(context.options)
        held = damping = first if self._damping is None else self._damping
        start = metric.loss_at({})
        units = self._units(metric)
        local = in_units(metric, units)  # where D = I
        covector = scaled({n: df.get(n, torch.zeros_like(p)) for n, p in metric.parameters.items()}, units)
        rounding = torch.finfo(next(iter(covector.values())).dtype).eps * abs(start)
        growth, tries = 2.0, 0
        while damping <= 1 / self.smallest:
            v = {n: -lr * d for n, d in local.direction(damping).items()}
            predicted = -float(dot(covector, v)) - 0.5 * float(local.inner(v, v))
            if not predicted > rounding:
                step = scaled(v, units)
                if predicted > 0 and (loss := finite_loss(metric, step)) <= start:
                    self.note(metric, damping=held, ratio=1.0, tries=tries, loss=start, loss_after=loss, accepted=True)
                    return step
                break
            a = local.acceleration(v, damping) if self.geodesic else None
            straight = a is None or not float(dot(a, a)) <= BENT**2 * float(dot(v, v))
            step = scaled(along(v, None if straight else a, 1.0), units)
            loss = math.inf if straight and a is not None else finite_loss(metric, step)
            ratio = (start - loss) / predicted
            if ratio > 0:
                damping *= self.factor if ratio < 0.25 else 1 / self.factor if ratio > 0.75 else 1
                self._damping = damping = min(max(damping, self.smallest), 1 / self.smallest)
                self.note(metric, damping=damping, ratio=ratio, tries=tries, loss=start, loss_after=loss, accepted=True)
                return step
            damping, growth, tries = damping * growth, 2 * growth, tries + 1
        self.note(metric, damping=held, ratio=0.0, tries=tries, loss=start, loss_after=start, accepted=False)
        return {n: torch.zeros_like(p) for n, p in metric.parameters.items()}

    def _units(self, metric: Metric) -> Vector:
        """D⁻¹; 1 where nothing has depended on a parameter so far, which does not move then."""
        now = metric.diagonal()
        self._diagonal = {n: torch.maximum(d, self._diagonal.get(n, d)) for n, d in now.items()}
        return by_diagonal(self._diagonal)

    def state_dict(self) -> dict[str, Any]:
        return {"damping": self._damping, "diagonal": dict(self._diagonal)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._damping, self._diagonal = state["damping"], dict(state["diagonal"])
