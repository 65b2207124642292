"""Ranks with the shards of a model and parts of a batch are one process with the model and the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.pool import Pool
from tests.distributed.sharded_tasks import train_sharded
from tests.distributed.tasks import Result, train
from tests.distributed.test_ddp import compare

PoolOf = Callable[[int], Pool]


def call(rank: int, size: int, arguments: dict[str, Any]) -> Result:
    return train_sharded(rank, size, **arguments)


CASES: dict[str, dict[str, Any]] = {
    "each layer": {},
    "root": {"each": False},
    "kept after forward": {"reshard": False},
    "given up after forward": {"reshard": True},
    "conv": {"model": "conv"},
    "attention": {"model": "attention"},
    "squared": {"criterion": "squared"},
    "sum": {"criterion": "sum"},
    "dense": {"options": {"structure": "dense"}},
    "block": {"options": {"structure": "block"}},
    "diagonal": {"options": {"structure": "diagonal"}},
    "mixed": {"options": {"structure": {"0.*": "diagonal", "2.*": "block"}}},
    "reduce": {"model": "conv", "options": {"sharing": "reduce"}},
    "empirical": {"options": {"kind": "empirical"}},
    "pieces": {"options": {"max_factor_dim": 4}},
    "pieces, conv": {"model": "conv", "options": {"max_factor_dim": 2}},
    "pieces, input": {"options": {"max_factor_dim": 4, "structure": "input"}},
    "no op rule": {"model": "moved", "steps": 10},
    "functional loss": {"functional": True},
    "accumulation": {"micro": 2},
    "clipped": {"clip": 0.1, "optimizer": {"weight_decay": 0.1}},
    "frozen": {"frozen": ("2.weight", "4.bias")},
    "groups": {"optimizer": {"groups": [{"params": "2.*", "lr": 0.01, "momentum": 0.5}]}},
    "recomputed": {"model": "recomputed"},
    "average": {"optimizer": {"average": 0.9, "maximize": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(case: str, pool_of: PoolOf) -> None:
    compare(pool_of(2).run(call, CASES[case]), train_sharded(0, 1, **CASES[case]))


FOUR: dict[str, dict[str, Any]] = {
    "each layer": {},
    "root": {"each": False},
    "attention": {"model": "attention"},
    "pieces": {"options": {"max_factor_dim": 4}},
    "copies of shards": {"hybrid": True},
    "copies of shards, root": {"hybrid": True, "each": False, "model": "attention"},
    "columns": {"columns": True},
}


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_are_one_process(case: str, pool_of: PoolOf) -> None:
    compare(pool_of(4).run(call, FOUR[case]), train_sharded(0, 1, **FOUR[case]))


def both(rank: int, size: int, kind: str) -> tuple[Result, Result]:
    return train(rank, size, options={"kind": kind}), train_sharded(rank, size, options={"kind": kind})


@pytest.mark.parametrize("kind", ["exact", "sampled"])
@pytest.mark.parametrize("size", [2, 4])
def test_sharded_or_replicated_is_the_same(size: int, kind: str, pool_of: PoolOf) -> None:
    for replicated, sharded in pool_of(size).run(both, kind):
        for n, p in replicated["parameters"].items():
            np.testing.assert_allclose(sharded["parameters"][n], p, atol=1e-10, rtol=0)


def test_uneven_batches_leave_the_metric_of_the_whole_batch(pool_of: PoolOf) -> None:
    still = {"optimizer": {"lr": 0.0}, "steps": 6}
    found = pool_of(2).run(call, {"sizes": (11, 5), **still})
    np.testing.assert_allclose(found[0]["metric"], train_sharded(0, 1, **still)["metric"], atol=1e-10, rtol=0)


def test_one_datum_beside_many_is_refused(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(call, {"sizes": (15, 1)}):
        assert "the ranks of a sharded model have [15, 1] data" in said


def test_unlike_numbers_of_data_that_mix_are_refused(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(call, {"model": "mixing", "sizes": (11, 5)}):
        assert "each has a backward pass of its own" in said
        assert "Give each rank the same" in said


@pytest.mark.parametrize("each", [True, False])
def test_mixed_precision_stays_close(each: bool, pool_of: PoolOf) -> None:
    single = {"dtype": torch.float32, "steps": 30}
    found = pool_of(2).run(call, {"half": True, "each": each, **single})
    one = train_sharded(0, 1, **single)
    start = train_sharded(0, 1, dtype=torch.float32, steps=0 + 1, optimizer={"lr": 0.0})["parameters"]
    for n, p in one["parameters"].items():
        assert found[0]["parameters"][n].dtype == np.float32
        way = np.linalg.norm(p - start[n])
        assert np.linalg.norm(found[0]["parameters"][n] - p) < 0.25 * way, n
    scale = np.abs(one["metric"]).max()
    assert np.abs(found[0]["metric"] - one["metric"]).max() < 0.1 * scale


@pytest.mark.parametrize("bad", [(0,), (3,), (5,)])
def test_all_ranks_skip_together(bad: tuple[int, ...], pool_of: PoolOf) -> None:
    found = pool_of(2).run(call, {"bad": bad})
    for result in found:
        assert (result["info"]["skipped"], result["info"]["steps"]) == (1, 19)
        assert np.isfinite(result["metric"]).all()
        for n, p in found[0]["parameters"].items():
            assert np.isfinite(p).all()
            np.testing.assert_array_equal(result["parameters"][n], p)


# what each rank holds and sends --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_curvature_is_shared_out_in_memory(size: int, pool_of: PoolOf) -> None:
    arguments = {"model": "wide", "steps": 3, "look": False, "options": {"kind": "sampled"}}
    found = pool_of(size).run(call, arguments)
    blocks: dict[str, int] = {}
    for result in found:
        assert not set(blocks) & set(result["bytes"][1])  # each block lies at one rank alone
        blocks.update(result["bytes"][1])
    one, whole = train_sharded(0, 1, **arguments)["bytes"]
    assert blocks == whole
    # 1.05 and 1.16 of max(1/W, the largest block's share); no assignment of whole blocks does better
    shared = (
        max(sum(n for n, r in zip(whole.values(), owners) if r == rank) for rank in range(size))
        for owners in itertools.product(range(size), repeat=len(whole))
    )
    assert sum(whole.values()) == one
    assert max(result["bytes"][0] for result in found) == min(shared)


BYTES = {
    "two": (2, 2, {}),
    "four": (4, 4, {}),
    "copies": (4, 2, {"hybrid": True}),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_are_those_of_the_formula(case: str, pool_of: PoolOf) -> None:
    """Of all ranks together; `within`: ranks that a copy of the model is sharded over."""
    size, within, arguments = BYTES[case]
    found = pool_of(size).run(call, {"model": "wide", "look": False, "options": {"kind": "sampled"}, **arguments})
    info = found[0]["info"]
    refreshes, steps = info["refreshes"], info["steps"]
    sent = {k: sum(r["info"]["sent_bytes"][k] for r in found) / 8 for k in info["sent_bytes"]}
    sides = [(32, 7), *[(32, 33)] * 8]
    sums = (size - 1) * sum(o * (o + 1) / 2 + i * (i + 1) / 2 for o, i in sides)
    parameters = sum(o * i for o, i in sides)
    assert sent["statistics"] / refreshes == pytest.approx(sums, rel=0.05)
    assert sent["gradients"] / steps == pytest.approx(parameters * (1 - 1 / within), rel=0.05)
    assert sent["directions"] / steps == pytest.approx(parameters * (size - 1) / within, rel=0.05)
    assert found[0]["messages"]["gradients"] == found[0]["messages"]["directions"] == steps


# checkpoints ---------------------------------------------------------------------------------------------


def test_states_are_those_of_one_process(pool_of: PoolOf) -> None:
    """12 steps; or 6 on two ranks, and 6 more on one process, or on four ranks, from the state of the first."""
    for model in ("mlp", "moved"):
        first = {"model": model, "steps": 6, "optimizer": {"average": 0.9}}
        straight = train_sharded(0, 1, **{**first, "steps": 12})
        for result in pool_of(2).run(call, first):
            later = {**first, "start": 6, "state": result["state"]}
            for n, p in train_sharded(0, 1, **later)["parameters"].items():
                np.testing.assert_allclose(p, straight["parameters"][n], atol=1e-10, rtol=0)
        for again in pool_of(4).run(call, later):
            for n, p in again["parameters"].items():
                np.testing.assert_allclose(p, straight["parameters"][n], atol=1e-10, rtol=0)
