"""Which cotangents to backpropagate for a kind of Fisher matrix, and which rows of a layer belong to which datum.

Every kind is a set of cotangents v on the outputs, F = (1/m) Σ_v Jᵀ v vᵀ J:

- exact      a root of the output Fisher matrix of every loss term;
- sampled    the score of a label drawn from the model for every loss term, independent across terms;
- empirical  the gradient of the observed loss of every datum.

Where data mix (graph nets, batch statistics) or sit in
another order, every datum, or for the exact kind every term, gets a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from natgrad._tree import Tensors
from natgrad.fisher.batch_axis import of_data
from natgrad.fisher.likelihoods.base import CriterionLikelihood

MAX_PASSES = 10_000  # backward passes an update may take before it is refused


def cotangents(
    likelihood: CriterionLikelihood,
    outputs: Tensors,
    output: object,
    targets: object,
    kind: str,
    samples: int,
    data: int,
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
    if apart and data * samples > MAX_PASSES:
        raise ValueError(
            f"the data mix inside the model, so each of {data} data needs a backward pass of its own "
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
        for n in range(data):
            keep = torch.zeros(data, dtype=torch.bool, device=v[0].device)
            keep[n] = True
            yield tuple(of_data(t, keep) for t in v)


def exact_cotangents(
    likelihood: CriterionLikelihood, outputs: Tensors, targets: object, data: int, apart: bool
) -> Iterator[Tensors]:
    roots = likelihood.roots(outputs, targets)
    passes = sum(r.term_count if apart else -(-r.term_count // data) for r in roots)
    if passes > MAX_PASSES:
        why = (
            "the data mix inside the model, so every loss term needs its own"
            if apart
            else "one for each output of a datum"
        )
        raise ValueError(
            f'kind="exact" would take {passes} backward passes ({why}; limit {MAX_PASSES}); use kind="sampled"'
        )
    for root in roots:
        slots = root.term_count if apart else -(-root.term_count // data)
        for slot in range(slots):
            yield root.pull(outputs, partial(in_slot, slot=slot, slots=slots))


def in_slot(terms: Tensor, slot: int, slots: int) -> Tensor:
    return terms % slots == slot
