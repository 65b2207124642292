"""Losses that are no likelihood: their metric is the generalised Gauss–Newton matrix Jᵀ H J (Schraudolph 2002).

H is the Hessian of the loss in the outputs. It falls into blocks, which are found by asking it: blocks of entries do
not touch each other if H(c∘r) = c∘(H r) for a random r and a number c for each block. Entry by entry, row by
row, datum by datum and all together are tried in this order. A block of b entries then takes b products with H, made
for all blocks at once. Cotangents are √λᵢ qᵢ of each block ("exact"), or Σᵢ ±√λᵢ qᵢ with random signs ("sampled").
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.fisher.likelihoods.base import CriterionLikelihood, FisherRoot, check_reduction, check_shapes
from natgrad.fisher.owners import Data
from natgrad.linalg.tree import Tensors, describe, leaves_of, replace_tensors

NEGATIVE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest eigenvalue: rounding of second derivatives
LAPLACE = (
    "Absolute errors have the metric of a Laplace likelihood: nn.L1Loss(), or "
    "ng.Likelihood(lambda f: torch.distributions.Laplace(f, 1))"
)
LARGEST = 2**27  # numbers in all blocks of a Hessian: half a gigabyte in float32


class Loss(nn.Module):
    """Any loss of outputs and targets as a criterion, which need not be a likelihood.

    Args:
        fn: a twice differentiable callable (output, target) → loss. The loss is a scalar, or a tensor of terms with
            the data in front, which `reduction` brings to one. The output may be a nest of tensors, and the target
            anything: ``(labels, weights)`` for weighted data, a teacher's outputs, a mask.
        reduction: "mean" or "sum". Of a scalar it says how it grows with the data: "mean" if it is a mean over them.
            A datum's part of it is taken as many times as there are data where the loss of one alone is asked for.

    Called like a loss module, ``loss(model(x), y)`` returns the scalar.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: the reduction is neither "mean" nor "sum".
    """

    def __init__(self, fn: Callable[[Any, Any], Tensor], reduction: str = "mean") -> None:
        super().__init__()
        if not callable(fn) or isinstance(fn, type):
            raise TypeError(f"Loss takes a callable (output, target) → loss, got {fn!r}")
        self.fn = fn
        self.reduction: str = reduction
        check_reduction(self)

    def forward(self, input: Any, target: Any) -> Tensor:
        loss = self.terms(input, target)
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def terms(self, output: Any, target: Any) -> Tensor:
        """Return what the function returns."""
        loss = self.fn(output, target)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the function of a Loss has to return a tensor, a scalar or terms, got {describe(loss)}")
        return loss


@dataclass(frozen=True)
class Split:
    """A way to see the outputs as rows of entries: (blocks, entries of a block)."""

    rows: Callable[[Tensors], Tensor]
    like: Callable[[Tensor], Tensors]  # back to the shapes of the outputs


class GaussNewtonLoss(CriterionLikelihood):
    """`Loss`: the Hessian in the outputs, block by block."""

    @property
    def name(self) -> str:
        inner = getattr(self.criterion, "fn", None)
        return super().name if inner is None else f"Loss({getattr(inner, '__name__', type(inner).__name__)})"

    def why_targets(self) -> str | None:
        return "the loss is a function of them"

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__(criterion)
        self._used: dict[int, list[int]] = {}  # how many tensors an output has → which of them the loss depends on
        self._asked: tuple[Tensors, Hessian] | None = None  # the Hessian in these outputs, between two questions

    def split(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output, targets = super().split(*args, **kwargs)
        self._learn(output, targets)
        return output, targets

    def _learn(self, output: Any, targets: Any) -> None:
        """Find which tensors of the output the loss depends on."""
        every = floats(output)
        if len(every) in self._used:
            return
        leaves = tuple(t.detach().requires_grad_() for t in every)
        with torch.enable_grad():
            loss = self.terms(replace_tensors(output, every, leaves), targets).sum()
            if not loss.requires_grad:
                raise ValueError(f"{self.name} does not depend on the outputs, or is not differentiable in them")
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        self._used[len(every)] = [i for i, g in enumerate(grads) if g is not None]

    def used(self, output: Any) -> Tensors:
        every = floats(output)
        return tuple(every[i] for i in self._used.get(len(every), range(len(every))))

    def outputs(self, output: Any) -> Tensors:
        if not floats(output):
            raise ValueError(f"{self.name} needs a floating-point tensor in the output, got {describe(output)}")
        self._example = output
        return self.used(output)

    def nats(self, outputs: Tensors, targets: Any) -> Tensor | None:
        return None  # a loss of any units

    # the loss and its terms

    def terms(self, output: Any, targets: Any) -> Tensor:
        """The loss as it is returned: a scalar, or terms."""
        found: Tensor = self.criterion.terms(output, in_dtype_of(output, targets))
        return found

    def sum_loss(self, output: Any, targets: Any) -> Tensor:
        self._learn(output, targets)
        loss = self.terms(output, targets)
        if loss.numel() > 1 or self.reduction == "sum":
            return loss.sum()
        return loss.sum() * length_of(self.used(output))  # a mean: as many times as there are data

    def term_mass(self, outputs: Tensors, targets: Any) -> Tensor:
        with torch.no_grad():
            loss = self.terms(self._example, targets)
        return outputs[0].new_ones(loss.numel() if loss.numel() > 1 else length_of(outputs))

    # its curvature

    def unbatched(self, outputs: Tensors) -> bool:
        return any(o.dim() == 0 or o.shape[0] != length_of(outputs) for o in outputs)

    def coupled(self, outputs: Tensors, targets: Any) -> bool:
        count = length_of(outputs)
        if count == 1 or self.unbatched(outputs):
            return False
        hessian = Hessian(self, outputs, targets)
        self._asked = outputs, hessian  # the roots are asked for next
        return not hessian.falls_into(in_rows(outputs, count))

    def draw(self, outputs: Tensors, targets: Any, generator: torch.Generator) -> Tensors:
        split, root = self._root(outputs, targets)
        signs = torch.randint(2, root.shape[:2], generator=generator, device=root.device, dtype=root.dtype) * 2 - 1
        return split.like((root @ signs.unsqueeze(-1)).squeeze(-1))

    def roots(self, outputs: Tensors, targets: Any) -> Sequence[FisherRoot]:
        split, root = self._root(outputs, targets)
        numbers = torch.arange(len(root), device=root.device)[:, None].expand(root.shape[:2])
        terms = split.like(numbers)
        return [FisherRoot(outputs, split.like(column), terms) for column in root.unbind(-1)]

    def observed(self, outputs: Tensors, output: Any, targets: Any, data: Data) -> Tensors:
        self._asked = None
        with torch.no_grad():
            loss = self.terms(output, targets)
        sizes = [prod(outputs[0].shape[: i + 1]) for i in range(outputs[0].dim())]
        if loss.numel() > 1 and loss.shape[0] != length_of(outputs) and loss.numel() not in sizes:
            raise ValueError(
                f"kind='empirical' takes the loss of each datum alone, but {self.name} returns {describe(loss)} for "
                f"{length_of(outputs)} data; return terms with the data in front, those that are masked as zeros"
            )
        return super().observed(outputs, output, targets, data)

    def _root(self, outputs: Tensors, targets: Any) -> tuple[Split, Tensor]:
        """(split, roots (blocks, b, b) of the blocks of H)

        Raises:
            ValueError: H has a negative eigenvalue, or is too large.
        """
        asked, self._asked = self._asked, None
        product = asked[1] if asked is not None and asked[0] is outputs else Hessian(self, outputs, targets)
        split = next(s for s in splits(outputs) if product.falls_into(s))
        blocks = product.blocks(split)
        if not bool(torch.isfinite(blocks).all()):
            return split, torch.full_like(blocks, torch.nan)  # as the loss: such statistics are not counted
        values, vectors = (
            (blocks[..., 0], torch.ones_like(blocks)) if blocks.shape[-1] == 1 else torch.linalg.eigh(blocks)
        )
        least, most = float(values.min()), float(values.abs().max())
        if least < -NEGATIVE[values.dtype] * most:
            raise ValueError(
                f"the Hessian of {self.name} in the outputs has the eigenvalue {least:.3g} (the largest size is "
                f"{most:.3g}): the Gauss–Newton matrix of a loss that is not convex in the outputs is no metric. Train "
                "with this loss, and take the metric of a convex one: nn.CrossEntropyLoss() for classes, "
                "nn.MSELoss() for numbers"
            )
        return split, vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


class ModuleLoss(GaussNewtonLoss):
    """A loss module of `torch.nn` that is no likelihood, with its own terms."""

    def terms(self, output: Any, targets: Any) -> Tensor:
        check_shapes(output, targets)
        apart = copy.copy(self.criterion)
        apart.reduction = "none"
        # `forward` and not a call: hooks on the user's criterion are not ours to fire
        return apart.forward(output, in_dtype_of(output, targets))


class Hessian:
    """Products with the Hessian of a loss in its outputs."""

    def __init__(self, loss: GaussNewtonLoss, outputs: Tensors, targets: Any) -> None:
        half = (torch.float16, torch.bfloat16)
        self.leaves = tuple((o.detach().float() if o.dtype in half else o.detach()).requires_grad_() for o in outputs)
        self.name = loss.name
        with torch.enable_grad():
            value = loss.sum_loss(replace_tensors(loss._example, outputs, self.leaves), targets)
            found = torch.autograd.grad(value, self.leaves, create_graph=True, allow_unused=True)
        self.gradients = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]
        if not self.gradients:
            raise ValueError(
                f"{loss.name} is linear in the outputs, so that its Gauss–Newton matrix is zero. {LAPLACE}"
            )
        generator = torch.Generator().manual_seed(0)
        self.probe = tuple(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in self.leaves)
        self.answer = self(self.probe)
        if not any(bool(a.any()) for a in self.answer):
            warnings.warn(
                f"the Hessian of {loss.name} in the outputs is zero for all data of a batch, which adds nothing to the "
                f"metric. {LAPLACE}",
                stacklevel=2,
            )
        self.generator = generator

    def __call__(self, v: Tensors) -> Tensors:
        index, grads = zip(*self.gradients)
        found = torch.autograd.grad(grads, self.leaves, [v[i] for i in index], retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(o) if g is None else g for g, o in zip(found, self.leaves))

    def falls_into(self, split: Split) -> bool:
        """Whether blocks do not touch each other: neither neighbours nor, by a second look, any others."""
        r, hr = split.rows(self.probe), split.rows(self.answer)
        for number in (torch.arange(len(r)), torch.randint(8, (len(r),), generator=self.generator)):
            # powers of two, which commute with rounding: blocks of very unlike sizes are told apart, each to its bits
            c = 2.0 ** (number % 8).to(r)[:, None]
            off = (split.rows(self(split.like(c * r))) - c * hr).abs().amax(1)
            if bool((off > 64 * torch.finfo(r.dtype).eps * (c * hr).abs().amax(1)).any()):
                return False
        return True

    def blocks(self, split: Split) -> Tensor:
        """(blocks, b, b), by b products.

        Raises:
            ValueError: there would be too many numbers.
        """
        count, size = split.rows(self.probe).shape
        if count * size**2 > LARGEST:
            raise ValueError(
                f"the Hessian of {self.name} has {count} blocks of {size}² in the outputs, more than {LARGEST} "
                "numbers. For labels that are probabilities (distillation) nn.CrossEntropyLoss has the same "
                "Gauss–Newton matrix in closed form; else pass fewer data an update, or ng.Likelihood"
            )
        columns = []
        for k in range(size):
            e = self.probe[0].new_zeros(count, size)
            e[:, k] = 1
            columns.append(split.rows(self(split.like(e))))
        h = torch.stack(columns, -1)
        return (h + h.mT) / 2


def splits(outputs: Tensors) -> list[Split]:
    """Finest first: entries, rows along the last or the second dimension, data, everything."""
    count = length_of(outputs) if all(o.dim() and o.shape[0] == length_of(outputs) for o in outputs) else 1
    by_datum = in_rows(outputs, count)
    found = [Split(lambda t: by_datum.rows(t).reshape(-1, 1), lambda r: by_datum.like(r.reshape(count, -1)))]
    if len(outputs) == 1 and outputs[0].dim() > 1:
        shape = outputs[0].shape
        turned = (shape[0], *shape[2:], shape[1])
        found.append(Split(lambda t: t[0].reshape(-1, shape[-1]), lambda r: (r.reshape(shape),)))
        if len(shape) > 2:
            found.append(
                Split(
                    lambda t: t[0].movedim(1, -1).reshape(-1, shape[1]),
                    lambda r: (r.reshape(turned).movedim(-1, 1),),
                )
            )
    return [*found, by_datum, in_rows(outputs, 1)]


def in_rows(outputs: Tensors, count: int) -> Split:
    """The outputs as `count` rows of all their entries."""
    sizes, shapes = [o.numel() // count for o in outputs], [o.shape for o in outputs]

    def like(rows: Tensor) -> Tensors:
        return tuple(part.reshape(shape) for part, shape in zip(rows.split(sizes, 1), shapes))

    return Split(lambda t: torch.cat([x.reshape(count, -1) for x in t], 1), like)


def in_dtype_of(output: Any, targets: Any) -> Any:
    """The targets with their numbers in the dtype of the output, which statistics are taken of in float32 at least."""
    old = floats(targets)
    return replace_tensors(targets, old, tuple(t.to(floats(output)[0].dtype) for t in old))


def length_of(outputs: Tensors) -> int:
    return outputs[0].shape[0] if outputs[0].dim() else 1


def floats(output: Any) -> Tensors:
    return tuple(t for t in leaves_of(output) if t.is_floating_point())
