"""Models sharded by ``torch.distributed.fsdp.fully_shard`` (FSDP2): where the shards lie, and how they travel.

Parameters and gradients are DTensors; everything here and above works on their local shards. A block's owner alone has
its statistics, inverse and velocity. The shards of its gradient are sent to the owner, and the shards of its direction
back, in one ``all_to_all`` each way, whatever the number of blocks:

    shards of the gradient → owner → d = G̃ g Ã, v, the increment → one sum of a few scalars → shards

With P numbers in the parameters, P_r of them in blocks that rank r owns and W ranks, rank r sends about (P − P_r)/W
numbers one way and P_r (W − 1)/W the other, so that all ranks together send 2 P (W − 1)/W numbers a step.

A mesh may be one dimension of shards or two, copies × shards: a gradient then comes to its owner from the ranks of the
owner's own copy, and a direction goes to all copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from natgrad.blocks.base import Block
from natgrad.blocks.batching import Preconditioning
from natgrad.distributed.data_parallel import DataParallel, applied
from natgrad.distributed.fsdp import REPLACE, LiveNames
from natgrad.distributed.ranks import Ranks
from natgrad.linalg.kronecker import FactorisationError


@dataclass(frozen=True)
class ShardLayout:
    """Which part of a tensor each rank of a group holds: a stretch of one dimension."""

    shape: torch.Size
    dim: int
    stretches: list[tuple[int, int]]  # (start, length) of each rank of the group
    copies: list[int]  # which copy of the whole tensor the shard of a rank belongs to

    def part(self, whole: Tensor, rank: int) -> Tensor:
        return whole.narrow(self.dim, *self.stretches[rank])

    def shape_on(self, rank: int) -> torch.Size:
        return torch.Size([*self.shape[: self.dim], self.stretches[rank][1], *self.shape[self.dim + 1 :]])


def layout_of(name: str, p: Any, ranks: Sequence[int]) -> ShardLayout:
    """Where the shards of a DTensor lie. `ranks`: the group, as global ranks.

    Raises:
        ValueError: it is shared out in another way than fully_shard does.
    """
    from torch.distributed.tensor import Replicate, Shard

    sharded = [i for i, s in enumerate(p.placements) if type(s) is Shard]
    rest = [s for i, s in enumerate(p.placements) if i not in sharded]
    if len(sharded) != 1 or not all(isinstance(s, Replicate) for s in rest):
        raise ValueError(
            f"parameter {name!r} is a DTensor placed {tuple(p.placements)}, which is tensor parallel; supported is one "
            f"sharded dimension of the mesh, and copies. {REPLACE}"
        )
    axis = sharded[0]
    mesh: Tensor = p.device_mesh.mesh
    if sorted(mesh.flatten().tolist()) != sorted(ranks):
        raise ValueError(
            f"parameter {name!r} is sharded over the ranks {mesh.flatten().tolist()} and others over {list(ranks)}; "
            "shard all modules over one mesh"
        )
    dim = p.placements[axis].dim
    size = mesh.shape[axis]
    long = -(-p.shape[dim] // size)  # as torch.chunk
    stretches, copies = [], []
    for r in ranks:
        where = (mesh == r).nonzero()[0].tolist()
        start = min(where[axis] * long, p.shape[dim])
        stretches.append((start, min(long, p.shape[dim] - start)))
        copies.append(0 if mesh.dim() == 1 else where[1 - axis])
    return ShardLayout(p.shape, dim, stretches, copies)


class FullySharded(DataParallel):
    """Ranks hold shards of the parameters, and data of their own.

    Args:
        ranks: that the parameters are sharded over.
    """

    sharded = True
    _live: LiveNames

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self.parameters: Mapping[str, Tensor] = {}
        self._members = dist.get_process_group_ranks(ranks.group)
        self._layouts: dict[str, ShardLayout] = {}
        self._travelling: dict[str, int] = {}  # {name: owner} of the gradients of this step
        self._failed: FactorisationError | None = None  # of `directions`: other ranks have to hear of it first

    def take(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        for name in parameters:
            self.layout(name)
        self._live = LiveNames(model, parameters)

    def layout(self, name: str) -> ShardLayout:
        """Return where the shards of a parameter lie."""
        if name not in self._layouts:
            self._layouts[name] = layout_of(name, self.parameters[name], self._members)
        return self._layouts[name]

    # forward passes ------------------------------------------------------------------------------------

    def parameter_names(self, parameters: Mapping[str, Tensor]) -> Mapping[int, str]:
        return self._live

    def live(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._live.by_name()

    @property
    def holds_gradients(self) -> bool:  # type: ignore[override]
        return self._live.hold_gradients

    def meet(self, fine: bool, data: int) -> bool:
        """Each backward pass of a sharded model is collective, so ranks take statistics all or none.

        Raises:
            RuntimeError: a rank has one datum and others more, so that ranks would take different backward passes.
        """
        told = self.ranks.gather([int(fine), data])
        counts = [d for _, d in told]
        self.most, self.uneven = max(counts), len(set(counts)) > 1
        if self.uneven and min(counts) == 1:
            raise RuntimeError(
                f"the ranks of a sharded model have {counts} data; with one datum the metric takes other backward "
                "passes than with several, and ranks would wait for each other. Give each rank two or more"
            )
        return all(f for f, _ in told)

    def everywhere(self, fine: bool) -> bool:
        return bool(self.ranks.all_fine(torch.tensor(fine, device=self.ranks.device)))

    # steps ---------------------------------------------------------------------------------------------

    def shards_of(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {n: local_of(t) for n, t in tensors.items()}

    def numel(self, name: str, local: Tensor) -> int:
        return self.parameters[name].numel()

    def sum_over_shards(self, squares: Tensor, names: Sequence[str]) -> Tensor:
        once = [float(self.layout(n).copies[self.rank] == 0) for n in names]  # 0 where a shard is a copy
        return self.ranks.total(squares * torch.tensor(once, device=self.ranks.device).to(squares))

    def owned(self, blocks: Sequence[Block]) -> list[Block]:
        return [b for b in blocks if b.owner == self.rank]

    def likes(self, parameters: Mapping[str, Tensor], blocks: Sequence[Block]) -> Mapping[str, Tensor]:
        names = {n for b in blocks for n in b.names}
        return {
            n: torch.zeros((), dtype=p.dtype, device=self.ranks.device).expand(p.shape)  # takes no memory
            for n, p in parameters.items()
            if n in names
        }

    def directions(self, todo: Sequence[Preconditioning]) -> list[Tensor]:
        found = []
        self._failed = None
        for t in todo:
            if t.gradient is None:
                continue
            try:
                found.append(applied(t))
            except FactorisationError as error:
                self._failed = self._failed or error
                found.append(torch.zeros_like(t.gradient))
        return found

    def totals(
        self, blocks: Sequence[Block], scalars: Tensor, by_block: Tensor | None, failures: int
    ) -> tuple[Tensor, Tensor, int]:
        first = len(scalars) + 1 + self.size
        told = scalars.new_zeros(first + len(blocks))
        told[: len(scalars)] = scalars
        told[len(scalars)] = failures
        told[len(scalars) + 1 + self.rank] = float(self._failed is not None)
        if by_block is not None:
            told[[first + i for i, b in enumerate(blocks) if b.owner == self.rank]] = by_block.to(told)
        told = self.ranks.total(told)
        failed = told[len(scalars) + 1 : first].nonzero().flatten().tolist()
        if self._failed is not None:
            raise self._failed
        if failed:
            raise FactorisationError(f"rank {failed[0]} owns a block whose factor could not be inverted; it says which")
        return told[: len(scalars)], told[first:], int(told[len(scalars)])

    def _whose(self, names: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, int]:
        """The owner of each name, the same on every rank."""
        return {n: b.owner for b in blocks for n in b.names if n in names and b.owner is not None}

    # on the way ----------------------------------------------------------------------------------------

    def to_owners(self, df: Mapping[str, Tensor], blocks: Sequence[Block]) -> Mapping[str, Tensor]:
        whose, local = self._whose(df, blocks), df
        self._travelling = whose
        whole = {n: local[n].new_empty(self.layout(n).shape) for n, r in whose.items() if r == self.rank}
        for names in by_dtype(whose, local):
            sent = {r: [n for n in names if whose[n] == r and self._gives(n, self.rank, r)] for r in self._every}
            got = {r: [n for n in names if whose[n] == self.rank and self._gives(n, r, self.rank)] for r in self._every}
            parts = {r: [self.layout(n).part(whole[n], r) for n in got[r]] for r in self._every}
            self._exchange({r: [local[n] for n in sent[r]] for r in self._every}, parts, "gradients")
        return whole

    def from_owners(self, moved: Mapping[str, Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
        whose, whole = self._travelling, moved  # the names that came in `to_owners`
        dtype = {n: self.parameters[n] for n in whose}
        local = {n: local_of(self.parameters[n]).new_empty(self.layout(n).shape_on(self.rank)) for n in whose}
        for names in by_dtype(whose, dtype):
            sent = {r: [n for n in names if whose[n] == self.rank] for r in self._every}
            got = {r: [n for n in names if whose[n] == r] for r in self._every}
            parts = {r: [self.layout(n).part(whole[n], r).to(local[n].dtype) for n in sent[r]] for r in self._every}
            self._exchange(parts, {r: [local[n] for n in got[r]] for r in self._every}, "directions")
        return local

    @property
    def _every(self) -> range:
        return range(self.ranks.size)

    def _gives(self, name: str, source: int, owner: int) -> bool:
        """Whether the shard that goes to the owner is the one of this rank: each comes from the owner's own copy."""
        copies = self.layout(name).copies
        return copies[source] == copies[owner]

    def _exchange(self, sent: Mapping[int, list[Tensor]], got: Mapping[int, list[Tensor]], what: str) -> None:
        """Fill the tensors ``got[r]`` with what rank r sent here."""
        like = next(t for ts in (*sent.values(), *got.values()) for t in ts)
        out_sizes = [sum(t.numel() for t in sent[r]) for r in self._every]
        in_sizes = [sum(t.numel() for t in got[r]) for r in self._every]
        flat = [t.reshape(-1) for r in self._every for t in sent[r]]
        outgoing = torch.cat(flat) if flat else like.new_empty(0)
        incoming = like.new_empty(sum(in_sizes))
        with self.ranks.monitor.collective(what):
            dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=self.ranks.group)
        self.ranks.sent[what] += (sum(out_sizes) - out_sizes[self.rank]) * like.element_size()
        self.ranks.messages[what] += 1
        left = iter(incoming.split([t.numel() for r in self._every for t in got[r]]))
        for r in self._every:
            for t in got[r]:
                t.copy_(next(left).reshape(t.shape))

    # states --------------------------------------------------------------------------------------------

    def whole(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        out = {}
        for n, t in local.items():
            p: Any = self.parameters[n]
            d = DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            out[n] = d.full_tensor()
        return out

    def shard(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.layout(n).part(t, self.rank).clone() for n, t in whole.items()}

    def union(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors go through host memory."""
        texts: list[Any] = [None] * self.size
        with self.ranks.monitor.collective("what each rank holds"):
            dist.all_gather_object(texts, moved_to(held, torch.device("cpu")), self.ranks.group)
        found = {k: v for text in texts for k, v in text.items()}
        return {k: moved_to(found[k], self.ranks.device) for k in sorted(found)}


def by_dtype(names: Mapping[str, int], tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names, in order, apart by dtype: a message has one."""
    out: dict[torch.dtype, list[str]] = {}
    for n in names:
        out.setdefault(tensors[n].dtype, []).append(n)
    return [out[d] for d in sorted(out, key=str)]


def moved_to(held: Any, device: torch.device) -> Any:
    """Nested dictionaries with their tensors on a device."""
    if isinstance(held, Mapping):
        return {k: moved_to(v, device) for k, v in held.items()}
    return held.detach().to(device) if isinstance(held, Tensor) else held


def local_of(t: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds, sharing its memory; other tensors as they are."""
    whole: Any = t.detach()
    local: Tensor = whole.to_local() if hasattr(t, "device_mesh") else t
    return local
