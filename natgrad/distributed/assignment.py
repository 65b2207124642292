"""Which rank computes what, a pure function of costs, so that all ranks find the same owners without a message.

Owners are found by longest processing time first (Graham 1969, SIAM J. Appl. Math. 17(2), 416–429): the costliest job
goes to the rank with the least to do so far. No rank does more than 4/3 of the work that the best assignment gives the
busiest one. What costs nothing to invert (diagonals) has no owner: every rank does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from natgrad.blocks.base import Block
from natgrad.linalg.block_diagonal import spans


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that each job goes to.

    >>> owners([5, 4, 3, 3, 3], 2)
    [0, 1, 1, 0, 1]
    """
    load = [0.0] * ranks
    found = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        found[job] = rank
        load[rank] += costs[job]
    return found


def work_of(costs: Sequence[float], ranks: int) -> list[float]:
    """The work of each rank, in the unit of the costs."""
    load = [0.0] * ranks
    for cost, rank in zip(costs, owners(costs, ranks)):
        load[rank] += cost
    return load


def cost_of(block: Block) -> float:
    """Multiplications of a block's inverse, from shapes alone."""
    return float(sum(cost_of_side(s) for s in block.sides()))


def cost_of_side(shape: Sequence[int]) -> int:
    """Σ w³ over the pieces of a side (…, p, d); a diagonal costs nothing."""
    if len(shape) < 2 or shape[-2] == 1:
        return 0
    return prod(shape[:-2]) * sum((stop - start) ** 3 for start, stop in spans(shape[-2], shape[-1]))


def footprint(block: Block) -> float:
    """Numbers that the owner of a block keeps: statistics, inverse and velocity."""
    return float(2 * sum(map(prod, block.sides())) + block.dimension)


def assign_owners(blocks: Sequence[Block], ranks: int) -> None:
    """Give every block that has none an owner, for good: its statistics will live there and nowhere else.

    Blocks that share a parameter share an owner. Work and memory both count: blocks go, the largest first, to the rank
    whose larger share of the two is the smallest afterwards. A pure function of the blocks and their order.
    """
    units: list[list[Block]] = []
    for block in blocks:
        touching = [u for u in units if any(set(block.names) & set(b.names) for b in u)]
        units = [u for u in units if u not in touching] + [[b for u in touching for b in u] + [block]]
    sizes = [(sum(map(cost_of, u)), sum(map(footprint, u))) for u in units]
    total = [sum(s[i] for s in sizes) or 1.0 for i in range(2)]
    shares = [tuple(s[i] / total[i] for i in range(2)) for s in sizes]
    load = [[0.0, 0.0] for _ in range(ranks)]

    def give(unit: int, rank: int) -> None:
        for block in units[unit]:
            block.owner = rank
        load[rank] = [a + b for a, b in zip(load[rank], shares[unit])]

    free = []
    for i, u in enumerate(units):
        held = next((b.owner for b in u if b.owner is not None), None)
        free.append(i) if held is None else give(i, held)
    for i in sorted(free, key=lambda j: (-max(shares[j]), j)):
        after = [(max(a + b for a, b in zip(load[r], shares[i])), sum(load[r]), r) for r in range(ranks)]
        give(i, min(after)[2])


def work_on(block: Block) -> list[tuple[float, int]]:
    """(multiplications, numbers in the result) of each of a block's jobs: kept, as jobs hold what they work on."""
    found: list[tuple[float, int]] = block.cached(
        "work", lambda: [(job.cost, job.like.numel()) for job in block.factor_jobs(1.0)]
    )
    return found
