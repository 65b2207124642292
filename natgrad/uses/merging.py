"""Merging models: the point that is nearest to all of them, each in its own metric.

    θ = (Σᵢ nᵢ ĝᵢ + λ)⁻¹ Σᵢ (nᵢ ĝᵢ + λ/k) θᵢ = argmin Σᵢ ½ ‖θ − θᵢ‖² in nᵢ ĝᵢ + λ/k

over k models, nᵢ the data that metric i was fitted on. Where −log p(Dᵢ | θ) is ½ ‖θ − θᵢ‖² in nᵢ ĝᵢ, as in a regression
with Gaussian noise, that is the model of all data together. With diagonal metrics it is Fisher-weighted averaging
(Matena & Raffel 2022, arXiv:2111.09832, eq. 3), with the input factors alone the regression mean (Jin et al. 2023,
arXiv:2212.09849, eq. 2).

Solved block by block in float64 by conjugate gradients, as (Σ nᵢ ĝᵢ + λ)(θ − θ̄) = Σ nᵢ ĝᵢ (θᵢ − θ̄) with θ̄ the mean. The
preconditioner is the inverse of the nearest block to the sum (`natgrad.blocks.sums`): where a structure is closed under
sums, one iteration does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.kronecker import KroneckerBlock
from natgrad.blocks.structures import STRUCTURES
from natgrad.blocks.sums import copied, restructured
from natgrad.fisher.frozen import FrozenMetric, Source, block_for_block, frozen, summed
from natgrad.linalg.krylov import conjugate_gradient
from natgrad.linalg.tree import describe
from natgrad.metric.metric import DENSE_PARAMETERS
from natgrad.uses.arguments import Point, point, say_bare
from natgrad.uses.projection import LIMIT, matrix_of, tolerance_of

COUNTER = "num_batches_tracked"  # the only whole number in a state_dict that models may differ in


def merge(
    models: Mapping[str, tuple[Mapping[str, Tensor], Source]], damping: float = 1e-2, structure: str | None = "input"
) -> dict[str, Tensor]:
    """Return the state_dict of one model from those of several, with the keys and dtypes of the first.

    Entries outside the metrics (buffers, frozen parameters) become their mean; a tied entry follows its parameter.

    Args:
        models: {name: (state_dict, metric)}, the metric of each model at its own parameters: an `ng.Fisher`, or the
            path of its file. All must be of one architecture.
        damping: λ over the mean eigenvalue of Σ nᵢ ĝᵢ; it pulls to the plain mean. 0 where the sum is positive
            definite.
        structure: what of the metrics is used: "input" of all but diagonal ones, "kfac" of ekfac too, "diagonal" of
            any, or None for all that they hold.

    Raises:
        TypeError: an entry is no pair of a state_dict and a metric.
        RuntimeError: a metric has seen no data.
        ValueError: state_dicts or metrics do not fit each other, the message names the differences; or a damping of 0
            leaves the sum singular.
    """
    states, metrics = checked(models)
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a finite number, zero or positive, got {damping!r}")
    if structure is not None and structure not in STRUCTURES:
        raise ValueError(f"unknown structure {structure!r}; there are {', '.join(map(repr, STRUCTURES))}, or None")
    names = list(metrics)
    if structure is not None:
        for name, metric in metrics.items():
            metrics[name] = metric.over([r for b in metric.ready for r in restructured(b, structure, metric.shapes)])
    rows = block_for_block(metrics, "these models do not merge")
    first = metrics[names[0]]
    for metric in metrics.values():
        say_bare(metric, "it becomes the mean over the models")
    thetas = [point(metrics[n], states[n], f"the state_dict of {n!r}") for n in names]
    thetas = [{n: t.double() for n, t in theta.items()} for theta in thetas]
    mean = {n: t + torch.stack([theta[n] - t for theta in thetas]).mean(0) for n, t in thetas[0].items()}
    weights = [float(metrics[n].data) for n in names]
    total = sum(float(w * metrics[n].trace()) for n, w in zip(names, weights))
    absolute = damping * total / sum(s.numel() for s in first.shapes.values())
    if absolute == 0:
        refuse_singular(first, rows)
    merged = {n: t.clone() for n, t in mean.items()}
    for row in rows:
        add_solution(row, weights, thetas, mean, absolute, first, merged)
    return assembled(states, first, merged)


def checked(models: Any) -> tuple[dict[str, Mapping[str, Any]], dict[str, FrozenMetric]]:
    """Return state_dicts and metrics by name."""
    if not isinstance(models, Mapping) or not models:
        raise TypeError(f"merge takes {{name: (state_dict, metric or path)}}, got {describe(models)}")
    states: dict[str, Mapping[str, Any]] = {}
    metrics = {}
    for name, pair in models.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], Mapping):
            raise TypeError(f"the model {name!r} must be (state_dict, metric or path), got {describe(pair)}")
        states[name] = pair[0]
        try:
            metrics[name] = frozen(pair[1], "merge")
        except (RuntimeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"the metric of {name!r}: {error}") from error
    device = next(iter(metrics.values())).device
    metrics = {n: m if m.device == device else m.copy(device) for n, m in metrics.items()}
    first = next(iter(states))
    said = [
        f"{name!r} {word} {keys}"
        for name, state in states.items()
        for word, keys in (
            ("lacks", [k for k in states[first] if k not in state]),
            ("has besides", [k for k in state if k not in states[first]]),
        )
        if keys
    ]
    if said:
        raise ValueError(f"the state_dicts have different entries; beside {first!r} " + "; ".join(said))
    return states, metrics


def refuse_singular(metric: FrozenMetric, rows: Sequence[Sequence[Block | None]]) -> None:
    """Raise a ValueError unless Σ ĝᵢ is known to be positive definite."""
    held = {n for row in rows for b in row if b is not None for n in b.names}
    if bare := [n for n in metric.shapes if n not in held]:
        raise ValueError(f"damping 0: the metrics are singular, as they have no curvature of {bare}; give a damping")
    for row in rows:
        blocks = [b for b in row if b is not None]
        if any(positive_definite(b) for b in blocks):
            continue
        total = summed([(1.0, b) for b in blocks], metric.shapes)
        if isinstance(total, KroneckerBlock) and total.structure != "input" and len(blocks) > 1:
            if total.dimension > DENSE_PARAMETERS:
                raise ValueError(
                    f"damping 0: each metric is singular in the block of {total.names}, and whether their sum is is "
                    f"not found out beyond {DENSE_PARAMETERS} entries; give a damping"
                )
            matrix = torch.stack([matrix_of(b).double() for b in blocks]).sum(0)
            fine = spread(torch.linalg.eigvalsh(matrix), total.dtype)
        else:
            fine = positive_definite(total)
        if not fine:
            raise ValueError(
                f"damping 0: the sum of the metrics is singular in the block of {total.names}: some inputs or outputs "
                "are the same for all data, or there are more than data. Give a damping, as the default 1e-2"
            )


def positive_definite(block: Block) -> bool:
    return spread(block.eigenvalues(), block.dtype)


def spread(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether the least eigenvalue is above what rounding of statistics in this dtype leaves of zero."""
    return float(values.min()) > torch.finfo(dtype).eps * len(values.flatten()) ** 0.5 * float(values.max())


def add_solution(
    row: Sequence[Block | None],
    weights: Sequence[float],
    thetas: Sequence[Point],
    mean: Point,
    damping: float,
    metric: FrozenMetric,
    into: Point,
) -> None:
    """Write θ of one block. `damping`: λ, absolute."""
    parts = [(w, copied(b, metric.shapes, torch.float64), t) for b, w, t in zip(row, weights, thetas) if b is not None]
    like = parts[0][1]
    device = metric.device
    moved = [like.pack({n: (t[n] - mean[n]).to(device) for n in like.names}) for _, _, t in parts]
    shape = moved[0].shape
    right = torch.stack([w * b.flat(x) for (w, b, _), x in zip(parts, moved)]).sum(0).flatten()
    if not bool(right.any()):
        return
    inverse = summed([(w, b) for w, b, _ in parts], metric.shapes).inverse(damping)

    def product(v: Tensor) -> Tensor:
        x = v.reshape(shape)
        return (torch.stack([w * b.flat(x) for w, b, _ in parts]).sum(0) + damping * x).flatten()

    def precondition(v: Tensor) -> Tensor:
        return inverse.apply(v.reshape(shape)).flatten()

    tolerance = max(tolerance_of(b) for b in row if b is not None)
    solution, _ = conjugate_gradient(product, right, precondition, tolerance, LIMIT)
    found = {n: torch.zeros_like(mean[n], device=device) for n in like.names}
    like.unpack(solution.reshape(shape), found)
    for n, t in found.items():
        into[n] += t.to(into[n].device)


def assembled(states: Mapping[str, Mapping[str, Any]], metric: FrozenMetric, merged: Point) -> dict[str, Tensor]:
    """Return a state_dict with merged parameters, and what is outside the metrics."""
    (first, state), *others = states.items()
    out = {}
    for key, value in state.items():
        if key in merged:
            out[key] = merged[key].to(value)
            continue
        if (tied := partner(key, states, metric)) is not None:
            out[key] = out[tied] if tied in out else merged[tied].to(value)
            continue
        out[key] = outside(key, value, {first: state, **dict(others)})
    return out


def partner(key: str, states: Mapping[str, Mapping[str, Any]], metric: FrozenMetric) -> str | None:
    """Return the parameter of the metric that an entry is tied to: the same memory, or in all models the same values,
    which are not the same in two models.
    """
    every = list(states.values())
    t = every[0][key]
    if not isinstance(t, Tensor):
        return None
    for name in metric.shapes:
        p = every[0][name]
        if p.shape != t.shape or p.dtype != t.dtype or not t.numel():
            continue
        if p.data_ptr() == t.data_ptr() and p.stride() == t.stride():
            return name
        if all(torch.equal(s[name], s[key]) for s in every) and any(not torch.equal(s[key], t) for s in every):
            return name
    return None


def outside(key: str, value: Any, states: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the mean of an entry that no metric has."""
    every = [s[key] for s in states.values()]
    if not all(isinstance(t, Tensor) for t in every):
        if all(type(t) is type(value) and t == value for t in every):
            return value
        raise ValueError(f"the entry {key!r} of the state_dicts is no tensor and differs; make it the same in all")
    if any(t.shape != value.shape for t in every):
        raise ValueError(f"the entry {key!r} has shapes {[tuple(t.shape) for t in every]} in {list(states)}")
    if all(torch.equal(t.to(value), value) for t in every):
        return value.clone()
    if value.is_floating_point():
        return (value.double() + torch.stack([t.to(value).double() - value.double() for t in every]).mean(0)).to(value)
    if key.rpartition(".")[2] == COUNTER:
        return torch.stack([t.to(value) for t in every]).amax(0)
    raise ValueError(
        f"the entry {key!r} holds {value.dtype}, which has no mean, and differs between {list(states)}; make it the "
        "same in all"
    )
