"""Burgers' equation u_t + u u_x = ν u_xx on t ∈ [0, 1], x ∈ [−1, 1], u(0, x) = −sin πx, u(t, ±1) = 0, ν = 0.01/π.

The setting of Raissi, Perdikaris & Karniadakis 2019 (section 3.1.1). The exact solution comes from the Cole–Hopf
transform, u = −2ν φ_x/φ, as a quotient of integrals by Gauss–Hermite quadrature (Basdevant et al. 1986).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from natgrad.cli.problems.pictures import field_picture
from natgrad.cli.problems.problem import Problem, Setting, tanh_network
from natgrad.function_space.gauss_newton import GaussNewton
from natgrad.function_space.operators import Field, derivatives
from natgrad.function_space.residuals import Term

VISCOSITY = 0.01 / math.pi
INTERIOR, BOUNDARY = 3000, 200
SHOCK = (
    0.1  # half of the points are drawn with this deviation around x = 0: between sparse points the shock goes unseen
)
NODES = 100  # of the quadrature


def exact_solution(at: Tensor) -> Tensor:
    """u at points (n, 2) of (t, x), (n,)"""
    t, x = at[:, :1], at[:, 1:]
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(NODES))
    y = x - nodes * torch.sqrt(4 * VISCOSITY * t)
    logs = -torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY)
    kernel = weights * torch.exp(logs - logs.max(1, keepdim=True).values)
    return -(kernel * torch.sin(math.pi * y)).sum(1) / kernel.sum(1)


def equation(u: Field, at: Tensor) -> Tensor:
    """u_t + u u_x − ν u_xx at one point (t, x), (1,)"""
    value, (u_t, u_x), u_xx = derivatives(u, at, [0.0, 1.0])
    return u_t + value * u_x - VISCOSITY * u_xx


def prepare(widths: tuple[int, ...], seed: int) -> Setting:
    model = tanh_network(widths, seed)
    interior = torch.rand(INTERIOR, 2).double() * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    interior[: INTERIOR // 2, 1] = (SHOCK * torch.randn(INTERIOR // 2)).clamp(-1, 1)
    start = torch.stack([torch.zeros(BOUNDARY), torch.linspace(-1, 1, BOUNDARY)], dim=1).double()
    sides = torch.stack([torch.rand(BOUNDARY), torch.randint(0, 2, (BOUNDARY,)) * 2.0 - 1.0], dim=1).double()
    edge = torch.cat([start, sides])
    batch = {
        "equation": interior,
        "edge": (edge, torch.where(edge[:, 0] == 0, -torch.sin(math.pi * edge[:, 1]), 0.0)),
    }
    terms: dict[str, Term] = {"equation": equation, "edge": lambda u, at, g: u(at) - g}
    t, x = torch.meshgrid(
        torch.linspace(0, 1, 101, dtype=torch.float64),
        torch.linspace(-1, 1, 201, dtype=torch.float64),
        indexing="ij",
    )
    grid = torch.stack([t.reshape(-1), x.reshape(-1)], dim=1)
    exact = exact_solution(grid)

    def error() -> float:
        with torch.no_grad():
            return float((model(grid)[:, 0] - exact).norm() / exact.norm())

    def draw(folder: Path) -> list[Path]:
        with torch.no_grad():
            u = model(grid)[:, 0]
        box, labels = (0.0, 1.0, -1.0, 1.0), ("t", "x")
        return [
            field_picture(u.reshape(t.shape).mT, box, "u", labels, folder / "solution.png"),
            field_picture(
                (u - exact).reshape(t.shape).mT,
                box,
                "u − exact solution",
                labels,
                folder / "error_field.png",
                True,
            ),
        ]

    return Setting(
        model,
        lambda solver: GaussNewton(model, terms, solver=solver),
        lambda step: batch,
        error,
        "relative L2 error",
        draw,
    )


problem = Problem(
    "burgers",
    "u_t + u u_x = ν u_xx, ν = 0.01/π",
    {"small": (2, 20, 20, 20, 1), "large": (2, 40, 40, 40, 1)},
    prepare,
    seconds=150,
)
