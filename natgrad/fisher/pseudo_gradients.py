"""Which cotangents to backpropagate for a kind of Fisher matrix.

Every kind is a set of cotangents v on the outputs, F = (1/m) Σ_v Jᵀ v vᵀ J:

- exact      a root of the output Fisher matrix of every loss term;
- sampled    the score of a label drawn from the model for every loss term, independent across terms;
- empirical  the gradient of the observed loss of every datum.

Where data mix (messages between nodes, batch statistics) every datum, or for the exact kind every term, gets a pass of
its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from natgrad.fisher.likelihoods.base import CriterionLikelihood
from natgrad.fisher.owners import Data
from natgrad.linalg.tree import Tensors

MAX_PASSES = 10_000  # backward passes an update may take before it is refused


def cotangents(
    likelihood: CriterionLikelihood,
    outputs: Tensors,
    output: object,
    targets: object,
    kind: str,
    samples: int,
    data: Data,
    apart: bool,
    generator: torch.Generator,
) -> Iterator[Tensors]:
    """The cotangents, one backward pass each. With `apart`, every pass belongs to one datum (exact: one term).

    Raises:
        ValueError: there would be more than `MAX_PASSES`.
    """
    if kind == "exact":
        yield from exact_cotangents(likelihood, outputs, targets, data, apart)
        return
    if apart and data.count * samples > MAX_PASSES:
        raise ValueError(
            f"the data mix inside the model, so each of {data.count} data needs a backward pass of its own "
            f'(limit {MAX_PASSES}); pass fewer data an update, or use structure="kfac"'
        )
    for _ in range(1 if kind == "empirical" else samples):
        if kind == "empirical":
            v = likelihood.observed(outputs, output, targets, data)
        else:
            v = likelihood.draw(outputs, targets, generator)
            v = v if samples == 1 else tuple(t * samples**-0.5 for t in v)
        if not apart:
            yield v
            continue
        for n in range(data.count):
            yield tuple(data.only(t, n) for t in v)


def exact_cotangents(
    likelihood: CriterionLikelihood, outputs: Tensors, targets: object, data: Data, apart: bool
) -> Iterator[Tensors]:
    roots = likelihood.roots(outputs, targets)
    passes = sum(r.term_count if apart else -(-r.term_count // data.count) for r in roots)
    if passes > MAX_PASSES:
        why = (
            "the data mix inside the model, so every loss term needs its own"
            if apart
            else "one for each output of a datum"
        )
        raise ValueError(
            f'kind="exact" would take {passes} backward passes ({why}; limit {MAX_PASSES}); use kind="sampled"'
        )
    rows = max((o.shape[0] for o in outputs[:1] if o.dim()), default=1)
    for root in roots:
        count = root.term_count
        for slot in range(count if apart else -(-count // data.count)):
            yield root.pull(outputs, partial(in_slot, slot=slot, data=None if apart else data, count=count, rows=rows))


def in_slot(terms: Tensor, slot: int, data: Data | None, count: int, rows: int) -> Tensor:
    """Which terms are number `slot` of their datum; without data, of all."""
    return (terms if data is None else data.slots(terms, count, rows)) == slot
