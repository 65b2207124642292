"""Data-parallel ranks: one metric of all their data, the same on each. Nothing at all on one process.

With S_r the sums of statistics of rank r and M_r their masses, every rank holds

    Σ_r S_r / Σ_r M_r,

which is what one process finds on all the data together, however unevenly they are shared out. Ranks meet when the
metric is refreshed and at no other step:

1. an ``all_gather`` of three integers a rank: a digest of the model, the options, the schedule and the layout of the
   statistics; the number of data; whether there are any. Only where digests differ are the texts themselves gathered,
   to say what differs, or to find the layers that some ranks have used and others have not;
2. the sums, symmetric matrices as triangles, in few flat buffers, through ``all_reduce``.

A sum that is not finite on one rank is so on all ranks afterwards, so all drop it together with no further message.
The messages go through a process group of our own: if ranks ever fell out of step they would wait for each other and
time out, instead of mixing up their messages with those of DistributedDataParallel.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from natgrad.agreement import Entry, digest_of, entries_of, flattened, reconcile
from natgrad.attendance import Attendance, first_line, timeout_of
from natgrad.averages import Average, Statistics
from natgrad.curvature import Curvature, Draw, statistics_dtype
from natgrad.metric_file import block_to_json
from natgrad.ownership import settle
from natgrad.sharded import mesh_ranks
from natgrad.triangles import side_of_triangles, triangles
from natgrad.wrappers import refuse_wrappers, wrapper_of

if TYPE_CHECKING:
    from natgrad.fisher import Fisher

BUCKET = 2**22  # numbers in one message, so that packing needs little memory beside the statistics
SEED_STRIDE = 1_000_003  # between the seeds of ranks: seeds that users choose close together do not meet
NAMED = 5  # differences that one message lists
EXCHANGES = ("auto", "inverses", "directions")


class Ranks:
    """The ranks that share a metric. Making one is a collective call: all ranks of `parent` do it together.

    Args:
        parent: the process group whose ranks hold different data and the same parameters, or its global ranks.
        device: where messages live.
        exchange: what ranks send each other of the inverses, see `natgrad.ownership`.
    """

    def __init__(self, parent: Any, device: torch.device, exchange: str) -> None:
        ranks = parent if isinstance(parent, list) else dist.get_process_group_ranks(parent)
        timeout = timeout_of(dist.group.WORLD if isinstance(parent, list) else parent, device)
        try:
            self.group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"not all of the ranks {ranks} made this metric: {first_line(error)}. Every rank of the process group "
                "must build it, in the same order as other metrics"
            ) from error
        self.attendance = Attendance(self.group, ranks, timeout)
        self.rank, self.size = dist.get_rank(self.group), len(ranks)
        self.device, self.exchange = device, exchange
        self.refresh = 1  # steps between refreshes, once an optimizer drives the metric
        self.sent: Counter[str] = Counter()  # bytes a rank sent, by what they hold
        self.messages: Counter[str] = Counter()  # collectives, by what they hold

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a process group cannot be copied, and a copy of a metric has the same ranks

    def seed(self, seed: int) -> int:
        """The seed of this rank's random streams; rank 0 has that of one process."""
        return seed + SEED_STRIDE * self.rank

    # agreement -----------------------------------------------------------------------------------------

    def all_fine(self, fine: Tensor) -> Tensor:
        """Whether a condition holds on every rank. Collective."""
        flag = fine.to(torch.int32, copy=True)
        with self.attendance.meeting("whether gradients are finite"):
            dist.all_reduce(flag, dist.ReduceOp.MIN, self.group)
        self._count("agreement", flag, 2 * (self.size - 1) / self.size)
        return flag.bool()

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank. Collective."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        held = [torch.empty_like(mine) for _ in range(self.size)]
        with self.attendance.meeting("digests"):
            dist.all_gather(held, mine, self.group)
        self._count("agreement", mine, self.size - 1)
        return [h.tolist() for h in held]

    def check_same(self, said: Mapping[str, Any]) -> None:
        """Raise a RuntimeError on every rank if what they say is not the same. Collective."""
        if len({digest for (digest,) in self.gather([digest_of(said)])}) > 1:
            self.refuse_differences(self._texts(said))

    def _texts(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        texts: list[Any] = [None] * self.size
        with self.attendance.meeting("descriptions"):
            dist.all_gather_object(texts, json.dumps(said), self.group)
        return [json.loads(t) for t in texts]

    def refuse_differences(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Raise a RuntimeError that names what ranks say differently from rank 0, if they do."""
        first = flattened(said[0])
        found = []
        for rank, other in enumerate(map(flattened, said)):
            names = [n for n in dict.fromkeys([*first, *other]) if first.get(n) != other.get(n)]
            found += [
                f"{n} is {other.get(n, 'missing')} on rank {rank} and {first.get(n, 'missing')} on rank 0"
                for n in names
            ]
        if found:
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise RuntimeError(
                "the ranks do not train the same thing, so they can share no metric: "
                + "; ".join(found[:NAMED])
                + more
                + ". Build the model, the metric and the optimizer with the same options on every rank, and load "
                "checkpoints on every rank"
            )

    def total(self, numbers: Tensor) -> Tensor:
        """Few numbers, each summed over the ranks. Collective."""
        with self.attendance.meeting("totals"):
            dist.all_reduce(numbers, group=self.group)
        self._count("agreement", numbers, 2 * (self.size - 1) / self.size)
        return numbers

    # statistics ----------------------------------------------------------------------------------------

    def share(
        self, curvature: Curvature, draw: Draw, said: Mapping[str, Any], plain: bool, owned: bool = False
    ) -> Draw | None:
        """The statistics of all ranks' data from those of this rank's; None if no rank has any. Collective.

        Args:
            curvature: whose blocks they are of; it learns of layers that only other ranks have used.
            draw: the statistics of this rank, one entry a block; may be empty.
            said: what must be the same on all ranks.
            plain: sums are never divided.
            owned: the statistics of a block go to its owner alone (a model that is sharded).

        Raises:
            RuntimeError: the ranks differ in `said`, or use a layer in ways that do not fit together.
        """
        entries = entries_of(curvature.blocks, draw)
        blocks = [block_to_json(b) for b in curvature.blocks]
        told: dict[str, Any] = {"blocks": blocks, "masses": sorted(draw.masses)}
        told["entries"] = [list(vars(e).values()) for e in entries]
        answers = self.gather([digest_of({"said": said, **told}), draw.data, int(bool(entries))])
        data, sources = sum(a[1] for a in answers), told["masses"]
        if not any(a[2] for a in answers):
            return None
        if len({a[0] for a in answers}) > 1:
            texts = self._texts({"said": said, **told})
            self.refuse_differences([t["said"] for t in texts])
            entries, sources = reconcile(curvature, texts)
        if owned:
            settle(curvature.blocks, self.size)
        return self._summed(curvature, draw, entries, sources, data, plain, owned)

    def _summed(
        self,
        curvature: Curvature,
        draw: Draw,
        entries: list[Entry],
        sources: list[str],
        data: int,
        plain: bool,
        owned: bool,
    ) -> Draw:
        dtype = statistics_dtype(curvature.parameters.values())
        mine = {(curvature.blocks.index(b), k): a for b, new in draw.statistics for k, a in new.items()}
        empty = Average()
        pieces, rebuild = [], []
        for e in entries:
            held, block = mine.get((e.block, e.key), empty), curvature.blocks[e.block]
            symmetric = block.is_symmetric(e.key)
            total = held.sums.get(e.source)
            total = torch.zeros(e.shape, dtype=dtype, device=self.device) if total is None else total
            pieces.append(triangles(total) if symmetric else total.flatten())
            rebuild.append((e, symmetric))
            if e.mass is not None:
                mass = held.masses.get(e.source)
                mass = torch.zeros(e.mass, dtype=dtype, device=self.device) if mass is None else mass
                pieces.append(mass.to(dtype).flatten())
        zero = torch.zeros((), dtype=dtype, device=self.device)
        nats = torch.stack([zero, zero]) if draw.nats is None else draw.nats.to(zero)
        pieces.append(torch.stack([*nats, *(draw.masses.get(s, zero).to(zero) for s in sources)]))
        if owned:
            whose = [curvature.blocks[e.block].owner for e, _ in rebuild for _ in range(1 + (e.mass is not None))]
            summed = [*self.owner_sum(pieces[:-1], whose, "statistics"), self.total(pieces[-1])]
        else:
            summed = self.all_sum(pieces, "statistics")
        left = iter(summed)
        read = [(e, next(left), s, next(left) if e.mass is not None else None) for e, s in rebuild]
        nats, masses = summed[-1][:2], dict(zip(sources, summed[-1][2:].unbind()))
        here = [curvature.blocks[e.block].owner == self.rank or not owned for e in entries]
        elsewhere = dict.fromkeys(curvature.blocks[e.block] for e, held_here in zip(entries, here) if not held_here)
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
        found = [(curvature.blocks[i], new) for i, new in statistics.items()]
        return Draw(found, data, masses, list(elsewhere), nats)

    def all_sum(self, pieces: Sequence[Tensor], what: str) -> list[Tensor]:
        """Flat tensors of one dtype, each summed over the ranks, in messages of about `BUCKET` numbers."""
        buckets: list[list[Tensor]] = [[]]
        for piece in pieces:
            if sum(t.numel() for t in buckets[-1]) >= BUCKET:
                buckets.append([])
            buckets[-1].append(piece)
        flat = [torch.cat(bucket) for bucket in buckets]
        with self.attendance.meeting(what):
            works = [dist.all_reduce(f, group=self.group, async_op=True) for f in flat]
            for work in works:
                work.wait()
        for f in flat:
            self._count(what, f, 2 * (self.size - 1) / self.size)
        return [t for f, bucket in zip(flat, buckets) for t in f.split([p.numel() for p in bucket])]

    def owner_sum(self, pieces: Sequence[Tensor], whose: Sequence[int | None], what: str) -> list[Tensor]:
        """Flat tensors, each summed over the ranks at its owner alone; elsewhere what comes back means nothing."""
        out = list(pieces)
        for rank in range(self.size):
            theirs = [i for i, r in enumerate(whose) if r == rank]
            while theirs:
                taken, size = 0, 0
                while taken < len(theirs) and (not taken or size < BUCKET):
                    size += pieces[theirs[taken]].numel()
                    taken += 1
                some, theirs = theirs[:taken], theirs[taken:]
                flat = torch.cat([pieces[i] for i in some])
                with self.attendance.meeting(what):
                    dist.reduce(flat, dist.get_global_rank(self.group, rank), group=self.group)
                self._count(what, flat, float(rank != self.rank))
                for i, t in zip(some, flat.split([pieces[i].numel() for i in some])):
                    out[i] = t
        return out

    def broadcast(self, pieces: Sequence[Sequence[Tensor]], what: str) -> None:
        """Fill the tensors ``pieces[r]`` of every rank with those of rank r, one message a rank that has any."""
        flat = [torch.cat([t.flatten() for t in ts]) if ts else None for ts in pieces]
        with self.attendance.meeting(what):
            works = []
            for r, f in enumerate(flat):
                if f is not None:
                    source = dist.get_global_rank(self.group, r)
                    works.append(dist.broadcast(f, source, group=self.group, async_op=True))
                    self._count(what, f, 1.0)
            for work in works:
                work.wait()
        for f, ts in zip(flat, pieces):
            if f is not None:
                for t, new in zip(ts, f.split([t.numel() for t in ts])):
                    t.copy_(new.reshape(t.shape))

    def _count(self, what: str, message: Tensor, times: float) -> None:
        self.sent[what] += round(message.numel() * message.element_size() * times)
        self.messages[what] += 1

    @property
    def info(self) -> dict[str, Any]:
        """For ``opt.info``: bytes that went through the collectives so far, by what they held."""
        return {"sent_bytes": dict(self.sent)}


# which ranks there are -----------------------------------------------------------------------------------


def ranks_of(model: nn.Module, process_group: Any, device: torch.device, exchange: str) -> Ranks | None:
    """The ranks that `model` is trained on, from its DistributedDataParallel wrapper or from the mesh that it is
    sharded over; None on one process.

    Raises:
        ValueError: an unknown `exchange`, or a wrapper that is not supported (the message says what to use instead).
        RuntimeError: several processes were started, or a group was given, but no process group is initialised.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"unknown exchange {exchange!r}; there are {', '.join(map(repr, EXCHANGES))}")
    refuse_wrappers(model)
    sharded = mesh_ranks(model)
    if not (dist.is_available() and dist.is_initialized()):
        if wrapper_of(model) is not None:
            raise RuntimeError(
                "the model is wrapped in DistributedDataParallel, but no process group is initialised any more. Make "
                "the metric before destroy_process_group(), or give Fisher the model inside the wrapper, model.module"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        launched = dist.is_available() and dist.is_torchelastic_launched()
        if process_group is not None or (launched and started > 1):
            why = "a process_group was given" if process_group is not None else f"torchrun started {started} processes"
            raise RuntimeError(
                f"{why}, but no process group is initialised: each process would train a model of its own. Call "
                "torch.distributed.init_process_group() first and wrap the model in DistributedDataParallel"
            )
        return None
    if sharded is not None:
        if process_group is not None:
            raise ValueError("process_group= is for models that are not sharded; those have the ranks of their mesh")
        if exchange != "auto":
            raise ValueError(
                f"exchange={exchange!r} is for models that every rank holds whole; of a sharded model the owner of a "
                "block sends its direction, always. Leave exchange= out"
            )
        return Ranks(sharded, device, exchange)
    parent = process_group if process_group is not None else getattr(wrapper_of(model), "process_group", None)
    if parent is None:
        if dist.get_world_size() > 1:
            warnings.warn(
                f"there are {dist.get_world_size()} processes, but the model is not wrapped in "
                "DistributedDataParallel, so each has a metric of its own data alone. Give Fisher the wrapped model, "
                "or process_group= where gradients are averaged by hand",
                stacklevel=4,
            )
        return None
    return Ranks(parent, device, exchange) if dist.get_world_size(parent) > 1 else None


def described(metric: Fisher) -> dict[str, Any]:
    """What must be the same on every rank."""
    found = {
        "parameter": {n: [list(p.shape), str(p.dtype)] for n, p in metric.parameters.items()},
        "criterion": f"{metric.reading.name}, reduction {metric.reading.reduction}",
        "kind": metric.kind,
        "samples": metric.samples,
        "structure": {n: metric.curvature.structure_of(n) for n in metric.parameters},
        "sharing": {n: metric.curvature.sharing_of(n) for n in metric.parameters},
        "max_side": {n: metric.curvature.max_side_of(n) for n in metric.parameters},
        "max_positions": metric.curvature.max_positions,
    }
    return found if metric._driver is None else {**found, "optimizer": metric._driver.schedule}
