"""NaturalGradient: a `torch.optim.Optimizer` that descends along ĝ⁻¹df."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natgrad.metric import Metric
from natgrad.steps import Options, StepRule


class NaturalGradient(torch.optim.Optimizer):
    """θ ← θ − η ĝ⁻¹df, with the metric's own step rule, damping and momentum unless they are given.

    Args:
        metric: the metric to descend by; it knows the parameters.
        lr, momentum, damping: None takes the step rule's defaults.
        weight_decay: decoupled, θ ← (1 − η·weight_decay) θ.
        step: a step rule; None takes the metric's own.
    """

    def __init__(
        self,
        metric: Metric,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        step: StepRule | None = None,
    ) -> None:
        self.metric = metric
        self.rule = metric.default_step() if step is None else step
        defaults = {
            "lr": self.rule.lr if lr is None else lr,
            "momentum": self.rule.momentum if momentum is None else momentum,
            "damping": self.rule.damping if damping is None else damping,
            "weight_decay": weight_decay,
        }
        self._name_of = {p: n for n, p in metric.parameters.items()}
        super().__init__(list(metric.parameters.values()), defaults)

    @torch.no_grad()
    def step(self, arg: Any = None) -> Tensor | None:  # type: ignore[override]
        """One step. A callable is a closure; anything else but None is a batch for metrics that make their own gradient."""
        loss: Tensor | None = None
        if callable(arg):
            loss = self._closure_loss(arg)
        elif arg is not None:
            loss = self.metric.observe(arg)
            df = self.metric.gradient()
        if arg is None or callable(arg):
            df = {n: p.grad for n, p in self.metric.parameters.items() if p.grad is not None}
        self.metric.advance()
        increments = self.rule.update(self.metric, df, self._options())
        for group in self.param_groups:
            for p in group["params"]:
                if (delta := increments.get(self._name_of[p])) is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(delta)
        return loss

    def _closure_loss(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            return closure()

    def _options(self) -> dict[str, Options]:
        return {
            self._name_of[p]: Options(float(g["lr"]), g["momentum"], g["damping"]) for g in self.param_groups for p in g["params"]
        }

    @property
    def info(self) -> dict[str, Any]:
        """What the last step did."""
        return {"damping_meaning": self.rule.damping_meaning, **self.rule.info}
