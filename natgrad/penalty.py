"""The default weight penalty: L2 in the gradient, in proportion to the curvature.

    df ← df + δ W for every matrix W,   δ = ρ s λ̄

λ̄ is the mean eigenvalue of the block of W, ρ a constant, and s the share of its set length that the last step of the
block had (`natgrad.normalised`): where data are fitted to the last point steps become short, and with them goes the
penalty.

In the gradient, and so before the metric, a penalty keeps weights small along directions that data say little of, and
hardly moves those that they determine; a decoupled decay (Loshchilov & Hutter 2019, arXiv:1711.05101) takes the same
share of both. Relative to curvature, as damping is, it needs no units: the size of the loss and that of a layer's input
do not matter, and λ̄ ‖W‖² stays the same where a factor moves from one layer to the next, as ReLU lets one do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from natgrad.blocks import Block
from natgrad.metric import Vector


def mean_eigenvalues(blocks: Sequence[Block]) -> Tensor:
    """λ̄ of each block, (blocks,), on the device of the first; 0 where it is not finite."""
    found = [b.trace() / b.dimension for b in blocks]
    return torch.stack([m.to(found[0]) for m in found]).nan_to_num(0, 0, 0)


def penalties(
    strength: float, blocks: Iterable[Block], means: Iterable[float], parameters: Mapping[str, Tensor]
) -> dict[str, float]:
    """δ / s of every matrix of the blocks, by name; slices of one parameter in several blocks have one, by their
    geometric mean.

    Args:
        strength: ρ; `means`: λ̄ of each block, and 0 where it is not known.
    """
    logs: dict[str, list[float]] = {}
    for block, mean in zip(blocks, means):
        if mean > 0:
            for n in block.names:
                if parameters[n].dim() > 1:
                    logs.setdefault(n, []).append(math.log(mean))
    return {n: strength * math.exp(sum(found) / len(found)) for n, found in logs.items()}


def penalised(
    df: Mapping[str, Tensor], weights: Mapping[str, Tensor], deltas: Mapping[str, float], shares: Mapping[str, Tensor]
) -> Vector:
    """df + δ W where there is a δ, in tensors of its own; the rest as it is. `shares`: s by name."""
    out = dict(df)
    for n, delta in deltas.items():
        out[n] = torch.addcmul(df[n], weights[n], shares[n].to(weights[n]), value=delta)
    return out
