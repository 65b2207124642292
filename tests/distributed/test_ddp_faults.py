"""Ranks that differ, data that are not finite, wrappers that are refused: said on every rank, and nobody hangs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from natgrad.optim.exact_quadratic import ExactQuadratic
from tests.distributed.pool import Pool
from tests.distributed.tasks import Result, build, data, shard
from tests.distributed.test_ddp import same

PoolOf = Callable[[int], Pool]


def setup(options: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
    net, criterion = DistributedDataParallel(build("mlp")), nn.CrossEntropyLoss()
    metric = ng.Fisher(net, criterion, **{"kind": "exact", **(options or {})})
    return net, criterion, ng.NaturalGradient(metric, **{"refresh": 4, **(optimizer or {})})


def one_step(net: Any, criterion: Any, opt: Any, step: int, rank: int, size: int, factor: float = 1.0) -> None:
    x, y = data(step)
    mine = shard(len(x), [len(x) // size] * size, rank)
    opt.zero_grad()
    criterion(net(x[mine] * factor), y[mine]).backward()
    opt.step()


# what differs between ranks ------------------------------------------------------------------------------

DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "schedule": ({}, {"refresh": 8}, "optimizer refresh is 8 on rank 1 and 4 on rank 0"),
    "lr": ({}, {"lr": 0.5}, "optimizer lr of group 0 is 0.5 on rank 1 and 0.1 on rank 0"),
    "kind": ({"kind": "sampled"}, {}, "kind is 'sampled' on rank 1 and 'exact' on rank 0"),
    "structure": ({"structure": "dense"}, {}, "structure 0.weight is 'dense' on rank 1 and 'kfac' on rank 0"),
    "model": ({"params": "[02].*"}, {}, "parameter 4.weight is missing on rank 1"),
}


def differ(rank: int, size: int, options: dict[str, Any], optimizer: dict[str, Any]) -> None:
    setup(options if rank else None, optimizer if rank else None)


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_differ_are_named_on_all_ranks(case: str, pool_of: PoolOf) -> None:
    options, optimizer, words = DIFFERENT[case]
    for said in pool_of(2).errors(differ, options, optimizer):
        assert said.startswith("RuntimeError: the ranks do not train the same thing")
        assert words in said
        assert "on every rank" in said


def change_later(rank: int, size: int) -> None:
    net, criterion, opt = setup()
    for step in range(20):
        if step == 6 and rank == 1:
            opt.refresh = 2
        one_step(net, criterion, opt, step, rank, size)


def test_a_schedule_that_one_rank_changes_later(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(change_later):
        assert "optimizer refresh is 2 on rank 1 and 4 on rank 0" in said


# what is not finite --------------------------------------------------------------------------------------


def nan_batch(rank: int, size: int, bad: int) -> Result:
    net, criterion, opt = setup()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(12):
            one_step(net, criterion, opt, step, rank, size, float("nan") if rank == 1 and step == bad else 1.0)
    return {
        "parameters": {n: p.detach().numpy() for n, p in net.module.named_parameters()},
        "metric": opt.metric.dense().numpy(),
        "info": {k: v for k, v in opt.info.items() if k in ("skipped", "steps", "dropped_statistics", "data_seen")},
        "said": [str(w.message) for w in said],
    }


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_a_batch_with_nan_on_one_rank_is_skipped_by_all(bad: int, pool_of: PoolOf) -> None:
    found = pool_of(2).run(nan_batch, bad)
    same(found)
    for result in found:
        assert result["info"]["skipped"] == 1
        assert result["info"]["steps"] == 11
        assert np.isfinite(result["metric"]).all()


def bad_statistics(rank: int, size: int) -> Result:
    net, criterion, opt = setup(optimizer={"refresh": 1})
    metric, count = opt.metric, opt.metric.count
    messages, before = [], None

    def spoilt(draw: Any, purpose: str) -> None:
        for _, new in draw.statistics:
            for average in new.values():
                average.sums = {h: s * float("inf") for h, s in average.sums.items()}
        count(draw, purpose)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(5):
            if step == 3:
                before = metric.dense()
            metric.count = spoilt if rank == 1 and step == 3 else count
            one_step(net, criterion, opt, step, rank, size)
            if step == 3:
                assert torch.equal(metric.dense(), before)
                assert not opt.refreshed
        messages = [str(w.message) for w in said]
    return {
        "parameters": {n: p.detach().numpy() for n, p in net.module.named_parameters()},
        "metric": metric.dense().numpy(),
        "info": opt.info,
        "said": messages,
    }


def test_statistics_that_are_bad_on_one_rank_are_dropped_by_all(pool_of: PoolOf) -> None:
    found = pool_of(2).run(bad_statistics)
    same(found)
    for result in found:
        assert result["info"]["dropped_statistics"] == 1
        assert result["info"]["refreshes"] == 4
        assert any("dropped" in s for s in result["said"])


def no_forward(rank: int, size: int) -> None:
    """Rank 1 leaves its forward pass out of the watched model where a refresh is due."""
    net, criterion, opt = setup()
    for step in range(4):
        x, y = data(step)
        opt.zero_grad()
        if rank == 1 and step == 1:
            opt.metric.count = lambda draw, purpose: None
        criterion(net(x), y).backward()
        opt.step()
        opt.metric.__dict__.pop("count", None)
    assert opt.refreshes == 3


def test_a_rank_without_statistics_waits_for_nobody(pool_of: PoolOf) -> None:
    pool_of(2).run(no_forward)


# what ranks there are ------------------------------------------------------------------------------------


def refused(rank: int, size: int, how: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    net = build("mlp")
    mesh = init_device_mesh("cpu", (size,))
    wrap: dict[str, Callable[[], nn.Module]] = {
        "FSDP1": lambda: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
        "DTensor": lambda: parallelize_module(net, mesh, {"0": ColwiseParallel()}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = wrap[how]()
    ng.Fisher(wrapped, nn.CrossEntropyLoss())


@pytest.mark.parametrize("how", ["FSDP1", "DTensor"])
def test_sharded_models_are_refused(how: str, pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(refused, how):
        assert said.startswith("ValueError")
        assert how in said
        assert "DistributedDataParallel" in said
        assert "fully_shard" in said


def met_alone(rank: int, size: int) -> None:
    """Rank 1 alone meets a layer, in a forward pass that is never backpropagated."""
    net, criterion = DistributedDataParallel(build("branches"), find_unused_parameters=True), nn.CrossEntropyLoss()
    metric = ng.Fisher(net, criterion, kind="exact", structure="dense", exchange="inverses")
    opt = ng.NaturalGradient(metric, refresh=1)
    for step in range(3):
        x, y = data(step)
        x[:, 0] = -1.0
        opt.zero_grad()
        if rank == 1 and step == 1:
            criterion(net(-x), y)
        criterion(net(x), y).backward()
        opt.step()


def test_a_layer_that_one_rank_alone_meets_is_named(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(met_alone):
        assert "one joint block is over" in said
        assert "rare.weight" in said


def ekfac(rank: int, size: int) -> None:
    setup({"structure": "ekfac"})


def test_ekfac_is_refused(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(ekfac):
        assert said.startswith("ValueError: the structure of '0.weight' is 'ekfac'")
        assert "structure='kfac'" in said


def full_batch(rank: int, size: int) -> None:
    setup(optimizer={"step": ExactQuadratic(*data(0))})


def test_a_rule_that_measures_the_loss_is_refused(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(full_batch):
        assert said.startswith("ValueError: ExactQuadratic measures the loss on the data of one rank")


def alone(rank: int, size: int) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net = build("mlp")
        ng.NaturalGradient(ng.GaussNewton(net, {"fit": lambda u, x: u(x)}))
    return [str(w.message) for w in said]


def test_a_metric_with_a_gradient_of_its_own_warns(pool_of: PoolOf) -> None:
    for said in pool_of(2).run(alone):
        assert any("GaussNewton makes its own gradient" in s for s in said)


def joined(rank: int, size: int) -> None:
    net, criterion, opt = setup()
    with net.join():
        one_step(net, criterion, opt, 0, rank, size)


def test_join_is_refused(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(joined):
        assert "join() is not supported" in said
        assert "DistributedSampler" in said


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DataParallel.*wrap it as torch.nn.parallel.DistributedDataParallel"):
        ng.Fisher(nn.DataParallel(build("mlp")), nn.CrossEntropyLoss())


def test_torchrun_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"torchrun started 2 processes.*init_process_group"):
        ng.Fisher(build("mlp"), nn.CrossEntropyLoss())


def test_a_group_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"a process_group was given.*init_process_group"):
        ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), process_group=object())


def test_unknown_exchange() -> None:
    with pytest.raises(ValueError, match="unknown exchange 'all'; there are 'auto', 'inverses', 'directions'"):
        ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), exchange="all")


def unwrapped(rank: int, size: int) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert ng.Fisher(build("mlp"), nn.CrossEntropyLoss()).strategy.size == 1
    return [str(w.message) for w in said]


def test_a_model_that_is_not_wrapped(pool_of: PoolOf) -> None:
    for said in pool_of(2).run(unwrapped):
        assert any("not wrapped in DistributedDataParallel" in s for s in said)


def by_hand(rank: int, size: int) -> Result:
    """Gradients averaged by hand, and a metric told which ranks share it."""
    net, criterion = build("mlp"), nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(net, criterion, kind="exact", process_group=dist.group.WORLD))
    for step in range(6):
        x, y = data(step)
        mine = shard(len(x), [len(x) // size] * size, rank)
        opt.zero_grad()
        criterion(net(x[mine]), y[mine]).backward()
        for p in net.parameters():
            dist.all_reduce(p.grad)
            p.grad /= size
        opt.step()
    return {
        "parameters": {n: p.detach().numpy() for n, p in net.named_parameters()},
        "metric": opt.metric.dense().numpy(),
    }


def test_gradients_averaged_by_hand(pool_of: PoolOf) -> None:
    same(pool_of(2).run(by_hand))


def two_groups(rank: int, size: int) -> tuple[int, Result]:
    """Ranks 0, 1 and 2, 3 train two models."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, mine = groups[rank // 2], rank % 2
    net, criterion = build("mlp"), nn.CrossEntropyLoss()
    wrapped = DistributedDataParallel(net, process_group=group)
    opt = ng.NaturalGradient(ng.Fisher(wrapped, criterion, kind="exact"))
    for step in range(4 + rank // 2):  # the groups do not wait for each other
        one_step(wrapped, criterion, opt, step + 100 * (rank // 2), mine, 2)
    return opt.metric.strategy.size, {
        "parameters": {n: p.detach().numpy() for n, p in net.named_parameters()},
        "metric": opt.metric.dense().numpy(),
    }


def test_two_models_on_two_groups(pool_of: PoolOf) -> None:
    sizes, found = zip(*pool_of(4).run(two_groups))
    assert sizes == (2, 2, 2, 2)
    same(list(found[:2]))
    same(list(found[2:]))
    assert not np.array_equal(found[0]["metric"], found[2]["metric"])
