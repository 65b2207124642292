"""NaturalGradient: a `torch.optim.Optimizer` that descends along ĝ⁻¹df.

The metric gives the geometry, the step rule the length; this class decides when the metric is refreshed, skips steps
that are not finite, and holds the one line that writes parameters.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from natgrad.metric import Metric
from natgrad.steps import Options, StepRule

GAP_GROWTH = 4  # the gap between refreshes is a quarter of the steps taken, up to `refresh`
AVERAGE_LIMIT = 0.85  # largest decay of the moving average of the statistics


class NaturalGradient(torch.optim.Optimizer):
    """θ ← θ − η ĝ⁻¹df, with the metric's own step rule, damping and momentum unless they are given.

    The loop is that of any optimizer: ``zero_grad``, forward, ``backward``, ``step``. For a `Fisher` metric the
    statistics are taken on the forward passes that fall due, with no further call.

    Args:
        metric: the metric to descend by; it knows the parameters.
        lr, momentum, damping: None takes the step rule's defaults; ``opt.info`` says what the damping means there.
        weight_decay: decoupled, θ ← (1 − η·weight_decay) θ.
        step: a step rule; None takes the metric's own.
        refresh: the largest number of steps between refreshes of the metric.

    Raises:
        TypeError: `metric` is no `Metric`.
        ValueError: an option out of range.
    """

    def __init__(
        self,
        metric: Metric,
        lr: float | None = None,
        momentum: float | None = None,
        damping: float | None = None,
        weight_decay: float = 0.0,
        step: StepRule | None = None,
        refresh: int = 20,
    ) -> None:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"NaturalGradient takes a metric first, got {type(metric).__name__}; for instance "
                f"ng.Fisher(model, criterion), or "
                "ng.Euclidean(model) for plain gradient descent"
            )
        self.metric = metric
        self.rule = metric.default_step() if step is None else step
        self.refresh = refresh
        defaults = {
            "lr": self.rule.lr if lr is None else lr,
            "momentum": self.rule.momentum if momentum is None else momentum,
            "damping": self.rule.damping if damping is None else damping,
            "weight_decay": weight_decay,
        }
        check_options(defaults, refresh, metric.positive_definite)
        self._name_of = {p: n for n, p in metric.parameters.items()}
        super().__init__(list(metric.parameters.values()), defaults)
        self.steps = self.skipped = self.refreshes = 0
        self.refreshed = False
        self._next_refresh = 0
        self._spent, self._started, self._ended = 0.0, time.perf_counter(), None
        metric.drive(self)

    @property
    def refresh_due(self) -> bool:
        """Whether the forward passes before the next step are to refresh the metric."""
        return self.steps >= self._next_refresh

    @torch.no_grad()
    def step(self, arg: Any = None) -> Tensor | None:  # type: ignore[override]
        """One step.

        Args:
            arg: None where ``loss.backward()`` was called; a callable is a closure that returns the loss after calling
                ``backward``; anything else is a batch for a metric that makes its own gradient.

        Raises:
            TypeError: a batch for a metric that takes its gradient from ``loss.backward()``.
        """
        loss: Tensor | None = None
        if callable(arg):
            with torch.enable_grad():
                loss = arg()
        began = time.perf_counter()
        if arg is not None and not callable(arg):
            loss = self.metric.observe(arg)
            df = self.metric.gradient()
        else:
            df = {n: p.grad for n, p in self.metric.parameters.items() if p.grad is not None}
        if not all_finite(df):
            self._skip()
        elif df:
            self._advance()
            self._write(self.rule.update(self.metric, df, self._options()))
        now = time.perf_counter()
        self._spent += now - began
        return loss

    def _write(self, increments: dict[str, Tensor]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if (delta := increments.get(self._name_of[p])) is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(delta)

    def _advance(self) -> None:
        """Fold pending statistics into the moving average and set the date of the next refresh."""
        # a plain mean at first, so that no start value lingers; then an exponential average
        decay = min(AVERAGE_LIMIT, 1 - 1 / (self.refreshes + 1))
        due = self.refresh_due
        self.refreshed = self.metric.advance(decay)
        if self.refreshed:
            self.refreshes += 1
        elif due and self.metric.needs_refresh and not self.refreshes:
            raise RuntimeError(
                "no forward pass of the metric's model was seen before this step, so there is no metric to "
                "descend by. Call the "
                "model itself (`model(x)`, not a submodule or model.forward), with grad enabled, and "
                "backpropagate its loss"
            )
        self.steps += 1
        if due:
            self._next_refresh = self.steps + max(1, min(self.refresh, self.steps // GAP_GROWTH)) - 1

    def _skip(self) -> None:
        self.refreshed = False
        self.skipped += 1
        self.metric.discard_pending()
        if self.skipped == 1:
            warnings.warn(
                f"step {self.steps}: the gradient holds NaN or Inf; the step is skipped and the parameters stay "
                f"as they are. "
                "Further skips are counted in opt.info['skipped'] without a warning",
                stacklevel=4,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and drop statistics of a backward pass that no step followed."""
        super().zero_grad(set_to_none)
        self.metric.discard_pending()

    def _options(self) -> dict[str, Options]:
        return {
            self._name_of[p]: Options(float(g["lr"]), g["momentum"], g["damping"])
            for g in self.param_groups
            for p in g["params"]
        }

    @property
    def info(self) -> dict[str, Any]:
        """What the last step did: numbers, read from the device now.

        ``damping`` and its meaning; ``step_length`` η·s; ``reduction_ratio`` of the loss over its linear prediction,
        estimated from slopes; ``refreshed``; ``refreshes``, ``steps`` and ``skipped`` so far; ``share_of_time`` spent
        inside `step`.
        """
        rule = {k: float(v) if isinstance(v, Tensor) else v for k, v in self.rule.info.items()}
        elapsed = time.perf_counter() - self._started
        return {
            "damping_meaning": self.rule.damping_meaning,
            **rule,
            "refreshed": self.refreshed,
            "refreshes": self.refreshes,
            "steps": self.steps,
            "skipped": self.skipped,
            "share_of_time": self._spent / elapsed if elapsed else 0.0,
        }


def all_finite(df: dict[str, Tensor]) -> bool:
    """Whether every entry is finite: norms first, since they need one pass and no temporaries."""
    if not df:
        return True
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(list(df.values())))).all())


def check_options(values: dict[str, Any], refresh: int, positive_definite: bool) -> None:
    """Raise a ValueError for an option out of range."""
    ranges: dict[str, tuple[Callable[[float], bool], str]] = {
        "lr": (lambda v: v >= 0, "at least 0"),
        "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "damping": (lambda v: v > 0 or (v == 0 and positive_definite), "positive"),
        "weight_decay": (lambda v: v >= 0, "at least 0"),
    }
    for name, (fits, words) in ranges.items():
        value = values[name]
        if not (float(value) < float("inf") and fits(float(value))):
            raise ValueError(f"{name} must be {words} and finite, got {value!r}")
    if not isinstance(refresh, int) or refresh < 1:
        raise ValueError(f"refresh must be a whole number of at least 1, got {refresh!r}")
