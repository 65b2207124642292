"""Steps of bounded KL divergence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.metric.metric import Metric, Vector
from natgrad.optim.fixed import AlongGradient
from natgrad.optim.step_rule import Increments, StepContext


class KLTrustRegion(AlongGradient):
    """Δθ = −ν η d with ν = min(1, √(r / ½ g(ηd, ηd))): a fixed step, shortened where it would change too much.

    Args:
        lr: η.
        momentum: μ, on the gradient.
        damping: λ, absolute.
        radius: r, the largest KL divergence per datum that a step may cause, as the metric predicts it (a summed loss
            adds over data, and so does its r). Parameters without curvature are shortened with the rest.

    Raises:
        ValueError: the radius is not positive.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, damping: float = 1e-3, radius: float = 1e-3) -> None:
        super().__init__()
        if not radius > 0:
            raise ValueError(f"radius must be positive, a KL divergence that a step may cause, got {radius!r}")
        self.lr, self.momentum, self.damping, self.radius = lr, momentum, damping, radius

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        options = context.options
        d = self._descent.direction(metric, df, options)
        step: Vector = {n: t * -options[n].lr for n, t in d.items()}
        bare = metric.without_curvature()
        if len(bare) == len(metric.parameters):
            return dict(step)  # there is nothing to measure by
        full = {
            n: step[n] if n in step and n not in bare else torch.zeros_like(p) for n, p in metric.parameters.items()
        }
        divergence = metric.inner(full, full) / 2
        shorter = (self.radius / divergence).sqrt().clamp(max=1)  # 1 where the divergence is 0
        length = next(iter(options.values())).lr
        self.info.update(step_length=shorter * length, predicted_kl=divergence * shorter.square())
        return {n: t * shorter.to(t.dtype) for n, t in step.items()}
