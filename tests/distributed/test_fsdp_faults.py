"""What is refused on sharded models, and what goes wrong at one rank: said on every rank, and nobody hangs."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import natgrad as ng
from natgrad.fisher import state as metric_file
from natgrad.optim.kl_trust_region import KLTrustRegion
from natgrad.state.files import write_whole
from tests.distributed.pool import Pool
from tests.distributed.tasks import Result, build, data, steps_with_failures

PoolOf = Callable[[int], Pool]


def setup(optimizer: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any, Any]:
    net, criterion = build("mlp"), nn.CrossEntropyLoss()
    fully_shard(net)
    metric = ng.Fisher(net, criterion, **{"kind": "exact", **options})
    return net, criterion, ng.NaturalGradient(metric, **{"refresh": 4, **(optimizer or {})})


def one_step(net: Any, criterion: Any, opt: Any, step: int, rank: int, size: int) -> None:
    x, y = data(step)
    opt.zero_grad()
    criterion(net(x[rank::size]), y[rank::size]).backward()
    opt.step()


def refused(rank: int, size: int, how: str) -> None:
    net, mesh = build("mlp"), init_device_mesh("cpu", (size,))
    criterion = nn.CrossEntropyLoss()
    if how == "column":
        parallelize_module(net, mesh, {"0": ColwiseParallel()})
    elif how == "row":
        parallelize_module(net, mesh, {"0": RowwiseParallel()})
    elif how == "both":
        both = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
        parallelize_module(net, both["tensor"], {"0": ColwiseParallel()})
        fully_shard(net, mesh=both["data"])
    elif how == "part":
        fully_shard(net[0], mesh=mesh)
    elif how == "offload":
        fully_shard(net, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    else:
        fully_shard(net, mesh=mesh)
    metric = ng.Fisher(
        net,
        criterion,
        process_group=torch.distributed.group.WORLD if how == "group" else None,
        exchange="inverses" if how == "exchange" else "auto",
    )
    if how == "precondition":
        metric.precondition_(0.1)
    ng.NaturalGradient(metric, step=KLTrustRegion() if how == "rule" else None)


REFUSED = {
    "column": ("'0.weight' is a DTensor without fully_shard (tensor parallel)", "DistributedDataParallel"),
    "row": ("'0.weight' is a DTensor without fully_shard (tensor parallel)", "DistributedDataParallel"),
    "both": ("'weight' of a Linear is tensor parallel", "over data-parallel ranks alone"),
    "part": ("'2.weight' is not sharded", "call fully_shard on the root module as well"),
    "offload": ("CPUOffloadPolicy()) is not supported", "leave it out"),
    "group": ("process_group= is for models that are not sharded", "ranks of their mesh"),
    "exchange": ("exchange='inverses' is for models that every rank holds whole", "Leave exchange= out"),
    "rule": ("KLTrustRegion works on whole parameters", "leave step= out"),
    "precondition": ("precondition_ is not supported", "ng.NaturalGradient(metric)"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused_says_what_to_do(how: str, pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(refused, how):
        assert said.startswith(("ValueError", "RuntimeError"))
        for words in REFUSED[how]:
            assert words in said


def sharded_late(rank: int, size: int) -> None:
    net, criterion = build("mlp"), nn.CrossEntropyLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = ng.Fisher(net, criterion)
    fully_shard(net)
    ng.NaturalGradient(metric)


def test_a_metric_made_before_the_model_was_sharded(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(sharded_late):
        assert "call fully_shard first" in said


def looked_at(rank: int, size: int) -> list[str]:
    net, criterion, opt = setup()
    one_step(net, criterion, opt, 0, rank, size)
    said = []
    for look in (opt.metric.dense, opt.metric.trace, lambda: opt.metric.factors("0.weight")):
        with pytest.raises(RuntimeError) as error:
            look()
        said.append(str(error.value))
    with opt.metric.whole() as whole:
        u, v = whole.factors("0.weight")
        assert (u.shape, v.shape) == ((8, 8), (7, 7))
        assert torch.isfinite(whole.logdet(0.1))
    one_step(net, criterion, opt, 1, rank, size)
    return said


def test_the_metric_is_looked_at_as_a_whole(pool_of: PoolOf) -> None:
    for said in pool_of(2).run(looked_at):
        assert all("with metric.whole()" in s for s in said)


def updated(rank: int, size: int) -> tuple[int, Any]:
    net = build("mlp")
    fully_shard(net)
    metric = ng.Fisher(net, nn.CrossEntropyLoss(), kind="exact")
    x, _ = data(0)
    metric.update(x[rank::size])
    with metric.whole():
        return metric.seen, metric.dense().numpy()


def test_update_takes_all_ranks_data(pool_of: PoolOf) -> None:
    one = ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), kind="exact")
    one.update(data(0)[0])
    for seen, dense in pool_of(2).run(updated):
        assert seen == 16
        np.testing.assert_allclose(dense, one.dense().numpy(), atol=1e-12, rtol=0)


def saved(rank: int, size: int, folder: str) -> tuple[Any, Any]:
    net, criterion, opt = setup()
    one_step(net, criterion, opt, 0, rank, size)
    opt.metric.save(f"{folder}/metric.safetensors")
    with pytest.raises(OSError, match="cannot write" if rank == 0 else "rank 0 could not write"):
        opt.metric.save(f"{folder}/none/metric.safetensors")
    other = setup()[2].metric
    other.load(f"{folder}/metric.safetensors")
    assert any(b.is_remote for b in other.blocks)
    with opt.metric.whole(), other.whole():
        return opt.metric.dense().numpy(), other.dense().numpy()


def test_a_file_is_written_once_and_read_by_all(pool_of: PoolOf, tmp_path: Path) -> None:
    for one, other in pool_of(2).run(saved, str(tmp_path)):
        np.testing.assert_array_equal(one, other)
    alone = ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), kind="exact")
    alone.load(tmp_path / "metric.safetensors")
    np.testing.assert_array_equal(alone.dense().numpy(), one)


def limited(path: Any, data: bytes) -> None:
    """Write a file where no more than a kilobyte fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the limit ends the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, before[1]))
    try:
        write_whole(path, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def on_a_full_disk(rank: int, size: int, folder: str) -> str:
    net, criterion, opt = setup()
    one_step(net, criterion, opt, 0, rank, size)
    opt.metric.save(f"{folder}/metric.safetensors")
    one_step(net, criterion, opt, 1, rank, size)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metric_file, "write_whole", limited)
        try:
            opt.metric.save(f"{folder}/metric.safetensors")
        except OSError as error:
            return str(error)
    return ""


def test_a_full_disk_is_said_on_all_ranks(pool_of: PoolOf, tmp_path: Path) -> None:
    first, second = pool_of(2).run(on_a_full_disk, str(tmp_path))
    assert "File too large" in first
    assert "rank 0 could not write the metric" in second
    alone = ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), kind="exact")
    alone.load(tmp_path / "metric.safetensors")  # the one from before
    assert len(list(tmp_path.iterdir())) == 1


def another_error(rank: int, size: int, folder: str) -> str:
    net, criterion, opt = setup()
    one_step(net, criterion, opt, 0, rank, size)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metric_file, "to_bytes", lambda *_, **__: 1 / 0)
        try:
            opt.metric.save(f"{folder}/metric.safetensors")
        except (OSError, ZeroDivisionError) as error:
            return type(error).__name__
    return ""


def test_whatever_stops_a_save_is_said_on_all_ranks(pool_of: PoolOf, tmp_path: Path) -> None:
    assert pool_of(2).run(another_error, str(tmp_path)) == ["ZeroDivisionError", "OSError"]


def update_with_nan(rank: int, size: int) -> None:
    net = build("mlp")
    fully_shard(net)
    x, _ = data(0)
    ng.Fisher(net, nn.CrossEntropyLoss(), kind="exact").update(x[rank::size] * (float("nan") if rank else 1.0))


def test_update_with_nan_on_one_rank_is_said_on_all(pool_of: PoolOf) -> None:
    for said in pool_of(2).errors(update_with_nan):
        assert "holds NaN or Inf" in said


def failing(rank: int, size: int, at: tuple[int, ...]) -> Result:
    """The owner of the 9 × 9 factor cannot invert it at some steps."""
    net, criterion, opt = setup({"refresh": 1})

    def step_of(step: int) -> None:
        one_step(net, criterion, opt, step, rank, size)

    kept = [opt.info["kept_factors"] for _ in steps_with_failures(step_of, at)]
    return {"kept": kept, "parameters": [p.full_tensor().detach().numpy() for p in net.parameters()]}


def test_a_failed_factorisation_keeps_the_last_one(pool_of: PoolOf) -> None:
    for result in pool_of(2).run(failing, (2, 3)):
        assert result["kept"] == [0, 0, 1, 2, 0, 0]
        assert all(np.isfinite(p).all() for p in result["parameters"])


def test_a_factorisation_that_fails_at_once_is_said_on_all_ranks(pool_of: PoolOf) -> None:
    said = pool_of(2).errors(failing, (0,))
    assert all(s.startswith("FactorisationError") for s in said)
    assert any("'2.weight'" in s for s in said)
    assert any("owns a block whose factor could not be inverted" in s for s in said)
