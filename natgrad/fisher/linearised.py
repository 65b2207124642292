"""One batch run through a model with its graph, and cotangents of its outputs pulled back to each datum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.collection import statistics_dtype
from natgrad.capture.layers import LayerIO, Layers, key_of, uses_of
from natgrad.capture.parameters import ParameterSlice
from natgrad.capture.tape import CaptureError, LayerCall, coverage_walk, edge_of, tapes_behind
from natgrad.capture.views import Place
from natgrad.fisher.backward_pass import PER_DATUM, BackwardPass, calls_per_datum
from natgrad.fisher.covectors import Covectors, forms, plain
from natgrad.fisher.fisher import Fisher
from natgrad.fisher.forward import check_output, isolated, traced_forward, usable
from natgrad.fisher.options import arguments
from natgrad.fisher.owners import Data, likely_data, whose
from natgrad.fisher.pseudo_gradients import MAX_PASSES
from natgrad.linalg.tree import Tensors, describe, replace_tensors
from natgrad.metric.damping import Damping


@dataclass
class Linearised:
    """One batch, run: what is needed to pull cotangents of its outputs back to the parameters."""

    metric: Fisher
    output: Any  # attached
    local: Any  # detached, in the dtype of statistics
    targets: Any
    outputs: Tensors  # of `output`
    data: Data
    places: list[Place] | None  # where the rows of each datum are in each call; None where data mix
    calls: list[LayerCall]
    layers: Layers
    backward: BackwardPass

    def pull(self, v: Tensors) -> list[Covectors]:
        """Jᵀv of each datum; several where data mix, of one datum each."""
        if self.places is not None:
            return [self._covectors(v, self.data, self.places)]
        alone: list[Place] = [0] * len(self.calls)
        return [self._covectors(tuple(self.data.only(t, n) for t in v), Data(1), alone) for n in range(self.data.count)]

    def _covectors(self, v: Tensors, data: Data, places: Sequence[Place]) -> Covectors:
        dtype = statistics_dtype(self.metric.parameters.values())
        grads = self.backward.backward(v, data)
        found: dict[ParameterSlice, list[LayerIO]] = {}
        for call, g, place in zip(self.calls, grads, places):
            if g is not None:
                layer = self.layers.of(call)
                found.setdefault(key_of(call), []).extend(uses_of(call, layer, g, place, data.count, data.count, dtype))
        held = {key: uses for key, uses in found.items() if uses}
        return Covectors(self.metric, [self.layers.found[k] for k in held], list(held.values()), data.count)

    @property
    def entries(self) -> int:
        """Entries of the outputs that one datum has."""
        return sum(o.numel() for o in self.outputs) // self.data.count

    def by_datum(self, t: Tensors) -> Tensor:
        """Tensors like the outputs, as (data, entries of a datum)."""
        n = self.data.count
        if self.data.inner:
            return torch.cat([x.reshape(-1, n, *x.shape[1:]).movedim(1, 0).reshape(n, -1) for x in t], 1)
        return torch.cat([x.reshape(n, -1) for x in t], 1)

    def of_entry(self, c: int) -> Tensors:
        """The cotangent that is 1 at one entry of every datum."""
        numbers = [torch.arange(x.numel(), device=x.device).reshape(x.shape) for x in self.outputs]
        found, start = [], 0
        for o, i in zip(self.outputs, numbers):
            rows = self.by_datum((i,))
            own = c - start
            v = torch.zeros(o.numel(), dtype=o.dtype, device=o.device)
            if 0 <= own < rows.shape[1]:
                v[rows[:, own]] = 1
            found.append(v.reshape(o.shape))
            start += rows.shape[1]
        return tuple(found)

    def like(self, rows: Tensor) -> Tensors:
        """The inverse of `by_datum`: (data, entries of a datum) as tensors like the outputs."""
        found, start = [], 0
        for o in self.outputs:
            numbers = self.by_datum((torch.arange(o.numel(), device=o.device).reshape(o.shape),))
            flat = torch.empty(o.numel(), dtype=rows.dtype, device=o.device)
            flat[numbers.flatten()] = rows[:, start : start + numbers.shape[1]].flatten()
            found.append(flat.reshape(o.shape))
            start += numbers.shape[1]
        return tuple(found)

    def at_the_output(self) -> dict[ParameterSlice, LayerIO]:
        """Layers whose output, used once, is the model's output as it is: their Jacobian is known without a pass."""
        if len(self.outputs) != 1 or self.outputs[0].dim() != 2 or self.places is None or self.data.inner:
            return {}
        end = edge_of(self.outputs[0])
        found: dict[ParameterSlice, LayerIO] = {}
        for call, place in zip(self.calls, self.places):
            once = sum(key_of(c) == key_of(call) for c in self.calls) == 1
            layer = self.layers.of(call)
            if call.out != end or not once or isinstance(place, Tensor) or call.weight is None:
                continue
            g = self.local if isinstance(self.local, Tensor) else self.outputs[0].detach()
            use = uses_of(call, layer, g, place, self.data.count, self.data.count, g.dtype)
            if len(use) == 1 and plain(use[0]) and use[0].gradients.shape == (len(g), 1, 1, g.shape[1]):
                found |= {key_of(call): use[0]} if torch.equal(use[0].gradients[:, 0, 0], g) else {}
        return found

    def variance(self, damping: Damping, diagonal: bool = False) -> Tensor:
        """J (ĝ + λ)⁻¹ Jᵀ of each datum, (data, entries, entries); with `diagonal` (data, entries).

        Raises:
            ValueError: it would take more than `MAX_PASSES` backward passes, one for each entry.
        """
        ends = self.at_the_output()
        alone = {b.layers[0].key for b in self.metric._ready() if len(b.layers) == 1}
        ends = {key: use for key, use in ends.items() if key in alone}
        if all(key_of(c) in ends for c in self.calls):
            return forms(self.metric, [], damping, diagonal, ends)
        if self.entries > MAX_PASSES:
            raise ValueError(
                f"variances take a backward pass for each of the {self.entries} outputs of a datum (limit "
                f"{MAX_PASSES}); take how='sample', or the metric of the last layer alone: params='head.*'"
            )
        passes = [self.pull(self.of_entry(c)) for c in range(self.entries)]
        return torch.cat([forms(self.metric, each, damping, diagonal, ends) for each in zip(*passes)])


@contextmanager
def linearised(metric: Fisher, inputs: Any, targets: Any = None, check: bool = True) -> Iterator[Linearised]:
    """Run the model on one batch, with its graph. Leaves it as `Fisher.update` does, and the metric as it was.

    Args:
        check: whether the criterion has to take the output with the targets.

    Raises:
        ValueError: the batch does not fit the model or the criterion, or the output holds NaN or Inf.
        CaptureError: a parameter is used in a way the metric cannot follow.
    """
    check_metric(metric)
    args, kwargs = arguments(inputs)
    with isolated(metric.module, metric.parameters.values()):
        try:
            result, tape = traced_forward(metric.module, metric.parameter_names(), args, kwargs)
        except CaptureError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"the metric's model cannot take {describe(inputs)}: {error}") from error
        output = metric.output_of(result)
        targets = metric.targets_of((args, kwargs), output) if targets is None else targets
        if check:
            check_output(metric.likelihood, output, targets)
        found = metric.likelihood.outputs(output)
        if not usable(found):
            raise ValueError(
                "the model's output holds NaN or Inf for this batch; look at the inputs and the parameters"
            )
        live = [o for o in found if o.requires_grad]
        if not live:
            raise CaptureError("the output does not depend on any parameter of the metric: it is detached")
        reached, missed = coverage_walk(live, tapes_behind(live, [tape]))
        noted = [c for c in tape.calls if c.out in reached]
        uncovered = dict(metric.collection.uncovered)
        try:
            metric.estimator._sort_out(noted, missed, tape.differentiated)
        finally:
            metric.collection.uncovered = uncovered
        likely = [Data(1)] if metric.likelihood.unbatched(found) else likely_data(found, [tape.shapes])
        layers = Layers(metric.collection.layers.shapes)
        layers.found = {key: replace(layer) for key, layer in metric.collection.layers.found.items()}
        extra = calls_per_datum(missed, metric.parameters, max(d.count for d in likely))
        _, calls = layers.learn([*noted, *extra])
        dtype = statistics_dtype(metric.parameters.values())
        local = replace_tensors(output, found, tuple(o.detach().to(dtype) for o in found))
        passes = BackwardPass(live, [o.requires_grad for o in found], calls, metric.parameters)
        detached = metric.likelihood.outputs(local)
        counted = [c for c in calls if c.op != PER_DATUM]
        edges = list(tape.outputs)
        data, where = whose(
            detached,
            passes.at_calls,
            [(c.view.leading(c.x), c.view.gradient_rows) for c in counted],
            likely,
            max(d.count for d in likely),
            by_size=bool(metric.estimator.batch_norms()),
            ends=(partial(passes.at, edges), [(tape.outputs[e], Tensor.detach) for e in edges]),
        )
        places = None if where is None else [*where, *[0] * (len(calls) - len(counted))]
        yield Linearised(metric, output, local, targets, found, data, places, calls, layers, passes)


def check_metric(metric: Any, fitted: bool = False) -> None:
    """Raise where a metric has no covectors of data to give.

    Args:
        fitted: whether it has to be of a known number of data.

    Raises:
        TypeError: it is no Fisher metric.
        RuntimeError: it has seen no data, its model is sharded, or an optimizer drives it.
    """
    if not isinstance(metric, Fisher):
        raise TypeError(
            f"this takes the metric of a model and its data, ng.Fisher(model, criterion), got {type(metric).__name__}"
        )
    if metric.strategy.sharded:
        raise RuntimeError("the model is sharded by fully_shard; load the metric into one process: metric.load(path)")
    metric._ready()
    metric.check_parameters()
    if fitted and metric.driver is not None:
        raise RuntimeError(
            "an optimizer drives this metric, whose statistics are a moving average over batches and not those of the "
            "training data. Make one of the trained model: ng.Fisher(model, criterion).fit(loader)"
        )
