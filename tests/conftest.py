"""Fixtures of the whole suite: one thread, one seed, and a log of the errors measured."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ctrl_c_is_left_alone() -> Iterator[None]:
    """A handler left behind would end a later test, or the worker that runs it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == before


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What other tests compiled is forgotten, which would be called again instead of compiled anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def close(request: pytest.FixtureRequest) -> Callable[..., None]:
    """close(found, expected, bound): relative error in the Frobenius norm. NATGRAD_ERRORS names a file to log it to."""

    def check(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype == torch.float64
        size = float(expected.norm())
        error = float((found - expected).norm()) / (size if size else 1.0)
        if log := os.environ.get("NATGRAD_ERRORS"):
            with Path(log).open("a") as file:
                file.write(f"{error:.2e} {bound:.0e} {request.node.nodeid}\n")
        assert error <= bound, f"relative error {error:.2e} > {bound:.0e}"

    return check
