"""Pruning: zero what the metric says costs least, then move the rest to where it costs least.

Removing entry i alone, and moving all others to compensate, raises ½‖·‖² in A = ĝ + λI by half of

    sᵢ = θᵢ² / [A⁻¹]ᵢᵢ,

its saliency (Hassibi & Stork 1993, NIPS 5, eq. 5); without the compensation it would be θᵢ² Aᵢᵢ, that of optimal brain
damage. The entries of least saliency become zero, and `natgrad.nearest` moves the others for all of them at once.
Pruning in k rounds removes an equal share of what is left in each, and takes saliencies anew from the moved weights.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.frozen import FrozenMetric, Source, frozen
from natgrad.linalg.tree import describe
from natgrad.metric.damping import Damping
from natgrad.uses.arguments import Point, damping_or_default, say_bare, values
from natgrad.uses.projection import projected

Groups = Mapping[str, int | Tensor]


def prune(
    metric: Source,
    fraction: float,
    damping: Damping | None = None,
    groups: Groups | None = None,
    rounds: int = 1,
    theta: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (masks, θ'): what to keep, {name: bool mask}, and the parameters with the rest at zero, {name: tensor}.

    Of all entries of the parameters with curvature together the given share is removed, those of least saliency. A mask
    goes into ``torch.nn.utils.prune.custom_from_mask(module, "weight", mask)`` as it is. The model is left as it was.

    Args:
        metric: an `ng.Fisher`, or the path of its file.
        fraction: of the entries to remove, from 0 to below 1; with `groups`, of the groups.
        damping: λ, absolute, or {name pattern: λ}; None takes `DAMPING` of the mean eigenvalue.
        groups: prune whole groups of these parameters, and nothing else: {name pattern: dimension} makes one group of
            each index along that dimension, as ``ln_structured`` does (0: the outputs of a layer); {name: labels}, a
            tensor of whole numbers of the parameter's shape, makes one group of all entries of a number, across
            parameters too, and keeps those below zero. A group's saliency is the sum of its entries'.
        rounds: how many times to remove a share and move the rest.
        theta: θ, {name: tensor}; None takes the present values of the parameters.

    Raises:
        RuntimeError: the metric has seen no data.
        ValueError: an argument is out of range or does not fit, or nothing would be kept.
        TypeError, FileNotFoundError: the metric is none.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise ValueError(f"fraction must be a number from 0 to below 1, the share to remove, got {fraction!r}")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, got {rounds!r}")
    held = frozen(metric, "prune")
    start = values(metric, theta, held, "prune")
    given = damping_or_default(held, damping)
    say_bare(held, "it is kept whole")
    labels = labels_of(held, groups)
    count = int((torch.cat([m.flatten() for m in labels.values()]).unique() >= 0).sum())  # of groups
    removed = round(fraction * count)
    if count == 0:
        raise ValueError("groups has no group: every entry has a label below zero, or no curvature")
    if removed == count:
        raise ValueError(f"fraction {fraction} of {count} keeps nothing; give a smaller one")
    moved = exact = {n: t.double() for n, t in start.items()}
    inverse = held.inverse_diagonal(given)
    masks = {n: torch.ones(t.shape, dtype=torch.bool, device=t.device) for n, t in start.items()}
    for k in range(1, rounds + 1):
        now = removed if k == rounds else round(count * (1 - (1 - removed / count) ** (k / rounds)))
        masks = least(labels, moved, inverse, masks, now)
        moved = projected(held, exact, masks, given)
    return masks, {n: t.to(start[n]) for n, t in moved.items()}


def labels_of(metric: FrozenMetric, groups: Any) -> Point:
    """Return the number of the group of each entry, -1 where it is in none; without groups each entry is one.

    Raises:
        TypeError, ValueError: they are no groups of the metric's parameters.
    """
    held = {n for b in metric.ready for n in b.names}
    shapes = {n: s for n, s in metric.shapes.items() if n in held}
    found = {n: torch.full(s, -1, dtype=torch.long) for n, s in metric.shapes.items()}
    if groups is None:
        first = 0
        for n, shape in shapes.items():
            found[n] = torch.arange(first, first + shape.numel()).reshape(shape)
            first += shape.numel()
        return found
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups must be a dict {{name pattern: dimension or labels}}, got {describe(groups)}")
    own = [t for t in groups.values() if isinstance(t, Tensor)]
    first = 1 + max((int(t.max()) for t in own if t.numel()), default=-1)
    for pattern, by in groups.items():
        names = [n for n in shapes if fnmatch.fnmatchcase(n, pattern)]
        if not names:
            raise ValueError(f"groups: no parameter with curvature matches {pattern!r}; there are {list(shapes)}")
        for n in names:
            shape = shapes[n]
            if isinstance(by, Tensor):
                if by.shape != shape or by.is_floating_point() or by.is_complex() or by.dtype == torch.bool:
                    raise ValueError(
                        f"groups[{pattern!r}] must be whole numbers of shape {tuple(shape)}, got {describe(by)}"
                    )
                found[n] = by.long().clamp(min=-1).cpu()
            elif isinstance(by, int) and not isinstance(by, bool) and -len(shape) <= by < len(shape):
                size, dim = shape[by], by % len(shape)
                lines = torch.arange(first, first + size).reshape([size if d == dim else 1 for d in range(len(shape))])
                found[n], first = lines.expand(shape).clone(), first + size
            else:
                raise ValueError(
                    f"groups[{pattern!r}] must be a dimension of {n}, of shape {tuple(shape)}, or labels, "
                    f"got {describe(by) if not isinstance(by, int) else by!r}"
                )
    return found


def least(labels: Point, theta: Point, inverse: Point, masks: Point, count: int) -> Point:
    """Return masks without the groups of least saliency: `count` of them, those that are gone already first."""
    names = list(theta)
    numbers = torch.cat([labels[n].flatten() for n in names])
    saliency = torch.cat([(theta[n].square() / inverse[n].to(theta[n].device)).flatten().cpu() for n in names])
    gone = torch.cat([~masks[n].flatten().cpu() for n in names])
    inside = numbers >= 0
    each, index = numbers[inside].unique(return_inverse=True)
    total = torch.zeros(len(each), dtype=torch.float64).index_add_(0, index, saliency[inside])
    total[index[gone[inside]]] = -math.inf
    out = torch.zeros(len(each), dtype=torch.bool)
    out[total.argsort(stable=True)[:count]] = True
    keep = torch.ones_like(inside)
    keep[inside] = ~out[index]
    parts = keep.split([theta[n].numel() for n in names])
    return {n: part.reshape(theta[n].shape).to(theta[n].device) for n, part in zip(names, parts)}
