"""The default step rule where parameters are sharded: a block's owner alone has its momentum, inverse and direction.

    shards of the gradient → owner → m, u, d = G̃ u Ã, rms(d) → one sum of a few scalars → s → −η s d / size → shards

The scalars are the slope along the last step and along this one, and what failed; the scale s is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.blocks import Block
from natgrad.curvature import statistics_dtype
from natgrad.kronecker import FactorisationError
from natgrad.metric import Metric
from natgrad.normalised import VECTOR_SHARE, BlockState, dot, packed_gradient, shared_options, update_sizes
from natgrad.sharded import Shards
from natgrad.steps import Increments, Options

if TYPE_CHECKING:
    from natgrad.normalised import NormalisedStep


def update_on_shards(
    rule: NormalisedStep, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]
) -> Increments:
    """Increments of this rank's shards, given its shards of df. Collective."""
    shards: Shards = metric.shards
    blocks: list[Block] = [b for b in getattr(metric, "blocks", []) if b.known]
    active = [b for b in blocks if any(n in df for n in b.names)]
    whose = {n: b.owner for b in active for n in b.names if n in df and b.owner is not None}
    mine = [b for b in active if b.owner == shards.mine]
    for block in blocks:
        if block.owner != shards.mine:
            rule.drop(block)  # what a checkpoint said of it
    moved = _covered(rule, shards, metric, mine, df, whose, options) if active else {}
    scale = rule.scale if isinstance(rule.scale, Tensor) else next(iter(df.values())).new_ones((), dtype=torch.float32)
    out: Increments = dict(moved)
    covered = {n for b in blocks for n in b.names}
    for n, g in df.items():
        if n not in covered:
            out[n] = rule._adam.direction(n, g) * (-options[n].lr * VECTOR_SHARE * scale)
    kept = rule.info.get("kept_factors", 0)
    rule._tell(options, scale)
    rule.info["kept_factors"] = kept  # of all ranks
    return {n: d for n, d in out.items() if n in df}


def _covered(
    rule: NormalisedStep,
    shards: Shards,
    metric: Metric,
    mine: list[Block],
    df: Mapping[str, Tensor],
    whose: Mapping[str, int],
    options: Mapping[str, Options],
) -> dict[str, Tensor]:
    """Increments of the parameters that blocks cover. `mine`: the blocks of this rank."""
    whole = shards.to_owners({n: df[n] for n in whose}, whose)
    likes = {n: shards.like(n) for b in mine for n in b.names}
    grads = [packed_gradient(b, whole, likes) for b in mine]
    del whole
    states = [rule.state_of(b, g) for b, g in zip(mine, grads)]
    chosen = [shared_options(b, options) for b in mine]
    before = [p for s, g in zip(states, grads) if (p := s.slope_along(g)) is not None]
    ahead = rule.look_ahead(states, grads, chosen)
    directions, failed = directions_of(mine, states, chosen, ahead)

    told = torch.zeros(
        4 + shards.ranks.size, dtype=statistics_dtype(metric.parameters.values()), device=shards.ranks.device
    )
    rates = told.new_zeros(0)
    if mine:
        sizes = update_sizes(mine, directions)
        lrs = sizes.new_tensor([o.lr for o in chosen])
        rates = torch.where(sizes > 0, lrs / sizes, torch.zeros_like(sizes))
        slopes = torch.stack([dot(g, d) for g, d in zip(grads, directions)])
        told[0] = torch.stack(before).sum() if before else 0.0
        told[1] = len(before)
        told[2] = -(slopes * rates).sum()
        told[3] = sum(s.failures for s in states)
        told[4 + shards.mine] = float(failed is not None)
    told = shards.ranks.total(told)
    refuse_failures(told[4:], failed)
    slope = rule.slope(told)
    if float(told[1]):
        slope.learn(told[0], rule.adapt)
    slope.taken = told[2] * slope.scale
    rule.info["kept_factors"] = int(told[3])
    if mine:
        torch._foreach_mul_(directions, list((-rates * slope.scale).unbind()))
        for s, u, size, delta in zip(states, ahead, torch._foreach_norm(ahead), directions):
            s.moved(u, size, delta)
    moved: dict[str, Tensor] = {}
    for block, step in zip(mine, directions):
        for n, delta in block.named(step, likes).items():
            moved[n] = moved[n] + delta if n in moved else delta  # slices of one parameter in several blocks
    return shards.from_owners(moved, whose)


def directions_of(
    blocks: list[Block], states: list[BlockState], options: list[Options], ahead: list[Tensor]
) -> tuple[list[Tensor], FactorisationError | None]:
    """The directions of this rank's blocks, and what went wrong: other ranks have to hear of it before it is raised."""
    out, failed = [], None
    for b, s, o, u in zip(blocks, states, options, ahead):
        try:
            out.append(s.refresh(b, o.damping).apply(u))
        except FactorisationError as error:
            failed = failed or error
            out.append(torch.zeros_like(u))
    return out, failed


def refuse_failures(failures: Tensor, mine: FactorisationError | None) -> None:
    """Raise a FactorisationError on every rank if one of them has no inverse to apply."""
    ranks = failures.nonzero().flatten().tolist()
    if mine is not None:
        raise mine
    if ranks:
        raise FactorisationError(f"rank {ranks[0]} owns a block whose factor could not be inverted; it says which")
