"""Normal noise of a variance that is given beside the mean."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.likelihoods.base import CriterionLikelihood, FisherRoot, counted, normal_like
from natgrad.linalg.tree import Tensors, describe


class GaussianNoise(CriterionLikelihood):
    """`nn.GaussianNLLLoss`: mean and variance, predicted or fixed; Fisher diag(1/σ², 1/(2σ⁴)) in (μ, σ²)."""

    def split(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        given = {**dict(zip(("input", "target", "var"), args)), **kwargs}
        return (given["input"], given["var"]), given.get("target")

    def outputs(self, output: Any) -> Tensors:
        if not (isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], Tensor)):
            raise ValueError(
                f"GaussianNLLLoss takes a pair (mean, variance), but the output is {describe(output)}; "
                "pass `output=` (a callable) that returns the pair"
            )
        mean, var = output
        var = var if isinstance(var, Tensor) else torch.full_like(mean, float(var))
        return mean, var

    def variance(self, outputs: Tensors) -> Tensor:
        """σ² in a shape that broadcasts against the mean."""
        mean, var = outputs
        var = var.unsqueeze(-1) if var.shape == mean.shape[:-1] and var.dim() < mean.dim() else var
        return var.clamp(min=self.criterion.eps)

    def divergence(self, before: Any, after: Any, targets: Any) -> Tensor:
        old, new = self.outputs(before), self.outputs(after)
        ratio = self.variance(old) / self.variance(new)
        apart = (old[0] - new[0]).square() / self.variance(new)
        return (ratio - 1 - ratio.log() + apart).expand_as(old[0]).sum() / 2

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        mean, var = outputs
        v, eps = self.variance(outputs), normal_like(mean, generator)
        score = (1 - eps.square()) / (2 * v)
        return -eps / v.sqrt(), score.sum_to_size(v.shape).reshape(var.shape)

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[FisherRoot]:
        mean, var = outputs
        v = self.variance(outputs)
        shared = mean.numel() / max(v.numel(), 1)  # elements of the mean that share one variance
        spread = ((shared / 2) ** 0.5 / v).reshape(var.shape)
        terms = (counted(mean), counted(var))
        return [
            FisherRoot(outputs, ((1 / v.sqrt()).expand_as(mean), torch.zeros_like(var)), terms),
            FisherRoot(outputs, (torch.zeros_like(mean), spread), terms),
        ]

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        summed = copy.copy(self.criterion)
        summed.reduction = "sum"
        return summed.forward(output[0], targets, output[1])
