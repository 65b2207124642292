"""Influence: what taking a training datum away would do to a measurement, to first order.

The parameters θ minimise L = (1/M) Σ_n L_n, L_n the loss summed over the terms of datum n and M the mass of all (1 for
a sum). Without datum n they move by (M ĝ)⁻¹ ∇L_n, so that a measurement m moves by

    score = ⟨∇m, (ĝ + λ)⁻¹ ∇L_n⟩ / M

(Koh & Liang 2017, arXiv:1703.04730, eq. 2, with the sign of taking away; Grosse et al. 2023, arXiv:2308.03296, §2.2 for
the Gauss–Newton matrix in place of the Hessian). Measurements are pulled back, brought through (ĝ + λ)⁻¹ and held in
full, a chunk of them at a time; training data are held as pairs (g, a) of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.covectors import forms
from natgrad.fisher.fisher import Fisher
from natgrad.fisher.likelihoods.classification import CrossEntropy
from natgrad.fisher.linearised import Linearised, check_metric, linearised
from natgrad.fisher.options import choose
from natgrad.fisher.product import ExactProduct
from natgrad.linalg.cholesky import ensure_fits
from natgrad.linalg.krylov import steps_of_conjugate_gradient
from natgrad.linalg.tree import Tensors, describe, replace_tensors
from natgrad.metric.damping import Damping, full
from natgrad.metric.metric import Metric
from natgrad.metric.progress import counted
from natgrad.metric.stacks import all_with_all, stack_size
from natgrad.uses.arguments import damping_or_default
from natgrad.uses.data import BATCH, Batches

DAMPING = 0.1  # of the mean eigenvalue, and
REFINED = 10.0  # where the exact Fisher matrix is solved with: python -m benchmarks.uses.influence
HELD = 2**27  # numbers of the measurements' gradients that are held at once: half a gigabyte in float32

Measure = Callable[[Any, Any], Tensor]


def influence(
    metric: Fisher,
    queries: Any,
    data: Any,
    damping: Damping | None = None,
    measure: Measure | None = None,
    refine: int = 0,
    by: str = "datum",
    top: int | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return by how much each query's loss rises if a training datum is taken away, to first order: (queries, data).

    Positive: the datum helps, the query's loss is higher without it. The size is that of leaving one out and training
    to the end: of a loss that is a mean over M terms the score is ⟨∇m, (ĝ + λ)⁻¹ ∇L_n⟩ / M, of a sum without 1/M, L_n
    the loss of datum n summed over its terms. So a sum and a mean give the same scores, where the damping of the sum is
    M times that of the mean. A query's loss is that of the query alone, as the criterion gives it.

    Args:
        metric: fitted on the training data, or loaded from a file.
        queries, data: loaders or datasets of (inputs, targets), or lists of batches, in a fixed order. `data` are the
            training data to score.
        damping: λ, absolute, or by name pattern. None is a tenth of the mean eigenvalue of the metric, and ten times
            the mean eigenvalue with `refine`.
        measure: (output, targets) → one number a query, (queries,), in place of its loss.
        refine: steps of conjugate gradients on the exact Fisher matrix of `data`, preconditioned by the metric. Each
            takes three passes through the model and the data for each query.
        by: "datum", or "token": the loss of each position by itself, (queries, data, positions). Costs a backward pass
            a position.
        top: return (values, indices), (queries, top) each, of the largest scores in place of all.
        chunk: queries whose gradients are held at once; `data` are run once a chunk. None takes as many as make
            2²⁷ numbers. Memory: chunk · parameters numbers, three times that with `refine`, beside the scores.
        progress: count the batches on standard error, where that is a terminal.

    Raises:
        TypeError: the metric is none of a model, or queries and data are no batches.
        ValueError: an option out of range, batches that do not fit the model, or a loader that shuffles.
        RuntimeError: the metric has seen no data, or an optimizer drives it.
        MemoryError: the scores do not fit; says how much they take.
    """
    check_scores(metric, by, top, refine, chunk, measure)
    size = sum(p.numel() for p in metric.parameters.values())
    like = next(iter(metric.parameters.values()))
    chunk = chunk or max(1, HELD // size)
    wanted, given = Batches(queries, "queries", min(chunk, BATCH)), Batches(data, "data")
    if top is None and wanted.count is not None and given.count is not None:  # said before anything is computed
        needed = wanted.count * given.count * like.element_size()
        ensure_fits(needed, f"scores of {wanted.count} queries and {given.count} data", "top=, or fewer queries", like)
    lam = damping_or_default(metric, damping, REFINED if refine else DAMPING)
    exact = ExactProduct(metric, lambda: given) if refine else None
    found: list[Tensor] = []
    best: list[Ranking] = []
    done = 0
    for stack in measurements(metric, wanted, measure, chunk):
        count = stack_size(stack, metric.parameters) or 0
        needed = (3 if refine else 1) * count * size * like.element_size()
        ensure_fits(needed, f"{count} queries at a time", "a smaller chunk=", like)
        tangents = solved(metric, stack, lam, exact, refine)
        parts, ranking = [], Ranking(top or 0)
        for inputs, targets in counted(given, f"influence on queries {done} to {done + count - 1}", progress):
            new = scores(metric, inputs, targets, tangents, by)
            if top is not None:
                ranking.add(new)
            else:
                ensure_fits(new.numel() * new.element_size(), "scores of one more batch", "top=", like)
                parts.append(new)
        done += count
        if top is None:
            found.append(joined(parts))
        else:
            best.append(ranking)
    if top is None:
        return torch.cat(found)
    return torch.cat([r.values for r in best]), torch.cat([r.indices for r in best])


def self_influence(metric: Fisher, data: Any, damping: Damping | None = None) -> Tensor:
    """Return how much each datum's own loss rises if it is taken away from the training data, to first order: (data,).

    Never negative, and large for data that only they themselves teach: rare ones, and wrong labels. It is the diagonal
    of `influence(metric, data, data)`, sign and scale as there, at the cost of two backward passes.

    Args:
        metric, data, damping: as for `influence`.

    Raises:
        TypeError, ValueError, RuntimeError: as `influence`.
    """
    check_scores(metric, "datum", None, 0, None, None)
    lam = damping_or_default(metric, damping, DAMPING)
    found = []
    for inputs, targets in Batches(data, "data"):
        with linearised(metric, inputs, targets) as lin:
            own, parts = lin.pull(loss_of_each(lin)), lin.pull(contribution(lin))
            found += [forms(metric, both, lam)[:, 0, 1] for both in zip(own, parts)]
    return torch.cat(found)


def pair(metric: Metric, df1: Mapping[str, Tensor], df2: Mapping[str, Tensor], damping: Damping) -> Tensor:
    """Return ⟨df1, (ĝ + λ)⁻¹ df2⟩, the pairing of covectors: (k1, k2) of stacks ``{name: (k, *shape)}``.

    Positive if a step down the one lowers the other. Of two vectors it is a scalar, of a stack and a vector (k,).

    Args:
        metric: any metric.
        df1, df2: covectors, as ``.grad`` has them, or stacks.
        damping: λ, absolute, or by name pattern; gradients go through it.

    Raises:
        TypeError, ValueError: they do not fit the metric's parameters, or a damping that is not positive.
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"pair takes a metric, got {describe(metric)}")
    return all_with_all(metric.check(df1, "df1"), metric.sharp(metric.check(df2, "df2"), damping), metric.parameters)


# what is asked, checked -----------------------------------------------------------------------------------


def check_scores(metric: Any, by: str, top: Any, refine: Any, chunk: Any, measure: Any) -> None:
    check_metric(metric, fitted=True)
    choose("by", by, ("datum", "token"))
    for what, value, least in (("top", top, 1), ("refine", refine, 0), ("chunk", chunk, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}")
    if top is not None and by == "token":
        raise ValueError("top= ranks data; take by='datum' with it")
    if measure is not None and not callable(measure):
        raise TypeError(f"measure= takes a callable (output, targets) → (queries,), got {describe(measure)}")


# the two covectors of a score -----------------------------------------------------------------------------


def loss_of_each(lin: Linearised) -> Tensors:
    """The gradient in the outputs of the loss of each datum alone, at the criterion's own reduction."""
    check_targets(lin)
    return lin.metric.likelihood.observed(shown(lin), lin.local, lin.targets, lin.data)


def contribution(lin: Linearised) -> Tensors:
    """The gradient in the outputs of Σ_n L_n / M: what each datum adds to the training loss."""
    check_targets(lin)
    likelihood, outputs = lin.metric.likelihood, shown(lin)
    if likelihood.coupled(outputs, lin.targets):
        raise ValueError(f"{likelihood.name} couples the data of a batch, so that no part of it is one datum's")
    total = [torch.zeros_like(o) for o in outputs]
    for source, part, out, y in likelihood.parts("exact", lin.local, lin.targets):
        own = part.outputs(out)
        leaves = tuple(o.detach().requires_grad_() for o in own)
        with torch.enable_grad():
            loss = part.sum_loss(replace_tensors(out, own, leaves), y)
        scale = likelihood.weight_of(source) / lin.metric.mass_of(source)
        for o, g in zip(own, torch.autograd.grad(loss, leaves, allow_unused=True)):
            if g is not None:
                total[next(i for i, t in enumerate(outputs) if t is o)] += scale * g
    return tuple(total)


def measured(lin: Linearised, measure: Measure) -> Tensors:
    """The gradient in the outputs of a measurement of each query.

    Raises:
        ValueError: it is not one number a query, or depends on no output.
    """
    outputs = shown(lin)
    leaves = tuple(o.detach().requires_grad_() for o in outputs)
    with torch.enable_grad():
        m = measure(replace_tensors(lin.local, outputs, leaves), lin.targets)
    if not isinstance(m, Tensor) or m.numel() != lin.data.count or m.dim() > 1:
        raise ValueError(f"measure must return one number a query, ({lin.data.count},), but returns {describe(m)}")
    if not m.requires_grad:
        raise ValueError("what measure returns does not depend on the output, or is detached from it")
    grads = torch.autograd.grad(m.sum(), leaves, allow_unused=True)
    return tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads))


def shown(lin: Linearised) -> Tensors:
    """The detached outputs; the reading of the criterion remembers what it was shown."""
    return lin.metric.likelihood.outputs(lin.local)


def check_targets(lin: Linearised) -> None:
    if lin.targets is None:
        raise ValueError(
            "influence needs the labels of queries and data: give batches of (inputs, targets), or `targets=` to the "
            "metric"
        )


def measurements(metric: Fisher, queries: Batches, measure: Measure | None, chunk: int) -> Iterator[dict[str, Tensor]]:
    """Gradients of the queries' measurements, stacks of at most `chunk`."""
    held: list[dict[str, Tensor]] = []
    room = chunk
    for inputs, targets in queries:
        with linearised(metric, inputs, targets, check=measure is None) as lin:
            for one in lin.pull(loss_of_each(lin) if measure is None else measured(lin, measure)):
                start = 0
                while start < one.count:
                    length = min(room, one.count - start)
                    held.append(one.dense(start, length))
                    start, room = start + length, room - length
                    if room == 0:
                        yield {n: torch.cat([h[n] for h in held]) for n in metric.parameters}
                        held, room = [], chunk
    if held:
        yield {n: torch.cat([h[n] for h in held]) for n in metric.parameters}


def solved(
    metric: Fisher, df: Mapping[str, Tensor], damping: Damping, exact: ExactProduct | None, steps: int
) -> dict[str, Tensor]:
    """(ĝ + λ)⁻¹ df, or some steps towards that with the exact Fisher matrix."""
    if exact is None:
        return metric.sharp(df, damping)
    parameters = metric.parameters
    names, sizes = list(parameters), [p.numel() for p in parameters.values()]

    def flat(v: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([v[n].reshape(-1, size) for n, size in zip(names, sizes)], 1)

    def named(rows: Tensor) -> dict[str, Tensor]:
        return {n: r.reshape(-1, *parameters[n].shape) for n, r in zip(names, rows.split(sizes, 1))}

    rows = flat(df)
    lam = torch.cat([d.flatten() for d in full(metric.dampings(damping), parameters, rows).values()])
    return named(
        steps_of_conjugate_gradient(
            lambda x: flat(exact(named(x))) + lam * x, rows, lambda r: flat(metric.sharp(named(r), damping)), steps
        )
    )


def scores(metric: Fisher, inputs: Any, targets: Any, tangents: Mapping[str, Tensor], by: str) -> Tensor:
    """(queries, data) or (queries, data, positions) of one batch."""
    with linearised(metric, inputs, targets) as lin:
        v = contribution(lin)
        if by == "datum":
            return torch.cat([c.against(tangents) for c in lin.pull(v)], 1)
        where, count = positions_of(lin)
        each = [lin.pull((torch.where(where == t, v[0], 0),)) for t in range(count)]
        return torch.stack([torch.cat([c.against(tangents) for c in found], 1) for found in each], -1)


def positions_of(lin: Linearised) -> tuple[Tensor, int]:
    """The position within its datum of each entry of the output, and how many there are.

    Raises:
        ValueError: there are several outputs, whose positions need not be the same.
    """
    if len(lin.outputs) != 1:
        raise ValueError("by='token' takes a model with one output; this one has " + str(len(lin.outputs)))
    f, n = lin.outputs[0], lin.data.count
    if f.dim() == 0 or (n == 1 and f.dim() == 1):
        return torch.zeros(f.shape, dtype=torch.long, device=f.device), 1
    classes = 1 if isinstance(lin.metric.likelihood, CrossEntropy) and f.dim() > 2 else f.dim() - 1
    dims = [d for d in range(1, f.dim()) if d != classes]
    inside = prod(f.shape[d] for d in dims)
    row = torch.arange(f.shape[0], device=f.device)
    row = row // n if lin.data.inner else row % max(1, f.shape[0] // n)
    own = row.reshape(-1, *[1] * (f.dim() - 1)) * inside
    index = torch.arange(inside, device=f.device).reshape([f.shape[d] if d in dims else 1 for d in range(f.dim())])
    return (own + index).expand(f.shape), inside * (f.shape[0] // n)


# putting batches together ---------------------------------------------------------------------------------


def joined(parts: list[Tensor]) -> Tensor:
    """Scores of all data; positions that a batch lacks have none, 0."""
    if parts[0].dim() == 3:
        most = max(p.shape[2] for p in parts)
        parts = [torch.nn.functional.pad(p, (0, most - p.shape[2])) for p in parts]
    return torch.cat(parts, dim=1)


class Ranking:
    """The largest scores so far, and which data they are of."""

    values: Tensor
    indices: Tensor

    def __init__(self, top: int) -> None:
        self.top, self.seen = top, 0

    def add(self, new: Tensor) -> None:
        start, self.seen = self.seen, self.seen + new.shape[1]
        index = torch.arange(start, self.seen, device=new.device).expand(new.shape)
        if start:
            new, index = torch.cat([self.values, new], 1), torch.cat([self.indices, index], 1)
        self.values, order = new.topk(min(self.top, new.shape[1]), dim=1)
        self.indices = index.gather(1, order)
