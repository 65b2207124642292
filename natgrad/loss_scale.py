"""How many times its criterion a training loss is: 0.01 where ``0.01 * criterion(output, targets)`` is backpropagated.

Curvature is taken of the criterion and gradients of the loss, and where their sizes meet, in the Newton step and in the
weight penalty, they must be of the same function. The factor is ⟨g, h⟩ / ⟨h, h⟩, with g the gradient that arrives at
the output that the criterion was called with, and h that of the criterion alone, at a sample of their entries: at each
they have the same ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.trees import replace_tensors

ENTRIES = 2**16  # of the sample, so that nothing of the size of a vocabulary is kept until the backward pass
AS_ONE = 0.99  # from which on a factor is taken as 1: losses that are scaled up, as GradScaler does, are scaled back


def own_gradients(criterion: nn.Module, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """A sample of h for each of `outputs`, tensors among the arguments of the criterion; hooks on neither run."""
    copies = tuple(t.detach().requires_grad_() for t in outputs)
    args, kwargs = replace_tensors((tuple(args), dict(kwargs)), tuple(outputs), copies)
    with torch.enable_grad():
        found = torch.autograd.grad(criterion.forward(*args, **kwargs).sum(), copies, allow_unused=True)
    return [None if h is None else sampled(h) for h in found]


def sampled(t: Tensor) -> Tensor:
    """Entries of a tensor, evenly spread, in float64."""
    flat = t.detach().flatten()
    return flat[:: max(1, len(flat) // ENTRIES)].double()


def factor(g: Tensor, h: Tensor | None) -> Tensor | None:
    """⟨g, h⟩ / ⟨h, h⟩ with what `own_gradients` gave, a scalar; None where there is no h, NaN where that is zero."""
    return None if h is None else torch.dot(sampled(g), h) / torch.dot(h, h)


def taken(found: Tensor, before: float) -> float:
    """The factor to reckon with: what is found, 1 at most; that of before, where nothing is."""
    size = abs(float(found))
    return before if size != size else size if size < AS_ONE else 1.0
