"""Losses with a term for every entry of the output: squared, binary and Poisson."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.fisher.likelihoods.base import CriterionLikelihood, FisherRoot, check_shapes, counted, normal_like
from natgrad.linalg.tree import Tensors


class Elementwise(CriterionLikelihood):
    """Losses whose terms are the elements of one output, each with curvature c·h."""

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        check_shapes(output, targets)
        return super().sum_loss(output, targets)

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        """c·h of each element."""
        raise NotImplementedError

    def apart(self, f: Tensor, g: Tensor, targets: Any) -> Tensor:
        """c·KL of each element, from one output to another."""
        raise NotImplementedError

    def divergence(self, before: Any, after: Any, targets: Any) -> Tensor:
        ((f,), (g,)) = self.outputs(before), self.outputs(after)
        return self.apart(f, g, targets).sum()

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[FisherRoot]:
        (f,) = outputs
        return [FisherRoot(outputs, (self.curvature(f, targets).sqrt(),), (counted(f),))]


class Squared(Elementwise):
    """`nn.MSELoss`: normal with variance ½."""

    def nats(self, outputs: Tensors, targets: Any) -> Tensor | None:
        (f,) = outputs
        if not isinstance(targets, Tensor):
            return None
        # KL = (Δf)² / 2σ² where the loss changes by (Δf)²: one nat is 2σ² of it
        twice = 2 * (f - targets.to(f)).square().sum()
        return torch.stack([twice, torch.full_like(twice, f.numel())])

    def apart(self, f: Tensor, g: Tensor, targets: Any) -> Tensor:
        return (f - g).square()

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        return torch.full_like(f, 2.0)

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        return (2**0.5 * normal_like(f, generator),)


class BinaryCrossEntropy(Elementwise):
    """`nn.BCEWithLogitsLoss`: c = weight · (1 + (pos_weight − 1) y), h = σ(1 − σ)."""

    def ignorance(self, outputs: Tensors) -> float | None:
        return math.log(2)

    def why_targets(self) -> str | None:
        return None if self.criterion.pos_weight is None else "`pos_weight` depends on the labels"

    def c(self, f: Tensor, targets: Any) -> Tensor:
        c = torch.ones_like(f)
        if self.criterion.weight is not None:
            c = c * self.criterion.weight
        if self.criterion.pos_weight is not None:
            c = c * (1 + (self.criterion.pos_weight - 1) * targets)
        return c

    def apart(self, f: Tensor, g: Tensor, targets: Any) -> Tensor:
        yes, no = (F.logsigmoid(s * f) - F.logsigmoid(s * g) for s in (1, -1))
        return self.c(f, targets) * (f.sigmoid() * yes + (-f).sigmoid() * no)

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        p = f.sigmoid()
        return self.c(f, targets) * p * (1 - p)

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        p = f.sigmoid()
        return (self.c(f, targets).sqrt() * (p - torch.bernoulli(p, generator=generator)),)


class PoissonCount(Elementwise):
    """`nn.PoissonNLLLoss`: the output is log λ, or λ − eps where ``log_input=False``."""

    def rate(self, f: Tensor) -> Tensor:
        return f.exp() if self.criterion.log_input else (f + self.criterion.eps).clamp(min=0)

    def apart(self, f: Tensor, g: Tensor, targets: Any) -> Tensor:
        old, new = self.rate(f), self.rate(g)
        return torch.xlogy(old, old) - torch.xlogy(old, new) - old + new

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        return self.rate(f) if self.criterion.log_input else 1 / self.rate(f)

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        rate = self.rate(f)
        newton_scale = rate - torch.poisson(rate, generator=generator)
        return (newton_scale if self.criterion.log_input else newton_scale / rate,)


class Absolute(Elementwise):
    """`nn.L1Loss`: Laplace of scale 1, whose Fisher information is 1."""

    def nats(self, outputs: Tensors, targets: Any) -> Tensor | None:
        return None  # in the units of the user's data

    def apart(self, f: Tensor, g: Tensor, targets: Any) -> Tensor:
        off = (f - g).abs()
        return off + torch.expm1(-off)

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        return torch.ones_like(f)

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        return (2 * torch.bernoulli(torch.full_like(f, 0.5), generator=generator) - 1,)


class BernoulliProbability(Elementwise):
    """`nn.BCELoss`: the output is p itself; c = weight, h = 1 / (p (1 − p))."""

    def ignorance(self, outputs: Tensors) -> float | None:
        return math.log(2)

    def inner(self, f: Tensor) -> Tensor:
        eps = torch.finfo(f.dtype).eps  # a sigmoid rounds to 0 and 1, where the information is infinite
        return f.clamp(eps, 1 - eps)

    def c(self, f: Tensor) -> Tensor:
        weight = self.criterion.weight
        return torch.ones_like(f) if weight is None else torch.ones_like(f) * weight

    def apart(self, f: Tensor, g: Tensor, targets: Any) -> Tensor:
        p, q = self.inner(f), self.inner(g)
        return self.c(f) * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        p = self.inner(f)
        return self.c(f) / (p * (1 - p))

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        p = self.inner(f)
        return (self.c(f).sqrt() * (p - torch.bernoulli(p, generator=generator)) / (p * (1 - p)),)
