"""Statistics of every block from one output and the calls behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.averages import Statistics
from natgrad.blocks import Block, DenseBlock, DiagonalBlock
from natgrad.capture import Call, CaptureError, Tape, Uncaptured, as_gradient_edge, coverage_walk, tapes_behind
from natgrad.eigenvalue_block import EigenvalueBlock
from natgrad.kronecker_blocks import InputBlock, KroneckerBlock
from natgrad.layers import Layer, Layers, Use, key_of, use_of
from natgrad.layouts import element_layout, flat_layout
from natgrad.likelihoods import Reading
from natgrad.passes import MAX_PASSES, axes_that_fit, cotangents, count_data, data_axes, of_data
from natgrad.pieces import Piece
from natgrad.trees import Tensors, replace_tensors
from natgrad.views import GradientView

PER_DATUM = "per-datum gradients"  # stands for an op where no rule covers a parameter
TRAINING_ROWS = 1024  # rows of a call that enter a factor while an optimizer drives a sampled metric: at least these,
# or as many as the larger side has, so that the moving average of a few refreshes has full rank
DENSE_LIMIT = 512  # parameters without an op rule: dense up to this size, diagonal beyond

KRONECKER: dict[str, type[KroneckerBlock]] = {"kfac": KroneckerBlock, "ekfac": EigenvalueBlock, "input": InputBlock}
STRUCTURES = ("dense", "block", "diagonal", *KRONECKER)


def block_of(structure: str, layers: Sequence[Layer], sharing: str, max_side: int | None, trains: bool) -> Block:
    """An empty block. `sharing`, `max_side` and `trains` are of the Kronecker structures."""
    if structure in KRONECKER:
        return KRONECKER[structure](layers, sharing, max_side, trains)
    block = DiagonalBlock(layers) if structure == "diagonal" else DenseBlock(layers)
    block.structure = structure
    return block


Streams = list[tuple[torch.Generator, Tensor]]  # random generators and their states


@dataclass
class Draw:
    """What one output says of every block; counts once the loss is backpropagated."""

    statistics: list[tuple[Block, Statistics]]
    data: int
    masses: dict[str, Tensor] = field(default_factory=dict)  # of the loss terms, by head; none for a sum
    elsewhere: list[Block] = field(default_factory=list)  # whose statistics other ranks own
    nats: Tensor | None = None  # (Σ m u, Σ m) of `Reading.nats`, over all loss terms
    streams: Streams = field(default_factory=list)  # where its random numbers end


@dataclass
class Part:
    """One source of loss terms behind an output (one a criterion), with what is needed to take its statistics."""

    source: str
    reading: Reading
    outputs: Tensors  # detached
    output: Any
    targets: Any
    shot: Shot
    mass: Tensor | None
    axes: list[int]  # of each call: which dimension of its rows counts data
    data: int
    apart: bool  # whether each datum has a backward pass of its own


@dataclass
class Curvature:
    """The layers and blocks of a model, and how their statistics are taken.

    ``structure_of``, ``sharing_of`` and ``max_side_of`` map a parameter name to its structure, its weight sharing and
    the longest block that is kept of a Kronecker side, None for no limit.
    """

    module: nn.Module
    reading: Reading
    kind: str
    samples: int
    seed: int
    parameters: dict[str, Tensor]
    structure_of: Callable[[str], str]
    sharing_of: Callable[[str], str]
    max_side_of: Callable[[str], int | None]
    max_positions: int | None = None
    trains: bool = False  # an optimizer drives the metric
    blocks: list[Block] = field(default_factory=list)
    uncovered: dict[str, Uncaptured] = field(default_factory=dict)
    uneven: bool = False  # the ranks of a sharded model have unlike numbers of data
    meeting: Callable[[bool, int], bool] | None = None  # see `Fisher._meet`: a sharded model runs on all ranks or none
    live: Callable[[], Mapping[str, Tensor]] | None = None  # parameters as the forward pass sees them, if not the same

    def __post_init__(self) -> None:
        self.layers = Layers({n: p.shape for n, p in self.parameters.items()})
        self.generators: dict[torch.device, torch.Generator] = {}  # of labels
        self.row_generator = torch.Generator().manual_seed(self.seed)
        self._axes: dict[tuple[object, ...], list[int] | None] = {}
        self._warned_batch_norm = False

    # one draw ------------------------------------------------------------------------------------------

    def draw(self, output: Any, targets: Any, tapes: Sequence[Tape], per_datum: bool) -> Draw | None:
        """Statistics from one output; None if no parameter of the tapes lies behind it.

        `per_datum`: give parameters that no op rule covers a block from per-datum gradients; the statistics will be
        added to those that are there now.

        The random streams stay where they are, as what is drawn may be dropped: `go_on` with those of the draw once it
        counts. Draws that wait for that at the same time have the same random numbers.

        Raises:
            CaptureError: a parameter is used both by covered and by uncovered ops.
            ValueError: labels are needed and missing, or the kind has no closed form or takes too many passes.
        """
        device = next(iter(self.parameters.values())).device
        start = self._streams()
        try:
            with torch.autocast(device.type, enabled=False):  # statistics are not to be taken in half precision
                draw = self._draw(output, targets, tapes, per_datum)
            if draw is not None:
                draw.streams = self._streams()
        finally:
            for generator in self.generators.values():  # one that was made on the way starts from its seed again
                generator.manual_seed(self.seed)
            go_on(start)
        return draw

    def _streams(self) -> Streams:
        return [(g, g.get_state()) for g in (*self.generators.values(), self.row_generator)]

    def _draw(self, output: Any, targets: Any, tapes: Sequence[Tape], per_datum: bool) -> Draw | None:
        found = self.reading.outputs(output)
        live = [o for o in found if o.requires_grad]
        tapes = tapes_behind(live, tapes)
        reached, missed = coverage_walk(live, tapes)
        if not reached and not missed:
            return None
        from_inputs = next((t.data for t in tapes if t.data), None)
        data = 1 if self.reading.unbatched(found) else count_data(found, from_inputs)
        fine = usable(found)
        if self.meeting is not None:
            fine = self.meeting(fine, data)
        if not fine:
            return None  # the gradient is not finite either, and the optimizer skips its step
        self._check_targets(targets)
        noted = [c for tape in tapes for c in tape.calls if c.out in reached]
        self._sort_out(noted, missed, any(tape.differentiated for tape in tapes))
        for tape in tapes:
            tape.drawn = True

        dtype = statistics_dtype(self.parameters.values())
        detached = tuple(o.detach().to(dtype) for o in found)
        local = replace_tensors(output, found, detached)
        extra = self._per_datum_calls(missed, data) if per_datum else []
        calls = self._learn([*noted, *extra])
        parts = [
            self._part(source, reading, here, there, labels, calls, data)
            for (source, reading, here, labels), (_, _, there, _) in zip(
                self.reading.parts(self.kind, local, targets), self.reading.parts(self.kind, output, targets)
            )
        ]
        masses = {part.source: part.mass for part in parts if part.mass is not None}
        nats = [part.reading.nats(part.outputs, part.targets) for part in parts]
        known = [n.to(dtype) for n in nats if n is not None]
        return Draw(
            self._look(parts, calls, dtype, settled=per_datum),
            data,
            masses,
            nats=torch.stack(known).sum(0) if len(known) == len(nats) else None,
        )

    def _part(
        self, source: str, reading: Reading, local: Any, output: Any, targets: Any, calls: Sequence[Call], data: int
    ) -> Part:
        attached = reading.outputs(output)
        outputs = reading.outputs(local)  # last: the reading remembers what it was shown
        parameters = self.parameters if self.live is None else self.live()
        shot = Shot([o for o in attached if o.requires_grad], [o.requires_grad for o in attached], calls, parameters)
        axes = self._data_axes(source, outputs, shot, data)
        mass = self._mass(reading, outputs, targets, data)
        apart = axes is None
        if apart and self.uneven:
            raise RuntimeError(
                "the data mix inside the model, so that each has a backward pass of its own, and the ranks of a "
                "sharded model, which make every backward pass together, have unlike numbers of data. Give each "
                "rank the same"
            )
        return Part(source, reading, outputs, local, targets, shot, mass, axes or [0] * len(calls), data, apart)

    def _look(
        self, parts: Sequence[Part], calls: Sequence[Call], dtype: torch.dtype, settled: bool
    ) -> list[tuple[Block, Statistics]]:
        """Statistics of every block; those that look twice see the same cotangents again."""
        twice = [b for b in self.blocks if b.looks_twice]
        self.generator(parts[0].outputs[0].device)
        generators = {d: g.get_state() for d, g in self.generators.items()}
        statistics: dict[Block, Statistics] = {}
        counted: set[int] = set()  # calls whose inputs have been counted
        kept: list[tuple[Part, list[Tensor | None]]] = []
        passes = 0
        for part, grads in self._passes(parts):
            passes += 1
            kept = [(part, grads)] if twice and passes == 1 else []
            for block, uses, like in self._uses(self.blocks, part, calls, grads, dtype, counted):
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
        plain = self.reading.reduction == "sum"
        for block in twice:
            block.between_looks(statistics[block], settled, plain)
        if not kept:
            for d, state in generators.items():
                self.generators[d].set_state(state)
        for part, grads in kept or self._passes(parts):
            for block, uses, like in self._uses(twice, part, calls, grads, dtype, counted):
                block.observe_again(statistics[block], uses, part.mass, part.source, like)
        return [(block, new) for block, new in statistics.items() if new]

    def _passes(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[Tensor | None]]]:
        """One backward pass after another: gradients at the calls."""
        for part in parts:
            for v in cotangents(
                part.reading,
                part.outputs,
                part.output,
                part.targets,
                self.kind,
                self.samples,
                part.data,
                part.apart,
                self.generator(part.outputs[0].device),
            ):
                yield part, part.shot.backward(v, 1 if part.apart else part.data)

    def _uses(
        self,
        blocks: Iterable[Block],
        part: Part,
        calls: Sequence[Call],
        grads: Sequence[Tensor | None],
        dtype: torch.dtype,
        counted: set[int],
    ) -> Iterator[tuple[Block, list[list[Use]], Tensor]]:
        """The uses of each block's layers in one pass; one block at a time, so that its inputs can be let go."""
        of_layer: dict[Piece, list[int]] = {}
        for i, call in enumerate(calls):
            if grads[i] is not None:
                of_layer.setdefault(key_of(call), []).append(i)
        like = part.outputs[0].new_zeros((), dtype=dtype)
        for block in blocks:
            if not any(self.parameters[n].requires_grad for n in block.names):
                continue  # frozen: its curvature stays as it was
            aligned = None if not block.needs_data else 1 if part.apart else part.data
            uses: list[list[Use]] = []
            for layer in block.layers:
                here = []
                for i in of_layer.get(layer.key, []):
                    g = grads[i]
                    assert g is not None
                    use = use_of(calls[i], layer, g, part.axes[i], part.data, aligned, dtype)
                    use.first = i not in counted
                    here.append(use)
                uses.append(here)
            yield block, uses, like

    def _mass(self, reading: Reading, outputs: Tensors, targets: Any, data: int) -> Tensor | None:
        """What to divide the sum over cotangents by; None for a sum."""
        if reading.reduction == "sum":
            return None
        if self.kind == "empirical":
            return outputs[0].new_tensor(float(data))
        return reading.term_mass(outputs, targets).sum()

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    # what is used by what ------------------------------------------------------------------------------

    def _check_targets(self, targets: Any) -> None:
        if targets is not None:
            return
        why = "kind='empirical' takes the observed labels" if self.kind == "empirical" else self.reading.why_targets()
        if why is not None:
            raise ValueError(
                f"the metric needs targets: {why}. Pass them to update(inputs, targets), call the criterion "
                "module in the training loop, or give `targets=` (a callable) to pick them out of what the model "
                "receives"
            )

    def _sort_out(self, calls: Sequence[Call], missed: Sequence[Uncaptured], differentiated: bool) -> None:
        used_by = {p.name: c.op for c in calls for p in (c.weight, c.bias) if p is not None}
        for use in missed:
            earlier = use.name in self.layers.captured_names() and use.name not in self.uncovered
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
            self.uncovered[use.name] = use

    def _module_of(self, name: str) -> str:
        path = name.rpartition(".")[0]
        found = dict(self.module.named_modules()).get(path)
        return f"module {path!r}, a {type(found).__name__}" if path and found is not None else "the model itself"

    def _per_datum_calls(self, missed: Sequence[Uncaptured], data: int) -> list[Call]:
        found = []
        for use in missed:
            p = self.parameters[use.name]
            shape = tuple(p.shape)
            view = GradientView(flat_layout(shape) if p.numel() <= DENSE_LIMIT else element_layout(shape))
            found.append(
                Call(
                    PER_DATUM, Piece(use.name), None, view, torch.ones(data, dtype=p.dtype, device=p.device), (None, 0)
                )
            )
        return found

    def _learn(self, calls: Sequence[Call]) -> list[Call]:
        fresh, calls = self.layers.learn(calls)
        for layer in fresh:
            structure = self.structure_of(layer.key.name)
            if structure == "dense":
                joint = next((b for b in self.blocks if isinstance(b, DenseBlock) and b.structure == "dense"), None)
                if joint is not None:
                    joint.extend(layer)
                    continue
            name = layer.key.name
            block = block_of(structure, [layer], self.sharing_of(name), self.max_side_of(name), self.trains)
            self.set_up(block)
            self.blocks.append(block)
        return calls

    def forget_layer_of(self, name: str) -> None:
        """A parameter was thawed: let its layer be found anew, together with it."""
        owner = name.rpartition(".")[0]
        gone = [b for b in self.blocks if any(n.rpartition(".")[0] == owner for n in b.names)]
        self.blocks = [b for b in self.blocks if b not in gone]
        for block in gone:
            for layer in block.layers:
                del self.layers.found[layer.key]

    def set_up(self, block: Block) -> None:
        """Say how many rows of one call may enter a factor, drawn by what."""
        if not isinstance(block, KroneckerBlock):
            return
        block.generator = self.row_generator
        block.max_rows = self.max_positions
        if self.trains and self.kind == "sampled" and self.max_positions is None:
            block.max_rows = max(TRAINING_ROWS, *block.matrix_shape[1:])

    def train(self) -> None:
        """An optimizer takes over: what a refresh costs counts from now on."""
        self.trains = True
        for block in self.blocks:
            self.set_up(block)

    # which rows belong to which datum ------------------------------------------------------------------

    def _data_axes(self, source: str, outputs: Tensors, shot: Shot, data: int) -> list[int] | None:
        """Which dimension of each call's rows counts data, if all data can share a backward pass; else None."""
        calls = shot.calls
        leading = [c.view.leading(c.x) for c in calls]
        if self.kind == "sampled" and not any(b.needs_data for b in self.blocks):
            return [0] * len(calls)
        if self.batch_norms() and self.kind != "exact":
            choices = [axes_that_fit(sizes, data) for sizes in leading]
            return [fit[0] for fit in choices] if all(choices) else None
        key = (
            source,
            self.module.training,
            tuple(sizes[0] // data if sizes and sizes[0] % data == 0 else sizes for sizes in leading),
            tuple(o.shape[1:] for o in outputs),
        )
        if key not in self._axes:
            views = [(sizes, c.view.gradient_rows) for sizes, c in zip(leading, calls) if c.op != PER_DATUM]
            self._axes[key] = data_axes(outputs, shot.at_calls, views, data)
        axes = self._axes[key]
        return None if axes is None else axes + [0] * (len(calls) - len(axes))

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
            "the metric takes its batch statistics as fixed. Call model.eval() first for the metric of the model that "
            "is deployed",
            stacklevel=4,
        )


@dataclass
class Shot:
    """Backward passes from the outputs of one forward pass."""

    live: Sequence[Tensor]  # outputs that carry a graph
    carries: Sequence[bool]  # which of all outputs those are
    calls: Sequence[Call]  # those without an op rule last
    parameters: Mapping[str, Tensor]

    def backward(self, v: Tensors, data: int) -> list[Tensor | None]:
        """Gradients at all calls; where there is no op rule, the gradients (data, P) of the parameter itself."""
        return [*self.at_calls(v), *self.per_datum(v, data)]

    def at_calls(self, v: Tensors) -> list[Tensor | None]:
        """Gradients at the noted calls."""
        edges = [c.out for c in self.calls if c.op != PER_DATUM]
        once = list(dict.fromkeys(edges))
        if not once:
            return []
        found = dict(zip(once, self._grad([as_gradient_edge(e) for e in once], v)))
        return [found[e] for e in edges]

    def per_datum(self, v: Tensors, data: int) -> list[Tensor | None]:
        """One backward pass a datum."""
        names = [c.weight.name for c in self.calls if c.op == PER_DATUM and c.weight is not None]
        if not names:
            return []
        held = [self.parameters[n] for n in names]
        rows: list[list[Tensor]] = [[] for _ in names]
        for masked in self._one_datum_each(v, data):
            for into, p, g in zip(rows, held, self._grad(held, masked)):
                into.append(torch.zeros_like(p).flatten() if g is None else g.flatten())
        return [torch.stack(r) for r in rows]

    def _one_datum_each(self, v: Tensors, data: int) -> Iterator[Tensors]:
        if data == 1:
            yield v
            return
        if data > MAX_PASSES:
            raise ValueError(
                f"parameters without an op rule need a backward pass for each of {data} data (limit {MAX_PASSES}); "
                "pass fewer data an update, or leave them out with `params=`"
            )
        for n in range(data):
            keep = torch.zeros(data, dtype=torch.bool, device=v[0].device)
            keep[n] = True
            yield tuple(of_data(t, keep) for t in v)

    def _grad(self, inputs: Sequence[Any], v: Tensors) -> tuple[Tensor | None, ...]:
        held = [t.to(o.dtype) for t, o in zip((t for t, live in zip(v, self.carries) if live), self.live)]
        try:
            return torch.autograd.grad(self.live, inputs, held, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "selective activation checkpoint" not in str(error):
                raise
            raise CaptureError(
                "the model uses selective activation checkpointing, which lets a region be backpropagated only once; "
                "the metric needs a backward pass of its own. Use checkpoint(…, use_reentrant=False) without "
                "context_fn, or take the metric with update() on a model without it"
            ) from error


def go_on(streams: Streams) -> None:
    """Let random streams go on from these states."""
    for generator, state in streams:
        generator.set_state(state)


def usable(outputs: Tensors) -> bool:
    """Whether there is a distribution to draw from: some output, no NaN, no +∞ (−∞ masks a class)."""
    return all(o.numel() > 0 and not bool((o.isnan() | (o == torch.inf)).any()) for o in outputs)


def statistics_dtype(parameters: Any) -> torch.dtype:
    """float64 where a parameter is, else float32: half-precision statistics lose the small eigenvalues."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
