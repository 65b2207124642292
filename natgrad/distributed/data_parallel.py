"""Data-parallel ranks: one metric of all their data, the same on each.

With S_r the sums of statistics of rank r and M_r their masses, every rank holds

    Σ_r S_r / Σ_r M_r,

which is what one process finds on all the data together, however unevenly they are shared out. Ranks agree whether
their gradients are finite and share statistics when the metric is refreshed, and at no other step:

1. an ``all_gather`` of four integers a rank: a digest of the model, the options, the schedule and the layout of the
   statistics; the number of data; whether there are any; the number of labels. Only where digests differ are the texts
   themselves gathered, to say what differs, or to find the layers that some ranks have used and others have not;
2. the sums, symmetric matrices as triangles, in few flat buffers, through ``all_reduce``.

A sum that is not finite on one rank is so on all ranks afterwards, so all drop it together with no further message.

The expensive part of a refresh is the inverse of each factor. It is computed by one rank (see `assignment`) and sent to
the others, in one of two ways:

- inverses     each *factor* has an owner, or each piece of one that is kept in pieces, which broadcasts its inverse:
               Σ (d_in² + d_out²) numbers a refresh, nothing on other steps; every rank applies every inverse.
- directions   each *block* has an owner, which alone holds and applies its inverse and broadcasts the direction:
               Σ d_in d_out numbers a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks.average import Average, Statistics
from natgrad.blocks.base import Block, Job
from natgrad.blocks.batch_statistics import BatchStatistics
from natgrad.blocks.batching import Preconditioning
from natgrad.blocks.collection import BlockCollection, statistics_dtype
from natgrad.blocks.structures import block_to_json
from natgrad.distributed.assignment import assign_owners, owners, work_on
from natgrad.distributed.ddp import check_join
from natgrad.distributed.exchange import Entry, digest_of, entries_of, reconcile
from natgrad.distributed.ranks import Ranks
from natgrad.distributed.strategy import Strategy
from natgrad.linalg.inverse import Inverse
from natgrad.linalg.kronecker import FactorisationError
from natgrad.linalg.packed import side_of_triangles, triangles


class DataParallel(Strategy):
    """Every rank holds the model, and data of its own.

    Args:
        ranks: that share the metric.
        exchange: what they send each other of the inverses: "inverses", "directions", or "auto", the one with fewer
            bytes.
    """

    def __init__(self, ranks: Ranks, exchange: str = "auto") -> None:
        super().__init__()
        self.ranks, self.exchange = ranks, exchange
        self.rank, self.size = ranks.rank, ranks.size
        self._applied: list[tuple[list[str], int, float]] = []  # what the owners' inverses belong to

    def __deepcopy__(self, memo: Any) -> DataParallel:
        return self  # a process group cannot be copied, and a copy of a metric has the same ranks

    @property
    def info(self) -> dict[str, Any]:
        return self.ranks.info

    def seed(self, seed: int) -> int:
        return self.ranks.seed(seed)

    def at_step(self, step: int) -> None:
        self.ranks.monitor.moment = f"step {step}"

    def check_same(self, said: Mapping[str, Any]) -> None:
        self.ranks.check_same(said)

    def all_fine(self, model: nn.Module, fine: Tensor) -> Tensor:
        check_join(model)
        return self.ranks.all_fine(fine)

    def summed(self, numbers: Tensor) -> Tensor:
        return self.ranks.total(numbers.to(self.ranks.device)).to(numbers)

    # statistics ----------------------------------------------------------------------------------------

    def merge(
        self, collection: BlockCollection, batch: BatchStatistics, said: Callable[[], Mapping[str, Any]], plain: bool
    ) -> BatchStatistics | None:
        entries = entries_of(collection.blocks, batch)
        blocks = [block_to_json(b) for b in collection.blocks]
        told: dict[str, Any] = {"said": said(), "blocks": blocks, "masses": sorted(batch.masses)}
        told["entries"] = [list(vars(e).values()) for e in entries]
        answers = self.ranks.gather([digest_of(told), batch.data, int(bool(entries)), batch.labels])
        data, sources = sum(a[1] for a in answers), told["masses"]
        if not any(a[2] for a in answers):
            return None
        if len({a[0] for a in answers}) > 1:
            texts = self.ranks.texts(told)
            self.ranks.check_differences([t["said"] for t in texts])
            entries, sources = reconcile(collection, texts)
        if self.sharded:
            assign_owners(collection.blocks, self.size)
        summed = self._summed(collection, batch, entries, sources, data, plain)
        summed.labels = sum(a[3] for a in answers)
        return summed

    def _summed(
        self,
        collection: BlockCollection,
        batch: BatchStatistics,
        entries: list[Entry],
        sources: list[str],
        data: int,
        plain: bool,
    ) -> BatchStatistics:
        dtype = statistics_dtype(collection.parameters.values())
        mine = {(collection.blocks.index(b), k): a for b, new in batch.statistics for k, a in new.items()}
        empty = Average()
        pieces, rebuild = [], []
        for e in entries:
            held, block = mine.get((e.block, e.key), empty), collection.blocks[e.block]
            symmetric = block.is_symmetric(e.key)
            total = held.sums.get(e.source)
            total = torch.zeros(e.shape, dtype=dtype, device=self.ranks.device) if total is None else total
            pieces.append(triangles(total) if symmetric else total.flatten())
            rebuild.append((e, symmetric))
            if e.mass is not None:
                mass = held.masses.get(e.source)
                mass = torch.zeros(e.mass, dtype=dtype, device=self.ranks.device) if mass is None else mass
                pieces.append(mass.to(dtype).flatten())
        zero = torch.zeros((), dtype=dtype, device=self.ranks.device)
        nats = torch.stack([zero, zero]) if batch.nats is None else batch.nats.to(zero)
        pieces.append(torch.stack([*nats, *(batch.masses.get(s, zero).to(zero) for s in sources)]))
        if self.sharded:
            whose = [collection.blocks[e.block].owner for e, _ in rebuild for _ in range(1 + (e.mass is not None))]
            summed = [*self.ranks.owner_sum(pieces[:-1], whose, "statistics"), self.ranks.total(pieces[-1])]
        else:
            summed = self.ranks.all_sum(pieces, "statistics")
        left = iter(summed)
        read = [(e, next(left), s, next(left) if e.mass is not None else None) for e, s in rebuild]
        nats, masses = summed[-1][:2], dict(zip(sources, summed[-1][2:].unbind()))
        here = [collection.blocks[e.block].owner == self.rank or not self.sharded for e in entries]
        remote = dict.fromkeys(collection.blocks[e.block] for e, held_here in zip(entries, here) if not held_here)
        statistics: dict[int, Statistics] = {}
        for (e, flat, symmetric, own), held_here in zip(read, here):
            if not held_here:
                continue
            total = side_of_triangles(flat, e.shape) if symmetric else flat.reshape(e.shape)
            average = statistics.setdefault(e.block, {}).setdefault(e.key, Average())
            average.sums[e.source] = total
            if own is not None:
                average.masses[e.source] = own.reshape(e.mass or ())
            else:
                average.masses[e.source] = total.new_ones(()) if plain else masses[e.source]
        found = [(collection.blocks[i], new) for i, new in statistics.items()]
        return BatchStatistics(found, data, masses, list(remote), nats)

    # steps ---------------------------------------------------------------------------------------------

    def directions(self, todo: Sequence[Preconditioning]) -> list[Tensor]:
        mine = [t for t in todo if t.gradient is not None]
        blocks = [t.block for t in mine]
        if self.way(blocks) == "directions":
            now = [(t.block.names, t.block.version, t.damping) for t in mine]
            fresh, self._applied = now != self._applied, now
            return shared_directions(self.ranks, mine, fresh)
        stale = [t for t in mine if t.block.is_stale(t.damping)]
        for t, make in zip(stale, shared_inverses(self.ranks, stale)):
            t.block.good_inverse(t.damping, make)
        return [applied(t) for t in mine]

    def way(self, blocks: Sequence[Block]) -> str:
        """Return what ranks send each other: what was asked for, else the one with fewer bytes."""
        if self.exchange != "auto":
            return self.exchange
        inverses = sum(numbers for b in blocks for _, numbers in work_on(b))
        directions = sum(b.dimension for b in blocks if work_on(b))
        return "directions" if directions * self.refresh < inverses else "inverses"


def applied(todo: Preconditioning) -> Tensor:
    """Return d of a block."""
    assert todo.gradient is not None
    return todo.block.good_inverse(todo.damping).apply(todo.gradient)


def shared_inverses(ranks: Ranks, stale: Sequence[Preconditioning]) -> list[Callable[[], Inverse]]:
    """Return the inverse of each block, computed by the owners of its factors and held by all ranks. Collective.

    What comes back raises a `FactorisationError`, on every rank, where an owner's factorisation failed.
    """
    jobs = [s.block.factor_jobs(s.damping) for s in stale]
    flat = [job for of_block in jobs for job in of_block]
    whose = owners([job.cost for job in flat], ranks.size)
    results = [computed(job) if r == ranks.rank else torch.empty_like(job.like) for job, r in zip(flat, whose)]
    ranks.broadcast([[t for t, r in zip(results, whose) if r == rank] for rank in range(ranks.size)], "inverses")
    left = iter(results)
    return [assembled(s, [next(left) for _ in of_block]) for s, of_block in zip(stale, jobs)]


def computed(job: Job) -> Tensor:
    """Return the result of a job; NaN stands for a factorisation that failed, for all ranks to see."""
    try:
        return job.compute().contiguous()
    except FactorisationError:
        return torch.full_like(job.like, torch.nan)


def assembled(stale: Preconditioning, results: list[Tensor]) -> Callable[[], Inverse]:
    def inverse() -> Inverse:
        for r in results:
            if not bool(torch.isfinite(r).all()):
                raise FactorisationError(f"a factor of shape {tuple(r.shape)} could not be inverted by its owner")
        return stale.block.relative_inverse(stale.damping, results)

    return inverse


def shared_directions(ranks: Ranks, todo: Sequence[Preconditioning], check: bool) -> list[Tensor]:
    """Return the direction of each block, from the rank that owns the block. Collective.

    Args:
        check: an inverse may have failed in this call: then every rank looks.

    Raises:
        FactorisationError: an owner had no inverse to apply; raised on every rank.
    """
    costs = [sum(cost for cost, _ in work_on(t.block)) for t in todo]
    owned = [i for i, cost in enumerate(costs) if cost]
    whose = dict(zip(owned, owners([costs[i] for i in owned], ranks.size)))
    found: list[Tensor] = []
    failed: FactorisationError | None = None
    for i, t in enumerate(todo):
        assert t.gradient is not None
        if whose.get(i, ranks.rank) != ranks.rank:
            found.append(torch.empty_like(t.gradient))
            continue
        try:
            found.append(applied(t))
        except FactorisationError as error:
            failed = failed or error
            found.append(torch.full_like(t.gradient, torch.nan))
    ranks.broadcast([[found[i] for i in owned if whose[i] == r] for r in range(ranks.size)], "directions")
    if failed is not None:
        raise failed
    if check:
        for i in owned:
            if not bool(torch.isfinite(found[i]).all()):
                raise FactorisationError(
                    f"block of {todo[i].block.names}: its owner, rank {whose[i]}, has no inverse for it"
                )
    return found
