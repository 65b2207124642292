"""What single operations of a step cost: ``python -m benchmarks.kernels``. CPU µs of one thread, float32.

The first table: an inverse of n rows applied to n × 128 numbers, and opened from its triangle before, as training keeps
it (`natgrad.triangles`). The second: the products Ũ X Ṽ of layers of one shape, one layer after the other and in one
batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from natgrad.kronecker import kron_apply
from natgrad.products import product
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
    for column in ("layers", "shape", "one by one", "batched"):
        table.add_column(column, justify="right")
    for layers, out, into in ((2, 128, 129), (3, 384, 129), (6, 64, 65), (2, 16, 17)):
        u, x, v = torch.randn(layers, out, out), torch.randn(layers, out, into), torch.randn(layers, into, into)
        times = cost(one_by_one, u, x, v), cost(lambda u, x, v: u @ x @ v, u, x, v)
        table.add_row(str(layers), f"{out} × {into}", *times)
    return table


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=100)
    console.print(opening())
    console.print(batching())


if __name__ == "__main__":
    main()
