"""Ranks with parts of a batch are one process with the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import natgrad as ng
from tests.distributed.pool import Pool
from tests.distributed.tasks import Result, train

PoolOf = Callable[[int], Pool]
CLOSE = 1e-10


def compare(found: list[Result], one: Result) -> None:
    """Metric and parameters within `CLOSE` of one process, and bit for bit the same on all ranks."""
    assert found[0]["seen"] == one["seen"]
    np.testing.assert_allclose(found[0]["metric"], one["metric"], atol=CLOSE, rtol=0)
    for n, p in one["parameters"].items():
        np.testing.assert_allclose(found[0]["parameters"][n], p, atol=CLOSE, rtol=0, err_msg=n)
    same(found)


def same(found: list[Result]) -> None:
    for other in found[1:]:
        np.testing.assert_array_equal(other["metric"], found[0]["metric"])
        for n, p in found[0]["parameters"].items():
            np.testing.assert_array_equal(other["parameters"][n], p, err_msg=n)


CASES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "conv": {"model": "conv"},
    "squared": {"criterion": "squared"},
    "dense": {"options": {"structure": "dense"}},
    "block": {"options": {"structure": "block"}},
    "diagonal": {"options": {"structure": "diagonal"}},
    "input": {"options": {"structure": "input"}},
    "reduce": {"model": "conv", "options": {"sharing": "reduce"}},
    "empirical": {"options": {"kind": "empirical"}},
    "pieces": {"options": {"max_factor_dim": 4}},
    "pieces, conv": {"model": "conv", "options": {"max_factor_dim": 2}},
    "pieces, input": {"options": {"max_factor_dim": 4, "structure": "input"}},
    "moved": {"model": "moved", "steps": 10},
    "accumulation": {"micro": 2},
    "static graph": {"ddp": {"static_graph": True}},
    "unused": {"ddp": {"find_unused_parameters": True}},
    "every step": {"optimizer": {"refresh": 1, "momentum": 0.0}},
    "radius": {"optimizer": {"step": ng.KLTrustRegion(lr=1.0, momentum=0.5, radius=1e-4), "refresh": 3}},
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_process(case: str, size: int, pool_of: PoolOf) -> None:
    arguments = CASES[case]
    if size == 4 and case not in ("mlp", "conv", "pieces", "accumulation"):
        pytest.skip("two ranks show it")
    compare(pool_of(size).run(call, arguments), train(0, 1, **arguments))


def call(rank: int, size: int, arguments: dict[str, Any]) -> Result:
    return train(rank, size, **arguments)


UNEVEN: dict[str, dict[str, Any]] = {
    "mlp": {"sizes": (11, 5)},
    "dense": {"sizes": (15, 1), "options": {"structure": "dense"}},
    "weighted": {"criterion": "weighted", "sizes": (4, 12)},
    "empirical": {"sizes": (3, 13), "options": {"kind": "empirical"}},
}


@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_shards(case: str, pool_of: PoolOf) -> None:
    """The metric is that of all data; the gradient is DDP's, the mean of the means, as of micro-batches."""
    compare(pool_of(2).run(call, UNEVEN[case]), train(0, 1, **UNEVEN[case]))


def test_uneven_shards_leave_the_metric_of_the_whole_batch(pool_of: PoolOf) -> None:
    still = {"optimizer": {"lr": 0.0}, "steps": 6}
    found = pool_of(2).run(call, {"sizes": (11, 5), **still})
    np.testing.assert_allclose(found[0]["metric"], train(0, 1, **still)["metric"], atol=CLOSE, rtol=0)


def test_a_sum_is_the_sum_over_all_ranks(pool_of: PoolOf) -> None:
    """DDP divides the gradient by the number of ranks all the same, which the length of a Newton step has to undo."""
    compare(pool_of(2).run(call, {"criterion": "sum"}), train(0, 1, criterion="sum"))


def test_layers_that_some_ranks_do_not_use(pool_of: PoolOf) -> None:
    arguments = {"model": "branches", "sizes": (9, 7), "ddp": {"find_unused_parameters": True}}
    compare(pool_of(2).run(call, arguments), train(0, 1, model="branches", sizes=(9, 7)))


def test_messages_are_few_and_at_refreshes_only(pool_of: PoolOf) -> None:
    found = pool_of(2).run(call, {})[0]
    assert found["messages"]["statistics"] == found["info"]["refreshes"] < found["info"]["steps"]
    assert found["messages"]["agreement"] == 1 + 2 * found["info"]["refreshes"]
