"""What a problem of ``natgrad solve`` is.

A new problem is one file in this folder with a ``problem`` of type `Problem`: networks, a metric, batches, and the
error against the exact solution where it is known. `PROBLEMS` in `natgrad.cli.problems.catalogue` lists it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.metric.metric import Metric


@dataclass(frozen=True)
class Published:
    """A result of others to stand beside ours, from the `source` of the problem."""

    who: str
    error: float
    seconds: float | None = None
    steps: int | None = None


@dataclass
class Setting:
    """One problem made concrete: a network and everything that is drawn with the seed.

    Attributes:
        model: the network.
        metric: takes the solver's name, gives the metric.
        batch: the batch of a step (0, 1, …); the same object where the points are fixed.
        error: the error to report, without gradient.
        error_name: what it measures.
        draw: writes pictures of the solution and its error into a folder, returns their paths.
    """

    model: nn.Module
    metric: Callable[[str], Metric]
    batch: Callable[[int], Any]
    error: Callable[[], float]
    error_name: str
    draw: Callable[[Path], list[Path]]


@dataclass(frozen=True)
class Problem:
    """A named problem.

    Attributes:
        title: one line with the equation.
        networks: name → widths; the first is the default.
        prepare: (widths, seed) → Setting.
        published: network name → results of others.
        source: where they were published.
        seconds: CPU seconds to run by default.
        loss_name: what the first column of the progress shows.
    """

    name: str
    title: str
    networks: dict[str, tuple[int, ...]]
    prepare: Callable[[tuple[int, ...], int], Setting]
    published: dict[str, list[Published]] = field(default_factory=dict)
    seconds: float = 60.0
    loss_name: str = "loss"
    source: str = ""


def tanh_network(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear layers and tanh between them, drawn in float32 from the seed, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b), nn.Tanh()] if i < len(widths) - 2 else [nn.Linear(a, b)]
    return nn.Sequential(*layers).double()


def cube_points(n: int, d: int) -> Tensor:
    """(n, d) points in the unit cube, float32."""
    return torch.rand(n, d)


def cube_boundary(n: int, d: int) -> Tensor:
    """(n, d) points on the faces of the unit cube, float32."""
    x = torch.rand(n, d)
    faces, sides = torch.randint(0, d, (n,)), torch.randint(0, 2, (n,))
    x[torch.arange(n), faces] = sides.to(x.dtype)
    return x


def rms(difference: Tensor) -> float:
    """Root mean square."""
    return float(difference.detach().square().mean().sqrt())
