"""Statistics of every block from one output and the calls behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks import Block, DenseBlock, DiagonalBlock, KroneckerBlock, Layer, Statistics, Use
from natgrad.capture import Call, CaptureError, Piece, Tape, Uncaptured, as_gradient_edge, coverage_walk
from natgrad.layers import Layers, canonical_input, uses_of
from natgrad.likelihoods import Reading
from natgrad.ops import ElementView, FlatView
from natgrad.passes import cotangents, count_data, of_data, separable
from natgrad.trees import Tensors, replace_tensors

PER_DATUM = "per-datum gradients"  # stands for an op where no rule covers a parameter
DENSE_LIMIT = 512  # parameters without an op rule: dense up to this size, diagonal beyond

BLOCKS: dict[str, Callable[[Sequence[Layer], str], Block]] = {
    "dense": lambda layers, sharing: DenseBlock(layers),
    "block": lambda layers, sharing: DenseBlock(layers),
    "diagonal": lambda layers, sharing: DiagonalBlock(layers),
    "kfac": KroneckerBlock,
}


@dataclass
class Draw:
    """What one output says of every block; counts once the loss is backpropagated."""

    statistics: list[tuple[Block, Statistics]]
    data: int
    masses: dict[str, Tensor]  # what their sums are divided by, for each source of terms; empty for a sum


@dataclass
class Curvature:
    """The layers and blocks of a model, and how their statistics are taken.

    ``structure_of`` and ``sharing_of`` map a parameter name to its structure and weight sharing.
    """

    module: nn.Module
    reading: Reading
    kind: str
    samples: int
    seed: int
    parameters: dict[str, Tensor]
    structure_of: Callable[[str], str]
    sharing_of: Callable[[str], str]
    blocks: list[Block] = field(default_factory=list)
    uncovered: dict[str, Uncaptured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = Layers({n: p.shape for n, p in self.parameters.items()})
        self.generators: dict[torch.device, torch.Generator] = {}
        self._separable: dict[tuple[object, ...], bool] = {}
        self._warned_batch_norm = False

    # one draw ------------------------------------------------------------------------------------------

    def draw(self, output: Any, targets: Any, tapes: Sequence[Tape], per_datum: bool) -> Draw | None:
        """Statistics from one output; None if no parameter of the tapes lies behind it.

        `per_datum`: give parameters that no op rule covers a block from per-datum gradients.

        Raises:
            CaptureError: a parameter is used both by covered and by uncovered ops.
            ValueError: labels are needed and missing, or the kind has no closed form or takes too many passes.
        """
        device = next(iter(self.parameters.values())).device
        with torch.autocast(device.type, enabled=False):  # statistics are not to be taken in half precision
            return self._draw(output, targets, tapes, per_datum)

    def _draw(self, output: Any, targets: Any, tapes: Sequence[Tape], per_datum: bool) -> Draw | None:
        found = self.reading.outputs(output)
        live = [o for o in found if o.requires_grad]
        reached, missed = coverage_walk(live, tapes)
        if not reached and not missed:
            return None
        if not usable(found):
            return None  # the gradient is not finite either, and the optimizer skips its step
        self._check_targets(targets)
        calls = [c for tape in tapes for c in tape.calls if c.out in reached]
        self._sort_out(calls, missed)
        for tape in tapes:
            tape.drawn = True

        dtype = statistics_dtype(self.parameters.values())
        local_output = replace_tensors(output, found, tuple(o.detach().to(dtype) for o in found))
        outputs = self.reading.outputs(local_output)
        from_inputs = next((t.data for t in tapes if t.data), None)
        data = 1 if self.reading.unbatched(outputs) else count_data(outputs, from_inputs)
        shot = Shot(live, [o.requires_grad for o in found], calls, self.parameters)
        extra = self._per_datum_calls(missed, data) if per_datum else []
        self._learn([*calls, *extra])
        inputs = [canonical_input(c, self.layers.of(c), dtype) for c in (*calls, *extra)]
        apart = not self._data_apart(outputs, shot, [a.shape[0] for a in inputs[: len(calls)]], data)
        mass = self._mass(outputs, targets, data)

        statistics: dict[Block, Statistics] = {}
        source = ""
        for v in cotangents(
            self.reading,
            outputs,
            local_output,
            targets,
            self.kind,
            self.samples,
            data,
            apart,
            self.generator(outputs[0].device),
        ):
            grads = [*shot.backward(v), *(shot.per_datum(c, v, 1 if apart else data) for c in extra)]
            self._observe(statistics, [*calls, *extra], inputs, grads, 1 if apart else data, mass, source)
        return Draw(list(statistics.items()), data, {} if mass is None else {source: mass})

    def _observe(
        self,
        statistics: dict[Block, Statistics],
        calls: Sequence[Call],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        data: int,
        mass: Tensor | None,
        source: str,
    ) -> None:
        uses: dict[Piece, list[Use]] = {}
        aligned = data if any(b.needs_data for b in self.blocks) else None
        for call, use in zip(calls, uses_of(calls, inputs, grads, aligned)):
            if use is not None:
                uses.setdefault(self.layers.of(call).key, []).append(use)
        for block in self.blocks:
            if not any(self.parameters[n].requires_grad for n in block.names):
                continue  # frozen: its curvature stays as it was
            first = block not in statistics
            new = block.observe([uses.get(layer.key, []) for layer in block.layers], mass, source, first)
            if first:
                statistics[block] = new
                continue
            for key, average in new.items():
                statistics[block][key].merge(average, plain=True)

    def _mass(self, outputs: Tensors, targets: Any, data: int) -> Tensor | None:
        """What to divide the sum over cotangents by; None for a sum."""
        if self.reading.reduction == "sum":
            return None
        if self.kind == "empirical":
            return outputs[0].new_tensor(float(data))
        return self.reading.term_mass(outputs, targets).sum()

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
                f"module in the "
                "training loop, or give `targets=` (a callable) to pick them out of what the model receives"
            )

    def _sort_out(self, calls: Sequence[Call], missed: Sequence[Uncaptured]) -> None:
        used_by = {p.name: c.op for c in calls for p in (c.weight, c.bias) if p is not None}
        for use in missed:
            earlier = use.name in self.layers.captured_names() and use.name not in self.uncovered
            if use.name in used_by or earlier:
                raise CaptureError(
                    f"parameter {use.name!r} is used by {used_by.get(use.name, 'a covered op')}, which the "
                    f"metric follows, and also "
                    f"in a way that no op rule covers (reached through {use.used_by}); its block would be wrong. "
                    "Use it through covered ops only, or leave it out with `params=`"
                )
            self.uncovered[use.name] = use

    def _per_datum_calls(self, missed: Sequence[Uncaptured], data: int) -> list[Call]:
        found = []
        for use in missed:
            p = self.parameters[use.name]
            view = FlatView(tuple(p.shape)) if p.numel() <= DENSE_LIMIT else ElementView(tuple(p.shape))
            found.append(Call(PER_DATUM, Piece(use.name), None, view, p.detach().new_ones(data), (None, 0)))
        return found

    def _learn(self, calls: Sequence[Call]) -> None:
        for layer in self.layers.learn(calls):
            structure = self.structure_of(layer.key.name)
            if structure == "dense":
                joint = next((b for b in self.blocks if isinstance(b, DenseBlock) and b.structure == "dense"), None)
                if joint is not None:
                    joint.extend(layer)
                    continue
            block = BLOCKS[structure]([layer], self.sharing_of(layer.key.name))
            block.structure = structure
            self.blocks.append(block)

    def forget_layer_of(self, name: str) -> None:
        """A parameter was thawed: let its layer be found anew, together with it."""
        owner = name.rpartition(".")[0]
        gone = [b for b in self.blocks if any(n.rpartition(".")[0] == owner for n in b.names)]
        self.blocks = [b for b in self.blocks if b not in gone]
        for block in gone:
            for layer in block.layers:
                del self.layers.found[layer.key]

    # which rows belong to which datum ------------------------------------------------------------------

    def _data_apart(self, outputs: Tensors, shot: Shot, rows: Sequence[int], data: int) -> bool:
        """Whether all data can share a backward pass; ``rows[i]`` is the first dimension of call i."""
        if self.kind == "sampled" and not any(b.needs_data for b in self.blocks):
            return True
        batch_norm = [
            n for n, m in self.module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
        ]
        if batch_norm and self.kind != "exact":
            if not self._warned_batch_norm:
                warnings.warn(
                    f"batch normalisation in training mode ({batch_norm[0]!r} and {len(batch_norm) - 1} more) "
                    f"mixes the data of a "
                    "batch; the metric takes its batch statistics as fixed. Call model.eval() first for the "
                    "metric of the "
                    "model that is deployed",
                    stacklevel=6,
                )
                self._warned_batch_norm = True
            return True
        key = (
            self.module.training,
            tuple(r // data if r % data == 0 else r for r in rows),
            tuple(o.shape[1:] for o in outputs),
        )
        if key not in self._separable:
            self._separable[key] = separable(outputs, shot.backward, rows, data)
        return self._separable[key]


@dataclass
class Shot:
    """Backward passes from the outputs of one forward pass."""

    live: Sequence[Tensor]  # outputs that carry a graph
    carries: Sequence[bool]  # which of all outputs those are
    calls: Sequence[Call]
    parameters: dict[str, Tensor]

    def backward(self, v: Tensors) -> list[Tensor | None]:
        """Gradients at the noted calls."""
        if not self.calls:
            return []
        return list(self._grad([as_gradient_edge(c.out) for c in self.calls], v))

    def per_datum(self, call: Call, v: Tensors, data: int) -> Tensor | None:
        """Gradients (data, P) of a parameter no op rule covers, one backward pass a datum."""
        assert call.weight is not None
        p = self.parameters[call.weight.name]
        rows = []
        for masked in self._one_datum_each(v, data):
            (g,) = self._grad([p], masked)
            rows.append(torch.zeros_like(p).flatten() if g is None else g.flatten())
        return torch.stack(rows)

    def _one_datum_each(self, v: Tensors, data: int) -> Iterator[Tensors]:
        if data == 1:
            yield v
            return
        for n in range(data):
            keep = torch.zeros(data, dtype=torch.bool, device=v[0].device)
            keep[n] = True
            yield tuple(of_data(t, keep) for t in v)

    def _grad(self, inputs: Sequence[Any], v: Tensors) -> tuple[Tensor | None, ...]:
        held = [t.to(o.dtype) for t, o in zip((t for t, live in zip(v, self.carries) if live), self.live)]
        with torch.autocast(self.live[0].device.type, enabled=False):
            return torch.autograd.grad(self.live, inputs, held, retain_graph=True, allow_unused=True)


def usable(outputs: Tensors) -> bool:
    """Whether there is a distribution to draw from: some output, no NaN, no +∞ (−∞ masks a class)."""
    return all(o.numel() > 0 and not bool((o.isnan() | (o == torch.inf)).any()) for o in outputs)


def statistics_dtype(parameters: Any) -> torch.dtype:
    """float64 where a parameter is, else float32: half-precision statistics lose the small eigenvalues."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
