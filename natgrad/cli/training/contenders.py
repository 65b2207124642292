"""The optimizers that the command line compares. A new one is a function and a line in `CONTENDERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import natgrad as ng


@dataclass
class Setup:
    """An optimizer ready to train, and the metric behind it where it has one to save."""

    optimizer: torch.optim.Optimizer
    metric: ng.Fisher | None = None


@dataclass(frozen=True)
class Contender:
    """One optimizer.

    Args:
        make: (model, criterion, learning rate) → `Setup`; the rate is None where `swept` is false.
        swept: whether it is tried at each of the task's rates, with a cosine schedule over the budget, or
            once, with no option set and no schedule.
        summary: what is run, in words.
    """

    make: Callable[[nn.Module, nn.Module, float | None], Setup]
    swept: bool
    summary: str


def natural_gradient(model: nn.Module, criterion: nn.Module, rate: float | None) -> Setup:
    metric = ng.Fisher(model, criterion)
    return Setup(ng.NaturalGradient(metric), metric)


def adamw(model: nn.Module, criterion: nn.Module, rate: float | None) -> Setup:
    assert rate is not None
    return Setup(torch.optim.AdamW(model.parameters(), rate))


def sgd(model: nn.Module, criterion: nn.Module, rate: float | None) -> Setup:
    assert rate is not None
    return Setup(torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True))


CONTENDERS = {
    "natgrad": Contender(
        natural_gradient, swept=False, summary="natgrad.NaturalGradient(natgrad.Fisher(…)), no option set"
    ),
    "adamw": Contender(adamw, swept=True, summary="torch.optim.AdamW"),
    "sgd": Contender(
        sgd,
        swept=True,
        summary="torch.optim.SGD with Nesterov momentum 0.9",
    ),
}
