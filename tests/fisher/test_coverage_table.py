"""What `print(metric.coverage())` shows."""

from __future__ import annotations

import torch
from torch import nn

import natgrad as ng


def test_the_table_lines_up_and_counts_each_block_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact")
    metric.update(torch.randn(5, 3).double())
    found = metric.coverage()
    title, *rows, total = str(found).splitlines()
    assert title.split() == ["parameter", "shape", "op", "block", "sizes", "memory", "why"]
    assert [r.split()[0] for r in rows] == metric.names
    assert {r.index(" linear ") for r in rows} == {title.index(" op ")}
    assert found["0.weight"].memory == found["0.bias"].memory == 8 * (4 * 4 + 4 * 4)  # U and V, the bias as a column
    assert found.memory == found["0.weight"].memory + found["2.weight"].memory
    assert found.memory == sum(b.memory() for b in metric.blocks)
    assert total.startswith(f"in all {found.memory} B")
