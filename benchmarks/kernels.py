"""Small layers of one shape, one by one and in a batch, in CPU µs of one thread, float32:
``python -m benchmarks.kernels``.

The products Ũ X Ṽ and the inverses of as many factors (`natgrad.blocks.batching`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from natgrad.linalg.block_diagonal import both_times
from natgrad.linalg.kronecker import damped_inverse, relative_inverse

ROUNDS, WARM = 300, 30


def cost(run: Callable[..., object], *args: object) -> str:
    for _ in range(WARM):
        run(*args)
    began = time.process_time()
    for _ in range(ROUNDS):
        run(*args)
    return f"{(time.process_time() - began) / ROUNDS * 1e6:.0f}"


def one_by_one(u: Tensor, x: Tensor, v: Tensor) -> list[Tensor]:
    return [both_times(*each) for each in zip(u.split(1), x.split(1), v.split(1))]


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


def main() -> None:
    torch.set_num_threads(1)
    Console(width=100).print(batching())


if __name__ == "__main__":
    main()
