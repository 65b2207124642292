"""The ranks that share a metric, and the messages they send each other.

The messages go through a process group of our own: if ranks ever fell out of step they would wait for each other and
time out, instead of mixing up their messages with those of DistributedDataParallel.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from natgrad.distributed.exchange import digest_of, flattened
from natgrad.distributed.monitor import Monitor, first_line, timeout_of

BUCKET = 2**22  # numbers in one message, so that packing needs little memory beside the statistics
SEED_STRIDE = 1_000_003  # between the seeds of ranks: seeds that users choose close together do not meet
NAMED = 5  # differences that one message lists


class Ranks:
    """The ranks that share a metric. Making one is a collective call: all ranks of `parent` do it together.

    Args:
        parent: the process group whose ranks hold different data and the same parameters, or its global ranks.
        device: where messages live.
    """

    def __init__(self, parent: Any, device: torch.device) -> None:
        ranks = parent if isinstance(parent, list) else dist.get_process_group_ranks(parent)
        timeout = timeout_of(dist.group.WORLD if isinstance(parent, list) else parent, device)
        try:
            self.group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"not all of the ranks {ranks} made this metric: {first_line(error)}. Every rank of the process group "
                "must build it, in the same order as other metrics"
            ) from error
        self.monitor = Monitor(self.group, ranks, timeout)
        self.rank, self.size = dist.get_rank(self.group), len(ranks)
        self.device = device
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
        with self.monitor.collective("whether gradients are finite"):
            dist.all_reduce(flag, dist.ReduceOp.MIN, self.group)
        self.count("agreement", flag, 2 * (self.size - 1) / self.size)
        return flag.bool()

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank. Collective."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        held = [torch.empty_like(mine) for _ in range(self.size)]
        with self.monitor.collective("digests"):
            dist.all_gather(held, mine, self.group)
        self.count("agreement", mine, self.size - 1)
        return [h.tolist() for h in held]

    def check_same(self, said: Mapping[str, Any]) -> None:
        """Raise a RuntimeError on every rank if what they say is not the same. Collective."""
        if len({digest for (digest,) in self.gather([digest_of(said)])}) > 1:
            self.check_differences(self.texts(said))

    def texts(self, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what every rank says, as JSON has it. Collective."""
        texts: list[Any] = [None] * self.size
        with self.monitor.collective("descriptions"):
            dist.all_gather_object(texts, json.dumps(said), self.group)
        return [json.loads(t) for t in texts]

    def check_differences(self, said: Sequence[Mapping[str, Any]]) -> None:
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
        with self.monitor.collective("totals"):
            dist.all_reduce(numbers, group=self.group)
        self.count("agreement", numbers, 2 * (self.size - 1) / self.size)
        return numbers

    # many numbers --------------------------------------------------------------------------------------

    def all_sum(self, pieces: Sequence[Tensor], what: str) -> list[Tensor]:
        """Flat tensors of one dtype, each summed over the ranks, in messages of about `BUCKET` numbers."""
        buckets: list[list[Tensor]] = [[]]
        for piece in pieces:
            if sum(t.numel() for t in buckets[-1]) >= BUCKET:
                buckets.append([])
            buckets[-1].append(piece)
        flat = [torch.cat(bucket) for bucket in buckets]
        with self.monitor.collective(what):
            works = [dist.all_reduce(f, group=self.group, async_op=True) for f in flat]
            for work in works:
                work.wait()
        for f in flat:
            self.count(what, f, 2 * (self.size - 1) / self.size)
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
                with self.monitor.collective(what):
                    dist.reduce(flat, dist.get_global_rank(self.group, rank), group=self.group)
                self.count(what, flat, float(rank != self.rank))
                for i, t in zip(some, flat.split([pieces[i].numel() for i in some])):
                    out[i] = t
        return out

    def broadcast(self, pieces: Sequence[Sequence[Tensor]], what: str) -> None:
        """Fill the tensors ``pieces[r]`` of every rank with those of rank r, one message a rank that has any."""
        flat = [torch.cat([t.flatten() for t in ts]) if ts else None for ts in pieces]
        with self.monitor.collective(what):
            works = []
            for r, f in enumerate(flat):
                if f is not None:
                    source = dist.get_global_rank(self.group, r)
                    works.append(dist.broadcast(f, source, group=self.group, async_op=True))
                    self.count(what, f, 1.0)
            for work in works:
                work.wait()
        for f, ts in zip(flat, pieces):
            if f is not None:
                for t, new in zip(ts, f.split([t.numel() for t in ts])):
                    t.copy_(new.reshape(t.shape))

    def count(self, what: str, message: Tensor, times: float) -> None:
        """Note a message that this rank sends to so many others."""
        self.sent[what] += round(message.numel() * message.element_size() * times)
        self.messages[what] += 1

    @property
    def info(self) -> dict[str, Any]:
        """For ``opt.info``: bytes that went through the collectives so far, by what they held."""
        return {"sent_bytes": dict(self.sent)}
