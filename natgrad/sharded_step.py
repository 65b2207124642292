"""The default step rule where parameters are sharded: a block's owner alone has its velocity, inverse and direction.

    shards of the gradient → owner → d = G̃ g Ã, v, the increment → one sum of a few scalars → shards

The scalars are how far the step is to move the predictions, what failed, and how far each block goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.blocks import Block
from natgrad.curvature import statistics_dtype
from natgrad.kronecker import FactorisationError
from natgrad.metric import Metric
from natgrad.normalised import VECTOR_SHARE, BlockState, look, packed_gradient, shared_options
from natgrad.sharded import Shards, local_of
from natgrad.step_arithmetic import Lengths, bound, in_nats
from natgrad.steps import Increments, Options

if TYPE_CHECKING:
    from natgrad.normalised import NormalisedStep


def update_on_shards(
    rule: NormalisedStep, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]
) -> Increments:
    """Return increments of this rank's shards, given its shards of df. Collective."""
    shards: Shards = metric.shards
    blocks: list[Block] = [b for b in getattr(metric, "blocks", []) if b.known]
    active = [b for b in blocks if any(n in df for n in b.names)]
    for block in blocks:
        if block.owner != shards.mine:
            rule.drop(block)  # what a checkpoint said of it
    rule.rescale([b for b in blocks if b.statistics], metric.gradient_share)
    moved: dict[str, Tensor] = {}
    if active:
        weights = {n: local_of(p) for n, p in metric.parameters.items()}
        sizes = rule.weight_sizes(active, weights) if rule.refreshed else {}
        moved, ways = _covered(rule, shards, metric, active, df, sizes, options)
        moved = rule.decayed(moved, weights, active, (1.0 if metric.nats is None else (128.0/metric.nats[1]).clamp(max=1).to(ways))*ways, options)
    out: Increments = dict(moved)
    covered = {n for b in blocks for n in b.names}
    for n, g in df.items():
        if n not in covered:
            out[n] = rule._adam.direction(n, g) * (-options[n].lr * VECTOR_SHARE)
    kept = rule.info.get("kept_factors", 0)
    rule._tell(options)
    rule.info["kept_factors"] = kept  # of all ranks
    return {n: d for n, d in out.items() if n in df}


def _covered(
    rule: NormalisedStep,
    shards: Shards,
    metric: Metric,
    active: list[Block],
    df: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    options: Mapping[str, Options],
) -> tuple[dict[str, Tensor], Tensor]:
    """Return increments of the parameters that blocks cover, and `Lengths.shares` of each block.

    Args:
        active: those blocks, of all ranks.
        sizes: rms(W) / W₀ of their matrices, where the metric was refreshed.
    """
    whose = {n: b.owner for b in active for n in b.names if n in df and b.owner is not None}
    mine = [b for b in active if b.owner == shards.mine]
    whole = shards.to_owners({n: df[n] for n in whose}, whose)
    likes = {n: shards.like(n) for b in mine for n in b.names}
    grads = [packed_gradient(b, whole, likes) for b in mine]
    del whole
    states = [rule.state_of(b, g) for b, g in zip(mine, grads)]
    chosen = [shared_options(b, options) for b in mine]
    directions, failed = directions_of(mine, states, chosen, grads)
    found = None
    if mine and failed is None:
        if rule.refreshed:
            look(states, grads, directions)
            rule.measure(mine, states, sizes)
        found = rule.lengths(mine, states, chosen, directions, grads, metric.gradient_share)
    told = _told(shards, metric, active, states, found, failed is not None)
    first = 3 + shards.ranks.size
    refuse_failures(told[3:first], failed)
    factor = bound(told[0], told[2], metric.nat)
    if found is not None:
        rule.move(states, chosen, directions, found, factor)
    rule.told = {"predicted_nats": in_nats(told[0], metric.nat)}
    rule.info["kept_factors"] = int(told[1])
    moved: dict[str, Tensor] = {}
    for block, step in zip(mine, directions):
        for n, delta in block.named(step, likes).items():
            moved[n] = moved[n] + delta if n in moved else delta  # slices of one parameter in several blocks
    return shards.from_owners(moved, whose), told[first:]


def _told(
    shards: Shards,
    metric: Metric,
    active: Sequence[Block],
    states: Sequence[BlockState],
    found: Lengths | None,
    failed: bool,
) -> Tensor:
    """Return sums over ranks: predicted nats, failures, the promise, which rank failed, and `Lengths.shares`."""
    first = 3 + shards.ranks.size
    dtype, device = statistics_dtype(metric.parameters.values()), shards.ranks.device
    told = torch.zeros(first + len(active), dtype=dtype, device=device)
    told[1] = sum(s.failures for s in states)
    told[3 + shards.mine] = float(failed)
    if found is not None:
        told[0], told[2] = found.nats, found.promise
        told[[first + i for i, b in enumerate(active) if b.owner == shards.mine]] = found.decay.to(told)
    return shards.ranks.total(told)


def directions_of(
    blocks: list[Block], states: list[BlockState], options: list[Options], grads: list[Tensor]
) -> tuple[list[Tensor], FactorisationError | None]:
    """The directions of this rank's blocks, and what went wrong: other ranks have to hear of it before it is raised."""
    out, failed = [], None
    for b, s, o, g in zip(blocks, states, options, grads):
        try:
            out.append(s.refresh(b, o.damping).apply(g))
        except FactorisationError as error:
            failed = failed or error
            out.append(torch.zeros_like(g))
    return out, failed


def refuse_failures(failures: Tensor, mine: FactorisationError | None) -> None:
    """Raise a FactorisationError on every rank if one of them has no inverse to apply."""
    ranks = failures.nonzero().flatten().tolist()
    if mine is not None:
        raise mine
    if ranks:
        raise FactorisationError(f"rank {ranks[0]} owns a block whose factor could not be inverted; it says which")
