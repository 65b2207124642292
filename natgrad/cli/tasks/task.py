"""What a task is: data, a model, a criterion and the number that is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


class CommandError(Exception):
    """Something the user gave cannot be used. The message is one line that says what to do; exit code 2."""


@dataclass(frozen=True)
class Data:
    """Training and held-out examples, in memory, and one line about where they come from."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    source: str


@dataclass(frozen=True)
class Task:
    """One problem of the command line. A new one is a file with such an object and a line in `TASKS`.

    Args:
        name: what the user types.
        summary: one line for the help and the list of tasks.
        load: data from a directory (None where the user names none; tasks with data of their own ignore it).
        model: an initialised model; the caller has seeded PyTorch. Takes the name of an initialisation.
        criterion: the loss that is trained.
        measure: (model output, target) → the mean per example of the number that is reported.
        measured: the name of that number, with its unit.
        batch_size: examples in a training batch.
        seconds: CPU seconds for one run where the user sets no budget.
        rates: for each rival its sweep of learning rates.
    """

    name: str
    summary: str
    load: Callable[[Path | None], Data]
    model: Callable[[str], nn.Module]
    criterion: Callable[[], nn.Module]
    measure: Callable[[Tensor, Tensor], Tensor]
    measured: str
    batch_size: int
    seconds: float
    rates: Mapping[str, tuple[float, ...]]

    def build(self, seed: int, init: str) -> nn.Module:
        """The model of a seed: every optimizer starts from the same numbers."""
        torch.manual_seed(seed)
        return self.model(init)
