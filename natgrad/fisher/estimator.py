"""Statistics of every block from one output and the calls behind it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks.average import Statistics
from natgrad.blocks.base import Block
from natgrad.blocks.batch_statistics import BatchStatistics, Streams, go_on
from natgrad.blocks.collection import BlockCollection, statistics_dtype
from natgrad.capture.layers import LayerIO, key_of, uses_of
from natgrad.capture.parameters import ParameterSlice
from natgrad.capture.tape import (
    CaptureError,
    Edge,
    LayerCall,
    Tape,
    Uncaptured,
    coverage_walk,
    edge_of,
    let_go,
    tapes_behind,
    used_outside,
)
from natgrad.capture.views import Place
from natgrad.distributed.strategy import Strategy
from natgrad.fisher.backward_pass import PER_DATUM, BackwardPass, calls_per_datum
from natgrad.fisher.forward import usable, why_unusable
from natgrad.fisher.likelihoods.base import CriterionLikelihood
from natgrad.fisher.owners import Data, likely_data, whose
from natgrad.fisher.pseudo_gradients import cotangents
from natgrad.linalg.tree import Tensors, replace_tensors


@dataclass
class LossTerms:
    """One source of loss terms behind an output (one a criterion), with what is needed to take its statistics."""

    source: str
    likelihood: CriterionLikelihood
    outputs: Tensors  # detached
    output: Any
    targets: Any
    backward: BackwardPass
    mass: Tensor | None
    places: list[Place]  # of each call: where the rows of each datum are
    data: Data
    apart: bool  # whether each datum has a backward pass of its own
    weight: float  # of this source in the loss
    coupled: bool  # whether the loss couples data, so that a cotangent is of all

    @property
    def alone(self) -> bool:
        """Whether a backward pass has one gradient, and not one a datum."""
        return self.apart or self.coupled


class Estimator:
    """How the statistics of a model's blocks are taken from its forward passes.

    Args:
        module: the model, as it is without wrappers.
        likelihood: what its criterion stands for.
        kind: "exact", "sampled" or "empirical"; `samples`: labels drawn for each datum where they are.
        seed: of the labels drawn.
        collection: the blocks, which grows by what the forward passes use.
        strategy: how ranks share the work.
    """

    def __init__(
        self,
        module: nn.Module,
        likelihood: CriterionLikelihood,
        kind: str,
        samples: int,
        seed: int,
        collection: BlockCollection,
        strategy: Strategy,
    ) -> None:
        self.module, self.likelihood, self.kind, self.samples, self.seed = module, likelihood, kind, samples, seed
        self.collection, self.strategy = collection, strategy
        self.generators: dict[torch.device, torch.Generator] = {}  # of labels
        self._warned_batch_norm = False
        self.unusable: str | None = None  # why the last output gave no statistics

    # one draw ------------------------------------------------------------------------------------------

    def draw(self, output: Any, targets: Any, tapes: Sequence[Tape], per_datum: bool) -> BatchStatistics | None:
        """Statistics from one output; None if no parameter of the tapes lies behind it.

        `per_datum`: give parameters that no op rule covers a block from per-datum gradients; the statistics will be
        added to those that are there now.

        The random streams stay where they are, as what is drawn may be dropped: `go_on` with those of the draw once it
        counts. Draws that wait for that at the same time have the same random numbers.

        Raises:
            CaptureError: a parameter is used both by covered and by uncovered ops.
            ValueError: labels are needed and missing, or the kind has no closed form or takes too many passes.
        """
        device = next(iter(self.collection.parameters.values())).device
        start = self._streams()
        try:
            with torch.autocast(device.type, enabled=False):  # statistics are not to be taken in half precision
                draw = self._draw(output, targets, tapes, per_datum)
            if draw is not None:
                draw.start, draw.streams = start, self._streams()
        finally:
            self.rewind(start)
            let_go(call for tape in tapes for call in tape.calls)
        return draw

    def rewind(self, start: Streams) -> None:
        """Let the random streams go on from where they were."""
        for generator in self.generators.values():  # one that was made on the way starts from its seed again
            generator.manual_seed(self.seed)
        go_on(start)

    def _streams(self) -> Streams:
        return [(g, g.get_state()) for g in (*self.generators.values(), self.collection.rows)]

    def _draw(self, output: Any, targets: Any, tapes: Sequence[Tape], per_datum: bool) -> BatchStatistics | None:
        found = self.likelihood.outputs(output)
        live = [o for o in found if o.requires_grad]
        tapes = tapes_behind(live, tapes)
        fine = usable(found)
        self.unusable = None if fine else why_unusable(found)
        reached, missed = coverage_walk(live, tapes)
        if not per_datum and len(tapes) == 1:  # in training; m(m(x)) is followed through both passes
            missed = [*missed, *used_outside(tapes)]
        if not reached and not missed:
            return None
        self._check_targets(targets)
        one = fine and self.likelihood.unbatched(found)
        likely = [Data(1)] if one else likely_data(found, [t.shapes for t in tapes])
        if not self.strategy.meet(fine, likely[0].count):
            return None  # the gradient is not finite either, and the optimizer skips its step
        traced_forward = [c for tape in tapes for c in tape.calls if c.out in reached]
        self._sort_out(traced_forward, missed, any(tape.differentiated for tape in tapes))
        for tape in tapes:
            tape.drawn = True

        dtype = statistics_dtype(self.collection.parameters.values())
        detached = tuple(o.detach().to(dtype) for o in found)
        local = replace_tensors(output, found, detached)
        extra = calls_per_datum(missed, self.collection.parameters, max(d.count for d in likely)) if per_datum else []
        calls = self.collection.learn([*traced_forward, *extra])
        returned = {e: shape for tape in tapes for e, shape in tape.outputs.items()}
        parts = [
            self._part(source, likelihood, here, there, labels, calls, likely, returned)
            for (source, likelihood, here, labels), (_, _, there, _) in zip(
                self.likelihood.parts(self.kind, local, targets), self.likelihood.parts(self.kind, output, targets)
            )
        ]
        masses = {part.source: part.mass for part in parts if part.mass is not None}
        masses |= self.likelihood.masses_of_terms(self.kind, local, targets)
        nats = [part.likelihood.nats(part.outputs, part.targets) for part in parts]
        known = [n.to(dtype) * n.new_tensor([p.weight, 1]) for n, p in zip(nats, parts) if n is not None]
        return BatchStatistics(
            self._look(parts, calls, dtype, added=per_datum),
            parts[0].data.count,
            masses,
            nats=torch.stack(known).sum(0) if len(known) == len(nats) else None,
            labels=sum(part.likelihood.labels(part.outputs) for part in parts),
            output=(*(tape.number for tape in tapes), *((id(e[0]), e[1]) for o in live if (e := edge_of(o)))),
        )

    def _part(
        self,
        source: str,
        likelihood: CriterionLikelihood,
        local: Any,
        output: Any,
        targets: Any,
        calls: Sequence[LayerCall],
        likely: Sequence[Data],
        returned: Mapping[Edge, tuple[int, ...]],
    ) -> LossTerms:
        attached = likelihood.outputs(output)
        outputs = likelihood.outputs(local)  # last: the reading remembers what it was shown
        parameters = self.strategy.live(self.collection.parameters)
        passes = BackwardPass(
            [o for o in attached if o.requires_grad], [o.requires_grad for o in attached], calls, parameters
        )
        data, found = self._whose(outputs, passes, likely, returned)
        apart = found is None
        mass = self._mass(likelihood, outputs, targets, data.count)
        if apart and self.strategy.uneven:
            raise RuntimeError(
                "the data mix inside the model, so that each has a backward pass of its own, and the ranks of a "
                "sharded model, which make every backward pass together, have unlike numbers of data. Give each "
                "rank the same"
            )
        places = found or [0] * len(calls)
        weight, coupled = self.likelihood.weight_of(source), likelihood.coupled(outputs, targets)
        if coupled and self.kind == "empirical":
            raise ValueError(
                f"kind='empirical' takes the loss of each datum alone, but {likelihood.name} couples the data of a "
                "batch; take kind='exact' or 'sampled'"
            )
        return LossTerms(
            source, likelihood, outputs, local, targets, passes, mass, places, data, apart, weight, coupled
        )

    def _look(
        self, parts: Sequence[LossTerms], calls: Sequence[LayerCall], dtype: torch.dtype, added: bool
    ) -> list[tuple[Block, Statistics]]:
        """Statistics of every block; those that look twice see the same cotangents again."""
        twice = [b for b in self.collection.blocks if b.two_pass]
        self.generator(parts[0].outputs[0].device)
        generators = {d: g.get_state() for d, g in self.generators.items()}
        statistics: dict[Block, Statistics] = {}
        counted: set[int] = set()  # calls whose inputs have been counted
        kept: list[tuple[LossTerms, list[Tensor | None]]] = []
        passes = 0
        for part, grads in self._passes(parts):
            passes += 1
            kept = [(part, grads)] if twice and passes == 1 else []
            for block, uses, like in self._uses(self.collection.blocks, part, calls, grads, dtype, counted):
                new = block.observe(uses, part.mass, part.source, like)
                if block not in statistics:
                    statistics[block] = new
                    continue
                held = statistics[block]
                for key, average in new.items():
                    known = key in held and set(average.sums) <= set(held[key].sums)
                    held.setdefault(key, type(average)()).merge(average, known and not block.is_mean(key))
            counted |= {i for i, g in enumerate(grads) if g is not None}
        if not twice:
            return [(block, new) for block, new in statistics.items() if new]
        plain = self.likelihood.reduction == "sum"
        for block in twice:
            block.choose_basis(statistics[block], added, plain)
        if not kept:
            for d, state in generators.items():
                self.generators[d].set_state(state)
        for part, grads in kept or self._passes(parts):
            for block, uses, like in self._uses(twice, part, calls, grads, dtype, counted):
                block.second_pass(statistics[block], uses, part.mass, part.source, like)
        return [(block, new) for block, new in statistics.items() if new]

    def _passes(self, parts: Sequence[LossTerms]) -> Iterator[tuple[LossTerms, list[Tensor | None]]]:
        """One backward pass after another: gradients at the calls."""
        for part in parts:
            for v in cotangents(
                part.likelihood,
                part.outputs,
                part.output,
                part.targets,
                self.kind,
                self.samples,
                part.data,
                part.apart and not part.coupled,
                self.generator(part.outputs[0].device),
            ):
                if part.weight != 1:
                    v = tuple(t * part.weight**0.5 for t in v)
                yield part, part.backward.backward(v, Data(1) if part.alone else part.data)

    def _uses(
        self,
        blocks: Iterable[Block],
        part: LossTerms,
        calls: Sequence[LayerCall],
        grads: Sequence[Tensor | None],
        dtype: torch.dtype,
        counted: set[int],
    ) -> Iterator[tuple[Block, list[list[LayerIO]], Tensor]]:
        """The uses of each block's layers in one pass; one block at a time, so that its inputs can be let go."""
        of_layer: dict[ParameterSlice, list[int]] = {}
        for i, call in enumerate(calls):
            if grads[i] is not None:
                of_layer.setdefault(key_of(call), []).append(i)
        like = part.outputs[0].new_zeros((), dtype=dtype)
        for block in blocks:
            if not any(self.collection.parameters[n].requires_grad for n in block.names):
                continue  # frozen: its curvature stays as it was
            whole = part.apart or (part.coupled and not block.reduces)
            aligned = None if not block.needs_data else 1 if whole else part.data.count
            uses: list[list[LayerIO]] = []
            for layer in block.layers:
                here: list[LayerIO] = []
                for i in of_layer.get(layer.key, []):
                    g = grads[i]
                    assert g is not None
                    before = len(here)
                    here += uses_of(calls[i], layer, g, part.places[i], part.data.count, aligned, dtype)
                    for use in here[before:]:
                        use.first = i not in counted
                uses.append(here)
            yield block, uses, like

    def _mass(self, likelihood: CriterionLikelihood, outputs: Tensors, targets: Any, data: int) -> Tensor | None:
        """What to divide the sum over cotangents by; None for a sum."""
        if likelihood.reduction == "sum":
            return None
        if self.kind == "empirical":
            return outputs[0].new_tensor(float(data))
        return likelihood.term_mass(outputs, targets).sum()

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    # what is used by what ------------------------------------------------------------------------------

    def why_targets(self) -> str | None:
        """Return why the metric depends on labels; None where it does not."""
        if self.kind == "empirical":
            return "kind='empirical' takes the observed labels"
        return self.likelihood.why_targets()

    def _check_targets(self, targets: Any) -> None:
        if targets is None and (why := self.why_targets()) is not None:
            raise ValueError(
                f"the metric needs targets: {why}. Pass them to update(inputs, targets), call the criterion "
                "module in the training loop, or give `targets=` (a callable) to pick them out of what the model "
                "receives"
            )

    def _sort_out(self, calls: Sequence[LayerCall], missed: Sequence[Uncaptured], differentiated: bool) -> None:
        used_by = {p.name: c.op for c in calls for p in (c.weight, c.bias) if p is not None}
        for use in missed:
            earlier = use.name in self.collection.layers.captured_names() and use.name not in self.collection.uncovered
            if use.name in used_by or earlier:
                where = self._module_of(use.name)
                if differentiated:
                    raise CaptureError(
                        f"parameter {use.name!r} (of {where}) also acts through a derivative that the model takes in "
                        "its forward pass (torch.autograd.grad), which a Fisher metric cannot follow. For losses on "
                        "derivatives of the network use a function-space metric: ng.GaussNewton(model, terms)"
                    )
                raise CaptureError(
                    f"parameter {use.name!r} (of {where}) is used by {used_by.get(use.name, 'a covered op')}, which "
                    f"the metric follows, and also in a way that no op rule covers (reached through {use.used_by}); "
                    "its block would be wrong. Use it through covered ops only, or leave it out with `params=`"
                )
            self.collection.uncovered[use.name] = use

    def _module_of(self, name: str) -> str:
        path = name.rpartition(".")[0]
        found = dict(self.module.named_modules()).get(path)
        return f"module {path!r}, a {type(found).__name__}" if path and found is not None else "the model itself"

    # which rows belong to which datum ------------------------------------------------------------------

    def _whose(
        self,
        outputs: Tensors,
        backward: BackwardPass,
        likely: Sequence[Data],
        returned: Mapping[Edge, tuple[int, ...]],
    ) -> tuple[Data, list[Place] | None]:
        """How the data lie in the outputs, and where they are in each call; None there if they mix. `returned`: shapes
        of what the forward passes returned.
        """
        calls = backward.calls
        if self.kind == "sampled" and not any(b.needs_data for b in self.collection.blocks):
            return likely[0], [0] * len(calls)
        noted = [c for c in calls if c.op != PER_DATUM]
        edges = list(returned)
        ends = (partial(backward.at, edges), [(returned[e], Tensor.detach) for e in edges])
        data, where = whose(
            outputs,
            backward.at_calls,
            [(c.view.leading(c.x), c.view.gradient_rows) for c in noted],
            likely[:1] if self.strategy.sharded else likely,  # there all ranks make the same backward passes
            self.strategy.most,
            by_size=self.kind != "exact" and bool(self.batch_norms()),  # batch statistics count as fixed
            ends=ends if self.kind == "empirical" else None,
        )
        if not self.strategy.everywhere(where is not None) or where is None:
            return data, None
        by_data: list[Place] = [0] * (len(calls) - len(noted))  # rows that are data
        return data, where + by_data

    def batch_norms(self) -> list[str]:
        """Modules that mix data by their batch statistics."""
        modules = self.module.named_modules()
        return [n for n, m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]

    def warn_of_batch_norm(self) -> None:
        """Say once what the metric of a model in training mode means."""
        found = self.batch_norms()
        if not found or self.kind == "exact" or self._warned_batch_norm:
            return
        self._warned_batch_norm = True
        warnings.warn(
            f"batch normalisation in training mode ({found[0]!r} and {len(found) - 1} more) mixes the data of a batch; "
            "the metric takes its batch statistics as fixed. Call model.eval() first for that of the deployed model",
            stacklevel=4,
        )
