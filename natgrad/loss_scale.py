"""How many times its criterion a training loss is: 0.01 where ``0.01 * criterion(output, targets)`` is backpropagated.

Curvature is taken of the criterion and gradients of the loss, and where their sizes meet, in the Newton step and in the
weight penalty, they must be of the same function. The factor is the gradient that arrives at what the criterion
returned.
"""

from __future__ import annotations

from torch import Tensor

AS_ONE = 0.99  # from which on a factor is taken as 1: losses that are scaled up, as GradScaler does, are scaled back


def taken(found: Tensor, before: float) -> float:
    """The factor to reckon with: what is found, 1 at most; that of before, where nothing is."""
    size = float(found)
    return before if size != size else size if size < AS_ONE else 1.0
