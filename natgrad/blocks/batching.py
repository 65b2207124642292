"""Layers of one shape together: their inverses in one batched factorisation, their directions in one product.

Where sides are small, the calls cost more than the arithmetic; on a GPU every call waits for a launch
(``python -m benchmarks.kernels``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.linalg.block_diagonal import is_whole
from natgrad.linalg.inverse import Inverse, KroneckerInverse
from natgrad.linalg.kronecker import FactorisationError, damped_inverse


def alike(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions of equal keys, where there are several; None is like nothing.

    >>> alike(["a", None, "b", "a", None])
    [[0, 3]]
    """
    found: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, []).append(i)
    return [members for members in found.values() if len(members) > 1]


def kind_of(*sides: Tensor) -> Hashable:
    """What tensors must share to be stacked."""
    return sides[0].dtype, sides[0].device, *(s.shape for s in sides)


class Preconditioning(NamedTuple):
    """A block, the damping of its inverse, and its gradient in the block's coordinates; None without one."""

    block: Block
    damping: float
    gradient: Tensor | None


class Products:
    """Ũ X Ṽ of many blocks. Keeps the inverses, and the stacks of those that go together, while they are the same."""

    def __init__(self) -> None:
        self._of: list[tuple[Block, int, float]] = []  # (block, version of its statistics, damping) of each inverse
        self._inverses: list[Inverse] = []
        self._batches: list[tuple[list[int], Tensor, Tensor]] = []

    def directions(self, todo: Sequence[Preconditioning]) -> list[Tensor]:
        """Return d of each block that has a gradient.

        Missing inverses are made together, also those of blocks without a gradient: in a batch the last bits depend on
        its members, and a run that goes on from a checkpoint makes all of them at once.
        """
        asked = [t for t in todo if t.gradient is not None]
        now = [(t.block, t.block.version, t.damping) for t in asked]
        if now != self._of:
            self._of, self._inverses, self._batches = [], [], []  # old inverses go as new ones take their place
            if any(t.block.is_stale(t.damping) for t in asked):
                stale = [t for t in todo if t.block.is_stale(t.damping)]
                for t, make in zip(stale, made_together([t.block for t in stale], [t.damping for t in stale])):
                    t.block.good_inverse(t.damping, make)
            self._stack([t.block.good_inverse(t.damping) for t in asked])
            self._of = now
        return self._apply([t.gradient for t in asked if t.gradient is not None])

    def _apply(self, xs: Sequence[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for members, u, v in self._batches:
            stacked = u @ torch.stack([xs[i] for i in members]) @ v
            found.update(zip(members, stacked.unbind()))
        return [found[i] if i in found else held.apply(x) for i, (held, x) in enumerate(zip(self._inverses, xs))]

    def _stack(self, inverses: Sequence[Inverse]) -> None:
        self._inverses, self._batches = list(inverses), []
        for members in alike(map(stackable, inverses)):
            held = [inverse for i in members if isinstance(inverse := inverses[i], KroneckerInverse)]
            u, v = torch.stack([h.u for h in held]), torch.stack([h.v for h in held])
            for h, mine, other in zip(held, u.unbind(), v.unbind()):
                h.u, h.v = mine, other  # kept once
            self._batches.append((members, u, v))


def stackable(inverse: Inverse) -> Hashable:
    """What inverses must share to be applied together; None for one that goes alone."""
    if not isinstance(inverse, KroneckerInverse):
        return None
    sides = inverse.u, inverse.v
    return kind_of(*sides) if all(map(is_whole, sides)) else None


def made_together(blocks: Sequence[Block], dampings: Sequence[float]) -> list[Callable[[], Inverse] | None]:
    """For each block how to make its `relative_inverse` from what was factorised in a batch; None where nothing was."""
    jobs = [block.factor_jobs(damping) for block, damping in zip(blocks, dampings)]
    flat = [(damping, job) for damping, mine in zip(dampings, jobs) for job in mine]
    done: dict[int, Tensor | None] = {}
    for members in alike((d, kind_of(job.like)) if job.relative else None for d, job in flat):
        systems = [flat[m][1].system() for m in members]
        done.update(zip((id(flat[m][1]) for m in members), solved(systems)))
    return [
        partial(block.relative_inverse, damping, [done.get(id(job)) for job in mine])
        if any(done.get(id(job)) is not None for job in mine)
        else None
        for block, damping, mine in zip(blocks, dampings, jobs)
    ]


def solved(systems: Sequence[tuple[Tensor, float]]) -> list[Tensor | None]:
    """(M + aI)⁻¹ of each, all with one a. Those that hold NaN or Inf are left out: None, and the rest goes without."""
    try:
        return list(damped_inverse(torch.stack([m for m, _ in systems]), systems[0][1]).unbind())
    except FactorisationError:
        fine = [bool(torch.isfinite(m).all()) for m, _ in systems]
        if all(fine) or sum(fine) < 2:
            return [None] * len(systems)
        left = iter(solved([system for system, good in zip(systems, fine) if good]))
        return [next(left) if good else None for good in fine]
