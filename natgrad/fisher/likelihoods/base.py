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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from natgrad._tree import Tensors, describe, leaves_of, replace_tensors
from natgrad.fisher.likelihoods.closed_forms import CLOSED_FORMS


@dataclass(frozen=True)
class Root:
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


class Reading:
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

    def parts(self, kind: str, output: Any, targets: Any) -> list[tuple[str, Reading, Any, Any]]:
        """The sources of loss terms that have a mass each: (key, reading, output, targets)."""
        return [("", self, output, targets)]

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

    def ignorance(self, outputs: Tensors) -> float | None:
        """Return the loss of a term for predictions that are the same whatever the label; None where there is none."""
        return None

    def term_mass(self, outputs: Tensors, targets: Any) -> Tensor:
        """m_r of each term, (terms,)."""
        return outputs[0].new_ones(outputs[0].numel())

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        """√c times the score of labels drawn from the model."""
        raise NotImplementedError

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[Root]:
        """Roots of c·H, for all terms at once.

        Raises:
            ValueError: the likelihood has no closed form.
        """
        raise NotImplementedError

    def observed(self, outputs: Tensors, output: Any, targets: Any, data: int) -> Tensors:
        """∇ℓ_n at the observed labels, ℓ_n the loss of datum n alone at the criterion's own reduction."""
        leaves = tuple(o.detach().requires_grad_() for o in outputs)
        with torch.enable_grad():
            loss = self.sum_loss(replace_tensors(output, outputs, leaves), targets)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, leaves))
        if self.reduction == "sum":
            return grads
        mass = self.term_mass(outputs, targets).view(data, -1).sum(1)
        scale = torch.where(mass > 0, 1 / mass, torch.zeros_like(mass))
        return tuple(per_datum(g, scale, data) for g in grads)

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        """The loss summed over its terms."""
        summed = copy.copy(self.criterion)
        summed.reduction = "sum"
        # `forward` and not a call: hooks on the user's criterion are not ours to fire
        return summed.forward(output, targets)


class CrossEntropy(Reading):
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

    def term_mass(self, outputs: Tensors, targets: Any) -> Tensor:
        return self.factors(outputs[0], targets)[1]

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

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[Root]:
        (f,) = outputs
        p = self.rows(f).softmax(1)
        c, _ = self.factors(f, targets)
        terms = self.like(torch.arange(p.shape[0], device=f.device)[:, None].expand_as(p), f)
        out = []
        for k in range(p.shape[1]):  # √(c p_k) (p − e_k)
            v = self.score(p).clone()
            v[:, k] -= 1
            out.append(Root(outputs, (self.like(v * (c * p[:, k]).sqrt()[:, None], f),), (terms,)))
        return out


class NegativeLogLikelihood(CrossEntropy):
    """`nn.NLLLoss`: the output is log p, and −log p_y has the score −e_y."""

    def score(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p)


class Elementwise(Reading):
    """Losses whose terms are the elements of one output, each with curvature c·h."""

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        if isinstance(targets, Tensor) and targets.shape != output.shape:
            raise ValueError("the shapes differ, and broadcasting them would make another loss")
        return super().sum_loss(output, targets)

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        """c·h of each element."""
        raise NotImplementedError

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[Root]:
        (f,) = outputs
        return [Root(outputs, (self.curvature(f, targets).sqrt(),), (counted(f),))]


class Squared(Elementwise):
    """`nn.MSELoss`: normal with variance ½."""

    def nats(self, outputs: Tensors, targets: Any) -> Tensor | None:
        (f,) = outputs
        if not isinstance(targets, Tensor):
            return None
        # KL = (Δf)² / 2σ² where the loss changes by (Δf)²: one nat is 2σ² of it
        twice = 2 * (f - targets.to(f)).square().sum()
        return torch.stack([twice, torch.full_like(twice, f.numel())])

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

    def curvature(self, f: Tensor, targets: Any) -> Tensor:
        return self.rate(f) if self.criterion.log_input else 1 / self.rate(f)

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        (f,) = outputs
        rate = self.rate(f)
        excess = rate - torch.poisson(rate, generator=generator)
        return (excess if self.criterion.log_input else excess / rate,)


class GaussianNoise(Reading):
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

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        mean, var = outputs
        v, eps = self.variance(outputs), normal_like(mean, generator)
        score = (1 - eps.square()) / (2 * v)
        return -eps / v.sqrt(), score.sum_to_size(v.shape).reshape(var.shape)

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[Root]:
        mean, var = outputs
        v = self.variance(outputs)
        shared = mean.numel() / max(v.numel(), 1)  # elements of the mean that share one variance
        spread = ((shared / 2) ** 0.5 / v).reshape(var.shape)
        terms = (counted(mean), counted(var))
        return [
            Root(outputs, ((1 / v.sqrt()).expand_as(mean), torch.zeros_like(var)), terms),
            Root(outputs, (torch.zeros_like(mean), spread), terms),
        ]

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        summed = copy.copy(self.criterion)
        summed.reduction = "sum"
        return summed.forward(output[0], targets, output[1])


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


class FromDistribution(Reading):
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

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[Root]:
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
class PulledRoot(Root):
    """A root that lives on the parameters of a distribution, pulled back to the leaves it was built from."""

    leaves: Tensors

    def pull(self, outputs: Tensors, keep: Callable[[Tensor], Tensor]) -> Tensors:
        return Root.pull(self, self.leaves, keep)


READINGS: dict[type[nn.Module], type[Reading]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    nn.MSELoss: Squared,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
    nn.GaussianNLLLoss: GaussianNoise,
    nn.PoissonNLLLoss: PoissonCount,
    Likelihood: FromDistribution,
}


def read(criterion: nn.Module) -> Reading:
    """The reading of a criterion as −log p(y | f).

    Raises:
        TypeError: it is not a module of the list, or a subclass whose forward may differ.
        ValueError: its reduction is neither "mean" nor "sum".
    """
    reading = READINGS.get(type(criterion))
    if reading is None:
        known = ", ".join(f"nn.{t.__name__}" if t is not Likelihood else "ng.Likelihood(…)" for t in READINGS)
        shown = (
            f"the class {criterion.__name__} itself (pass an instance)"
            if isinstance(criterion, type)
            else type(criterion).__name__
        )
        raise TypeError(
            f"cannot read {shown} as −log p(y|f). Supported criteria: {known}. "
            "For any other loss that is a log-likelihood, pass ng.Likelihood(lambda output: torch.distributions.…)"
        )
    check_reduction(criterion)
    return reading(criterion)


def check_reduction(criterion: Any) -> None:
    if criterion.reduction not in ("mean", "sum"):
        raise ValueError(
            f"{type(criterion).__name__}(reduction={criterion.reduction!r}) has no single loss to take the metric of; "
            'use reduction="mean" or "sum", the one you train with'
        )


# small helpers ---------------------------------------------------------------------------------------------


def normal_like(f: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)


def counted(f: Tensor) -> Tensor:
    """Entries numbered in order, in the shape of f."""
    return torch.arange(f.numel(), device=f.device).reshape(f.shape)


def per_datum(g: Tensor, scale: Tensor, data: int) -> Tensor:
    """g with the rows of datum n multiplied by scale[n]."""
    if g.dim() == 0 or g.shape[0] % data:
        return g * scale.reshape(()) if data == 1 else g
    return (g.reshape(data, -1) * scale[:, None]).reshape(g.shape)
