"""Cholesky factors of damped matrices, and allocations that are refused before they fail."""

from __future__ import annotations

import os

import torch
from torch import Tensor

JITTER_TRIES = 6  # each ten times the last
NOT_FINITE = (
    "the metric is not finite: a Jacobian holds inf or NaN; take shorter steps, or look at the network's values"
)


def damped_cholesky(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factor of matrix + damping·I; where rounding makes that indefinite, a little more damping.

    Raises:
        ValueError: the matrix is not finite, or is indefinite beyond rounding.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(NOT_FINITE)
    jitter = 0.0
    first = torch.finfo(matrix.dtype).eps * max(float(matrix.diagonal().mean()), 1e-300)
    for attempt in range(JITTER_TRIES + 1):
        damped = matrix.clone()
        damped.diagonal().add_(damping + jitter)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return lower
        jitter = first * 10**attempt
    raise ValueError(f"matrix + {damping + jitter:.3g}·I is not positive definite; take a larger damping")


def ensure_fits(needed: int, what: str, instead: str, like: Tensor) -> None:
    """Refuse an allocation that cannot succeed, before it brings the machine down.

    Raises:
        MemoryError: more bytes are needed than are free; says how many and what to take instead.
    """
    free = free_bytes(like.device)
    if needed > free:
        raise MemoryError(
            f"{what} needs {needed:,} bytes ({needed / 2**30:.1f} GiB) and {free:,} are free; take {instead}"
        )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
