"""Cross-entropy, and −log p of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.fisher.likelihoods.base import CriterionLikelihood, FisherRoot
from natgrad.linalg.tree import Tensors, describe


class CrossEntropy(CriterionLikelihood):
    """`nn.CrossEntropyLoss`: outputs (C,), (N, C) or (N, C, d1, …); labels or class probabilities."""

    def why_targets(self) -> str | None:
        c = self.criterion
        if c.weight is not None:
            return "`weight` depends on the labels"
        return None if c.ignore_index == -100 else f"`ignore_index={c.ignore_index}` depends on the labels"

    def unbatched(self, outputs: Tensors) -> bool:
        return outputs[0].dim() == 1

    def rows(self, f: Tensor) -> Tensor:
        """(N, C, d1, …) → (N·d1·…, C)"""
        return f.reshape(1, -1) if f.dim() == 1 else f.movedim(1, -1).reshape(-1, f.shape[1])

    def like(self, rows: Tensor, f: Tensor) -> Tensor:
        """(N·d1·…, C) → (N, C, d1, …)"""
        return (
            rows.reshape(f.shape) if f.dim() == 1 else rows.reshape(f.shape[0], *f.shape[2:], f.shape[1]).movedim(-1, 1)
        )

    def factors(self, f: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """(c, m) of each row."""
        rows, classes = f.numel() // self.classes(f), self.classes(f)
        one = f.new_ones(rows)
        if targets is None:
            return one, one
        weight, eps = self.criterion.weight, getattr(self.criterion, "label_smoothing", 0.0)
        w = f.new_ones(classes) if weight is None else weight.to(f)
        if targets.is_floating_point():
            return (1 - eps) * (self.rows(targets) * w).sum(1) + eps / classes * w.sum(), one
        y = targets.reshape(-1)
        valid = (y != self.criterion.ignore_index).to(f)
        mass = w[y.clamp(0, classes - 1)] * valid
        return (1 - eps) * mass + eps / classes * w.sum() * valid, mass

    def classes(self, f: Tensor) -> int:
        return f.shape[0] if f.dim() == 1 else f.shape[1]

    def ignorance(self, outputs: Tensors) -> float | None:
        return math.log(max(2, self.classes(outputs[0])))

    def labels(self, outputs: Tensors) -> int:
        (f,) = outputs
        return f.numel() // max(1, f.shape[1]) if f.dim() > 1 else 1

    def disagrees(self, f: Tensor, g: Tensor) -> str | None:
        if g.dtype in (torch.float16, torch.bfloat16):
            return None  # which lose the small entries
        unsure = self.rows(f.detach().float()).softmax(1).amax(1) < 0.99  # of sure ones rounding is left
        rows = self.rows(g.float())[unsure]
        # far above rounding, and above small terms on the logits beside the loss; a squared loss has more
        if float(rows.sum(1).abs().sum()) <= 0.1 * float(rows.abs().sum()):
            return None
        return "the gradient at the output does not sum to zero over the classes"

    def term_mass(self, outputs: Tensors, targets: Any) -> Tensor:
        return self.factors(outputs[0], targets)[1]

    def divergence(self, before: Any, after: Any, targets: Any) -> Tensor:
        ((f,), (g,)) = self.outputs(before), self.outputs(after)
        log_p, log_q = self.rows(f).log_softmax(1), self.rows(g).log_softmax(1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), torch.zeros_like(log_p))
        return (self.factors(f, targets)[0] * terms.sum(1)).sum()

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        p = self.rows(f).softmax(1)
        # by the inverse of the distribution function: torch.multinomial takes as long as the model on a vocabulary
        below = p.cumsum(1)
        u = torch.rand(p.shape[0], 1, dtype=p.dtype, device=p.device, generator=generator) * below[:, -1:]
        drawn = torch.searchsorted(below, u, right=True).clamp(max=p.shape[1] - 1)
        c, _ = self.factors(f, targets)
        score = self.score(p).scatter_add(1, drawn, -torch.ones_like(p[:, :1]))
        return (self.like(score * c.sqrt()[:, None], f),)

    def score(self, p: Tensor) -> Tensor:
        """The part of the gradient of −log p_y that does not depend on y."""
        return p

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[FisherRoot]:
        (f,) = outputs
        p = self.rows(f).softmax(1)
        c, _ = self.factors(f, targets)
        terms = self.like(torch.arange(p.shape[0], device=f.device)[:, None].expand_as(p), f)
        out = []
        for k in range(p.shape[1]):  # √(c p_k) (p − e_k)
            v = self.score(p).clone()
            v[:, k] -= 1
            out.append(FisherRoot(outputs, (self.like(v * (c * p[:, k]).sqrt()[:, None], f),), (terms,)))
        return out


class NegativeLogLikelihood(CrossEntropy):
    """`nn.NLLLoss`: the output is log p, and −log p_y has the score −e_y."""

    def disagrees(self, f: Tensor, g: Tensor) -> str | None:
        return None  # terms beside the loss have any sign

    def score(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p)


class Divergence(NegativeLogLikelihood):
    """`nn.KLDivLoss`: the output is log p along its last dimension; −log p_y in the mean over the target's y."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__(criterion)
        self.by_batch = self.reduction == "batchmean"
        self.reduction = "sum" if self.reduction == "sum" else "mean"

    def outputs(self, output: Any) -> Tensors:
        (f,) = super().outputs(output)
        if f.dim() and f.numel() and bool((f.detach().float().logsumexp(-1).abs() > 0.1).any()):
            raise ValueError(
                f"nn.KLDivLoss takes logarithms of probabilities along the last dimension, but those of {describe(f)} "
                "do not sum to one; return log_softmax(logits, dim=-1)"
            )
        return (f,)

    def unbatched(self, outputs: Tensors) -> bool:
        return outputs[0].dim() < 2

    def rows(self, f: Tensor) -> Tensor:
        return f.reshape(-1, f.shape[-1])

    def like(self, rows: Tensor, f: Tensor) -> Tensor:
        return rows.reshape(f.shape)

    def classes(self, f: Tensor) -> int:
        return f.shape[-1]

    def factors(self, f: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        rows = self.rows(f)
        c = rows.new_ones(len(rows))
        if targets is not None:
            c = self.rows(targets.exp() if self.criterion.log_target else targets).to(f).sum(1)
        # "batchmean" divides by the data, "mean" by all entries
        return c, torch.full_like(c, f.shape[0] / len(rows) if self.by_batch else f.shape[-1])

    def nats(self, outputs: Tensors, targets: Any) -> Tensor | None:
        c, mass = self.factors(outputs[0], targets)
        return torch.stack([c.sum(), mass.sum()])

    def labels(self, outputs: Tensors) -> int:
        return len(self.rows(outputs[0]))
