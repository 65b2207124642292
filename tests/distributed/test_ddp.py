"""Ranks with parts of a batch are one process with the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

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
    "moved": {"model": "moved", "steps": 10},
    "accumulation": {"micro": 2},
    "static graph": {"ddp": {"static_graph": True}},
    "unused": {"ddp": {"find_unused_parameters": True}},
    "every step": {"optimizer": {"refresh": 1, "momentum": 0.0}},
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_process(case: str, size: int, pool_of: PoolOf) -> None:
    arguments = CASES[case]
    if size == 4 and case not in ("mlp", "conv", "accumulation"):
        pytest.skip("two ranks show it")
    compare(pool_of(size).run(call, arguments), train(0, 1, **arguments))


def call(rank: int, size: int, arguments: dict[str, Any]) -> Result:
    return train(rank, size, **arguments)
