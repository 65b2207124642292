"""Who computes which inverse, how much each rank does, and how many bytes are sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad.blocks.base import Block
from natgrad.blocks.kronecker import kept_rows
from natgrad.distributed.assignment import assign_owners, cost_of, footprint, owners, work_of
from natgrad.linalg import kronecker
from natgrad.linalg.block_diagonal import spans
from tests.distributed.pool import Pool
from tests.distributed.tasks import Result, build, steps_with_failures, train
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


def costs_of(sides: Sides, max_factor_dim: Any = None) -> list[float]:
    """Of the inverse of every factor, or of every piece of one; "training" is the default while an optimizer drives."""
    limit, trains = (None, True) if max_factor_dim == "training" else (max_factor_dim, False)
    kept = [(kept_rows(d, limit, trains), d) for pair in sides for d in pair]
    return [float(stop - start) ** 3 for p, d in kept if p > 1 for start, stop in spans(p, d)]


def newton_scale(costs: list[float], size: int) -> float:
    """The busiest rank's work over max(1/W, the largest factor's share)."""
    return max(work_of(costs, size)) / max(sum(costs) / size, max(costs))


@pytest.mark.parametrize("sides", [transformer(), resnet18()], ids=["transformer", "resnet18"])
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_work_is_even(sides: Sides, size: int) -> None:
    assert newton_scale(costs_of(sides), size) < 1.1


def test_where_work_is_uneven() -> None:
    """Where a few more factors of the largest size are left than ranks, some rank has one more, whoever assigns."""
    uneven = [
        {size for size in range(2, 65) if newton_scale(costs_of(sides), size) >= 1.1}
        for sides in (transformer(), resnet18())
    ]
    assert uneven == [set(range(17, 30)), {3}]


SPLIT: dict[tuple[str, Any], set[int]] = {  # where the busiest rank's work is 10 % above 1/W, of W up to 64
    ("transformer", None): {*range(17, 30), *range(34, 65)},
    ("transformer", 1536): set(range(48, 57)),
    ("transformer", 1024): {45, 52, 60, 61, 62, 63},
    ("transformer", 768): set(),
    ("transformer", 512): set(),
    ("transformer, its table diagonal", 512): set(),
    ("transformer", "training"): set(),
    ("resnet18", None): set(range(3, 65)) - {4, 5},
    ("resnet18", 1024): set(range(20, 65)) - {22, 23},
    ("resnet18", 512): {26, 29, *range(36, 60), 63, 64},
    ("resnet18", "training"): {40, *range(47, 65)},
    ("resnet18", 256): {43, *range(49, 65)},
    ("resnet18", 112): set(),
}
NETS = {"transformer": transformer(), "transformer, its table diagonal": transformer(words=1), "resnet18": resnet18()}


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_pieces_share_out_what_dominates(case: tuple[str, Any]) -> None:
    name, max_factor_dim = case
    costs = costs_of(NETS[name], max_factor_dim)
    share = {size: max(work_of(costs, size)) / sum(costs) for size in range(2, 65)}
    assert {size for size in share if share[size] * size >= 1.1} == SPLIT[case]


@pytest.mark.parametrize(
    ("name", "max_factor_dim", "uneven"),
    [
        ("transformer", 512, set()),
        ("transformer", 768, set()),
        ("resnet18", 112, set()),
        ("resnet18", 1024, {20, 21}),
        ("resnet18", 1536, {9, 12, 13, 14, 15}),
    ],
)
def test_work_in_pieces_is_even(name: str, max_factor_dim: int, uneven: set[int]) -> None:
    """Within 10 % of max(1/W, the largest piece's share)."""
    costs = costs_of(NETS[name], max_factor_dim)
    assert {size for size in range(2, 65) if newton_scale(costs, size) >= 1.1} == uneven


def test_the_assignment_is_a_function_of_the_costs() -> None:
    costs = [float(c) for c in torch.randint(1, 5, (40,)).tolist()]
    assert owners(costs, 7) == owners(list(costs), 7)
    assert set(owners(costs, 7)) == set(range(7))
    assert owners([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert owners([], 3) == []


def test_costs_of_blocks_are_those_of_their_factors() -> None:
    metric = ng.Fisher(build("mlp"), nn.CrossEntropyLoss())
    metric.update(torch.randn(4, 6, dtype=torch.float64))
    jobs = [[job.cost for job in b.factor_jobs(0.1)] for b in metric.blocks]
    assert jobs == [[8**3, 7**3], [5**3, 9**3], [3**3, 6**3]]


def test_costs_of_split_blocks_are_those_of_their_pieces() -> None:
    metric = ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), max_factor_dim=4)
    metric.update(torch.randn(4, 6, dtype=torch.float64))
    for block, (out, into) in zip(metric.blocks, SIDES):
        costs = [job.cost for job in block.factor_jobs(0.1)]
        assert costs == costs_of([(out, into)], 4)
        assert sum(costs) == cost_of(block)


# sharing the inverses ------------------------------------------------------------------------------------

EXCHANGED: dict[str, dict[str, Any]] = {
    "kfac": {},
    "pieces": {"options": {"max_factor_dim": 4}},
    "pieces, conv": {"model": "conv", "options": {"max_factor_dim": 2}},
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


def counted(rank: int, size: int, exchange: str, **options: Any) -> list[int]:
    """Sides of the factors that this rank inverts in one refresh."""
    calls: list[int] = []
    inverse = kronecker.damped_inverse

    def spied(m: torch.Tensor, damping: Any) -> torch.Tensor:
        calls.append(m.shape[-1])
        return inverse(m, damping)

    net, criterion, opt = setup({"exchange": exchange, **options})
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


def counted_in_pieces(rank: int, size: int) -> list[int]:
    return counted(rank, size, "inverses", max_factor_dim=4)


def test_each_piece_is_inverted_once(pool_of: PoolOf) -> None:
    """8 = 4 + 4, 7 = 4 + 3, 5 = 3 + 2, 9 = 3 + 3 + 3, 3, 6 = 3 + 3; no rank has a whole factor of side 9 to invert."""
    found = pool_of(4).run(counted_in_pieces)
    assert sorted(d for calls in found for d in calls) == sorted([4, 4, 4, 3, 3, 2, 3, 3, 3, 3, 3, 3])
    assert max(sum(d**3 for d in calls) for calls in found) == 4**3 + 3**3 + 3**3  # of 416; whole, one has 9³ = 729


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


def test_bytes_of_pieces_are_those_of_the_formula(pool_of: PoolOf) -> None:
    info = pool_of(2).run(call, {"options": {"exchange": "inverses", "max_factor_dim": 4}})[0]["info"]
    widths = [stop - start for pair in SIDES for d in pair for start, stop in spans(kept_rows(d, 4), d)]
    sent = {k: v / 8 / info["refreshes"] for k, v in info["sent_bytes"].items()}
    assert sent["statistics"] == pytest.approx(sum(w * (w + 1) / 2 for w in widths), rel=0.1)
    assert sent["inverses"] == sum(w * w for w in widths)


@pytest.mark.parametrize(("refresh", "expected"), [(20, "inverses"), (1, "directions")])
def test_the_default_sends_fewer_bytes(refresh: int, expected: str, pool_of: PoolOf) -> None:
    found = pool_of(2).run(call, {"optimizer": {"refresh": refresh}})
    assert expected in found[0]["info"]["sent_bytes"]


# factorisations that fail --------------------------------------------------------------------------------


def failing(rank: int, size: int, exchange: str, at: tuple[int, ...]) -> Result:
    """The owner of the 9 × 9 factor cannot invert it at some steps."""
    net, criterion, opt = setup({"exchange": exchange}, {"refresh": 1})

    def step_of(step: int) -> None:
        one_step(net, criterion, opt, step, rank, size)

    for _ in steps_with_failures(step_of, at):
        pass
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


# what no assignment can beat -----------------------------------------------------------------------------


def least(costs: list[float], size: int) -> float:
    """A bound from below on the busiest rank's work, whoever assigns.

    Besides the mean and the largest job: the jobs of the two largest sizes, b and m, alone. A rank that has k of the b
    jobs has room for (x − k b) / m of the others below a load x, so that x is too small where they do not all fit.
    """
    bound = max(sum(costs) / size, max(costs))
    top = sorted({round(c, 3) for c in costs}, reverse=True)
    # sizes within 1 % of each other count as one, the smaller
    classes: list[float] = []
    for c in top:
        if classes and classes[-1] < 1.01 * c:
            classes[-1] = min(classes[-1], c)
        else:
            classes.append(c)
    b, m = classes[0], classes[1]
    big = sum(c >= b * (1 - 1e-9) for c in costs)
    middle = sum(m * (1 - 1e-9) <= c < b * (1 - 1e-9) for c in costs)
    loads = sorted({i * b + j * m for i in range(big + 1) for j in range(middle + 1) if i + j})
    return max(bound, next(x for x in loads if fits(x * (1 + 1e-9), b, m, big, middle, size)))


def fits(x: float, b: float, m: float, big: int, middle: int, size: int) -> bool:
    """Whether so many jobs of two sizes fit below a load of x on every rank: ranks fill up with large ones first or
    spread them, and every mixture of the two is tried."""
    most = [-1] * (big + 1)  # most[k]: jobs of size m that fit beside k of size b, on the ranks so far
    most[0] = 0
    for _ in range(size):
        after = [-1] * (big + 1)
        for k, held in enumerate(most):
            if held < 0:
                continue
            for more in range(min(big - k, int(x / b)) + 1):
                after[k + more] = max(after[k + more], held + int((x - more * b) / m))
        most = after
    return most[big] >= middle


@pytest.mark.parametrize("sides", [transformer(), resnet18()], ids=["transformer", "resnet18"])
def test_no_assignment_is_much_better(sides: Sides) -> None:
    costs = costs_of(sides)
    for size in range(2, 65):
        assert max(work_of(costs, size)) < 1.1 * least(costs, size), size


# blocks of sharded models --------------------------------------------------------------------------------


class Shape(Block):
    """A block that is its shapes."""

    def __init__(self, number: int, out: int, into: int, max_factor_dim: int | None = None) -> None:
        self.owner, self.names = None, [str(number)]  # no layers: of a block only its shapes count here
        self.out, self.into, self.max_factor_dim = out, into, max_factor_dim

    @property
    def dimension(self) -> int:
        return self.out * self.into

    def sides(self) -> list[tuple[int, ...]]:
        return [(1, kept_rows(d, self.max_factor_dim), d) for d in (self.out, self.into)]


def shares(sides: Sides, size: int, max_factor_dim: int | None = None) -> list[tuple[float, float]]:
    """Work and memory of the busiest and the fullest rank: over the whole, and over max(1/W, the largest block's)."""
    blocks: list[Block] = [Shape(i, *pair, max_factor_dim) for i, pair in enumerate(sides)]
    assign_owners(blocks, size)
    out = []
    for measure in (cost_of, footprint):
        sizes = [measure(b) for b in blocks]
        most = max(sum(s for b, s in zip(blocks, sizes) if b.owner == r) for r in range(size))
        out.append((most / sum(sizes), most / max(sum(sizes) / size, max(sizes))))
    return out


EVEN_BLOCKS = {"transformer": (transformer(), (2, 4, 8)), "resnet18": (resnet18(), (2, 4, 8, 16, 32, 64))}


@pytest.mark.parametrize("case", EVEN_BLOCKS)
def test_blocks_are_shared_out_by_work_and_memory(case: str) -> None:
    sides, sizes = EVEN_BLOCKS[case]
    for size in sizes:
        (_, work), (_, memory) = shares(sides, size)
        assert memory < 1.15, size
        assert work < 1.2, size


@pytest.mark.parametrize(
    ("name", "size", "megabytes", "work"),
    [
        ("transformer", 1, 3105, 100.0),
        ("transformer", 2, 1562, 50.6),
        ("transformer", 4, 806, 26.1),
        ("transformer", 8, 406, 13.5),
        ("transformer", 16, 210, 6.9),
        ("transformer", 64, 160, 3.4),
        ("resnet18", 1, 297, 100.0),
        ("resnet18", 2, 152, 51.5),
        ("resnet18", 4, 78, 26.5),
        ("resnet18", 8, 49, 21.3),
        ("resnet18", 64, 49, 21.3),
    ],
)
def test_the_table_of_sharded_models(name: str, size: int, megabytes: int, work: float) -> None:
    """Memory of the fullest rank in float32 and the share of work of the busiest, as docs/distributed.md has them."""
    whole = sum(footprint(Shape(i, *pair)) for i, pair in enumerate(NETS[name])) * 4 / 1e6
    (busiest, _), (fullest, over) = shares(NETS[name], size)
    assert round(fullest * whole) == megabytes
    assert round(100 * busiest, 1) == work
    assert over < 1.09


@pytest.mark.parametrize(
    ("name", "max_factor_dim", "work", "memory"),
    [
        ("transformer", None, {12, 14, 15, *range(17, 31)}, {15}),
        ("transformer", 512, set(), set()),
        ("resnet18", None, {3}, {5}),
        ("resnet18", 512, set(), set()),
        ("resnet18", 1024, set(), set()),
    ],
)
def test_where_whole_blocks_are_uneven(name: str, max_factor_dim: int | None, work: set[int], memory: set[int]) -> None:
    """15 % above max(1/W, the largest block's share), of W from 2 to 64."""
    found = {size: shares(NETS[name], size, max_factor_dim) for size in range(2, 65)}
    assert {size for size, ((_, w), _) in found.items() if w >= 1.15} == work
    assert {size for size, (_, (_, m)) in found.items() if m >= 1.15} == memory


def test_blocks_keep_their_owners() -> None:
    blocks: list[Block] = [Shape(i, 8 + i, 8) for i in range(6)]
    assign_owners(blocks[:4], 2)
    before = [b.owner for b in blocks[:4]]
    assign_owners(blocks, 2)
    assert [b.owner for b in blocks[:4]] == before
    assert {b.owner for b in blocks} == {0, 1}
    again: list[Block] = [Shape(0, 8, 8), Shape(0, 9, 9), Shape(1, 4, 4)]  # two blocks of one parameter
    assign_owners(again, 2)
    assert again[0].owner == again[1].owner != again[2].owner
