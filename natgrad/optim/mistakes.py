"""Mistakes in a training loop that would do nothing, or the wrong thing, without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric

MISSES = 3  # refreshes in a row that bring nothing before it is said: one may fall on a batch that is skipped


def check_driver(metric: Metric, opt: Any) -> None:
    """Raise a RuntimeError where another optimizer drives the metric by now."""
    if metric.driver is not None and metric.driver is not opt:
        raise RuntimeError(
            "the metric of this optimizer is driven by another NaturalGradient, made later. One metric serves one "
            "optimizer: options for some of the parameters go into groups=, and a second model takes a second metric"
        )


def loss_of_closure(closure: Callable[[], Any], parameters: Iterable[Tensor]) -> Any:
    """Return what the closure returns.

    Raises:
        RuntimeError: it leaves every gradient as it was.
    """
    before = [(p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]
    with torch.enable_grad():
        loss = closure()
    if all(p.grad is g and (g is None or g._version == v) for p, (g, v) in zip(parameters, before)):
        raise RuntimeError(
            "the closure leaves the gradient of every parameter as it was: it has to call zero_grad(), compute the "
            "loss, call loss.backward() and return the loss"
        )
    return loss


def say_no_gradient(metric: Metric, by_closure: bool, said: bool) -> bool:
    """Warn of a step that has nothing to go by, unless that is `said`. Return True: from now on it is.

    Raises:
        RuntimeError: that is so because the model has other parameters than the metric.
    """
    metric.check_parameters()
    if said:
        return True
    who = "Have the closure call" if by_closure else "Call"
    warnings.warn(
        f"step() did nothing: no parameter of the optimizer has a gradient. {who} backward() on a loss of the metric's "
        "own model first; a copy of it, or one that is frozen, gives no gradient here",
        stacklevel=3,
    )
    return True


def say_stale(why: str) -> None:
    """Warn that refreshes fall due and bring nothing, as where a loop stops calling the model itself."""
    warnings.warn(
        f"{MISSES} refreshes of the metric fell due and brought nothing, so that it stays as it was: {why}",
        stacklevel=4,
    )
