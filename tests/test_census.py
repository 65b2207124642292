"""How many data there are is told from those that come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import natgrad as ng
from natgrad import census
from natgrad.census import Census, hashes


def epochs(data: Tensor, batch: int, batches: int) -> Iterator[Tensor]:
    """As a DataLoader that shuffles: every datum once an epoch."""
    left = torch.zeros(0, dtype=torch.long)
    for _ in range(batches):
        if len(left) < batch:
            left = torch.randperm(len(data))
        yield data[left[:batch]]
        left = left[batch:]


def with_replacement(data: Tensor, batch: int, batches: int) -> Iterator[Tensor]:
    for _ in range(batches):
        yield data[torch.randint(len(data), (batch,))]


@pytest.mark.parametrize("sampler", [epochs, with_replacement])
@pytest.mark.parametrize(("size", "batch", "batches"), [(700, 32, 400), (4000, 128, 400), (9000, 256, 600)])
@pytest.mark.parametrize(("capacity", "within"), [(census.CAPACITY, 0.06), (512, 0.15)])
def test_the_number_of_data_is_found(
    sampler: object, size: int, batch: int, batches: int, capacity: int, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "CAPACITY", capacity)
    data, found = torch.randn(size, 5), Census()
    for x in sampler(data, batch, batches):  # type: ignore[operator]
        found.count(hashes(x, batch))  # type: ignore[arg-type]
    assert found.size == pytest.approx(size, rel=within)
    assert len(found.marks) <= capacity


def test_data_that_are_new_each_time_are_without_end() -> None:
    found = Census()
    for _ in range(50):
        found.count(hashes(torch.randn(64, 3), 64))  # type: ignore[arg-type]
    assert found.recaptures == 0
    assert found.size is not None
    assert found.size > 50 * 64 * 50 * 64 / 2 * 0.9


def test_nothing_is_said_of_one_batch_and_a_whole_set_is_known_from_two() -> None:
    found, x = Census(), torch.randn(40, 3)
    found.count(hashes(x, 40))  # type: ignore[arg-type]
    assert found.size is None
    for _ in range(30):
        found.count(hashes(torch.cat([x, x]), 80))  # type: ignore[arg-type]
    assert found.size == pytest.approx(40, rel=0.01)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_a_datum_is_known_wherever_it_stands(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, 7) * 9
    x = x > 0 if dtype == torch.bool else x.abs().to(dtype)
    found, order = hashes(x, 50), torch.randperm(50)
    assert found is not None
    assert torch.equal(hashes(x[order], 50), found[order])  # type: ignore[arg-type]
    assert torch.equal(hashes(x[:1], 1), found[:1])  # type: ignore[arg-type]
    assert len(found.unique()) == 50
    assert 10 < int((found & 1).sum()) < 40  # the last bits too depend on the datum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_numbers_with_few_bits_do_not_collide(dtype: torch.dtype) -> None:
    for x in (torch.randn(20_000, 40) > 0, torch.randint(16, (20_000, 40))):
        assert len(hashes(x.to(dtype), 20_000).unique()) > 19_990  # type: ignore[union-attr]


def test_a_conjugate_view_is_read_as_its_numbers() -> None:
    x = torch.randn(5, 3, dtype=torch.complex64)
    assert torch.equal(hashes(x.conj(), 5), hashes(x.conj().resolve_conj(), 5))  # type: ignore[arg-type]


def test_all_that_belongs_to_a_datum_counts() -> None:
    x, y = torch.randn(6, 4), torch.arange(6)
    alone = hashes(x, 6)
    labelled = hashes((x, {"y": y}), 6)
    assert alone is not None
    assert labelled is not None
    assert not torch.equal(alone, labelled)
    assert torch.equal(hashes(y, 6, alone), labelled)  # type: ignore[arg-type]
    per_token = torch.arange(18)  # three labels a datum, in one row
    assert torch.equal(hashes(per_token, 6, alone), hashes(per_token.view(6, 3), 6, alone))  # type: ignore[arg-type]
    assert torch.equal(hashes((x, torch.tensor(0.5)), 6), alone)  # type: ignore[arg-type]
    grid = torch.arange(12.0)  # twelve positions beside six data
    assert torch.equal(hashes((x, grid), 6), alone)  # type: ignore[arg-type]
    assert hashes((), 6) is None
    assert hashes(x, None) is None
    for dtype in (torch.float32, torch.complex64):
        large = torch.zeros(2, 5000, dtype=dtype)
        large[1, ::5] = 1.0
        assert len(hashes(large, 2).unique()) == 2  # type: ignore[union-attr]


def test_training_counts_its_data_by_inputs_and_labels_once_a_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(96, 4), torch.randint(3, (96,))
    sizes = {}
    for how in ("together", "in parts", "other labels"):
        torch.manual_seed(1)
        model, criterion = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
        opt = ng.NaturalGradient(ng.Fisher(model, criterion), refresh=1)
        for i in range(120):
            rows = torch.arange(24) + 24 * (i % 4)
            opt.zero_grad()
            for part in rows.chunk(3 if how == "in parts" else 1):
                labels = torch.randint(3, (len(part),)) + 3 * i if how == "other labels" else y[part]
                criterion(model(x[part]), labels % 3).backward()
            opt.step()
        sizes[how] = opt.info["data_estimated"]
    assert sizes["together"] == sizes["in parts"] == pytest.approx(96, rel=0.05)
    assert sizes["other labels"] > 200  # 3 · 96 pairs
    opt.metric.reset()
    assert opt.info["data_estimated"] is None


def test_the_count_goes_on_from_a_state() -> None:
    one = Census()
    for x in with_replacement(torch.randn(300, 2), 32, 9):
        one.count(hashes(x, 32))  # type: ignore[arg-type]
    other = Census.restored(one.state(), one.marks)
    x = hashes(torch.randn(32, 2), 32)
    assert x is not None
    for found in (one, other):
        found.count(x)
    assert torch.equal(one.marks, other.marks)
    assert one.state() == other.state()
