"""How far a step moves the predictions: the KL divergence on the batch that it was made from.

    D(Δ) = Σ_r c_r KL(p(y_r | f_r(θ)) ‖ p(y_r | f_r(θ + Δ))) / m,

m as in the loss: a mean over data has a divergence per datum, a sum that of all. Where Δ is small it is ½ g(Δ, Δ), g
the exact metric of that batch. Both outputs are computed with the same random numbers, so that dropout drops the
same units. A step rule that asks for D has the metric keep the batches that were backpropagated since the last step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from natgrad.capture.purpose import purpose_of_pass
from natgrad.capture.tape import Hook, in_backward, in_transform
from natgrad.distributed.strategy import Strategy
from natgrad.fisher.forward import isolated
from natgrad.fisher.hooks import is_unwatched
from natgrad.fisher.likelihoods.base import CriterionLikelihood
from natgrad.fisher.likelihoods.multi_head import MultiHead, head_of
from natgrad.linalg.tree import describe, leaves_of, replace_tensors
from natgrad.metric.protocols import Vector

KEPT = 8  # forward passes that may wait for their loss at once
SEED = 0  # of both forward passes


class Predicting(Protocol):
    """What is asked of a metric."""

    module: nn.Module
    parameters: dict[str, Tensor]
    likelihood: CriterionLikelihood
    strategy: Strategy

    @property
    def trainer(self) -> int: ...
    @property
    def picks_output(self) -> bool: ...
    def parameter_names(self) -> Mapping[int, str]: ...
    def output_of(self, result: Any) -> Any: ...
    def targets_of(self, given: tuple[Any, Any], picked: Any) -> Any: ...


class Pass:
    """A forward pass: what the model was given and returned."""

    def __init__(self, args: Any, kwargs: Any, output: Any, leaves: list[Tensor]) -> None:
        self.given, self.output, self.leaves = (args, kwargs), output, leaves
        self.backpropagated = False
        self.before: Any = None  # what it returns once more, at the parameters as they are


class Mark:
    """A hook on an output that holds its pass weakly, so that no cycle keeps a graph alive."""

    def __init__(self, kept: Pass, names: Mapping[int, str]) -> None:
        self._kept, self._names = weakref.ref(kept), names

    def __call__(self, g: Tensor) -> None:
        kept = self._kept()
        if kept is not None and kept.leaves and purpose_of_pass(self._names) is not None:
            kept.backpropagated = True
            kept.output, kept.leaves = None, []  # the graph may go


class Call:
    """A call of the criterion, whose output is T(o), o what the model returned in some passes.

    Where T is not the identity it has to be linear, as reshaping, slicing, concatenating and scaling are: then
    T(o') = T(o) + J(o' − o), with J from the vector–Jacobian product u ↦ Jᵀu by differentiating it again.
    """

    def __init__(self, given: Any, targets: Any, sources: list[tuple[Pass, int, Tensor]]) -> None:
        self.targets, self.given = targets, detached(given)
        outputs = [t for t in leaves_of(given) if t.requires_grad]
        self.places = [i for i, t in enumerate(leaves_of(given)) if t.requires_grad]
        self.u = [torch.zeros_like(t, requires_grad=True) for t in outputs]
        with torch.enable_grad():
            every = [t for _, _, t in sources]
            pulled = torch.autograd.grad(outputs, every, self.u, create_graph=True, allow_unused=True)
            self.parts = [(p, i, t.detach(), g) for (p, i, t), g in zip(sources, pulled) if g is not None]
            live = [g for *_, g in self.parts if g.requires_grad]
            ones = [torch.ones_like(g) for g in live]
            found = torch.autograd.grad(live, every, ones, retain_graph=True, allow_unused=True) if live else []
        self.linear = all(g is None for g in found)

    @property
    def passes(self) -> list[Pass]:
        return list(dict.fromkeys(p for p, *_ in self.parts))

    def at(self, results: Mapping[Pass, Any]) -> Any:
        """What the criterion would be given, for what the model returns in each pass."""
        moved = [differentiable(results[p])[i].to(o.dtype) - o for p, i, o, _ in self.parts]
        pulled = [g for *_, g in self.parts]
        pushed = torch.autograd.grad(pulled, self.u, moved, retain_graph=True, allow_unused=True)
        leaves = leaves_of(self.given)
        new = [t.to(wide(t)) if t.is_floating_point() else t for t in leaves]
        for place, change in zip(self.places, pushed):
            new[place] = new[place] if change is None else new[place] + change
        return replace_tensors(self.given, tuple(leaves), tuple(new))


class KeptBatches:
    """The batches of the coming step."""

    def __init__(self, metric: Predicting, root: nn.Module, criteria: Mapping[str, nn.Module]) -> None:
        self._metric = weakref.ref(metric)
        self.passes: list[Pass] = []
        self.calls: list[Call] = []
        self._called: dict[str, tuple[Any, Any]] = {}
        self._heads = list(criteria)
        self._listeners = [Heard(self, key) for key in criteria]
        after = Hook(self._after, root)
        heard = [Hook(listener.called, c) for listener, c in zip(self._listeners, criteria.values())]
        for hook in (after, *heard):
            hook.due = True
        handles = [root.register_forward_hook(after, with_kwargs=True)]
        handles += [c.register_forward_hook(h, with_kwargs=True) for c, h in zip(criteria.values(), heard)]
        self.remove = weakref.finalize(metric, removed, handles)

    def _metric_here(self) -> Predicting | None:
        """The metric, where this thread trains its model."""
        metric = self._metric()
        if metric is None or not torch.is_grad_enabled() or metric.trainer != threading.get_ident():
            return None
        away = in_backward() or in_transform() or torch.jit.is_tracing() or is_unwatched()
        return None if away else metric

    def _after(self, args: Any, kwargs: Any, output: Any) -> None:
        leaves = differentiable(output)
        metric = self._metric_here()
        if metric is None or not any(t.requires_grad for t in leaves):
            return
        waiting = [p for p in self.passes if not p.backpropagated]
        if len(waiting) == KEPT:  # of validation, as no loss has come
            self._drop(waiting[0])
        self.passes.append(kept := Pass(detached(args), detached(kwargs), output, leaves))
        mark = Mark(kept, metric.parameter_names())
        for t in leaves:
            if t.requires_grad and not t.is_leaf:
                t.register_hook(mark)

    def heard(self, key: str, args: Any, kwargs: Any) -> None:
        metric = self._metric_here()
        waiting = [p for p in self.passes if p.leaves]
        if metric is None or not waiting:
            return
        self._called[key] = (args, kwargs)
        if len(self._called) < len(self._heads):
            return
        called, self._called, likelihood = self._called, {}, metric.likelihood
        if isinstance(likelihood, MultiHead):
            split = {k: likelihood.heads[k].split(*a, **kw) for k, (a, kw) in called.items()}
            given, targets = {k: s[0] for k, s in split.items()}, {k: s[1] for k, s in split.items()}
        else:
            given, targets = likelihood.split(*called[""][0], **called[""][1])
        if not any(t.requires_grad for t in leaves_of(given)):
            return
        call = Call(given, targets, [(p, i, t) for p in waiting for i, t in enumerate(p.leaves) if t.requires_grad])
        if call.parts:  # else it is the criterion of another model's output
            self.calls.append(call)

    def divergence(self, increments: Mapping[str, Tensor]) -> Tensor:
        """D(Δ), a scalar tensor in float64.

        Raises:
            RuntimeError: no batch was backpropagated since the last step.
            ValueError: the criterion is given what does not follow from the model's output.
        """
        metric = self._metric()
        assert metric is not None
        if not any(p.backpropagated for p in self.passes) and metric.strategy.size == 1:
            raise RuntimeError(
                "no forward pass of the metric's model was backpropagated before this step, so that its KL divergence "
                "cannot be measured. Call the model itself (`model(x)`), with grad enabled, in the thread that steps"
            )
        many = metric.likelihood.heads if isinstance(metric.likelihood, MultiHead) else {}
        heads: Mapping[str, CriterionLikelihood] = many or {"": metric.likelihood}
        like = next(iter(metric.parameters.values()))
        sums = like.new_zeros(len(heads), 2, dtype=wide(like))
        with torch.no_grad():
            for before, after, targets in self._pairs(metric, increments):
                for row, (key, reading) in zip(sums, heads.items()):
                    f, g = (head_of(o, key) if many else o for o in (before, after))
                    y = targets.get(key) if many and targets is not None else targets
                    row[0] += reading.divergence(f, g, y)
                    row[1] += reading.term_mass(reading.outputs(f), y).sum()
        total, mass = metric.strategy.summed(sums).unbind(1)
        shares = total if metric.likelihood.reduction == "sum" else total / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        return torch.stack([metric.likelihood.weight_of(k) * s for k, s in zip(heads, shares)]).sum()

    def _pairs(self, metric: Predicting, increments: Mapping[str, Tensor]) -> Iterator[tuple[Any, Any, Any]]:
        """What the criterion is given before and after, in float64, and its labels."""
        moved = {  # rounded as the optimizer writes them
            n: (p.detach() + increments[n]).to(p.dtype) if n in increments else p.detach()
            for n, p in metric.parameters.items()
        }
        before, after = {}, {}
        for kept in self.passes:
            if kept.backpropagated:
                if kept.before is None:
                    kept.before = result_of(metric, kept, {})
                before[kept], after[kept] = kept.before, result_of(metric, kept, moved)
        for call in self.calls:
            if all(p.backpropagated for p in call.passes) and not metric.picks_output:
                if not call.linear:
                    raise ValueError(
                        f"the criterion is given {describe(call.given)}, which is no linear function of what the model "
                        "returns: the KL divergence of a step cannot be measured. Pass ng.Fisher an `output=` that "
                        "does with the model's output what the loop does"
                    )
                yield call.at(before), call.at(after), call.targets
        for kept in before:
            found = next((c for c in self.calls if kept in c.passes), None)
            if found is None or metric.picks_output:
                picked = metric.output_of(before[kept])
                targets = metric.targets_of(kept.given, picked) if found is None else found.targets
                yield widened(picked), widened(metric.output_of(after[kept])), targets

    def _drop(self, kept: Pass) -> None:
        self.passes.remove(kept)
        self.calls = [c for c in self.calls if kept not in c.passes]

    def forget(self) -> None:
        """Let go of batches that were backpropagated; a forward pass whose loss is to come keeps its place."""
        for kept in [p for p in self.passes if p.backpropagated]:
            self._drop(kept)
        self._called = {}

    def __deepcopy__(self, memo: Any) -> None:
        return None


class Heard:
    """Tells which head's criterion was called."""

    def __init__(self, kept: KeptBatches, key: str) -> None:
        self._kept, self.key = weakref.ref(kept), key

    def called(self, args: Any, kwargs: Any, result: Any) -> None:
        if (kept := self._kept()) is not None:
            kept.heard(self.key, args, kwargs)


def result_of(metric: Predicting, kept: Pass, parameters: Vector) -> Any:
    """What the model returns for the batch of a pass, with the same random numbers each time."""
    buffers = {n: b.detach().clone() for n, b in metric.module.named_buffers()}
    args, kwargs = kept.given
    with isolated(metric.module, metric.parameters.values()), torch.no_grad():
        torch.manual_seed(SEED)
        return torch.func.functional_call(metric.module, {**buffers, **parameters}, args, kwargs)


def differentiable(tree: Any) -> list[Tensor]:
    return [t for t in leaves_of(tree) if t.is_floating_point()]


def detached(tree: Any) -> Any:
    """The same nest with its tensors outside any graph."""
    leaves = tuple(leaves_of(tree))
    return replace_tensors(tree, leaves, tuple(t.detach() for t in leaves))


def widened(tree: Any) -> Any:
    """The same nest with its numbers in float64."""
    leaves = tuple(differentiable(tree))
    return replace_tensors(tree, leaves, tuple(t.to(wide(t)) for t in leaves))


def wide(t: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def removed(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
