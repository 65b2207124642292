"""Products with the exact Fisher matrix of a data set, which is never formed: F v = Σ_n J_nᵀ H_n J_n v / M.

J v comes from differentiating u ↦ Jᵀu, which is linear; H is the curvature of the loss in the outputs, the Fisher
matrix of the likelihood (Schraudolph 2002, Neural Computation 14(7), §3). A product takes three passes through the
model, whatever the number of outputs. M is the mass of the data, 1 for a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks.base import CHUNK
from natgrad.fisher.fisher import Fisher
from natgrad.fisher.forward import check_output, isolated
from natgrad.fisher.likelihoods.base import CriterionLikelihood, FisherRoot
from natgrad.fisher.likelihoods.classification import CrossEntropy
from natgrad.fisher.options import arguments
from natgrad.fisher.owners import Data
from natgrad.fisher.pseudo_gradients import MAX_PASSES, in_slot
from natgrad.linalg.tree import Tensors, replace_tensors

Curvature = Callable[[Tensors], Tensors]
Batches = Callable[[], Iterable[tuple[Any, Any]]]


class ExactProduct:
    """v ↦ F v on stacks {name: (k, *shape)}, F the exact Fisher matrix over the batches.

    Args:
        metric: of the model and the criterion.
        batches: gives the (inputs, targets) anew at every call.

    Raises:
        ValueError: the likelihood has no closed form.
    """

    def __init__(self, metric: Fisher, batches: Batches) -> None:
        self.metric, self.batches = metric, batches
        self.masses: dict[str, float] | None = None

    def __call__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        total = {n: torch.zeros_like(t) for n, t in v.items()}
        for inputs, targets in self.batches():
            for n, t in self._of_batch(inputs, targets, v).items():
                total[n] += t
        return total

    def _of_batch(self, inputs: Any, targets: Any, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        metric = self.metric
        parameters = list(metric.parameters.values())
        with isolated(metric.module, parameters), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            output, targets = given_to_criterion(metric, inputs, targets)
            check_output(metric.likelihood, output, targets)
            outputs = metric.likelihood.outputs(output)
            local = replace_tensors(output, outputs, tuple(o.detach() for o in outputs))
            curvature = self._curvature(local, targets)
            live = [i for i, o in enumerate(outputs) if o.requires_grad]
            found = [outputs[i] for i in live]
            u = [torch.zeros_like(o, requires_grad=True) for o in found]
            try:
                pulled = torch.autograd.grad(found, parameters, u, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise ValueError(f"the exact Fisher product needs second derivatives of the model: {error}") from error
            used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]

            def several(*t: Tensor) -> tuple[Tensor, ...]:
                """Of some vectors (k, …), all in one pass."""
                pull = partial(torch.autograd.grad, retain_graph=True, allow_unused=True, is_grads_batched=True)
                k = len(t[0])
                pushed = dict(zip(live, pull([pulled[i] for i in used], u, t)))
                every = tuple(
                    torch.zeros((k, *o.shape), dtype=o.dtype, device=o.device) if (x := pushed.get(i)) is None else x
                    for i, o in enumerate(outputs)
                )
                h = torch.vmap(lambda *x: curvature(x))(*every)
                back = pull(found, [parameters[i] for i in used], [h[i] for i in live])
                return tuple(torch.zeros_like(x) if y is None else y for x, y in zip(t, back))

            names = list(metric.parameters)
            out = {n: torch.zeros_like(t) for n, t in v.items()}
            if not used:
                return out
            held = sum(o.numel() for o in outputs) + sum(p.numel() for p in parameters)
            most = max(1, CHUNK // held)
            stacks = [v[names[i]].split(most) for i in used]
            for start, some in enumerate(zip(*stacks)):
                for i, x in zip(used, several(*some)):
                    out[names[i]][start * most : start * most + len(x)] = x
        return out

    def _curvature(self, local: Any, targets: Any) -> Curvature:
        """u ↦ H u of a batch, divided by the mass of all data."""
        likelihood = self.metric.likelihood
        shown = likelihood.outputs(local)
        total = self.total_masses()
        maps = []
        for source, part, out, y in likelihood.parts("exact", local, targets):
            own = part.outputs(out)
            where = [next(i for i, t in enumerate(shown) if t is o) for o in own]
            scale = likelihood.weight_of(source) / total.get(source, 1.0)
            maps.append((where, scale, curvature_of(part, own, y)))

        def apply(u: Tensors) -> Tensors:
            found = [torch.zeros_like(t) for t in u]
            for where, scale, product in maps:
                for i, h in zip(where, product(tuple(u[i] for i in where))):
                    found[i] = found[i] + scale * h
            return tuple(found)

        return apply

    def total_masses(self) -> dict[str, float]:
        """The mass of all data, by source; none for a sum."""
        if self.masses is None:
            self.masses = masses_of(self.metric, self.batches())
        return self.masses


def given_to_criterion(metric: Fisher, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """What the criterion is given for a batch: the picked output, and targets."""
    args, kwargs = arguments(inputs)
    buffers = {n: b.detach().clone() for n, b in metric.module.named_buffers()}
    output = metric.output_of(torch.func.functional_call(metric.module, buffers, args, kwargs))
    return output, metric.targets_of((args, kwargs), output) if targets is None else targets


def masses_of(metric: Fisher, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """The mass of the loss terms of some data, by source; none for a sum."""
    found: dict[str, float] = {}
    if metric.likelihood.reduction == "sum":
        return found
    for inputs, targets in batches:
        with isolated(metric.module, metric.parameters.values()), torch.no_grad():
            output, targets = given_to_criterion(metric, inputs, targets)
            for source, part, out, y in metric.likelihood.parts("exact", output, targets):
                found[source] = found.get(source, 0.0) + float(part.term_mass(part.outputs(out), y).sum())
    return found


def curvature_of(likelihood: CriterionLikelihood, outputs: Tensors, targets: Any) -> Curvature:
    """u ↦ Σ_r c_r H_r u over the loss terms r, on tensors like the outputs.

    Raises:
        ValueError: the likelihood has no closed form.
    """
    if type(likelihood) is CrossEntropy:
        (f,) = outputs
        p, c = likelihood.rows(f).softmax(1), likelihood.factors(f, targets)[0][:, None]

        def of_classes(u: Tensors) -> Tensors:
            rows = likelihood.rows(u[0])
            return (likelihood.like(c * p * (rows - (p * rows).sum(1, keepdim=True)), f),)

        return of_classes
    return partial(by_roots, columns(likelihood, outputs, likelihood.roots(outputs, targets)))


def columns(
    likelihood: CriterionLikelihood, outputs: Tensors, roots: Sequence[FisherRoot]
) -> list[tuple[Tensors, Tensors, int]]:
    """Roots as (cotangents of the outputs, the number of the term of each entry, terms)."""
    found: list[tuple[Tensors, Tensors, int]] = []
    for root in roots:
        if len(root.tensors) == len(outputs) and all(a is b for a, b in zip(root.tensors, outputs)):
            terms = tuple(t.expand_as(v) for t, v in zip(root.terms, root.cotangents))
            found.append((root.cotangents, terms, root.term_count))
            continue
        rows = max((o.shape[0] for o in outputs[:1] if o.dim()), default=1)
        data = Data(1 if likelihood.unbatched(outputs) or root.term_count % rows else rows)
        slots = -(-root.term_count // data.count)
        if slots > MAX_PASSES:
            raise ValueError(f"{likelihood.name} has {slots} terms a datum (limit {MAX_PASSES}) for an exact product")
        whose = tuple(
            (data.of_rows(o.shape[0]) if o.dim() else torch.zeros(()))
            .to(o.device)
            .long()
            .reshape(-1, *[1] * (o.dim() - 1))
            for o in outputs
        )
        for slot in range(slots):
            v = root.pull(outputs, partial(in_slot, slot=slot, data=data, count=root.term_count, rows=rows))
            found.append((v, tuple(w.expand_as(t) for w, t in zip(whose, v)), data.count))
    return found


def by_roots(found: Sequence[tuple[Tensors, Tensors, int]], u: Tensors) -> Tensors:
    """Σ v ⟨v, u⟩, term by term."""
    total = [torch.zeros_like(t) for t in u]
    for v, terms, count in found:
        dots = u[0].new_zeros(count)
        for a, b, t in zip(v, u, terms):
            dots = dots.index_add(0, t.reshape(-1), (a * b).reshape(-1))
        total = [s + a * dots[t] for s, a, t in zip(total, v, terms)]
    return tuple(total)
