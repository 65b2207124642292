"""Steps as long as Adam's, in the natural direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric
from natgrad.optim.adam import Adam
from natgrad.optim.fixed import AlongGradient
from natgrad.optim.step_rule import Increments, StepContext


class Grafted(AlongGradient):
    """Δ_b = −η ‖a_b‖ d_b / ‖d_b‖ for every block b, with a Adam's direction and d the natural one.

    Args:
        lr: η, Adam's rate: a rate that has been tuned for Adam serves.
        momentum: μ, on the gradient that d is made from; Adam has its own.
        damping: λ, absolute.
    """

    def __init__(self, lr: float = 1e-3, momentum: float = 0.9, damping: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping = lr, momentum, damping
        self._adam = Adam()

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
        return dict(step)

    def state_dict(self) -> dict[str, Any]:
        return {"descent": self._descent.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._descent.load_state_dict(state["descent"])
        self._adam.load_state_dict(state["adam"])


def blocks_of(metric: Metric) -> list[list[str]]:
    """Names of the parameters that share a block; every parameter by itself where the metric has no blocks."""
    if metric.blocks is None:
        return [[n] for n in metric.parameters]
    return [b.names for b in metric.blocks if b.statistics]


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([n.float() for n in torch._foreach_norm(tensors)]).norm()
