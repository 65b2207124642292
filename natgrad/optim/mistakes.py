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


def loss_of_closure(closure: Callable[[], Any], parameters: Iterable[Tensor], metric: Metric) -> Any:
    """Return what the closure returns. One that does nothing and returns None counts as no closure: Lightning passes
    such a one where gradients are there already.

    Raises:
        RuntimeError: it leaves every gradient as it was, and returns a loss.
    """
    before = [(p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]
    with torch.enable_grad():
        loss = closure()
    if loss is None or metric.observed_here is not None:  # such a metric says by itself what is missing
        return loss
    if all(p.grad is g and (g is None or g._version == v) for p, (g, v) in zip(parameters, before)):
        raise RuntimeError(
            "the closure leaves the gradient of every parameter as it was: it has to call zero_grad(), compute the "
            "loss, call loss.backward() and return the loss"
        )
    return loss


def own_gradient(metric: Metric, left: dict[str, Tensor]) -> dict[str, Tensor]:
    """df of the batch that a metric which makes its own gradient has observed; `left` for any other metric.

    Args:
        left: what ``backward()`` has left in ``.grad``, if anything.

    Raises:
        RuntimeError: no batch was observed at the parameters as they are, or `left` is the gradient of something else.
    """
    kind, here = type(metric).__name__, metric.observed_here
    if here is None:
        return left
    if not here:
        raise RuntimeError(
            f"{kind} makes its own gradient from a batch, and has observed none since the parameters changed last. "
            "Call opt.step(batch), batch a dictionary as for metric.observe. Where a trainer calls step, write `loss = "
            "metric.training_loss(batch)` in the closure or training_step in the place of a loss of your own, then "
            "loss.backward() where the trainer does not"
        )
    df = metric.gradient()
    if left:
        off = torch.stack([(g - df[n]).norm() if n in df else g.norm() for n, g in left.items()]).norm()
        size = torch.stack([g.norm() for g in df.values()]).norm()
        if bool(off > torch.finfo(size.dtype).eps ** 0.5 * size):
            raise RuntimeError(
                f"the gradients that backward() left are not those of the batch {kind} observed: they were clipped or "
                f"scaled, accumulated over several batches, or are of another loss, and {kind} would step without "
                "them. Call zero_grad() first, backpropagate metric.training_loss(batch) alone, and make another part "
                "of the loss a term"
            )
    return df


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
