"""Steps whose gradient is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

PATIENCE = 100  # steps in a row with a gradient that is not finite before training is given up


class Skips:
    """Steps whose gradient is not finite: skipped on the host where that costs nothing, else masked and counted
    later.
    """

    def __init__(self) -> None:
        self.total = 0
        self.in_a_row = 0
        self._unread: Tensor | None = None  # bad steps on the device since the count was last read
        self._run: Tensor | None = None  # and those in a row up to now

    def count(self, fine: Tensor, read: bool) -> bool:
        """Whether this step is known to be bad. `read`: the device may be waited for."""
        if free_to_read(fine):
            skipped = not bool(fine.numpy())
            return self._seen(int(skipped), self.in_a_row + 1 if skipped else 0)
        bad = (~fine).to(torch.int32)
        self._unread = bad if self._unread is None else self._unread + bad
        self._run = bad if self._run is None else (self._run + bad) * bad
        if not read:
            return False
        behind, in_a_row, self._unread = int(self._unread), int(self._run), None
        self._seen(behind, in_a_row)
        return in_a_row > 0

    def _seen(self, bad: int, in_a_row: int) -> bool:
        self.in_a_row = in_a_row
        if not bad:
            return False
        if not self.total:
            warnings.warn(
                "the gradient holds NaN or Inf: the step is skipped and the parameters stay as they are. Further skips "
                "are counted in opt.info['skipped'] without a warning",
                stacklevel=6,
            )
        self.total += bad
        if self.in_a_row >= PATIENCE:
            raise FloatingPointError(
                f"the gradient held NaN or Inf for {self.in_a_row} steps in a row; lower lr or look for the "
                f"first batch "
                "that gives it (torch.autograd.set_detect_anomaly)"
            )
        return True


def free_to_read(t: Tensor) -> bool:
    """Whether a value can be read without waiting for a device: on the host the memory is ours."""
    return t.device.type == "cpu"


def all_finite(df: Mapping[str, Tensor]) -> Tensor:
    """Whether every norm is finite, a scalar tensor.

    A norm takes one pass and no temporaries; where it overflows and no entry does, the gradient is as useless.
    """
    return torch.isfinite(torch.stack(torch._foreach_norm(list(df.values())))).all()
