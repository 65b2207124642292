"""Several heads with a criterion each: the loss is the sum Σ_h w_h criterion_h(output[h], targets[h]).

The Fisher matrix is the sum of w_h times those of the heads, each divided by the mass of its own terms. Heads are
separate sources of terms for "exact" and "sampled"; for "empirical" the loss of a datum is the sum over heads, and so
is its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from natgrad.fisher.likelihoods.base import CriterionLikelihood
from natgrad.fisher.likelihoods.registry import likelihood_of
from natgrad.fisher.owners import Data
from natgrad.linalg.tree import Tensors, describe

Weight = float | Tensor | Callable[[], Any]  # of a head; a callable is asked at every refresh


class MultiHead(CriterionLikelihood):
    """A dictionary of criteria, by the key of the output that each takes."""

    def __init__(self, criteria: Mapping[str, nn.Module], weights: Mapping[str, Weight] | None = None) -> None:
        if not criteria:
            raise ValueError("the dictionary of criteria is empty; give {output key: criterion}")
        self.heads = {str(k): likelihood_of(c) for k, c in criteria.items()}
        self.criterion = criteria
        reductions = {k: h.reduction for k, h in self.heads.items()}
        if len(set(reductions.values())) > 1:
            raise ValueError(f"the criteria differ in their reduction: {reductions}; use one for all heads")
        if len({id(c) for c in criteria.values()}) < len(criteria):
            raise ValueError("two heads share one criterion module; give each head a module of its own")
        self.reduction = next(iter(reductions.values()))
        if weights is not None and not isinstance(weights, Mapping):
            raise TypeError(f"weights takes {{output key: weight}}, got {describe(weights)}")
        self.weights = dict(weights or {})
        if unknown := self.weights.keys() - self.heads.keys():
            raise ValueError(
                f"weights={{…}} names heads that there are not: {sorted(unknown)}; there are {list(self.heads)}"
            )
        for key, weight in self.weights.items():
            if not callable(weight):
                self.weight_of(key)

    def weight_of(self, source: str) -> float:
        given = self.weights.get(source, 1.0)
        weight = given() if callable(given) else given
        try:
            value = float(weight)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the weight of head {source!r} must be a number, or a callable that returns one, got {weight!r}"
            ) from error
        if not 0 <= value < math.inf:
            raise ValueError(
                f"the weight of head {source!r} is {value}; a metric takes weights of at least 0 that are finite"
            )
        return value

    @property
    def name(self) -> str:
        return ", ".join(f"{k}: {h.name}" for k, h in self.heads.items())

    def parts(self, kind: str, output: Any, targets: Any) -> list[tuple[str, CriterionLikelihood, Any, Any]]:
        if kind == "empirical":
            return [("", self, output, targets)]
        return [(k, h, head_of(output, k), target_of(targets, k)) for k, h in self.heads.items()]

    def outputs(self, output: Any) -> Tensors:
        self._output = output
        return tuple(t for k, h in self.heads.items() for t in h.outputs(head_of(output, k)))

    def unbatched(self, outputs: Tensors) -> bool:
        return any(h.unbatched(h.outputs(head_of(self._output, k))) for k, h in self.heads.items())

    def coupled(self, outputs: Tensors, targets: Any) -> bool:
        mine = {k: head_of(self._output, k) for k in self.heads}
        return any(h.coupled(h.outputs(mine[k]), target_of(targets, k)) for k, h in self.heads.items())

    def why_targets(self) -> str | None:
        return next((f"head {k!r}: {why}" for k, h in self.heads.items() if (why := h.why_targets())), None)

    def observed(self, outputs: Tensors, output: Any, targets: Any, data: Data) -> Tensors:
        found: list[Tensor] = []
        for k, h in self.heads.items():
            mine = head_of(output, k)
            weight = self.weight_of(k)
            found += (weight * g for g in h.observed(h.outputs(mine), mine, target_of(targets, k), data))
        return tuple(found)

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        losses = [
            self.weight_of(k) * h.sum_loss(head_of(output, k), target_of(targets, k)) for k, h in self.heads.items()
        ]
        return sum(losses[1:], losses[0])


def head_of(output: Any, key: str) -> Any:
    """The output of one head: an entry of a mapping or an attribute.

    Raises:
        ValueError: there is none.
    """
    if isinstance(output, Mapping) and key in output:
        return output[key]
    if not isinstance(output, Mapping) and hasattr(output, key):
        return getattr(output, key)
    raise ValueError(
        f"there is a criterion for the output {key!r}, but the model returns {describe(output)}; "
        "pass `output=` (a callable) that returns a dictionary with the keys of the criteria"
    )


def target_of(targets: Any, key: str) -> Any:
    if targets is None:
        return None
    if not isinstance(targets, Mapping):
        raise ValueError(f"several heads take targets as a dictionary, got {describe(targets)}")
    return targets.get(key)
