"""Averaged weights: an exponential average of the iterates, to evaluate by.

The noise of minibatch steps averages out, so that the average is about as good as the end of a learning-rate schedule,
at any time and with no horizon (Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407). It starts as a plain
mean, so that no start value lingers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.optim.adam import HALF


class WeightAverage:
    """θ̄ ← θ̄ + max(1 − decay, 1/n) (θ − θ̄) after step n. Half-precision weights are averaged in float32."""

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"average must lie between 0 and 1 (0.98 averages about 50 steps), got {decay!r}")
        self.decay = decay
        self.steps = 0
        self.values: dict[str, Tensor] = {}

    def include(self, parameters: Mapping[str, Tensor]) -> None:
        """Begin to average these, from where they are."""
        for n, p in parameters.items():
            self.values.setdefault(n, p.detach().float() if p.dtype in HALF else p.detach().clone())

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        mine = [self.values[n] for n in parameters]
        theirs = [p.detach().to(a.dtype) for a, p in zip(mine, parameters.values())]
        torch._foreach_lerp_(mine, theirs, max(1 - self.decay, 1 / self.steps))
