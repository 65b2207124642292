"""A rank that dies or falls behind: the others say which one, and do not hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from natgrad.distributed.monitor import timeout_of
from tests.distributed.pool import Pool
from tests.distributed.tasks import build, data, shard

PoolOf = Callable[[int], Pool]
TIMEOUT = 4.0


def die() -> None:
    time.sleep(0.3)  # let the gradients arrive
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    time.sleep(1.7 * TIMEOUT)


def train_until(rank: int, size: int, fault: Callable[[], None], at: int) -> None:
    """Rank 1 has a fault between the backward pass and the step."""
    net, criterion = DistributedDataParallel(build("mlp")), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(net, criterion, kind="exact"), refresh=1)
    for step in range(at + 1):
        x, y = data(step, 18)
        mine = shard(len(x), [len(x) // size] * size, rank)
        opt.zero_grad()
        criterion(net(x[mine]), y[mine]).backward()
        if rank == 1 and step == at:
            fault()
        began = time.monotonic()
        try:
            opt.step()
        except RuntimeError as error:
            raise RuntimeError(f"after {time.monotonic() - began:.1f} s: {error}") from error


@pytest.mark.parametrize(("fault", "answers"), [(die, 2), (sleep, 3)])
def test_a_rank_that_does_not_come_is_named(fault: Callable[[], None], answers: int) -> None:
    pool = Pool(3, timedelta(seconds=TIMEOUT))
    try:
        found = pool.outcomes(train_until, fault, 4, answers=answers)
    finally:
        pool.kill()
        pool.close()
    for rank, kind, said, _ in found:
        assert kind == "error"
        if rank == 1:  # it woke up and found that the others had left
            assert "waited in vain" in said
            continue
        assert f"rank {rank} waited in vain for the others at step 4, in the exchange of whether gradients are" in said
        assert "rank 1 did not come, it was last seen at step 3, directions" in said
        assert said.count("did not come, it was last") == 1
        assert f"timeout (here {TIMEOUT:g} s)" in said
        assert "from a checkpoint" in said
        assert float(said.split("after ")[1].split(" s:")[0]) < 2.2 * TIMEOUT


def timeouts(rank: int, size: int) -> list[float]:
    net = DistributedDataParallel(build("mlp"))
    ranks = ng.Fisher(net, nn.CrossEntropyLoss()).strategy.ranks
    found = [timeout_of(group, torch.device("cpu")) for group in (dist.group.WORLD, ranks.group)]
    return [t.total_seconds() for t in found]


def test_the_time_out_is_that_of_the_user(pool_of: PoolOf) -> None:
    assert pool_of(2).run(timeouts) == [[10.0, 10.0]] * 2


def test_a_wrapper_whose_process_group_is_gone(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = DistributedDataParallel(build("mlp"))
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"no process group is initialised any more.*model\.module"):
        ng.Fisher(net, nn.CrossEntropyLoss())
