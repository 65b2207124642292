"""Rounding: what is fed on is what makes the loss least, entry by entry; grids, and quantisers that are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle_of_uses import F64, STRUCTURES, fisher, flat, net, values
from torch import Tensor, nn

import natgrad as ng
from natgrad.uses import rounding

Close = Callable[[Tensor, Tensor, float], None]


def halves(name: str, w: Tensor) -> Tensor:
    return (w * 8).round() / 8


def cost(metric: ng.Fisher, theta: dict[str, Tensor]) -> float:
    return float(metric.norm({n: theta[n] - t for n, t in values(metric).items()}))


def by_hand(matrix: Tensor, theta: Tensor, order: list[int]) -> Tensor:
    """Round one entry after the other, where the quadratic of all that are not yet rounded has its minimum."""
    now, free = theta.clone(), list(order)
    for i in order:
        q = (now[i] * 8).round() / 8
        free.remove(i)
        if free:
            now[free] -= torch.linalg.solve(matrix[free][:, free], matrix[free, i]) * (q - now[i])
        now[i] = q
    return now


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
def test_matrices_are_rounded_where_the_rest_is_at_its_best(structure: str, close: Close) -> None:
    metric = fisher(structure)
    found = flat(metric, ng.round_weights(metric, halves, damping=0.01))
    matrix = metric.dense() + 0.01 * torch.eye(len(found), dtype=F64)
    index = metric.flat_to_vector(torch.arange(len(found)))
    order = [int(i) for b in metric.blocks for i in b.pack(index)]
    close(found, by_hand(matrix, flat(metric, values(metric)), order), 1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input"])
def test_products_are_rounded_where_the_rest_is_at_its_best(structure: str, close: Close) -> None:
    metric, damping = fisher(structure), 0.01
    found = ng.round_weights(metric, halves, damping=damping)
    for n in ("0", "2"):
        u, v = metric.factors(f"{n}.weight")
        u = torch.eye(len(u), dtype=F64) * u.trace() / len(u) if structure == "input" else u
        tu, tv = float(u.trace()) / len(u), float(v.trace()) / len(v)
        root = math.sqrt(damping / (tu * tv))
        u = u + root * tu * torch.eye(len(u), dtype=F64)
        v = v + root * tv * torch.eye(len(v), dtype=F64)
        w = torch.cat([values(metric)[f"{n}.weight"], values(metric)[f"{n}.bias"][:, None]], 1)
        out, into = w.shape
        order = sorted(range(out * into), key=lambda k: (k // into + k % into, k))
        expected = by_hand(torch.kron(u, v), w.flatten(), order).reshape(out, into)
        close(torch.cat([found[f"{n}.weight"], found[f"{n}.bias"][:, None]], 1), expected, 1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_result_lies_on_the_grid_and_costs_less(structure: str) -> None:
    metric = fisher(structure)
    found = ng.round_weights(metric, halves)
    assert all(torch.equal(halves(n, t), t) for n, t in found.items())
    plain = {n: halves(n, t) for n, t in values(metric).items()}
    if structure == "diagonal":
        assert all(torch.equal(found[n], plain[n]) for n in plain)
    else:
        assert cost(metric, found) < cost(metric, plain)


def test_biases_take_up_errors_where_they_come_back_as_they_went_in() -> None:
    metric = fisher("kfac")
    left = ng.round_weights(metric, halves, names="*.weight")
    assert all(torch.equal(left[n], values(metric)[n]) for n in ("0.bias", "2.bias"))
    free = ng.round_weights(metric, lambda n, w: w if n.endswith("bias") else halves(n, w))
    assert all(torch.equal(halves(n, free[n]), free[n]) for n in ("0.weight", "2.weight"))
    assert cost(metric, free) < cost(metric, left)


def test_a_layer_called_twice_and_sides_in_pieces() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).tanh()).tanh())

    torch.manual_seed(1)
    for options in ({}, {"max_factor_dim": 2}, {"max_factor_dim": 1}):
        metric = ng.Fisher(Twice().double(), nn.CrossEntropyLoss(), kind="exact", **options)
        metric.update(torch.randn(30, 4, dtype=F64), torch.randint(3, (30,)))
        found = ng.round_weights(metric, halves)
        plain = {n: halves(n, t) for n, t in values(metric).items()}
        assert all(torch.equal(halves(n, t), t) for n, t in found.items())
        assert cost(metric, found) <= cost(metric, plain)


def test_a_parameter_of_which_a_part_is_used() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w[2:5])

    metric = ng.Fisher(Part().double(), nn.MSELoss(), kind="exact")
    metric.update(torch.randn(20, 5, dtype=F64))
    found = ng.round_weights(metric, halves)["w"]
    assert torch.equal(halves("w", found), found)
    plain = halves("w", values(metric)["w"])
    assert torch.equal(found[:2], plain[:2])
    assert torch.equal(found[5:], plain[5:])
    assert not torch.equal(found[2:5], plain[2:5])
    masks, pruned = ng.prune(metric, 20 / 35, 1e-9)
    assert not bool(masks["w"][[0, 1, 5, 6]].any())  # nothing depends on them
    assert torch.equal(pruned["w"][2:5], values(metric)["w"][2:5])


def test_of_a_file_and_in_float32(tmp_path: Path) -> None:
    metric = ng.Fisher(net().float(), nn.CrossEntropyLoss(), kind="exact")
    metric.update(torch.randn(20, 5), torch.randint(3, (20,)))
    metric.save(tmp_path / "m")
    found = ng.round_weights(metric, halves)
    again = ng.round_weights(tmp_path / "m", halves, theta=values(metric))
    assert all(torch.equal(found[n], again[n]) and t.dtype == torch.float32 for n, t in again.items())
    with pytest.raises(ValueError, match="give round_weights theta="):
        ng.round_weights(tmp_path / "m", halves)


def moving(name: str, w: Tensor) -> Tensor:
    scale = w.abs().mean() / 3
    return (w / scale).round() * scale


def test_quantisers_that_are_none() -> None:
    metric = fisher("kfac")
    before = values(metric)
    for quantiser, said in (
        (lambda n, w: w[:1], r"must return a tensor of shape \(4, 5\)"),
        (lambda n, w: w.float(), "and torch.float64 for '0.weight', got .* torch.float32"),
        (lambda n, w: None, "must return a tensor"),
        (lambda n, w: w / 0, "gave NaN or Inf for '0.weight'"),
        (moving, "its grid is not fixed"),
    ):
        with pytest.raises(ValueError, match=said):
            ng.round_weights(metric, quantiser)
    with pytest.raises(TypeError, match="quantiser must be callable"):
        ng.round_weights(metric, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter matches '9'"):
        ng.round_weights(metric, halves, names=["0.*", "9"])
    with pytest.raises(ValueError, match="damping must be"):
        ng.round_weights(metric, halves, damping=0.0)
    with pytest.raises(RuntimeError, match="seen no data"):
        ng.round_weights(ng.Fisher(net(), nn.CrossEntropyLoss()), halves)
    assert all(torch.equal(values(metric)[n], before[n]) for n in before)


def test_the_default_damping_is_a_share_of_each_factor() -> None:
    metric = fisher("kfac")
    found = ng.round_weights(metric, halves, names="0.*")
    mean = float(metric.dense()[:24, :24].trace()) / 24
    again = ng.round_weights(metric, halves, names="0.*", damping=rounding.DAMPING * mean)
    assert all(torch.equal(found[n], again[n]) for n in found)
