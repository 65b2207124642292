"""What single operations of a step cost: ``python -m benchmarks.kernels``. CPU µs of one thread, float32.

The first table: an inverse of n rows applied to n × 128 numbers, and opened from its triangle before, as training keeps
it (`natgrad.triangles`). The second: the products Ũ X Ṽ of layers of one shape and the inverses of as many factors, one
after the other and in one batch (`natgrad.batched`). The third: the arithmetic between directions and increments, and
what `torch.compile` makes of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from natgrad.kronecker import damped_inverse, kron_apply, relative_inverse
from natgrad.products import product
from natgrad.step_arithmetic import step_
from natgrad.triangles import side_of_triangles, triangles, unfolded

ROUNDS, WARM = 300, 30


def cost(run: Callable[..., object], *args: object) -> str:
    for _ in range(WARM):
        run(*args)
    began = time.process_time()
    for _ in range(ROUNDS):
        run(*args)
    return f"{(time.process_time() - began) / ROUNDS * 1e6:.0f}"


def opening() -> Table:
    table = Table(title="an inverse of n rows, CPU µs")
    for column in ("n", "product", "opened as it is", "opened without a table"):
        table.add_column(column, justify="right")
    for n in (64, 128, 192, 250, 400):
        side = torch.randn(1, n, n)
        side = side + side.mT
        flat = triangles(side)
        times = cost(product, side, torch.randn(1, n, 128)), cost(side_of_triangles, flat, (1, n, n))
        table.add_row(str(n), *times, cost(unfolded, flat.view(1, -1), n))
    return table


def one_by_one(u: Tensor, x: Tensor, v: Tensor) -> list[Tensor]:
    return [kron_apply(*each) for each in zip(u.split(1), x.split(1), v.split(1))]


def batching() -> Table:
    table = Table(title="Ũ X Ṽ of layers of one shape, CPU µs")
    for column in ("layers", "shape", "one by one", "batched", "inverses", "batched"):
        table.add_column(column, justify="right")
    for layers, n in itertools.product((2, 8), (16, 32, 64, 96, 128)):
        u, x, v = torch.randn(layers, n, n), torch.randn(layers, n, n + 1), torch.randn(layers, n + 1, n + 1)
        m = torch.randn(layers, 1, n, 2 * n)
        m = m @ m.mT / n
        times = cost(one_by_one, u, x, v), cost(lambda u, x, v: u @ x @ v, u, x, v)
        inverses = cost(lambda m: [relative_inverse(each, 0.1) for each in m.unbind()], m)
        table.add_row(str(layers), f"{n} × {n + 1}", *times, inverses, cost(damped_inverse, m, 0.3))
    return table


SHAPES = {
    "tabular": [(128, 9), (128, 129), (128, 129), (1, 129)],
    "autoencoder": [(400, 785), (200, 401), (100, 201), (50, 101), (25, 51), (6, 26)],
    "transformer": [(384, 129), (128, 129), (512, 129), (128, 513)] * 3,
}


def arithmetic(step: Callable[..., object], shapes: list[tuple[int, int]]) -> str:
    """What a step costs from directions to increments, on fresh numbers each time."""
    fresh, count = [torch.randn(1, *s) for s in shapes], len(shapes)
    directions, velocities, ones = [d.clone() for d in fresh], [d.clone() for d in fresh], torch.ones(count)
    c = torch.tensor(0.1)  # a number would be compiled in
    rest = [torch.zeros(())] * count, 0.1 * ones, ones, ones, [(0.9, c, list(range(count)))]

    def run() -> None:
        torch._foreach_copy_(directions, fresh)
        torch._foreach_copy_(velocities, fresh)
        step(directions, velocities, *rest)

    return cost(run)


def compiling() -> Table:
    table = Table(title="directions to increments, CPU µs")
    for column in ("blocks of", "as it is", "compiled"):
        table.add_column(column, justify="left" if column == "blocks of" else "right")
    for name, shapes in SHAPES.items():
        table.add_row(name, arithmetic(step_, shapes), arithmetic(torch.compile(step_), shapes))
    return table


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=100)
    console.print(opening())
    console.print(batching())
    console.print(compiling())


if __name__ == "__main__":
    main()
