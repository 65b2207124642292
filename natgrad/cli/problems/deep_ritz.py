"""−u″ + u³ = f on (−1, 1), natural boundary, as the minimum of E(u) = ∫ ½u′² + ¼u⁴ − f u (Müller & Zeinhofer 2023).

The exact solution is u = cos πx; the integral is a trapezoid rule with 20,000 points.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from natgrad.cli.problems.pictures import line_pictures
from natgrad.cli.problems.problem import Problem, Setting, tanh_network
from natgrad.function_space.energy import Energy

POINTS = 20_000


def prepare(widths: tuple[int, ...], seed: int) -> Setting:
    model = tanh_network(widths, seed)
    x = torch.linspace(-1, 1, POINTS, dtype=torch.float64)
    weights = torch.full_like(x, 2 / (POINTS - 1))
    weights[[0, -1]] /= 2
    exact = torch.cos(math.pi * x)
    f = math.pi**2 * exact + exact**3
    batch = {"interior": (x[:, None], weights, f)}
    densities = {"interior": lambda u, du, x, f: 0.5 * du @ du + 0.25 * u**4 - f * u}

    def error() -> float:
        with torch.no_grad():
            difference = model(x[:, None])[:, 0] - exact
        return float(((weights @ difference**2) / (weights @ exact**2)).sqrt())

    def draw(folder: Path) -> list[Path]:
        with torch.no_grad():
            return line_pictures(x, model(x[:, None])[:, 0], exact, ("x", "u"), folder)

    return Setting(
        model,
        lambda solver: Energy(model, densities, solver=solver),
        lambda step: batch,
        error,
        "relative L2 error",
        draw,
    )


problem = Problem(
    "deep-ritz",
    "−u″ + u³ = f on (−1, 1), natural boundary, by its energy",
    {"small": (1, 32, 1)},
    prepare,
    seconds=30,
    loss_name="energy",
)
