"""−Δu = f on the unit cube with u given on the boundary, in 2, 5 and 10 dimensions.

Points, draws and error follow Dangel, Müller & Zeinhofer 2024 (https://arxiv.org/abs/2405.15603, section 4): the
network in float32 from the seed, then the interior points, the boundary points and the evaluation points, in this
order; f in float32 and cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.cli.problems.pictures import box_pictures
from natgrad.cli.problems.problem import Problem, Published, Setting, cube_boundary, cube_points, rms, tanh_network
from natgrad.function_space.gauss_newton import GaussNewton
from natgrad.function_space.operators import laplacian

SOURCE = "Dangel, Müller & Zeinhofer 2024, arXiv:2405.15603"
Function = Callable[[Tensor], Tensor]  # (n, d) → (n,)


def poisson(
    name: str,
    d: int,
    solution: Function,
    source: Function,
    points: tuple[int, int],
    fresh: bool,
    networks: dict[str, tuple[int, ...]],
    published: dict[str, list[Published]],
    formula: str,
    seconds: float,
) -> Problem:
    """−Δu = source, u = solution on the boundary.

    `points` are the numbers in the interior and on the boundary, drawn for every step where `fresh`.
    """

    def draw() -> dict[str, tuple[Tensor, Tensor]]:
        x, xb = cube_points(points[0], d), cube_boundary(points[1], d)
        return {
            "interior": (x.double(), source(x).double()),
            "boundary": (xb.double(), solution(xb.double())),
        }

    def prepare(widths: tuple[int, ...], seed: int) -> Setting:
        model = tanh_network(widths, seed)
        first = draw()
        test = cube_points(10 * points[0], d).double()
        exact = solution(test)
        terms = {"interior": lambda u, x, f: laplacian(u, x) + f, "boundary": lambda u, x, g: u(x) - g}
        return Setting(
            model,
            lambda solver: GaussNewton(model, terms, solver=solver),
            lambda step: draw() if fresh and step else first,
            lambda: rms(model(test)[:, 0] - exact),
            "L2 error",
            lambda folder: box_pictures(model, solution, d, folder),
        )

    title = f"−Δu = f on [0, 1]^{d}, u = {formula}"
    return Problem(name, title, networks, prepare, published, seconds, source=SOURCE)


def sine_product(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


def cosine_sum(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(1)


def pair_products(x: Tensor) -> Tensor:
    """x₁x₂ + x₃x₄ + …, harmonic"""
    return (x[:, 0::2] * x[:, 1::2]).sum(1)


poisson2d = poisson(
    "poisson2d",
    2,
    sine_product,
    lambda x: 2 * math.pi**2 * sine_product(x),
    (900, 120),
    False,
    {"small": (2, 64, 1), "large": (2, 64, 64, 48, 48, 1)},
    {
        "small": [
            Published("energy natural gradient", 6.186e-8, 1000, 5701),
            Published("K-FAC, automatic step", 1.99e-7, 1000, 34944),
            Published("Hessian-free", 3.213e-7, 1001, 1652),
            Published("SGD", 3.622e-5, 1000, 339287),
            Published("Adam", 9.399e-5, 1000, 320415),
            Published("L-BFGS", 1.783e-4, 1000, 49379),
        ],
        "large": [
            Published("K-FAC, automatic step", 7.888e-7, 1000, 11567),
            Published("Hessian-free", 1.253e-6, 1003, 605),
            Published("energy natural gradient, layer-wise", 9.494e-5, 1014, 25),
            Published("Adam", 2.105e-4, 1000, 127231),
            Published("L-BFGS", 3.389e-4, 861, 24414),
            Published("SGD", 5.575e-4, 1000, 128527),
        ],
    },
    "Π sin πxᵢ",
    60,
)
poisson5d = poisson(
    "poisson5d",
    5,
    cosine_sum,
    lambda x: math.pi**2 * cosine_sum(x),
    (3000, 500),
    True,
    {"small": (5, 64, 1), "large": (5, 64, 64, 48, 48, 1)},
    {
        "small": [
            Published("energy natural gradient", 5.575e-8, 3000, 13038),
            Published("K-FAC, automatic step", 2.68e-6, 3000, 104898),
            Published("Hessian-free", 6.102e-6, 3001, 1817),
            Published("L-BFGS", 8.88e-4, 3000, None),
            Published("Adam", 1.137e-3, 3000, 216350),
            Published("SGD", 2.592e-3, 3000, 225098),
        ],
        "large": [
            Published("energy natural gradient", 1.169e-4, 3014, 48),
            Published("Hessian-free", 1.276e-4, 3005, 493),
            Published("K-FAC, automatic step", 6.334e-4, 3000, 32159),
            Published("Adam", 3.772e-3, 3000, 140339),
        ],
    },
    "Σ cos πxᵢ",
    120,
)
poisson10d = poisson(
    "poisson10d",
    10,
    pair_products,
    lambda x: torch.zeros(len(x)),
    (3000, 1000),
    True,
    {"small": (10, 64, 1), "large": (10, 256, 256, 128, 128, 1)},
    {},
    "x₁x₂ + x₃x₄ + … + x₉x₁₀",
    60,
)
