"""Refreshes on few data of a batch.

A factor takes so many rows of a batch and no more (`Curvature.set_up`). Where every layer sees many rows a datum, as a
transformer does, few data have them all, and a backward pass of the whole batch for labels that are drawn would be
spent on the rest. Those data, drawn at random, go through the model once more by themselves: forward, and backward from
their labels.

That this is the same is not assumed but seen: the outputs must be those that the same data have within the batch. They
are not where data mix, where the forward pass draws random numbers (dropout), or where the first dimension counts
something else; the whole batch is used then, from there on without another trial. No trial is made where it could do
harm: with batch statistics, with arguments that may be indices into the batch, on several ranks, whose forward passes
may be collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from natgrad.capture import Tape, coverage_walk
from natgrad.curvature import Curvature, Draw, usable
from natgrad.kronecker_blocks import FEWEST_DATA, KroneckerBlock
from natgrad.layers import key_of
from natgrad.own_pass import aside, noted
from natgrad.trees import Tensors, leaves_of, replace_tensors

if TYPE_CHECKING:
    from natgrad.fisher import Fisher

FEWEST_ROWS = 8  # a datum, in every layer
LARGEST_SHARE = 0.5  # of a batch that may be run again: its forward and backward pass costs 1.5 backward passes
ROWS_OF_DIAGONALS = 64  # that a block of diagonals takes at least: each entry is a mean over them
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # over the largest


class Few(NamedTuple):
    """Some data of a batch."""

    chosen: Tensor
    data: int  # of the batch

    def inputs(self, tree: Any) -> Any:
        """Arguments of the model with those data alone, in tensors whose first dimension counts data.

        Raises:
            ValueError: there is a tensor that cannot be cut, or that may hold indices into the batch.
        """
        cut = []
        for t in leaves_of(tree):
            if t.layout != torch.strided or t.is_nested:
                raise ValueError("a tensor that is not dense")
            if t.dim() and t.shape[0] == self.data:
                cut.append(t)
            elif t.dim() and not t.is_floating_point() and t.dtype != torch.bool:
                raise ValueError("integers of another length than the batch")
        return replace_tensors(tree, tuple(cut), tuple(t[self.chosen.to(t.device)] for t in cut))

    def fits(self, t: Tensor) -> bool:
        return t.dim() > 0 and t.shape[0] % self.data == 0

    def rows(self, t: Tensor) -> Tensor:
        """Of (data · r, …) the rows of those data, (few · r, …)."""
        return t.reshape(self.data, -1, *t.shape[1:])[self.chosen.to(t.device)].flatten(0, 1)


def few_enough(curvature: Curvature, outputs: Tensors, tape: Tape) -> int | None:
    """How many data have the rows that the factors take; None where the whole batch may as well be used."""
    data = tape.data
    if not data or curvature.kind != "sampled" or not curvature.trains or curvature.reading.reduction == "sum":
        return None
    if curvature.fraction < 1 or curvature.max_positions is not None or curvature.batch_norms():
        return None
    reached, missed = coverage_walk([o for o in outputs if o.requires_grad], [tape])
    if missed or not reached or tape.differentiated:
        return None
    calls = curvature.known_calls([c for c in tape.calls if c.out in reached])
    blocks = {layer.key: block for block in curvature.blocks for layer in block.layers}
    wanted = FEWEST_DATA
    for call in calls:
        block = blocks[key_of(call)]
        if not isinstance(block, KroneckerBlock) or block.needs_data or block.max_rows is None:
            return None
        rows = prod(call.view.leading(call.x))
        if rows % data == 0:  # else what it sees belongs to no datum, as the positions of an embedding
            if rows < FEWEST_ROWS * data and max(block.kept) > 1:
                return None
            most = block.max_rows if max(block.kept) > 1 else min(block.max_rows, ROWS_OF_DIAGONALS)
            wanted = max(wanted, -(-most * data // rows))
    return wanted if wanted <= LARGEST_SHARE * data else None


def drawn_again(outputs: Tensors, whole: Any, again: Any, few: Few) -> Tensors | None:
    """What the criterion is to be given of a pass of few data, as `outputs` is what it was given of the whole batch.

    `whole`, `again`: what the model returned for the batch and for the few. The criterion may have been given them in
    another shape, but with the same numbers. None where they are not found, or are not the same for those data.
    """
    found = []
    leaves = list(zip(leaves_of(whole), leaves_of(again)))
    for o in outputs:
        same = [a for w, a in leaves if is_view_of(o, w) and few.fits(w) and w.is_contiguous() and a.is_contiguous()]
        if not same or not few.fits(o) or same[0].numel() * few.data != o.numel() * len(few.chosen):
            return None
        if o.stride(0) * (o.shape[0] // few.data) != o.numel() // few.data:
            return None  # its first dimension does not count data
        shape = (o.shape[0] // few.data * len(few.chosen), *o.shape[1:])
        found.append(same[0].as_strided(shape, o.stride(), same[0].storage_offset()))
    return tuple(found) if are_same(found, outputs, few) else None


def as_it_was(tape: Tape) -> AbstractContextManager[Any]:
    """The autocast in which a forward pass ran."""
    if tape.autocast is None:
        return nullcontext()
    where, dtype, on = tape.autocast
    return torch.autocast(where, dtype, enabled=on)


def is_view_of(o: Tensor, leaf: Tensor) -> bool:
    """Whether both are all of the same memory."""
    return o.data_ptr() == leaf.data_ptr() and o.numel() == leaf.numel() and o.dtype == leaf.dtype


def are_same(again: Sequence[Tensor], whole: Sequence[Tensor], few: Few) -> bool:
    """Whether outputs are those of the same data within the batch, to rounding."""
    for a, w in zip(again, whole):
        if not few.fits(w):
            return False
        expected = few.rows(w.detach())
        if a.shape != expected.shape or a.dtype not in ROUNDING:
            return False
        size = float(expected[expected.isfinite()].abs().amax()) if expected.isfinite().any() else 0.0
        if not torch.allclose(a.detach().double(), expected.double(), rtol=0, atol=ROUNDING[a.dtype] * size):
            return False
    return True


class SmallPasses:
    """What `Fisher` keeps of its refreshes on few data."""

    def __init__(self) -> None:
        self.taken = 0
        self.refused: set[bool] = set()  # modes, training or not, in which few data were not the same by themselves

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "refused": sorted(self.refused)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.taken, self.refused = state["taken"], set(state["refused"])

    def draw(self, metric: Fisher, output: Any, targets: Any, tape: Tape, at_criterion: bool) -> Draw | None:
        """The draw of a training batch from few of its data; None where the whole batch is to be used.

        `output`, `targets`: what the criterion was given, or `output=` and `targets=` made of the batch.
        """
        curvature = metric.curvature
        outputs = curvature.reading.outputs(output)
        mode = metric.module.training
        if metric.ranks is not None or tape.at_output is None or mode in self.refused or not usable(outputs):
            return None
        count = few_enough(curvature, outputs, tape)
        if count is None:
            return None
        assert tape.data is not None
        before = curvature.row_generator.get_state()
        few = Few(torch.randperm(tape.data, generator=curvature.row_generator)[:count], tape.data)
        with aside(metric):
            found = self._again(metric, output, targets, tape, few, at_criterion)
            draw = None if found is None else curvature.draw(*found, per_datum=False)
        if draw is None:
            self.refused.add(mode)
            curvature.row_generator.set_state(before)
            return None
        self.taken += 1
        tape.drawn = True
        draw.data = tape.data  # for which these stand
        return draw

    def _again(
        self, metric: Fisher, output: Any, targets: Any, tape: Tape, few: Few, at_criterion: bool
    ) -> tuple[Any, Any, list[Tape]] | None:
        """Output, targets and tape of the few; None where their outputs are not the same."""
        whole, (args, kwargs) = tape.at_output
        outputs = metric.reading.outputs(output)
        labels = leaves_of(targets)
        if at_criterion and not all(few.fits(t) for t in labels):
            return None
        try:
            args, kwargs = few.inputs(args), few.inputs(kwargs)
            with as_it_was(tape):
                again, tape_of_few = noted(metric, args, kwargs)
            if at_criterion:
                new = drawn_again(outputs, whole, again, few)
                theirs = replace_tensors(targets, tuple(labels), tuple(map(few.rows, labels)))
                return None if new is None else (replace_tensors(output, outputs, new), theirs, [tape_of_few])
            result, theirs = metric.asked_for(again, args, kwargs)
            return (result, theirs, [tape_of_few]) if are_same(metric.reading.outputs(result), outputs, few) else None
        except Exception:  # the model or what the user picks of it may be made for batches of one size
            return None
