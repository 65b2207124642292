"""Step rules: how far to go along −ĝ⁻¹df, and with what damping and momentum.

A step rule is a small object that turns a metric and a covector df into increments of the parameters. It brings
the default learning rate, momentum, damping and weight decay; the optimizer hands it the values in force, which differ
between parameter groups where the user says so, and decays the weights itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from natgrad.distributed.strategy import Strategy
from natgrad.metric.metric import Metric


@dataclass
class Options:
    """The values in force for one parameter: those of its group."""

    lr: float  # η
    momentum: float  # μ
    damping: float  # λ
    maximize: bool = False
    weight_decay: float = 0.0  # w
    share: float = 1.0  # what a schedule has left of lr


class ScaledStep(NamedTuple):
    """Δθ = length · way, written in one fused operation as `torch.optim` does."""

    way: Tensor
    length: float


Increments = dict[str, Tensor | ScaledStep]


@dataclass(frozen=True)
class StepContext:
    """What a step rule is told besides the metric and df."""

    options: Mapping[str, Options]  # of each parameter
    refreshed: bool = False  # whether the metric's statistics are new
    loss: float | None = None  # what a closure returned at the parameters as they are, for rules that `verifies`
    trial: Callable[[Mapping[str, Tensor]], float] | None = None  # Δ → the loss of the closure at θ + Δ


class StepRule:
    """What a step rule is.

    ``lr``, ``momentum``, ``damping`` and ``weight_decay`` are the defaults it brings; ``damping_meaning`` says in words
    what its damping means, and is shown in ``opt.info``. `update` returns the increments {name: Δθ}, tensors or
    `ScaledStep`; names left out stay where they are. `info` holds damping and lr of the first group when `update` is
    called, and what it adds for ``opt.info``. State that must survive a checkpoint goes through `state_dict`.
    """

    lr: float = 1.0
    momentum: float = 0.0
    damping: float = 1e-3
    weight_decay: float = 0.0
    damping_meaning = "absolute: (ĝ + λI)⁻¹"
    decays = False  # whether `update` sees to the weight decay; if not, the optimizer decays weights, decoupled
    least_lr = 0.0  # a smaller lr, other than 0, is worth a warning
    on_shards = False  # whether it can do without whole parameters, see `natgrad.distributed.fully_shard`
    verifies = False  # whether it asks `Metric.divergence` or `StepContext.trial`, for which batches are kept
    refresh = 20  # the largest number of steps between refreshes, where the optimizer is given none
    strategy: Strategy  # how ranks share the work; set by the optimizer that takes the steps
    on_ranks = True  # whether steps follow from metric and gradient alone, and so are the same on all ranks

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.strategy = Strategy()

    def update(
        self, metric: Metric, df: Mapping[str, Tensor], context: StepContext
    ) -> Mapping[str, Tensor | ScaledStep]:
        """Increments of the parameters, given df at the current ones. Called once a step, after `Metric.advance`."""
        raise NotImplementedError

    def cosines(self) -> dict[str, Tensor]:
        """{name: cos of the angle between a direction and the gradient it was made from}, scalar tensors; of the last
        step, or of the last one that refreshed the metric.

        A key is a parameter, or the first one of a block. Near 1 everywhere means that the metric has become a multiple
        of the identity: natural gradient descent is plain gradient descent then. Computed when asked for.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers to continue from, safe to load with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


def one_value(values: set[float], what: str) -> float:
    """The only member of a set of option values.

    Raises:
        ValueError: parameter groups differ in an option that this step rule takes for all parameters at once.
    """
    if len(values) != 1:
        raise ValueError(f"this step rule needs one {what} for all parameter groups, got {sorted(values)}")
    return next(iter(values))
