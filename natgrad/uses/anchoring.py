"""Staying close: a penalty on the distance from a point, in the metric there.

    ½ ‖θ − θ₀‖²_ĝ,    its gradient ĝ (θ − θ₀), its Hessian ĝ

With ĝ a Fisher metric that is elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3), and
twice the Kullback–Leibler divergence from the model at θ₀ to second order. Laplace's approximation of the posterior
after data is the same with n ĝ (Ritter et al. 2018, arXiv:1805.07810, eq. 6).

A sum of penalties is a quadratic again. Around the newer point θ₂ it is

    p₁(θ) + p₂(θ) = p₁(θ₂) + c₂ + ⟨dp₁(θ₂) + h₂, θ − θ₂⟩ + ½ ‖θ − θ₂‖²_{ĝ₁ + ĝ₂},

so one point, one covector and one block a layer hold it, however many are added. Where a structure is not closed under
sums, ĝ₁ + ĝ₂ is the nearest that is (`natgrad.blocks.sums`): value and gradient at θ₂ are still exact.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.sums import nearest_sum
from natgrad.fisher.frozen import FrozenMetric, Source, block_for_block, frozen, summed
from natgrad.metric.metric import Metric
from natgrad.uses.arguments import Point, say_bare, values


def anchor(metric: Source, theta: Mapping[str, Tensor] | None = None) -> Anchor:
    """Return the penalty on the distance from a point, in the metric as it is now.

    Takes a copy of the point and of the statistics: what happens to model and metric afterwards changes nothing.

    Args:
        metric: an `ng.Fisher`, or the path of its file.
        theta: the point θ₀, {name: tensor}; None takes the present values of the parameters.

    Raises:
        RuntimeError: the metric has seen no data.
        ValueError: the point does not fit, or a metric from a file comes without one.
        TypeError, FileNotFoundError: the metric is none.
    """
    held = frozen(metric, "anchor").copy()
    say_bare(held, "nothing holds it near the anchor")
    centre = values(metric, theta, held, "anchor")
    live = metric if isinstance(metric, Metric) and not isinstance(metric, FrozenMetric) else None
    return Anchor(held, centre, {}, torch.zeros(()), live)


class Anchor:
    """A quadratic c + ⟨h, θ − θ₀⟩ + ½ ‖θ − θ₀‖²_ĝ of the parameters; `natgrad.anchor` makes one.

    ``near + near2`` adds penalties, ``γ * near`` weighs one, `at` moves one.
    """

    def __init__(
        self, metric: FrozenMetric, centre: Point, slope: Point, constant: Tensor, live: Metric | None
    ) -> None:
        self.metric, self.centre = metric, centre
        self._slope, self._constant = slope, constant
        self._parameters = None if live is None else live.parameters
        self._live = None if live is None else weakref.ref(live)

    def penalty(self, theta: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the penalty at the present parameters, a scalar tensor, differentiable as often as you like.

        Args:
            theta: {name: tensor} to take instead; may hold more than the metric's parameters.

        Raises:
            ValueError: there is no model to read parameters from, or `theta` does not fit.
            RuntimeError: parameters of the model were replaced after the metric was made.
        """
        theta = self._now(theta)
        device = next(iter(theta.values())).device
        self._move(device)
        with torch.autocast(device.type, enabled=False):
            dtype = next(iter(self.metric.parameters.values())).dtype  # of the statistics
            moved = {n: theta[n].to(dtype) - c.to(dtype) for n, c in self.centre.items()}
            parts = [half_square(b, moved) for b in self.metric.ready]
            parts += [(h * moved[n]).sum() for n, h in self._slope.items()]
            return torch.stack([self._constant.to(parts[0]), *(p.to(dtype) for p in parts)]).sum()

    def at(self, theta: Mapping[str, Tensor] | None = None) -> Anchor:
        """Return ½ ‖θ − θ₁‖²_ĝ around another point: the same metric, with neither slope nor constant.

        Args:
            theta: θ₁; None takes the present parameters. For the online Laplace approximation, that is where training
                with the penalty has ended.

        Raises:
            ValueError, RuntimeError: as `penalty`.
        """
        theta = self._now(theta)
        centre = {n: theta[n].detach().clone() for n in self.centre}
        return self._like(self.metric, centre, {}, torch.zeros(()))

    def __add__(self, other: Anchor) -> Anchor:
        """Return the sum of both penalties, around the second one's point.

        Raises:
            TypeError: the other is no anchor.
            ValueError: the metrics have different layouts; the message names the differences.
        """
        if not isinstance(other, Anchor):
            raise TypeError(f"anchors add to anchors, got {type(other).__name__}")
        device = next(iter(other.centre.values())).device
        self._move(device)
        other._move(device)
        rows = block_for_block({"the first": self.metric, "the second": other.metric}, "anchors do not add")
        blocks = [summed([(1.0, b) for b in row], self.metric.shapes) for row in rows]
        point = {n: t.clone().requires_grad_() for n, t in other.centre.items()}
        before = self.penalty(point)
        slopes = torch.autograd.grad(before, list(point.values()), allow_unused=True)
        slope = {n: h for n, h in zip(point, slopes) if h is not None}
        for n, h in other._slope.items():
            slope[n] = h + slope[n] if n in slope else h
        twin = other if other._parameters is not None else self
        return twin._like(
            other.metric.over(blocks), other.centre, slope, before.detach() + other._constant.to(before.device)
        )

    def __mul__(self, factor: float) -> Anchor:
        """Return a multiple of the penalty.

        Raises:
            TypeError: the factor is no number.
            ValueError: it is not positive and finite.
        """
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"an anchor is multiplied by a number, got {type(factor).__name__}")
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"an anchor is multiplied by a positive number, got {factor}")
        blocks = [nearest_sum([(float(factor), b)], self.metric.shapes) for b in self.metric.ready]
        slope = {n: factor * h for n, h in self._slope.items()}
        return self._like(self.metric.over(blocks), self.centre, slope, factor * self._constant)

    __rmul__ = __mul__

    def _like(self, metric: FrozenMetric, centre: Point, slope: Point, constant: Tensor) -> Anchor:
        twin = Anchor(metric, centre, slope, constant, None)
        twin._parameters, twin._live = self._parameters, self._live
        return twin

    def _now(self, theta: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        if theta is None:
            if self._parameters is None:
                raise ValueError(
                    "a metric from a file does not know the model; give penalty(dict(model.named_parameters()))"
                )
            if self._live is not None and (live := self._live()) is not None:
                live.check_parameters()
            return self._parameters
        if lacks := [n for n in self.centre if n not in theta]:
            raise ValueError(f"theta lacks the parameters {lacks} of the metric; it has {list(theta)}")
        return self.metric.check({n: theta[n] for n in self.centre}, "theta")

    def _move(self, device: torch.device) -> None:
        """Follow parameters that were moved to another device."""
        self.centre = {n: t.to(device) for n, t in self.centre.items()}
        self._slope = {n: t.to(device) for n, t in self._slope.items()}
        for block in self.metric.ready:
            block.move(device, block.dtype)


def half_square(block: Block, moved: Mapping[str, Any]) -> Tensor:
    """½ ‖x‖² of a displacement in a block."""
    x = block.pack({n: moved[n] for n in block.names})
    return (x * block.flat(x)).sum() / 2
