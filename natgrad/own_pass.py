"""Forward passes of the metric's own, beside those of training; and what several of them say together.

They leave the model, its buffers and the random state as they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.averages import Statistics
from natgrad.blocks import Block
from natgrad.capture import CaptureError, Tape
from natgrad.curvature import Draw, go_on, usable
from natgrad.likelihoods import Reading
from natgrad.trees import describe
from natgrad.watch import unwatched
from natgrad.wrappers import kept_attributes

if TYPE_CHECKING:
    from natgrad.fisher import Fisher


@contextmanager
def aside(metric: Fisher) -> Iterator[None]:
    """For forward passes of the metric's own."""
    devices = sorted({p.device.index for p in metric.parameters.values() if p.device.type == "cuda"})
    drawn = random.getstate()
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), unwatched(), kept_attributes(metric.module):
            yield
    finally:
        random.setstate(drawn)


def noted(metric: Fisher, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tape]:
    """What the model returns, and the calls behind it.

    Raises:
        ValueError: the batch is empty.
    """
    buffers = {n: b.detach().clone() for n, b in metric.module.named_buffers()}
    tape = Tape(metric.parameter_names())
    tape.open(args, kwargs)
    try:
        if tape.data == 0:
            raise ValueError("the batch is empty: its inputs have a first dimension of 0; leave it out")
        return torch.func.functional_call(metric.module, buffers, args, kwargs), tape
    finally:
        tape.close()


def draw_aside(metric: Fisher, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Any) -> Draw:
    """The statistics of one batch, by a pass of the metric's own.

    Raises:
        ValueError: the batch is empty, the criterion cannot take the output, or that holds NaN or Inf.
        CaptureError: the output does not depend on any parameter of the metric.
    """
    with aside(metric):
        result, tape = noted(metric, args, kwargs)
        output = metric.output_of(result)
        check_output(metric.reading, output, targets)
        metric.curvature.warn_of_batch_norm()
        if not metric.everywhere(usable(metric.reading.outputs(output))):
            raise ValueError(
                "the model's output holds NaN or Inf for this batch, so there is no distribution to take the "
                "metric of; nothing was added. Look at the inputs and the parameters"
            )
        draw = metric.curvature.draw(output, targets, [tape], per_datum=True)
    if draw is None:
        raise CaptureError(
            "the output does not depend on any parameter of the metric: it is detached, or the model was run under "
            "no_grad or ignores its parameters"
        )
    go_on(draw.streams)
    return draw


def check_output(reading: Reading, output: Any, targets: Any) -> None:
    """Raise a ValueError if the criterion cannot take the output with these labels."""
    reading.outputs(output)
    if targets is None:
        return
    try:
        with torch.no_grad():
            reading.sum_loss(output, targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"{reading.name} cannot take {describe(output)} with targets {describe(targets)}: "
            f"{str(error).rstrip('.')}. If the training loop reshapes the output first, do the same in `output=`"
        ) from error


def together(blocks: Sequence[Block], draws: Sequence[Draw], plain: bool) -> Draw:
    """Several draws as one."""
    statistics: list[tuple[Block, Statistics]] = []
    masses: dict[str, Tensor] = {}
    for block in blocks:
        parts = [new for draw in draws for held, new in draw.statistics if held is block]
        if parts:
            statistics.append((block, block.merged(parts, plain)))
    for draw in draws:
        for source, mass in draw.masses.items():
            masses[source] = masses[source] + mass if source in masses else mass
    for block, new in statistics:
        for key, average in new.items():
            for source in average.sums.keys() & masses.keys() if not block.is_mean(key) else ():
                average.weigh(masses[source], source)  # a block's gradient is zero in the draws that do not know it
    nats = [draw.nats for draw in draws if draw.nats is not None]
    return Draw(statistics, sum(draw.data for draw in draws), masses, nats=torch.stack(nats).sum(0) if nats else None)
