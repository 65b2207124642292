"""A metric that is a set of blocks: the verbs, block by block.

    ĝ v: pack → block.flat → unpack,      (ĝ + λI)⁻¹ df: pack → the block's kept inverse → unpack.

Where no block lies, the metric is zero. Blocks that other ranks own are brought together by `whole`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.average import Average, Statistics
from natgrad.blocks.base import Block
from natgrad.blocks.kronecker import FULL_FACTOR_DIM, KroneckerBlock
from natgrad.distributed.assignment import assign_owners
from natgrad.distributed.strategy import Strategy
from natgrad.linalg.block_diagonal import dense_of, diagonal_of, is_diagonal
from natgrad.metric.damping import Damping, full, per_name
from natgrad.metric.metric import Metric, Vector
from natgrad.metric.stacks import stack_size


class BlockMetric(Metric):
    """The verbs of a metric whose `blocks` are known once it has seen data."""

    takes_stacks = True
    seen: int  # data
    strategy: Strategy
    _driver: Any  # the optimizer, if one drives

    @property
    def blocks(self) -> list[Block]:
        raise NotImplementedError

    def flat(self, v: Mapping[str, Tensor]) -> Vector:
        v = self.check(v, "v")
        out = {n: torch.zeros_like(t) for n, t in v.items()}
        for block in self._ready() if stack_size(v, self.parameters) != 0 else ():
            block.unpack(block.flat(block.pack(v).to(block.dtype)), out)
        return out

    def sharp(self, df: Mapping[str, Tensor], damping: Damping) -> Vector:
        given = self.dampings(damping)
        df = self.check(df, "df")
        out = {n: t / per_name(given, n) for n, t in df.items()}  # where the metric is zero
        for block in self._ready() if stack_size(df, self.parameters) != 0 else ():
            inverse = block.kept_inverse(block.damping_of(given, self.parameters))
            block.unpack(inverse.apply(block.pack(df).to(block.dtype)), out)
        return out

    def dense(self) -> Tensor:
        index = self._index()
        size = sum(p.numel() for p in self.parameters.values())
        blocks = self._ready()
        out = self._like().new_zeros(size, size)
        for block in blocks:
            where = block.pack(index)
            eye = torch.eye(where.numel(), dtype=block.dtype, device=out.device).reshape(-1, *where.shape)
            rows = where.flatten()
            out[rows[:, None], rows[None, :]] = block.flat(eye).reshape(len(rows), len(rows)).to(out.dtype)
        return out

    def diagonal(self) -> Vector:
        like = self._like()
        out = {n: torch.zeros(p.shape, dtype=p.dtype, device=like.device) for n, p in self.parameters.items()}
        for block in self._ready():
            block.unpack(block.diagonal(), out)
        return out

    def trace(self) -> Tensor:
        return torch.stack([block.trace() for block in self._ready()]).sum()

    def logdet(self, damping: Damping) -> Tensor:
        given = self.dampings(damping)
        blocks = self._ready()
        logs = {n: d.log() for n, d in full(given, self.parameters, self._like()).items()}
        rest = [d.sum() for d in logs.values()]  # as if the metric were zero
        mine = [b.logdet(b.damping_of(given, self.parameters)) - b.pack(logs).sum() for b in blocks]
        return torch.stack([*rest, *mine]).sum()

    def sample(self, damping: Damping, generator: torch.Generator | None = None) -> Vector:
        given = self.dampings(damping)
        like = self._like()
        noise = {
            n: torch.randn(p.shape, dtype=like.dtype, device=p.device, generator=generator)
            for n, p in self.parameters.items()
        }
        out = {n: z * per_name(given, n) ** -0.5 for n, z in noise.items()}
        for block in self._ready():
            d = block.damping_of(given, self.parameters)
            block.unpack(block.sample(block.pack(noise).to(block.dtype), d), out)
        return out

    def inverse_diagonal(self, damping: Damping) -> Vector:
        given = self.dampings(damping)
        out = {n: 1 / d for n, d in full(given, self.parameters, self._like()).items()}
        for block in self._ready():
            block.unpack(block.inverse_diagonal(block.damping_of(given, self.parameters)), out)
        return out

    def eigenvalues(self, name: str) -> Tensor:
        """Return the eigenvalues of the block that a parameter lies in, (d,) in descending order, without damping.

        The block may be over more than this parameter: a layer's bias shares that of its weight, and with
        structure="dense" there is one over all. Of a parameter that is used in slices with a block each they are those
        of all these blocks.

        Raises:
            ValueError: there is no such parameter, or it has no curvature.
        """
        found = self._blocks_of(name)
        if not found:
            raise ValueError(f"parameter {name!r} has no curvature, and so no block: see metric.coverage()")
        return torch.cat([b.eigenvalues().flatten() for b in found]).clamp(min=0).sort(descending=True).values

    def _blocks_of(self, name: str) -> list[Block]:
        if name not in self.parameters:
            raise ValueError(f"no parameter {name!r} in this metric; the names are {self.names}")
        return [b for b in self._ready() if name in b.names]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(U, V) of the Kronecker block of a parameter: U (d_out, d_out) from output gradients, V (d_in, d_in) from
        inputs.

        A layer's bias is the last row and column of V. A grouped convolution gives stacks (groups, …). What
        `max_factor_dim`, or the limit of 250 in training, leaves out is zero. Where a side longer than
        `natgrad.blocks.kronecker.FULL_FACTOR_DIM` is not kept whole, it comes as it is kept: its diagonal (d,), or the
        columns (p, d) of its blocks, see `natgrad.linalg.block_diagonal`.

        Raises:
            ValueError: there is no such parameter, or its block is no Kronecker product.
        """
        found = self._blocks_of(name)
        kron = [b for b in found if isinstance(b, KroneckerBlock)]
        if not kron:
            structure = found[0].structure if found else "no curvature"
            raise ValueError(
                f"the block of {name!r} is {structure!r}, which has no Kronecker factors; use structure='kfac'"
            )
        if len(kron) > 1:
            pieces = [str(p) for b in kron for p in b.pieces if p.name == name]
            raise ValueError(f"parameter {name!r} is used in {len(kron)} slices with a block each: {pieces}")
        u, v = (shown(s) for s in (kron[0].u, kron[0].v))
        return (u[0], v[0]) if u.shape[0] == 1 else (u, v)

    def _ready(self) -> list[Block]:
        if not self.seen:
            hint = (
                "train a step first"
                if self._driver is not None
                else "call update(inputs, targets) or fit(loader) first"
            )
            raise RuntimeError(f"the metric has seen no data yet; {hint}")
        if any(b.is_remote for b in self.blocks):
            raise RuntimeError(
                "the model is sharded, and each rank holds the statistics of some blocks only. Let all ranks enter "
                "`with metric.whole():` together, and ask inside; this takes the memory of all blocks"
            )
        return [b for b in self.blocks if b.statistics]

    @contextmanager
    def whole(self) -> Iterator[BlockMetric]:
        """Inside, every rank of a sharded model holds the statistics of all blocks. Collective.

        For looking at the metric (`dense`, `sharp`, `factors`, …), not for training steps. Where the model is not
        sharded there is nothing to do.
        """
        if not self.strategy.sharded:
            yield self
            return
        held = {str(i): statistics_to_plain(b.statistics) for i, b in enumerate(self.blocks) if b.statistics}
        gathered = self.strategy.union(held)
        away = [b for b in self.blocks if b.is_remote]
        try:
            for i, block in enumerate(self.blocks):
                if block in away:
                    block.statistics, block.is_remote = statistics_from_plain(gathered[str(i)]), False
                    block.version += 1
            yield self
        finally:
            for block in away:
                block.statistics, block.is_remote = {}, True
                block.forget()

    def share_out(self) -> None:
        """Let go of the statistics that other ranks own, where this rank holds them all."""
        if not self.strategy.sharded:
            return
        assign_owners(self.blocks, self.strategy.size)
        for block in self.blocks:
            if block.statistics and block.owner != self.strategy.rank:
                block.statistics, block.is_remote = {}, True
                block.forget()

    def _like(self) -> Tensor:
        name, p = next(iter(self.parameters.items()))
        return self.strategy.shards_of({name: p})[name].detach()

    def _index(self) -> dict[str, Tensor]:
        """Position in `dense` of every entry of every parameter."""
        size = sum(p.numel() for p in self.parameters.values())
        return self.flat_to_vector(torch.arange(size, device=self._like().device))


def statistics_to_plain(statistics: Statistics) -> dict[str, Any]:
    return {key: dict(vars(a)) for key, a in statistics.items()}


def statistics_from_plain(plain: Mapping[str, Any]) -> Statistics:
    return {key: Average(**fields) for key, fields in plain.items()}


def shown(side: Tensor) -> Tensor:
    """A Kronecker side as a matrix, or as it is kept where the matrix is too large."""
    if side.shape[-1] <= FULL_FACTOR_DIM:
        return dense_of(side)
    return diagonal_of(side) if is_diagonal(side) else side
