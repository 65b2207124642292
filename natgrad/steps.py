"""Step rules: how far to go along −ĝ⁻¹df, and with what damping and momentum.

A step rule is a small object that turns a metric and a covector df into increments of the parameters. It brings
the default learning rate, momentum and damping; the optimizer hands it the values in force, which differ between
parameter groups where the user says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natgrad.metric import Metric, Vector


@dataclass
class Options:
    """The values in force for one parameter: those of its group."""

    lr: float  # η
    momentum: float  # μ
    damping: float  # λ
    maximize: bool = False


class Along(NamedTuple):
    """Δθ = length · way, written in one fused operation as `torch.optim` does."""

    way: Tensor
    length: float


Increments = dict[str, Tensor | Along]


class StepRule:
    """What a step rule is.

    ``lr``, ``momentum`` and ``damping`` are the defaults it brings; ``damping_meaning`` says in words what its
    damping means, and is shown in ``opt.info``. `update` returns the increments {name: Δθ}, tensors or
    `Along`; names left out stay where they are. State that must survive a checkpoint goes through `state_dict`.
    """

    lr: float = 1.0
    momentum: float = 0.0
    damping: float = 1e-3
    damping_meaning = "absolute: (ĝ + λI)⁻¹"

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}

    def update(
        self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]
    ) -> Mapping[str, Tensor | Along]:
        """Increments of the parameters, given df at the current ones. Called once a step, after `Metric.advance`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers to continue from, safe to load with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


class FixedStep(StepRule):
    """Δθ = −η (ĝ + λI)⁻¹ m with m ← μ m + df: momentum as in ``torch.optim.SGD``, before the metric is applied."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.0, damping: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping = lr, momentum, damping
        self._buffer: Vector = {}

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Increments:
        damping = one_value({o.damping for o in options.values()}, "damping")
        full = {n: df.get(n, torch.zeros_like(p)) for n, p in metric.parameters.items()}
        for n, g in full.items():
            mu = options[n].momentum
            if mu:
                full[n] = self._buffer[n] = g.clone() if n not in self._buffer else self._buffer[n].mul_(mu).add_(g)
        direction = metric.sharp(full, damping)
        return {n: Along(direction[n], -options[n].lr) for n in df}

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": dict(self._buffer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer = dict(state["buffer"])


def one_value(values: set[float], what: str) -> float:
    """The only member of a set of option values.

    Raises:
        ValueError: parameter groups differ in an option that this step rule takes for all parameters at once.
    """
    if len(values) != 1:
        raise ValueError(f"this step rule needs one {what} for all parameter groups, got {sorted(values)}")
    return next(iter(values))
