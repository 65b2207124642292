"""How many data there are, from which ones come back: capture and recapture.

An optimizer sees batches and is not told how large the set is that they are drawn from. Each datum of a batch that
refreshes the metric leaves a mark, a hash of its inputs and labels. Of n data drawn from N, of which m had been marked,
nm/N are expected to be among the marked; over several batches (Schnabel 1938, American Mathematical Monthly 45(6),
348–352, with one more recapture so that none is no infinity)

    N ≈ Σ n m / (1 + Σ recaptures).

Data that are drawn anew or changed at random each time never come back, and N grows without end. Marks are kept of a
sample of the data that thins as it grows: of those whose hash ends in so many zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from natgrad.trees import leaves_of

CAPACITY = 8192  # marks kept
ENTRIES = 1024  # numbers of a tensor, evenly spread over a datum, that enter its hash
ODD = (-7046029254386353131, -4417276706812531889, -7723592293110705685)  # of splitmix64 and the golden ratio
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Census:
    """The marks, and what recaptures say."""

    def __init__(self) -> None:
        self.marks = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.zeros = 0  # at the end of every hash that is kept
        self.pairs = 0.0  # Σ n m
        self.recaptures = 0

    @property
    def size(self) -> float | None:
        """N; None before the second batch."""
        return self.pairs / (1 + self.recaptures) if self.pairs else None

    def count(self, hashes: Tensor) -> None:
        """Take in one batch, in which a datum may stand several times."""
        seen = self._sampled(hashes.cpu()).unique()
        self.pairs += float(len(seen) * len(self.marks) * 2**self.zeros)
        self.recaptures += int(torch.isin(seen, self.marks).sum())
        self.marks = torch.cat([self.marks, seen]).unique()
        while len(self.marks) > CAPACITY:
            self.zeros += 1
            self.marks = self._sampled(self.marks)

    def _sampled(self, hashes: Tensor) -> Tensor:
        return hashes[hashes & (2**self.zeros - 1) == 0]

    def state(self) -> dict[str, Any]:
        """All but the marks."""
        return {"zeros": self.zeros, "pairs": self.pairs, "recaptures": self.recaptures}

    @classmethod
    def restored(cls, state: Mapping[str, Any], marks: Tensor | None) -> Census:
        out = cls()
        if marks is not None:
            out.marks = marks.cpu().clone()
        out.zeros, out.pairs, out.recaptures = state["zeros"], state["pairs"], state["recaptures"]
        return out


def hashes(tree: Any, data: int | None, before: Tensor | None = None) -> Tensor | None:
    """(data,) int64, the same for the same datum wherever in a batch it stands: of all dense tensors in `tree` whose
    first dimension counts data. None where there are none. `before`: hashes of the inputs, to go on from with labels,
    which may have several rows a datum.
    """
    out = before
    if not data:
        return None
    for t in leaves_of(tree):
        if t.layout != torch.strided or t.is_nested or not t.dim() or not t.numel():
            continue
        if t.shape[0] != data and (before is None or t.shape[0] % data):
            continue
        rows = t.detach().resolve_conj()
        rows = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(data, -1)
        rows = integers(rows[:, :: -(-rows.shape[1] // ENTRIES)])
        # sums of integers do not depend on their order, as those of floating-point numbers do
        mine = (rows * factors(rows.device)[: rows.shape[1]]).sum(1)
        out = mixed(mine if out is None else out.to(mine.device) * ODD[0] + mine)
    return out


def integers(rows: Tensor) -> Tensor:
    """The bits of each number."""
    if rows.is_floating_point():
        rows = rows.contiguous().view(INTEGERS[rows.element_size()])
    rows = rows.to(torch.int64)
    return rows ^ (rows >> 32)  # the last bits of most floating-point numbers are zero


@cache
def factors(device: torch.device) -> Tensor:
    drawn = torch.randint(2**62, (ENTRIES,), generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * drawn + 1).to(device)


def mixed(h: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of `h`: the finaliser of splitmix64, with a signed shift."""
    h = (h ^ (h >> 30)) * ODD[1]
    h = (h ^ (h >> 27)) * ODD[2]
    return h ^ (h >> 31)
