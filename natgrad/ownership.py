"""Which rank computes which inverse, and what ranks send each other of it. Used on several ranks only.

The expensive part of a refresh is the inverse of each factor, d³ multiplications for a side d. It is computed by one
rank and sent to the others, in one of two ways:

- inverses     each *factor* has an owner, or each piece of one that is kept in pieces, which broadcasts its inverse:
               Σ (d_in² + d_out²) numbers a refresh, nothing on other steps; every rank applies every inverse.
- directions   each *block* has an owner, which alone holds and applies its inverse and broadcasts the direction:
               Σ d_in d_out numbers a step.

Owners are found by longest processing time first (Graham 1969, SIAM J. Appl. Math. 17(2), 416–429): the costliest job
goes to the rank with the least to do so far. It is a pure function of the costs, so that all ranks find the same owners
without a message; no rank does more than 4/3 of the work that the best assignment gives the busiest one.

What costs nothing to invert (diagonals) has no owner: every rank does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.blocks import Block, Inverse, Job
from natgrad.kronecker import FactorisationError
from natgrad.sides import spans

if TYPE_CHECKING:
    from natgrad.distributed import Ranks


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


def settle(blocks: Sequence[Block], ranks: int) -> None:
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


@dataclass
class Stale:
    """A block whose inverse is out of date, and the jobs that make a new one."""

    block: Block
    damping: float
    jobs: list[Job]


def way_of(ranks: Ranks, blocks: Sequence[Block]) -> str:
    """What ranks send each other, "inverses" or "directions": what was asked for, else the one with fewer bytes."""
    if ranks.exchange != "auto":
        return ranks.exchange
    inverses = sum(numbers for b in blocks for _, numbers in work_on(b))
    directions = sum(b.dimension for b in blocks if work_on(b))
    return "directions" if directions * ranks.refresh < inverses else "inverses"


def work_on(block: Block) -> list[tuple[float, int]]:
    """(multiplications, numbers in the result) of each of a block's jobs: kept, as jobs hold what they work on."""
    found: list[tuple[float, int]] = block.cached(
        "work", lambda: [(job.cost, job.like.numel()) for job in block.relative_jobs(1.0)]
    )
    return found


def shared_inverses(ranks: Ranks, stale: Sequence[Stale]) -> list[Callable[[], Inverse]]:
    """The inverse of each block, computed by the owners of its factors and held by all ranks. Collective.

    What comes back raises a `FactorisationError`, on every rank, where an owner's factorisation failed.
    """
    jobs = [job for s in stale for job in s.jobs]
    whose = owners([job.cost for job in jobs], ranks.size)
    results = [computed(job) if r == ranks.rank else torch.empty_like(job.like) for job, r in zip(jobs, whose)]
    ranks.broadcast([[t for t, r in zip(results, whose) if r == rank] for rank in range(ranks.size)], "inverses")
    left = iter(results)
    return [_assembled(s, [next(left) for _ in s.jobs]) for s in stale]


def computed(job: Job) -> Tensor:
    """The result of a job; NaN stands for a factorisation that failed, for all ranks to see."""
    try:
        return job.compute().contiguous()
    except FactorisationError:
        return torch.full_like(job.like, torch.nan)


def _assembled(stale: Stale, results: list[Tensor]) -> Callable[[], Inverse]:
    def inverse() -> Inverse:
        for r in results:
            if not bool(torch.isfinite(r).all()):
                raise FactorisationError(f"a factor of shape {tuple(r.shape)} could not be inverted by its owner")
        return stale.block.relative_inverse(stale.damping, results)

    return inverse


def shared_directions(
    ranks: Ranks, blocks: Sequence[Block], find: Callable[[int], Tensor], like: Sequence[Tensor], check: bool
) -> list[Tensor]:
    """The direction of each block from the rank that owns the block. Collective.

    Args:
        find: block number → its direction, called for the blocks that this rank owns and for those without an owner.
        like: tensors of the shapes of the directions.
        check: an inverse may have failed in this call: then every rank looks.

    Raises:
        FactorisationError: an owner had no inverse to apply; raised on every rank.
    """
    costs = [sum(cost for cost, _ in work_on(b)) for b in blocks]
    owned = [i for i, cost in enumerate(costs) if cost]
    whose = dict(zip(owned, owners([costs[i] for i in owned], ranks.size)))
    found: list[Tensor] = []
    failed: FactorisationError | None = None
    for i, u in enumerate(like):
        if whose.get(i, ranks.rank) != ranks.rank:
            found.append(torch.empty_like(u))
            continue
        try:
            found.append(find(i))
        except FactorisationError as error:
            failed = failed or error
            found.append(torch.full_like(u, torch.nan))
    ranks.broadcast([[found[i] for i in owned if whose[i] == r] for r in range(ranks.size)], "directions")
    if failed is not None:
        raise failed
    if check:
        for i in owned:
            if not bool(torch.isfinite(found[i]).all()):
                raise FactorisationError(
                    f"block of {blocks[i].names}: its owner, rank {whose[i]}, has no inverse for it"
                )
    return found
