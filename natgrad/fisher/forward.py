"""Forward passes of a metric's own, beside those of training. They leave the model, its buffers and the random state as
they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.blocks.batch_statistics import BatchStatistics
from natgrad.capture.tape import Tape
from natgrad.distributed.ddp import kept_attributes
from natgrad.fisher.hooks import unwatched
from natgrad.fisher.likelihoods.base import CriterionLikelihood
from natgrad.linalg.tree import Tensors, describe, leaves_of
from natgrad.metric.interrupts import entered


@contextmanager
def isolated(module: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """For forward passes of a metric's own."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with entered(
        kept_random_state(), torch.random.fork_rng(devices), torch.enable_grad(), unwatched(), kept_attributes(module)
    ):
        yield


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Python's own random numbers go on afterwards as if none had been drawn."""
    drawn = random.getstate()
    try:
        yield
    finally:
        random.setstate(drawn)


def traced_forward(
    module: nn.Module, names: Mapping[int, str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tape]:
    """Return what the model returns, and the calls behind it. `names`: of the parameters, by id.

    Raises:
        ValueError: the batch is empty.
    """
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    tape = Tape(names)
    try:
        tape.open(args, kwargs)
        if next((shape[0] for shape in tape.shapes if shape), 1) == 0:
            raise ValueError("the batch is empty: its inputs have a first dimension of 0; leave it out")
        result = torch.func.functional_call(module, buffers, args, kwargs)
        tape.returned(leaves_of(result))
        return result, tape
    finally:
        tape.close()


def check_output(likelihood: CriterionLikelihood, output: Any, targets: Any) -> None:
    """Raise a ValueError if the criterion cannot take the output with these labels."""
    likelihood.outputs(output)
    if targets is None:
        return
    try:
        with torch.no_grad():
            likelihood.sum_loss(output, targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"{likelihood.name} cannot take {describe(output)} with targets {describe(targets)}: "
            f"{str(error).rstrip('.')}. If the training loop reshapes the output first, do the same in `output=`"
        ) from error


def check_finite(batch: BatchStatistics) -> None:
    """Raise a ValueError if statistics hold NaN or Inf."""
    if not batch.finite:
        raise ValueError(
            "the statistics of this batch hold NaN or Inf, as where the loss has no second derivative at the model's "
            "output; nothing was added. Look at the inputs, the labels and the parameters"
        )


def usable(outputs: Tensors) -> bool:
    """Whether there is a distribution to draw from: some output, no NaN, no +∞ (−∞ masks a class)."""
    return all(o.numel() > 0 and not bool((o.isnan() | (o == torch.inf)).any()) for o in outputs)


def why_unusable(outputs: Tensors) -> str:
    """What to say of outputs that are not `usable`."""
    if any(o.numel() == 0 for o in outputs):
        return "the batch is empty, so there is no metric to descend by; leave such batches out"
    return "the model's output holds NaN or Inf, so there is no metric to descend by; look at inputs and parameters"
