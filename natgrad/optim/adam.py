"""Adam's direction (Kingma & Ba 2015, arXiv:1412.6980), for parameters that no curvature covers and for grafting.

    m ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²,   d = m̂ / (√v̂ + ε)   with m̂, v̂ free of their start at zero.

d has entries of about one; the step rule gives it a length. Moments of half-precision gradients are kept in float32,
where (1 − β₂) g² does not vanish.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BETAS = (0.9, 0.999)  # the paper's
EPS = 1e-8
HALF = (torch.float16, torch.bfloat16)


@dataclass
class Moments:
    first: Tensor  # m
    second: Tensor  # v
    steps: int = 0


class Adam:
    """Moments of named gradients, and the direction they give."""

    def __init__(self) -> None:
        self._moments: dict[str, Moments] = {}

    def direction(self, name: str, g: Tensor) -> Tensor:
        """d after taking in g, shaped like g and of the moments' dtype."""
        b1, b2 = BETAS
        g = g.float() if g.dtype in HALF else g
        m = self._moments.get(name)
        if m is None:
            m = self._moments[name] = Moments(torch.zeros_like(g), torch.zeros_like(g))
        m.steps += 1
        m.first.lerp_(g, 1 - b1)
        m.second.mul_(b2).addcmul_(g, g, value=1 - b2)
        return m.first / (1 - b1**m.steps) / (m.second / (1 - b2**m.steps)).sqrt_().add_(EPS)

    def state_dict(self) -> dict[str, Any]:
        return {n: {"first": m.first, "second": m.second, "steps": m.steps} for n, m in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = {n: Moments(**m) for n, m in state.items()}
