"""Backward passes from the outputs of one forward pass, to every place where a layer was used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.layouts import element_layout, flat_layout
from natgrad.capture.parameters import ParameterSlice
from natgrad.capture.tape import CaptureError, Edge, LayerCall, Uncaptured, as_gradient_edge
from natgrad.capture.views import GradientView
from natgrad.fisher.owners import Data
from natgrad.fisher.pseudo_gradients import MAX_PASSES
from natgrad.linalg.tree import Tensors

DENSE_LIMIT = 512  # parameters without an op rule: dense up to this size, diagonal beyond
PER_DATUM = "per-datum gradients"  # stands for an op where no rule covers a parameter


@dataclass
class BackwardPass:
    """Backward passes from the outputs of one forward pass."""

    live: Sequence[Tensor]  # outputs that carry a graph
    carries: Sequence[bool]  # which of all outputs those are
    calls: Sequence[LayerCall]  # those without an op rule last
    parameters: Mapping[str, Tensor]

    def backward(self, v: Tensors, data: Data) -> list[Tensor | None]:
        """Gradients at all calls; where there is no op rule, the gradients (data, P) of the parameter itself."""
        return [*self.at_calls(v), *self.per_datum(v, data)]

    def at_calls(self, v: Tensors) -> list[Tensor | None]:
        """Gradients at the noted calls."""
        return self.at([c.out for c in self.calls if c.op != PER_DATUM], v)

    def at(self, edges: Sequence[Edge], v: Tensors) -> list[Tensor | None]:
        """Gradients at places in the graph."""
        once = list(dict.fromkeys(edges))
        if not once:
            return []
        found = dict(zip(once, self._grad([as_gradient_edge(e) for e in once], v)))
        return [found[e] for e in edges]

    def per_datum(self, v: Tensors, data: Data) -> list[Tensor | None]:
        """One backward pass a datum."""
        names = [c.weight.name for c in self.calls if c.op == PER_DATUM and c.weight is not None]
        if not names:
            return []
        held = [self.parameters[n] for n in names]
        rows: list[list[Tensor]] = [[] for _ in names]
        for masked in self._one_datum_each(v, data):
            for into, p, g in zip(rows, held, self._grad(held, masked)):
                into.append(torch.zeros_like(p).flatten() if g is None else g.flatten())
        return [torch.stack(r) for r in rows]

    def _one_datum_each(self, v: Tensors, data: Data) -> Iterator[Tensors]:
        if data.count == 1:
            yield v
            return
        if data.count > MAX_PASSES:
            raise ValueError(
                f"parameters without an op rule need a backward pass for each of {data.count} data (limit "
                f"{MAX_PASSES}); pass fewer data an update, or leave them out with `params=`"
            )
        for n in range(data.count):
            yield tuple(data.only(t, n) for t in v)

    def _grad(self, inputs: Sequence[Any], v: Tensors) -> tuple[Tensor | None, ...]:
        held = [t.to(o.dtype) for t, o in zip((t for t, live in zip(v, self.carries) if live), self.live)]
        try:
            return torch.autograd.grad(self.live, inputs, held, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "selective activation checkpoint" not in str(error):
                raise
            raise CaptureError(
                "the model uses selective activation checkpointing, which lets a region be backpropagated only once; "
                "the metric needs a backward pass of its own. Use checkpoint(…, use_reentrant=False) without "
                "context_fn, or take the metric with update() on a model without it"
            ) from error


def calls_per_datum(missed: Iterable[Uncaptured], parameters: Mapping[str, Tensor], data: int) -> list[LayerCall]:
    """Return a stand-in for the calls of each parameter that no op rule covers: its per-datum gradients."""
    found = []
    for use in missed:
        p = parameters[use.name]
        shape = tuple(p.shape)
        view = GradientView(flat_layout(shape) if p.numel() <= DENSE_LIMIT else element_layout(shape))
        ones = torch.ones(data, dtype=p.dtype, device=p.device)
        found.append(LayerCall(PER_DATUM, ParameterSlice(use.name), None, view, ones, (None, 0)))
    return found
