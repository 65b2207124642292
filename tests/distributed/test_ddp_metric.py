"""The metric alone on several ranks: update, fit, sampling, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from tests.distributed.pool import Pool
from tests.distributed.tasks import build, data

PoolOf = Callable[[int], Pool]


def wrapped() -> nn.Module:
    return DistributedDataParallel(build("mlp"))


def fitted(rank: int, size: int, how: str) -> tuple[int, Any]:
    """Rank r has r + 1 batches."""
    metric = ng.Fisher(wrapped(), nn.CrossEntropyLoss(), kind="exact")
    mine = [data(10 * rank + i, rows=3 + i) for i in range(rank + 1)]
    if how == "fit":
        metric.fit(mine, progress=False)
    else:
        metric.update(torch.cat([x for x, _ in mine]))
    return metric.seen, metric.dense().numpy()


def test_fit_and_update_take_all_ranks_data(pool_of: PoolOf) -> None:
    one = ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), kind="exact")
    one.update(torch.cat([data(10 * r + i, rows=3 + i)[0] for r in range(2) for i in range(r + 1)]))
    for how in ("fit", "update"):
        for seen, dense in pool_of(2).run(fitted, how):
            assert seen == one.seen == 10
            np.testing.assert_allclose(dense, one.dense().numpy(), atol=1e-12, rtol=0)


def empty_loader(rank: int, size: int) -> int:
    metric = ng.Fisher(wrapped(), nn.CrossEntropyLoss(), kind="exact")
    return metric.fit([data(0)] if rank == 0 else [], progress=False).seen


def test_fit_where_one_rank_has_no_data(pool_of: PoolOf) -> None:
    assert pool_of(2).run(empty_loader) == [16, 16]


def test_fit_where_no_rank_has_data(pool_of: PoolOf) -> None:
    assert all("the loader is empty" in said for said in pool_of(2).errors(no_data))


def no_data(rank: int, size: int) -> None:
    ng.Fisher(wrapped(), nn.CrossEntropyLoss()).fit([], progress=False)


def drawn(rank: int, size: int, options: dict[str, Any]) -> tuple[Any, Any]:
    """The statistics of this rank alone, and those of all, of the same data on all ranks."""
    metric = ng.Fisher(wrapped(), nn.CrossEntropyLoss(), kind="sampled", **options)
    x, _ = data(0)
    draw = metric._new_draw(x, None)
    mine = draw.statistics[0][1]["U"].value().numpy()
    metric._commit([draw], decay=None)
    return mine, metric.blocks[0].value("U").numpy()


def test_ranks_draw_labels_of_their_own(pool_of: PoolOf) -> None:
    for options in ({}, {"max_positions": 4}):
        (a, all_a), (b, all_b) = pool_of(2).run(drawn, options)
        assert not np.array_equal(a, b)
        np.testing.assert_array_equal(all_a, all_b)
        np.testing.assert_allclose(all_a, (a + b) / 2, atol=1e-14)


def test_rank_0_draws_what_one_process_draws(pool_of: PoolOf) -> None:
    one = ng.Fisher(build("mlp"), nn.CrossEntropyLoss(), kind="sampled")
    one.update(data(0)[0])
    np.testing.assert_array_equal(pool_of(2).run(drawn, {})[0][0], one.blocks[0].value("U").numpy())


def resumed(rank: int, size: int, folder: str, kind: str) -> tuple[Any, Any, Any]:
    """Train 12 steps; and 6, save on rank 0, load on all, and 6 more."""

    def steps(net: nn.Module, opt: Any, at: range) -> None:
        for step in at:
            x, y = data(step)
            opt.zero_grad()
            criterion(net(x[rank::size]), y[rank::size]).backward()
            opt.step()

    def parameters(net: nn.Module) -> Any:
        return [p.detach().clone().numpy() for p in net.parameters()]

    criterion, net = nn.CrossEntropyLoss(), wrapped()
    opt = ng.NaturalGradient(ng.Fisher(net, criterion, kind=kind))
    steps(net, opt, range(6))
    if rank == 0:
        torch.save({"net": net.module.state_dict(), "opt": opt.state_dict()}, Path(folder) / "state.pt")
    torch.distributed.barrier()
    saved = torch.load(Path(folder) / "state.pt", weights_only=True)
    steps(net, opt, range(6, 12))

    again, criterion = wrapped(), nn.CrossEntropyLoss()
    other = ng.NaturalGradient(ng.Fisher(again, criterion, kind=kind))
    again.module.load_state_dict(saved["net"])
    other.load_state_dict(saved["opt"])
    streams = [g.initial_seed() for g in other.metric.estimator.generators.values()]
    steps(again, other, range(6, 12))
    return parameters(net), parameters(again), streams


def test_a_checkpoint_of_rank_0_is_continued_by_all(pool_of: PoolOf, tmp_path: Path) -> None:
    for straight, again, _ in pool_of(2).run(resumed, str(tmp_path), "exact"):
        for a, b in zip(straight, again):
            np.testing.assert_array_equal(a, b)


def test_ranks_that_load_one_checkpoint_keep_streams_of_their_own(pool_of: PoolOf, tmp_path: Path) -> None:
    found = pool_of(2).run(resumed, str(tmp_path), "sampled")
    assert found[0][2] != found[1][2]
    for a, b in zip(found[0][1], found[1][1]):
        np.testing.assert_array_equal(a, b)


# experts: rows of one rank go to some of them, rows of the other to others ------------------------------------------


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.w, self.head = nn.Parameter(torch.randn(3, 4, 4).double()), nn.Linear(4, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        which, out = x[:, 0].long(), torch.zeros_like(x)
        for e in range(3):
            rows = (which == e).nonzero().squeeze(1)
            out = out.index_add(0, rows, x[rows] @ self.w[e])
        return self.head(out)


def routed_data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[:, 0] = torch.tensor([0.0, 0, 0, 0, 1, 1, 2, 1])
    return x, x[:, 1:3]


def routed_metric(rank: int, size: int, structure: str) -> np.ndarray[Any, Any]:
    model = DistributedDataParallel(Routed())
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact", structure=structure)
    x, y = (t.chunk(size)[rank] for t in routed_data())
    metric.update(x, y)
    found: np.ndarray[Any, Any] = metric.dense().numpy()
    return found


@pytest.mark.parametrize("structure", ["kfac", "block"])
def test_experts_of_all_ranks_are_those_of_one_process(pool_of: PoolOf, structure: str) -> None:
    metric = ng.Fisher(Routed(), nn.MSELoss(), kind="exact", structure=structure)
    metric.update(*routed_data())
    for found in pool_of(2).run(routed_metric, structure):
        np.testing.assert_allclose(found, metric.dense().numpy(), atol=1e-12)
