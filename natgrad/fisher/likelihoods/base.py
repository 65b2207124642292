"""Losses read as −log p(y | f): labels drawn from the model, and roots of the output Fisher matrix.

A loss is a sum of independent *terms* (one per row for cross-entropy, one per element for squared error),
L = (1/m) Σ_r c_r ℓ_r with m = 1 for "sum" and m = Σ_r m_r for "mean". Here are, for each loss,

- the mass m_r of each term (1, or the class weight w_y of its label; 0 where the label is ignored),
- the score of a label drawn from the model: a cotangent v with E[v vᵀ] = c_r H_r, H_r the Hessian of ℓ_r,
- exact roots: cotangents v_1 … v_k with Σ v_i v_iᵀ = c_r H_r,
- the gradient of the loss at the observed labels, a datum at a time.

None of them is divided by m: `natgrad.Fisher` divides once, by the mass of all data together.

For a weighted and smoothed cross-entropy c_r = (1−ε) w_y + (ε/C) Σ_c w_c, since the Hessian of every −log p_c is
diag(p) − p pᵀ, whatever the class. Squared error (f − y)² is −log p of a normal with variance ½, up to a constant.
Roots for `torch.distributions` stand in `natgrad.fisher.likelihoods.closed_forms`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.fisher.owners import Data
from natgrad.linalg.tree import Tensors, describe, replace_tensors

TERMS = "terms of "  # begins the keys of the masses of loss terms that no statistic is divided by


@dataclass(frozen=True)
class FisherRoot:
    """One column of a root of the output Fisher matrix, for all loss terms at once.

    ``tensors`` are where the cotangents live: the outputs themselves, or tensors computed from them (the parameters
    of a distribution). ``terms`` say which loss term each entry belongs to, numbered from 0 with the first
    dimension slowest; they broadcast against the cotangents.
    """

    tensors: Tensors
    cotangents: Tensors
    terms: Tensors

    def pull(self, outputs: Tensors, keep: Callable[[Tensor], Tensor]) -> Tensors:
        """The cotangent with respect to the outputs of the terms for which `keep` is true."""
        masked = tuple(torch.where(keep(t), v, torch.zeros_like(v)) for v, t in zip(self.cotangents, self.terms))
        if len(self.tensors) == len(outputs) and all(a is b for a, b in zip(self.tensors, outputs)):
            return masked
        live = [(t, v) for t, v in zip(self.tensors, masked) if t.requires_grad]
        if not live:
            return tuple(torch.zeros_like(o) for o in outputs)
        grads = torch.autograd.grad(
            [t for t, _ in live], outputs, [v for _, v in live], retain_graph=True, allow_unused=True
        )
        return tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs))

    @property
    def term_count(self) -> int:
        return max(int(t.max()) + 1 if t.numel() else 0 for t in self.terms)


class CriterionLikelihood:
    """A criterion read as −log p(y | f). Subclasses fill in what the module docstring lists."""

    reduction: str
    criterion: Any  # a loss module; its attributes are read by name

    def __init__(self, criterion: nn.Module) -> None:
        self.criterion = criterion
        self.reduction = str(criterion.reduction)

    def split(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(output, targets) of a call of the criterion."""
        names = ("input", "target", "var")
        given = {**dict(zip(names, args)), **kwargs}
        return given["input"], given.get("target")

    def parts(self, kind: str, output: Any, targets: Any) -> list[tuple[str, CriterionLikelihood, Any, Any]]:
        """The sources of loss terms that have a mass each: (key, reading, output, targets)."""
        return [("", self, output, targets)]

    def masses_of_terms(self, kind: str, output: Any, targets: Any) -> dict[str, Tensor]:
        """What the loss divides by, by source, where the metric is divided by something else: the number of data."""
        if kind != "empirical" or self.reduction == "sum":
            return {}
        parts = self.parts("exact", output, targets)
        return {TERMS + source: part.term_mass(part.outputs(out), y).sum() for source, part, out, y in parts}

    def weight_of(self, source: str) -> float:
        """Return what a source of loss terms is multiplied by in the loss."""
        return 1.0

    def outputs(self, output: Any) -> Tensors:
        """The tensors the likelihood depends on.

        Raises:
            ValueError: the criterion cannot take this output.
        """
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{self.name} takes one tensor, but the output is {describe(output)}; "
                "pass `output=` (a callable) to pick the tensor out of what the model returns"
            )
        if not output.is_floating_point():
            raise ValueError(f"{self.name} takes a floating-point output, got {describe(output)}")
        return (output,)

    @property
    def name(self) -> str:
        return type(self.criterion).__name__

    def why_targets(self) -> str | None:
        """Why the metric depends on the labels, or None where it does not."""
        return None

    def unbatched(self, outputs: Tensors) -> bool:
        """Whether the output is that of one datum, without a dimension of data."""
        return False

    def coupled(self, outputs: Tensors, targets: Any) -> bool:
        """Whether the loss is no sum over data, as a contrastive loss: then they have curvature in common."""
        return False

    def nats(self, outputs: Tensors, targets: Any) -> Tensor | None:
        """Return (Σ m u, Σ m) over terms of mass m, u how much of a term's loss one nat is; None where it is not known.

        A likelihood is measured in nats: u is 1. Where predictions are worse than knowing nothing, it is the loss over
        that of knowing nothing: a classifier that is a thousand nats off would not get anywhere by single ones. A
        squared error has the units of the user's data: it is read as the likelihood of a normal whose variance is that
        of the residuals.
        """
        mass = self.term_mass(outputs, targets).sum()
        nothing = self.ignorance(outputs)
        if nothing is None or not isinstance(targets, Tensor):
            return torch.stack([mass, mass])
        with torch.no_grad():
            loss = self.sum_loss(outputs[0], targets).to(mass)
        return torch.stack([torch.maximum(mass, (loss / nothing).nan_to_num(0, 0, 0)), mass])

    def labels(self, outputs: Tensors) -> int:
        """Return how many labels these outputs are of: one a datum and position, whatever the size of a label."""
        (f, *_) = outputs
        return f.numel() // max(1, f.shape[-1]) if f.dim() > 1 else f.numel()

    def disagrees(self, f: Tensor, g: Tensor) -> str | None:
        """Return why the gradient `g` at the output cannot be of this loss; None where it may be."""
        return None

    def ignorance(self, outputs: Tensors) -> float | None:
        """Return the loss of a term for predictions that are the same whatever the label; None where there is none."""
        return None

    def divergence(self, before: Any, after: Any, targets: Any) -> Tensor:
        """Return Σ_r c_r KL(p(y | f_r) ‖ p(y | f'_r)) between two outputs f and f'.

        Here the Bregman divergence ℓ(f') − ℓ(f) − ⟨∇ℓ(f), f' − f⟩, the same for likelihoods in natural parameters, and
        the one of losses that are none: its second derivative at f is the Hessian of the loss.
        """
        old, new = self.outputs(before), self.outputs(after)
        leaves = tuple(o.detach().requires_grad_() for o in old)
        with torch.enable_grad():
            loss = self.sum_loss(replace_tensors(before, old, leaves), targets)
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        rise = self.sum_loss(after, targets) - loss.detach()
        return rise - sum(((g * (b - a)).sum() for g, a, b in zip(slopes, old, new) if g is not None), rise * 0)

    def term_mass(self, outputs: Tensors, targets: Any) -> Tensor:
        """m_r of each term, (terms,)."""
        return outputs[0].new_ones(outputs[0].numel())

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        """√c times the score of labels drawn from the model."""
        raise NotImplementedError

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[FisherRoot]:
        """Roots of c·H, for all terms at once.

        Raises:
            ValueError: the likelihood has no closed form.
        """
        raise NotImplementedError

    def observed(self, outputs: Tensors, output: Any, targets: Any, data: Data) -> Tensors:
        """∇ℓ_n at the observed labels, ℓ_n the loss of datum n alone at the criterion's own reduction."""
        leaves = tuple(o.detach().requires_grad_() for o in outputs)
        with torch.enable_grad():
            loss = self.sum_loss(replace_tensors(output, outputs, leaves), targets)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, leaves))
        if self.reduction == "sum":
            return grads
        rows = 1 if data.count == 1 else outputs[0].shape[0]
        by_row = self.term_mass(outputs, targets).view(rows, -1).sum(1)
        mass = by_row.new_zeros(data.count).index_add(0, data.of_rows(rows).to(by_row.device), by_row)
        scale = torch.where(mass > 0, 1 / mass, torch.zeros_like(mass))
        return tuple(data.scaled(g, scale) for g in grads)

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        """The loss summed over its terms."""
        summed = copy.copy(self.criterion)
        summed.reduction = "sum"
        # `forward` and not a call: hooks on the user's criterion are not ours to fire
        return summed.forward(output, targets)


def check_reduction(criterion: Any) -> None:
    if criterion.reduction not in ("mean", "sum", *["batchmean"] * isinstance(criterion, nn.KLDivLoss)):
        raise ValueError(
            f"{type(criterion).__name__}(reduction={criterion.reduction!r}) has no single loss to take the metric of; "
            'use reduction="mean" or "sum", the one you train with'
        )


def check_shapes(output: Tensor, targets: Any) -> None:
    """Raise a ValueError where a loss of entries would broadcast."""
    if isinstance(targets, Tensor) and targets.shape != output.shape:
        raise ValueError("the shapes differ, and broadcasting them would make another loss")


def normal_like(f: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)


def counted(f: Tensor) -> Tensor:
    """Entries numbered in order, in the shape of f."""
    return torch.arange(f.numel(), device=f.device).reshape(f.shape)
