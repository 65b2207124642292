"""Pools of processes shared by all tests here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[[int], Pool]]:
    pools: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in pools or not pools[size].alive:
            pools[size] = Pool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
