"""Step rules to choose by name: steps of bounded KL divergence, and lengths taken from Adam.

Both follow (ĝ + λI)⁻¹ m with absolute damping (`natgrad.optim.step_rule.Descent`); they differ in how far they go.

- `KLTrustRegion`: no step changes the model's predictions by more than a set KL divergence, ½ g(Δ, Δ) ≤ r. The
  "KL clip" of K-FAC (Ba, Grosse & Martens 2017, §5) and the norm constraint of FermiNet (Pfau et al. 2020, App. C).
- `Grafted`: every block moves as far as Adam would, in the natural direction (Agarwal et al. 2020, arXiv:2002.11803).

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric, Vector
from natgrad.optim.adam import Adam
from natgrad.optim.step_rule import Descent, Increments, StepContext, StepRule


class KLTrustRegion(StepRule):
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
        self._descent = Descent()

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
        first = next(iter(options.values()))
        self.info = {
            "damping": first.damping,
            "step_length": shorter * first.lr,
            "predicted_kl": divergence * shorter.square(),
        }
        return {n: t * shorter.to(t.dtype) for n, t in step.items()}

    def cosines(self) -> dict[str, Tensor]:
        return self._descent.cosines()

    def state_dict(self) -> dict[str, Any]:
        return self._descent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._descent.load_state_dict(state)


class Grafted(StepRule):
    """Δ_b = −η ‖a_b‖ d_b / ‖d_b‖ for every block b, with a Adam's direction and d the natural one.

    Args:
        lr: η, Adam's rate: a rate that has been tuned for Adam serves.
        momentum: μ, on the gradient that d is made from; Adam has its own.
        damping: λ, absolute.
    """

    def __init__(self, lr: float = 1e-3, momentum: float = 0.9, damping: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping = lr, momentum, damping
        self._descent, self._adam = Descent(), Adam()

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        options = context.options
        d = self._descent.direction(metric, df, options)
        lengths = {n: self._adam.direction(n, g) for n, g in df.items()}
        step = {n: lengths[n] * -options[n].lr for n in df}  # stays where there is no curvature
        for names in blocks_of(metric):
            mine = [n for n in names if n in df]
            if mine:
                wanted, natural = norm([lengths[n] for n in mine]), norm([d[n] for n in mine])
                ratio = torch.where(natural > 0, wanted / natural, torch.zeros_like(natural))
                step.update({n: d[n] * (ratio * -options[n].lr).to(d[n].dtype) for n in mine})
        first = next(iter(options.values()))
        self.info = {"damping": first.damping, "step_length": first.lr}
        return dict(step)

    def cosines(self) -> dict[str, Tensor]:
        return self._descent.cosines()

    def state_dict(self) -> dict[str, Any]:
        return {"descent": self._descent.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._descent.load_state_dict(state["descent"])
        self._adam.load_state_dict(state["adam"])


def blocks_of(metric: Metric) -> list[list[str]]:
    """Names of the parameters that share a block; every parameter by itself where the metric has no blocks."""
    blocks = getattr(metric, "blocks", None)
    if blocks is None:
        return [[n] for n in metric.parameters]
    return [b.names for b in blocks if b.statistics]


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([n.float() for n in torch._foreach_norm(tensors)]).norm()
