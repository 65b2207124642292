"""What a step costs as layers grow wider: ``python -m benchmarks.width [--widths 128 256 512 1024 2048]``.

An MLP with three hidden layers of one width, batch 256, float32, CPU ms of one thread: forward and backward pass alone,
natgrad's part of an ordinary step beside it, and a step that refreshes, with the defaults in training (sides in blocks)
and with whole sides. The last line is the exponent of each between the two largest widths.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import natgrad as ng

BATCH, INPUTS, CLASSES = 256, 64, 10
REFRESH, STEPS = 4, 12


def network(width: int) -> nn.Sequential:
    sizes = [INPUTS, width, width, width]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def timed(width: int, max_factor_dim: int | None) -> tuple[float, float, float]:
    """Forward and backward pass, natgrad's part of an ordinary step, and a whole step that refreshes: medians in ms."""
    torch.manual_seed(0)
    model, criterion = network(width), nn.CrossEntropyLoss()
    x, y = torch.randn(BATCH, INPUTS), torch.randint(CLASSES, (BATCH,))
    opt = ng.NaturalGradient(ng.Fisher(model, criterion, max_factor_dim=max_factor_dim), refresh=REFRESH)
    passes, ordinary, refreshes = [], [], []
    for _ in range(STEPS):
        opt.zero_grad()
        began = time.process_time()
        criterion(model(x), y).backward()
        passed = time.process_time()
        opt.step()
        done = time.process_time()
        if opt.info["refreshed"]:
            refreshes.append(done - began)
        else:
            passes.append(passed - began)
            ordinary.append(done - passed)
    first, second, third = (1e3 * statistics.median(t) for t in (passes, ordinary, refreshes[1:]))
    return first, second, third


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    widths = parser.parse_args().widths
    torch.set_num_threads(1)
    table = Table(title=f"MLP of three hidden layers, batch {BATCH}: CPU ms")
    columns = ("forward + backward", "step", "refresh", "step, sides whole", "refresh, sides whole")
    for column in ("width", *columns):
        table.add_column(column, justify="right")
    rows = []
    for width in widths:
        rows.append([*timed(width, None), *timed(width, 4096)[1:]])
        table.add_row(str(width), *(f"{v:.1f}" for v in rows[-1]))
    if len(widths) > 1:
        doublings = math.log2(widths[-1] / widths[-2])
        table.add_row("exponent", *(f"{math.log2(b / a) / doublings:.2f}" for a, b in zip(rows[-2], rows[-1])))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
