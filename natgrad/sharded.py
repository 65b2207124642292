"""Models sharded by ``torch.distributed.fsdp.fully_shard`` (FSDP2): where the shards lie, and how they travel.

Parameters and gradients are DTensors; everything here and above works on their local shards. For a block of the metric
the shards of the gradient are sent to the rank that owns the block, and the shards of its direction back, in one
``all_to_all`` each way, whatever the number of blocks. With P numbers in the parameters, P_r of them in blocks that
rank r owns and W ranks, rank r sends about (P − P_r)/W numbers one way and P_r (W − 1)/W the other, so that all ranks
together send 2 P (W − 1)/W numbers a step.

A mesh may be one dimension of shards or two, copies × shards: a gradient then comes to its owner from the ranks of the
owner's own copy, and a direction goes to all copies.

During a forward pass fully_shard puts unsharded parameters, plain tensors, in the place of the DTensors. `LiveNames`
knows them by the object that fully_shard keeps for each parameter (`FSDPParam` in torch).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from natgrad.distributed import Ranks

REPLACE = "wrap the model in DistributedDataParallel, or shard it with fully_shard over data-parallel ranks alone"


@dataclass(frozen=True)
class Layout:
    """Which part of a tensor each rank of a group holds: a stretch of one dimension."""

    shape: torch.Size
    dim: int
    stretches: list[tuple[int, int]]  # (start, length) of each rank of the group
    copies: list[int]  # which copy of the whole tensor the shard of a rank belongs to

    def part(self, whole: Tensor, rank: int) -> Tensor:
        return whole.narrow(self.dim, *self.stretches[rank])

    def shape_on(self, rank: int) -> torch.Size:
        return torch.Size([*self.shape[: self.dim], self.stretches[rank][1], *self.shape[self.dim + 1 :]])

    def numel_on(self, rank: int) -> int:
        return self.shape_on(rank).numel()


def layout_of(name: str, p: Any, ranks: Sequence[int]) -> Layout:
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
    return Layout(p.shape, dim, stretches, copies)


class Shards:
    """The shards of a metric's parameters.

    Args:
        ranks: that the parameters are sharded over.
        parameters: {name: DTensor}, the metric's own dictionary: parameters that are thawed later appear in it.
    """

    def __init__(self, ranks: Ranks, parameters: Mapping[str, Tensor]) -> None:
        self.ranks, self.parameters = ranks, parameters
        self._members = dist.get_process_group_ranks(ranks.group)
        self._layouts: dict[str, Layout] = {}
        for name in parameters:
            self.layout(name)

    def __deepcopy__(self, memo: Any) -> Shards:
        return self

    def layout(self, name: str) -> Layout:
        if name not in self._layouts:
            self._layouts[name] = layout_of(name, self.parameters[name], self._members)
        return self._layouts[name]

    @property
    def mine(self) -> int:
        return self.ranks.rank

    def like(self, name: str) -> Tensor:
        """A tensor of the shape of a whole parameter that takes no memory."""
        p = self.parameters[name]
        return torch.zeros((), dtype=p.dtype, device=self.ranks.device).expand(p.shape)

    def counted(self, names: Sequence[str]) -> Tensor:
        """Return for each name 1 where this rank's shard counts in a sum over all ranks, 0 where it is a copy."""
        return torch.tensor([float(self.layout(n).copies[self.mine] == 0) for n in names], device=self.ranks.device)

    # on the way ----------------------------------------------------------------------------------------

    def to_owners(self, local: Mapping[str, Tensor], whose: Mapping[str, int]) -> dict[str, Tensor]:
        """{name: whole tensor} of the names that this rank owns, from the shards of all ranks. Collective.

        Args:
            local: this rank's shards.
            whose: {name: owner}, the same on every rank.
        """
        whole = {n: local[n].new_empty(self.layout(n).shape) for n, r in whose.items() if r == self.mine}
        for names in by_dtype(whose, local):
            sent = {r: [n for n in names if whose[n] == r and self._gives(n, self.mine, r)] for r in self._every}
            got = {r: [n for n in names if whose[n] == self.mine and self._gives(n, r, self.mine)] for r in self._every}
            parts = {r: [self.layout(n).part(whole[n], r) for n in got[r]] for r in self._every}
            self._exchange({r: [local[n] for n in sent[r]] for r in self._every}, parts, "gradients")
        return whole

    def from_owners(self, whole: Mapping[str, Tensor], whose: Mapping[str, int]) -> dict[str, Tensor]:
        """This rank's shards of the names in `whose`, from the owners' whole tensors. Collective."""
        dtype = {n: self.parameters[n] for n in whose}
        local = {n: local_of(self.parameters[n]).new_empty(self.layout(n).shape_on(self.mine)) for n in whose}
        for names in by_dtype(whose, dtype):
            sent = {r: [n for n in names if whose[n] == self.mine] for r in self._every}
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
        with self.ranks.attendance.meeting(what):
            dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=self.ranks.group)
        self.ranks.sent[what] += (sum(out_sizes) - out_sizes[self.mine]) * like.element_size()
        self.ranks.messages[what] += 1
        left = iter(incoming.split([t.numel() for r in self._every for t in got[r]]))
        for r in self._every:
            for t in got[r]:
                t.copy_(next(left).reshape(t.shape))

    # whole tensors, for checkpoints --------------------------------------------------------------------

    def whole(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on every rank from the shards of all. Collective."""
        from torch.distributed.tensor import DTensor

        out = {}
        for n, t in local.items():
            p: Any = self.parameters[n]
            d = DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            out[n] = d.full_tensor()
        return out

    def shard(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of whole tensors."""
        return {n: self.layout(n).part(t, self.mine).clone() for n, t in whole.items()}

    def named(self, name: str, held: Mapping[str, Any]) -> dict[str, Tensor]:
        """This rank's shards of several tensors that all belong to one parameter."""
        return {k: self.shard({name: t})[name] for k, t in held.items() if isinstance(t, Tensor)}

    def union(self, held: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of all ranks' dictionaries, on every rank; tensors through host memory. Collective."""
        texts: list[Any] = [None] * self.ranks.size
        with self.ranks.attendance.meeting("what each rank holds"):
            dist.all_gather_object(texts, moved(held, torch.device("cpu")), self.ranks.group)
        found = {k: v for text in texts for k, v in text.items()}
        return {k: moved(found[k], self.ranks.device) for k in sorted(found)}


def by_dtype(names: Mapping[str, int], tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names, in order, apart by dtype: a message has one."""
    out: dict[torch.dtype, list[str]] = {}
    for n in names:
        out.setdefault(tensors[n].dtype, []).append(n)
    return [out[d] for d in sorted(out, key=str)]


def moved(held: Any, device: torch.device) -> Any:
    """Nested dictionaries with their tensors on a device."""
    if isinstance(held, Mapping):
        return {k: moved(v, device) for k, v in held.items()}
    return held.detach().to(device) if isinstance(held, Tensor) else held


def local_of(t: Tensor) -> Tensor:
    """The shard of a DTensor that this rank holds, sharing its memory; other tensors as they are."""
    whole: Any = t.detach()
    local: Tensor = whole.to_local() if hasattr(t, "device_mesh") else t
    return local


# what fully_shard makes of a model ---------------------------------------------------------------------------


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that fully_shard was called on, the root first."""
    import sys

    fsdp = sys.modules.get("torch.distributed.fsdp")  # what was never imported shards nothing, and is slow to import
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def kept_parameters(model: nn.Module) -> Iterator[Any]:
    """What fully_shard keeps of each parameter."""
    seen: set[int] = set()
    for module in sharded_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield from group.fsdp_params


def mesh_ranks(model: nn.Module) -> list[int] | None:
    """Global ranks that a model is sharded over; None where fully_shard has no part in it.

    Raises:
        ValueError: something in the model is shared out in a way that is not supported; the message says what to do.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.reshard()  # after a forward pass without a backward one the root holds unsharded parameters
    mesh: Tensor | None = None
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, p in named:
        sharded = hasattr(p, "device_mesh")
        if sharded and not modules:
            raise ValueError(
                f"parameter {name!r} is a DTensor without fully_shard (tensor parallel), which is not supported; "
                + REPLACE
            )
        if modules and not sharded:
            raise ValueError(
                f"parameter {name!r} is not sharded, and others are, so nothing averages its gradient over the ranks; "
                "call fully_shard on the root module as well, without ignored_params"
            )
        mesh = p.device_mesh.mesh if sharded and mesh is None else mesh
    for kept in kept_parameters(model):
        if kept.is_dtensor:
            raise ValueError(
                f"parameter {kept._module_info.param_name!r} of a {type(kept._module_info.module).__name__} is tensor "
                f"parallel (a DTensor before fully_shard), which is not supported; {REPLACE}"
            )
        if kept.offload_to_cpu:
            raise ValueError("fully_shard(offload_policy=CPUOffloadPolicy()) is not supported; leave it out")
    return None if mesh is None else sorted(mesh.flatten().tolist())


@contextmanager
def kept_open(model: nn.Module) -> Iterator[None]:
    """A metric's own backward passes leave parameters unsharded that were so before: the loss's pass counts on it."""
    groups = [g for m in sharded_modules(model) for g in m._get_fsdp_state()._fsdp_param_groups if g.is_unsharded]
    before = [g.reshard_after_backward for g in groups]
    for g in groups:
        g.reshard_after_backward = False
    try:
        yield
    finally:
        for g, value in zip(groups, before):
            g.reshard_after_backward = value


class LiveNames(Mapping[int, str]):
    """{id of an unsharded parameter: name}: those that the forward pass works with.

    fully_shard makes them when a module runs for the first time and keeps them, so the list is complete from the second
    forward pass on, and looked through again until it is.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        names = {id(p): n for n, p in parameters.items()}
        self._waiting = [(k, n) for k in kept_parameters(model) if (n := names.get(id(k.sharded_param))) is not None]
        self._found: dict[int, str] = {}
        self._kept: list[Any] = []

    def _look(self) -> dict[int, str]:
        left = []
        for kept, name in self._waiting:
            live = getattr(kept, "_unsharded_param", None)
            if live is None:
                left.append((kept, name))
            else:
                self._found[id(live)] = name
                self._kept.append(kept)
        self._waiting = left
        return self._found

    def __getitem__(self, key: int) -> str:
        return (self._look() if self._waiting else self._found)[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())

    @property
    def hold_gradients(self) -> bool:
        """Whether gradients wait here for the last of several backward passes (`set_requires_gradient_sync`)."""
        return any(k.unsharded_accumulated_grad is not None or k._unsharded_param.grad is not None for k in self._kept)

    def by_name(self) -> dict[str, Tensor]:
        self._look()
        return {self._found[id(k._unsharded_param)]: k._unsharded_param for k in self._kept}
