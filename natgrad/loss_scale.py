"""How many times its criterion a training loss is: 0.01 where ``0.01 * criterion(output, targets)`` is backpropagated.

Curvature is taken of the criterion and gradients of the loss, and where their sizes meet, in the Newton step and in the
weight penalty, they must be of the same function. The factor is ⟨g, h⟩ / ⟨h, h⟩, with g the gradient that arrives at
the output that the criterion was called with, and h that of the criterion alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.trees import replace_tensors

AS_ONE = 0.99  # from which on a factor is taken as 1: losses that are scaled up, as GradScaler does, are scaled back


def own_gradients(criterion: nn.Module, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """h for each of `outputs`, tensors among the arguments of the criterion. Hooks on neither of them run."""
    copies = tuple(t.detach().requires_grad_() for t in outputs)
    args, kwargs = replace_tensors((tuple(args), dict(kwargs)), tuple(outputs), copies)
    with torch.enable_grad():
        loss = criterion.forward(*args, **kwargs)
        return list(torch.autograd.grad(loss.sum(), copies, allow_unused=True))


def factor(g: Tensor, h: Tensor | None) -> Tensor | None:
    """⟨g, h⟩ / ⟨h, h⟩, a scalar; None where there is no h. NaN where that is zero."""
    if h is None:
        return None
    g, h = (t.detach().double().flatten() for t in (g, h))
    return torch.dot(g, h) / torch.dot(h, h)


def taken(found: Tensor, before: float) -> float:
    """The factor to reckon with: what is found, 1 at most; that of before, where nothing is."""
    size = abs(float(found))
    return before if size != size else size if size < AS_ONE else 1.0
