"""What users hand to the uses of a metric, checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.frozen import FrozenMetric
from natgrad.linalg.tree import describe
from natgrad.metric.damping import Damping, Resolved
from natgrad.metric.metric import Metric

Point = dict[str, Tensor]

DAMPING = 1e-2  # of the mean eigenvalue; benchmarks/uses/prune.py, second command


def point(metric: FrozenMetric, theta: Any, what: str) -> Point:
    """Return values of the parameters, apart from any graph. `theta` may hold more than the metric's parameters.

    Raises:
        TypeError: it is no dictionary.
        ValueError: a parameter is missing, has another shape or no real values.
    """
    if not isinstance(theta, Mapping):
        raise TypeError(f"{what} must be a dict {{parameter name: tensor}}, as a state_dict is, got {describe(theta)}")
    if lacks := [n for n in metric.shapes if n not in theta]:
        has = [n for n in theta if n not in metric.shapes]
        raise ValueError(
            f"{what} lacks the parameters {lacks} of the metric" + (f"; it has {has[:5]} besides" if has else "")
        )
    found = {n: theta[n] for n in metric.shapes}
    for n, t in found.items():
        if not isinstance(t, Tensor) or t.shape != metric.shapes[n]:
            raise ValueError(f"{what}[{n!r}] must be a tensor of shape {tuple(metric.shapes[n])}, got {describe(t)}")
        if not t.is_floating_point() or not bool(torch.isfinite(t).all()):
            raise ValueError(f"{what}[{n!r}] must hold finite real numbers, got {describe(t)}")
    return {n: t.detach().clone() for n, t in found.items()}


def values(source: Any, theta: Any, metric: FrozenMetric, what: str) -> Point:
    """Return `theta`, or where it is None the present values of the parameters of the metric it was taken of.

    Raises:
        ValueError: there is neither; or as `point`.
    """
    if theta is not None:
        return point(metric, theta, "theta")
    if not isinstance(source, Metric) or isinstance(source, FrozenMetric):
        raise ValueError(f"a metric from a file has no parameters' values; give {what} theta=model.state_dict()")
    return point(metric, source.parameters, "theta")


def per_parameter(metric: FrozenMetric, given: Any, what: str, dtype: torch.dtype) -> Point:
    """Return one tensor shaped like the parameter for each that is named; others are left out.

    Raises:
        TypeError: it is no dictionary.
        ValueError: a name that the metric does not have, another shape or dtype.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a dict {{parameter name: tensor}}, got {describe(given)}")
    if unknown := [n for n in given if n not in metric.shapes]:
        raise ValueError(f"{what} names {unknown}, which the metric does not have; the names are {metric.names}")
    for n, t in given.items():
        if not isinstance(t, Tensor) or t.shape != metric.shapes[n] or t.dtype != dtype:
            raise ValueError(
                f"{what}[{n!r}] must be a tensor of shape {tuple(metric.shapes[n])} and {dtype}, got {describe(t)}"
            )
    return dict(given)


def say_bare(metric: FrozenMetric, consequence: str) -> None:
    """Warn of parameters without curvature. `consequence`: what becomes of them."""
    if metric.bare:
        said = "; ".join(f"{n!r} ({why})" for n, why in metric.bare.items())
        warnings.warn(f"the metric holds no curvature of {said}: {consequence}", stacklevel=4)


def damping_or_default(metric: Metric, damping: Damping | None, share: float = DAMPING) -> Resolved:
    """Return λ; where none is given a share of the mean eigenvalue, tr ĝ over the number of parameters.

    Raises:
        ValueError: it is not positive and finite, or the metric is zero and has no mean eigenvalue.
    """
    if damping is not None:
        return metric.dampings(damping)
    mean = float(metric.trace()) / sum(p.numel() for p in metric.parameters.values())
    if not mean > 0:
        raise ValueError("the metric is zero, so that damping relative to it is zero too; give damping=")
    return share * mean
