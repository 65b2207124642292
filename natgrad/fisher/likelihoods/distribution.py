"""Any likelihood that `torch.distributions` has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from natgrad.fisher.likelihoods.base import CriterionLikelihood, FisherRoot, check_reduction
from natgrad.fisher.likelihoods.closed_forms import CLOSED_FORMS
from natgrad.linalg.tree import Tensors, describe, leaves_of, replace_tensors

DRAWS = 256  # the relative error of a divergence is about √(2 / (draws · data))


class Likelihood(nn.Module):
    """Any `torch.distributions` family as a criterion: −log p(y | output), summed or averaged over its batch shape.

    Args:
        distribution: a callable output → `torch.distributions.Distribution`.
        reduction: "mean" or "sum".

    Called like a loss module, ``likelihood(model(x), y)`` returns the loss.

    Raises:
        ValueError: the reduction is neither "mean" nor "sum".
    """

    def __init__(self, distribution: Callable[[Any], td.Distribution], reduction: str = "mean") -> None:
        super().__init__()
        if not callable(distribution):
            raise TypeError(
                f"Likelihood takes a callable output → torch.distributions.Distribution, got {distribution!r}"
            )
        self.distribution = distribution
        self.reduction: str = reduction
        check_reduction(self)

    def forward(self, input: Any, target: Any) -> Tensor:
        log_p = self.distribution(input).log_prob(target)
        return -log_p.mean() if self.reduction == "mean" else -log_p.sum()


class FromDistribution(CriterionLikelihood):
    """`Likelihood`: scores by automatic differentiation of log_prob, roots from the table of closed forms."""

    def outputs(self, output: Any) -> Tensors:
        found = tuple(t for t in leaves_of(output) if t.is_floating_point())
        if not found:
            raise ValueError(f"Likelihood needs a floating-point tensor in the output, got {describe(output)}")
        self._example = output
        return found

    def local(self, outputs: Tensors) -> tuple[Tensors, td.Distribution]:
        leaves = tuple(o.detach().requires_grad_() for o in outputs)
        with torch.enable_grad():
            return leaves, self.criterion.distribution(replace_tensors(self._example, outputs, leaves))

    def term_mass(self, outputs: Tensors, targets: Any) -> Tensor:
        return outputs[0].new_ones(self.local(outputs)[1].batch_shape.numel())

    def divergence(self, before: Any, after: Any, targets: Any) -> Tensor:
        """In closed form where torch has one, else from `DRAWS` draws y of p, in the mean over q/p − 1 − log q/p, which
        has the same expectation and no negative terms (Schulman 2020, http://joschu.net/blog/kl-approx.html).
        """
        p, q = self.criterion.distribution(before), self.criterion.distribution(after)
        try:
            return td.kl_divergence(p, q).sum()
        except NotImplementedError:
            y = p.sample(torch.Size([DRAWS]))
            log = q.log_prob(y) - p.log_prob(y)
            return (log.expm1() - log).mean(0).sum()

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        leaves, dist = self.local(outputs)
        device = outputs[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # torch.distributions draws from the global stream; lend it a seed from ours and put it back
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
            y = dist.sample()
        with torch.enable_grad():
            nll = -dist.log_prob(y).sum()
        grads = torch.autograd.grad(nll, leaves, allow_unused=True)
        return tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, leaves))

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[FisherRoot]:
        leaves, dist = self.local(outputs)
        while isinstance(dist, td.Independent):
            dist = dist.base_dist
        closed = CLOSED_FORMS.get(type(dist))
        if closed is None:
            raise ValueError(
                f'kind="exact" has no closed form for {type(dist).__name__}; use kind="sampled". '
                f"Closed forms exist for {', '.join(sorted(t.__name__ for t in CLOSED_FORMS))}"
            )
        batch = dist.batch_shape
        count = torch.arange(batch.numel(), device=outputs[0].device).reshape(batch)
        with torch.enable_grad():
            columns = closed(dist)
        found = []
        for column in columns:
            tensors, cotangents = zip(*column)
            terms = tuple(count.reshape(*batch, *[1] * (v.dim() - len(batch))) for v in cotangents)
            found.append(PulledRoot(tensors, tuple(v.detach() for v in cotangents), terms, leaves))
        return found


@dataclass(frozen=True)
class PulledRoot(FisherRoot):
    """A root that lives on the parameters of a distribution, pulled back to the leaves it was built from."""

    leaves: Tensors

    def pull(self, outputs: Tensors, keep: Callable[[Tensor], Tensor]) -> Tensors:
        return FisherRoot.pull(self, self.leaves, keep)
