"""The arithmetic of the default step rule: from directions to increments, on lists of tensors, one entry a block.

It is what `natgrad.normalised` says in formulas, in functions of tensors and numbers. `torch.compile` makes it slower:
the checks before a compiled call cost more than fusing saves (``python -m benchmarks.kernels``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

AVERAGING = 3.0  # k: the mean is over about the last third of the steps; its origin is in docs/decisions.md
COHERENCE_GAIN = 3.0  # κ: a step is at most e³ times as long, or as short, as η says
COHERENCE_MEMORY = 0.8  # ρ: over about five steps
NEWTON_SHARE = 0.5  # ν: of the damped Newton step of a block, which a step that neither agrees nor turns back stays in


class Stepped(NamedTuple):
    coherence: tuple[Tensor, ...]  # c̄ with the new directions in it, a scalar a block
    at_newton: Tensor  # share of blocks where the Newton step is the shorter one


def step_(
    directions: list[Tensor],
    velocities: list[Tensor],
    coherence: Sequence[Tensor],
    rates: Tensor,
    units: Tensor,
    excesses: Tensor | None,
    groups: Sequence[tuple[float, float, list[int]]],
) -> Stepped:
    """Writes increments of θ over `directions`, and the next velocities over `velocities`.

    Args:
        directions: d of each block; `velocities`: v; `coherence`: c̄, scalars.
        rates: η of each block, (blocks,).
        units: what η is measured against, over ‖d‖, (blocks,).
        excesses: how many times the Newton step each direction is, (blocks,); None where that is not known.
        groups: (β, c, members).
    """
    norms = torch.stack(torch._foreach_norm(directions))
    speeds = torch.stack(torch._foreach_norm(velocities))
    along = torch.stack([dot(d, v) for d, v in zip(directions, velocities)])
    cosines = (-along / norms / speeds).nan_to_num(0, 0, 0)  # 0 where one of them is
    now = cosines.lerp(torch.stack(list(coherence)), COHERENCE_MEMORY)

    sizes = norms * units
    lengths = set_lengths = rates / sizes
    if excesses is not None:
        lengths = torch.minimum(lengths, NEWTON_SHARE / excesses)
    at_newton = (lengths < set_lengths).to(lengths).mean()
    lengths = torch.where(sizes > 0, -(COHERENCE_GAIN * now).exp() * lengths, 0.0)
    torch._foreach_mul_(directions, list(lengths.unbind()))
    for momentum, c, members in groups:
        move_([velocities[i] for i in members], [directions[i] for i in members], momentum, c)
    return Stepped(now.unbind(), at_newton)


def move_(velocities: list[Tensor], deltas: list[Tensor], momentum: float, c: float) -> None:
    """v ← v + β Δ, then increments (1 − β) Δ + c v over `deltas`, then v ← (1 − c) v."""
    torch._foreach_add_(velocities, deltas, alpha=momentum)
    torch._foreach_mul_(deltas, 1 - momentum)
    torch._foreach_add_(deltas, velocities, alpha=c)
    torch._foreach_mul_(velocities, 1 - c)


def averaging(steps: int) -> float:
    """c after so many steps."""
    return AVERAGING / (AVERAGING + steps)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
