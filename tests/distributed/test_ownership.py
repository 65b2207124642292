"""Who computes which inverse, how much each rank does, and how many bytes are sent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad import kronecker
from natgrad.kronecker import FactorisationError
from natgrad.kronecker_blocks import FULL_SIDE
from natgrad.ownership import owners, work_of
from tests.distributed.pool import Pool
from tests.distributed.tasks import Result, build, train
from tests.distributed.test_ddp import call, compare
from tests.distributed.test_ddp_faults import one_step, setup

PoolOf = Callable[[int], Pool]
Sides = list[tuple[int, int]]


# the assignment ------------------------------------------------------------------------------------------


def transformer(depth: int = 12, d: int = 768, words: int = 50257) -> Sides:
    """(d_out, d_in) of every layer, a bias a column."""
    layer = [(3 * d, d + 1), (d, d + 1), (4 * d, d + 1), (d, 4 * d + 1)]
    return layer * depth + [(words, d)]


def resnet18() -> Sides:
    sides = [(64, 3 * 49)]
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        sides += [(width, 9 * before), *[(width, 9 * width)] * 3]
        sides += [(width, before)] if before != width else []
    return [*sides, (1000, 513)]


def costs_of(sides: Sides) -> list[float]:
    return [float(d) ** 3 for pair in sides for d in pair if 1 < d <= FULL_SIDE]


def excess(costs: list[float], size: int) -> float:
    """The busiest rank's work over max(1/W, the largest factor's share)."""
    return max(work_of(costs, size)) / max(sum(costs) / size, max(costs))


@pytest.mark.parametrize("sides", [transformer(), resnet18()], ids=["transformer", "resnet18"])
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_work_is_even(sides: Sides, size: int) -> None:
    assert excess(costs_of(sides), size) < 1.1


def test_where_work_is_uneven() -> None:
    """Where a few more factors of the largest size are left than ranks, some rank has one more, whoever assigns."""
    uneven = [
        {size for size in range(2, 65) if excess(costs_of(sides), size) >= 1.1} for sides in (transformer(), resnet18())
    ]
    assert uneven == [set(range(17, 30)), {3}]


def test_the_assignment_is_a_function_of_the_costs() -> None:
    costs = [float(c) for c in torch.randint(1, 5, (40,)).tolist()]
    assert owners(costs, 7) == owners(list(costs), 7)
    assert set(owners(costs, 7)) == set(range(7))
    assert owners([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert owners([], 3) == []


def test_costs_of_blocks_are_those_of_their_factors() -> None:
    metric = ng.Fisher(build("mlp"), nn.CrossEntropyLoss())
    metric.update(torch.randn(4, 6, dtype=torch.float64))
    jobs = [[job.cost for job in b.relative_jobs(0.1)] for b in metric.blocks]
    assert jobs == [[8**3, 7**3], [5**3, 9**3], [3**3, 6**3]]


# sharing the inverses ------------------------------------------------------------------------------------

EXCHANGED: dict[str, dict[str, Any]] = {
    "kfac": {},
    "conv": {"model": "conv"},
    "dense": {"options": {"structure": "dense"}},
    "block": {"options": {"structure": "block"}},
    "mixed": {"options": {"structure": {"0.*": "diagonal", "2.*": "block"}}},
}


@pytest.mark.parametrize("exchange", ["inverses", "directions"])
@pytest.mark.parametrize("case", EXCHANGED)
def test_shared_work_is_the_work_of_one_process(case: str, exchange: str, pool_of: PoolOf) -> None:
    arguments = EXCHANGED[case]
    shared = {**arguments, "options": {**arguments.get("options", {}), "exchange": exchange}}
    found = pool_of(2).run(call, shared)
    compare(found, train(0, 1, **arguments))
    assert set(found[0]["info"]["sent_bytes"]) - {"agreement", "statistics"} == {exchange}


def counted(rank: int, size: int, exchange: str) -> list[int]:
    """Sides of the factors that this rank inverts in one refresh."""
    calls: list[int] = []
    inverse = kronecker.damped_inverse

    def spied(m: torch.Tensor, damping: Any) -> torch.Tensor:
        calls.append(m.shape[-1])
        return inverse(m, damping)

    net, criterion, opt = setup({"exchange": exchange})
    kronecker.damped_inverse = spied
    try:
        one_step(net, criterion, opt, 0, rank, size)
    finally:
        kronecker.damped_inverse = inverse
    return calls


@pytest.mark.parametrize("exchange", ["inverses", "directions"])
def test_each_factor_is_inverted_once(exchange: str, pool_of: PoolOf) -> None:
    found = pool_of(4).run(counted, exchange)
    assert sorted(d for calls in found for d in calls) == sorted([8, 7, 5, 9, 3, 6])
    if exchange == "inverses":
        assert max(sum(d**3 for d in calls) for calls in found) == 9**3


SIDES = [(8, 7), (5, 9), (3, 6)]  # of the layers of "mlp"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("exchange", ["inverses", "directions"])
def test_bytes_are_those_of_the_formula(exchange: str, size: int, pool_of: PoolOf) -> None:
    found = pool_of(size).run(call, {"options": {"exchange": exchange}})
    info = found[0]["info"]
    refreshes, steps = info["refreshes"], info["steps"]
    sent = {k: v / 8 for k, v in info["sent_bytes"].items()}
    sums = 2 * (size - 1) / size * sum(o * (o + 1) / 2 + i * (i + 1) / 2 for o, i in SIDES)
    assert sent["statistics"] / refreshes == pytest.approx(sums, rel=0.05)
    if exchange == "inverses":
        assert sent["inverses"] / refreshes == sum(o * o + i * i for o, i in SIDES)
    else:
        assert sent["directions"] / steps == sum(o * i for o, i in SIDES)


@pytest.mark.parametrize(("refresh", "expected"), [(20, "inverses"), (1, "directions")])
def test_the_default_sends_fewer_bytes(refresh: int, expected: str, pool_of: PoolOf) -> None:
    found = pool_of(2).run(call, {"optimizer": {"refresh": refresh}})
    assert expected in found[0]["info"]["sent_bytes"]


# factorisations that fail --------------------------------------------------------------------------------


def failing(rank: int, size: int, exchange: str, at: tuple[int, ...]) -> Result:
    """The owner of the 9 × 9 factor cannot invert it at some steps."""
    net, criterion, opt = setup({"exchange": exchange}, {"refresh": 1})
    inverse = kronecker.damped_inverse

    def failing_inverse(m: torch.Tensor, damping: Any) -> torch.Tensor:
        if m.shape[-1] == 9:
            raise FactorisationError("for the test")
        return inverse(m, damping)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            kronecker.damped_inverse = failing_inverse if step in at else inverse
            try:
                one_step(net, criterion, opt, step, rank, size)
            finally:
                kronecker.damped_inverse = inverse
    return {
        "parameters": {n: p.detach().numpy() for n, p in net.module.named_parameters()},
        "metric": opt.metric.dense().numpy(),
    }


@pytest.mark.parametrize("exchange", ["inverses", "directions"])
def test_a_failed_factorisation_keeps_the_last_one_on_all_ranks(exchange: str, pool_of: PoolOf) -> None:
    found = pool_of(2).run(failing, exchange, (2, 3))
    for n, p in found[0]["parameters"].items():
        assert np.isfinite(p).all()
        np.testing.assert_array_equal(found[1]["parameters"][n], p)


@pytest.mark.parametrize("exchange", ["inverses", "directions"])
def test_a_factorisation_that_fails_at_once_is_said_on_all_ranks(exchange: str, pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(failing, exchange, (0,)):
        assert said.startswith("FactorisationError: block of")
        assert "'2.weight'" in said
