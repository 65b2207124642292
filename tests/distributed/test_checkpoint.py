"""Sharded checkpoints: exact to continue from, on any number of ranks, whole or refused, and safe to read."""

from __future__ import annotations

import contextlib
import pickle
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from natgrad import checkpoint
from natgrad.distributed.checkpoint import checkpoint as inner
from natgrad.distributed.checkpoint.files import Reader, Writer
from natgrad.distributed.checkpoint.packing import Pieces, pack, unpack
from tests.distributed.pool import Pool
from tests.distributed.tasks import build, data, shard

PoolOf = Callable[[int], Pool]


class Trained:
    """A model, its optimizer and how to go on training them, on one rank or on several."""

    def __init__(
        self,
        rank: int,
        size: int,
        model: str = "mlp",
        average: float | None = 0.9,
        sharded: bool = False,
        **options: Any,
    ) -> None:
        self.rank, self.size, self.net = rank, size, build(model)
        torch.manual_seed(rank)
        if sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in (m for m in self.net.modules() if isinstance(m, nn.Linear)):
                fully_shard(layer)
            self.model = fully_shard(self.net)
        else:
            self.model = DistributedDataParallel(self.net) if size > 1 else self.net
        self.criterion = nn.CrossEntropyLoss()
        self.metric = ng.Fisher(self.model, self.criterion, **options)
        self.opt = ng.NaturalGradient(self.metric, refresh=4, average=average)
        self.targets = {"model": self.model, "opt": self.opt}

    def steps(self, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            x, y = data(step)
            mine = shard(len(x), [len(x) // self.size] * self.size, self.rank)
            self.opt.zero_grad()
            loss = self.criterion(self.model(x[mine]), y[mine])
            loss.backward()
            self.opt.step()
            losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {**pack(self.opt.state_dict()), **{n: p.detach().clone() for n, p in self.net.named_parameters()}}

    def held(self) -> dict[str, Any]:
        """What must not depend on the number of ranks."""
        return {
            "metric": self.metric.dense().numpy(),
            "steps": [self.opt.steps, self.opt.refreshes, self.metric.seen],
            **{n: p.detach().clone().numpy() for n, p in self.net.named_parameters()},
        }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def contents(path: Any) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read on this process alone."""
    reader = Reader(path)
    found: dict[str, Any] = {
        n: torch.empty(about.size, dtype=about.properties.dtype)
        for n, about in reader.read_metadata().state_dict_metadata.items()
    }
    with checkpoint.quiet():
        dcp.load(found, storage_reader=reader, planner=checkpoint.Planner(flatten_state_dict=False), no_dist=True)
    return found


# going on -------------------------------------------------------------------------------------------------


def resume(rank: int, size: int, folder: str, options: dict[str, Any]) -> tuple[list[float], list[float], bool]:
    run = Trained(rank, size, **options)
    run.steps(0, 9)
    checkpoint.save({**run.targets, "step": 9}, f"{folder}/step-9")
    straight = run.steps(9, 24)
    other = Trained(rank, size, **options)
    newest = checkpoint.latest(folder)
    step = checkpoint.load(other.targets, newest)["step"]
    again = other.steps(step, 24)
    return straight, again, same(run.state(), other.state())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"exchange": "directions"}, {"structure": "dense"}, {"model": "moved"}], ids=str
)
def test_resume_goes_on_bit_for_bit(size: int, options: dict[str, Any], tmp_path: Path, pool_of: PoolOf) -> None:
    """With labels that are drawn: the streams of all ranks go on too."""
    runs = pool_of(2).run(resume, str(tmp_path), options) if size > 1 else [resume(0, 1, str(tmp_path), options)]
    for straight, again, equal in runs:
        assert again == straight
        assert equal
    if size > 1:
        assert runs[0][0] != runs[1][0]


def saved(rank: int, size: int, path: str) -> dict[str, Any]:
    run = Trained(rank, size, kind="exact")
    run.steps(0, 9)
    checkpoint.save(run.targets, path)
    at = run.held()
    run.steps(9, 18)
    return {"at": at, "end": run.held()}


def loaded(rank: int, size: int, path: str) -> dict[str, Any]:
    run = Trained(rank, size, kind="exact")
    checkpoint.load(run.targets, path)
    at = run.held()
    run.steps(9, 18)
    return {"at": at, "end": run.held()}


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1), (1, 2)])
def test_another_number_of_ranks(before: int, after: int, tmp_path: Path, pool_of: PoolOf) -> None:
    path = str(tmp_path / "step-9")
    run = {
        size: (lambda f, size=size: pool_of(size).run(f, path) if size > 1 else [f(0, 1, path)]) for size in (1, 2, 4)
    }
    first = run[before](saved)[0]
    for found in run[after](loaded):
        for name, value in first["at"].items():
            np.testing.assert_array_equal(found["at"][name], value, err_msg=name)
        for name, value in first["end"].items():
            np.testing.assert_allclose(found["end"][name], value, atol=1e-10, rtol=0, err_msg=name)


def shards(rank: int, size: int, path: str, save: bool) -> tuple[list[float], list[float]]:
    run = Trained(rank, size, sharded=size > 1, kind="exact")
    straight: list[float] = []
    if save:
        run.steps(0, 9)
        future = checkpoint.async_save(run.targets, path)
        straight = run.steps(9, 15)
        future.result()
        run = Trained(rank, size, sharded=True, kind="exact")
    checkpoint.load(run.targets, path)
    return straight, run.steps(9, 15)


def test_a_sharded_model(tmp_path: Path, pool_of: PoolOf) -> None:
    """Bit for bit on as many ranks; on others, and on one process, the mean of their losses is the same."""
    two = pool_of(2).run(shards, str(tmp_path / "c"), True)
    for straight, again in two:
        assert again == straight
    mean = np.mean([again for _, again in two], axis=0)
    four = pool_of(4).run(shards, str(tmp_path / "c"), False)
    np.testing.assert_allclose(np.mean([again for _, again in four], axis=0), mean, rtol=1e-10)
    np.testing.assert_allclose(shards(0, 1, str(tmp_path / "c"), False)[1], mean, rtol=1e-10)


def metric_alone(rank: int, size: int, path: str, save: bool) -> Any:
    net = build("mlp")
    model = DistributedDataParallel(net) if size > 1 else net
    metric = ng.Fisher(model, nn.CrossEntropyLoss())
    if save:
        metric.update(data(rank)[0])
        checkpoint.save({"metric": metric, "model": model}, path)
    else:
        checkpoint.load({"metric": metric}, path)
    return metric.dense().numpy()


def test_a_metric_alone(tmp_path: Path, pool_of: PoolOf) -> None:
    two = pool_of(2).run(metric_alone, str(tmp_path / "c"), True)
    np.testing.assert_array_equal(metric_alone(0, 1, str(tmp_path / "c"), False), two[0])
    np.testing.assert_array_equal(pool_of(2).run(metric_alone, str(tmp_path / "c"), False)[1], two[1])


def streams(rank: int, size: int, path: str) -> list[int]:
    run = Trained(rank, size)
    if size == 2:
        run.steps(0, 3)
        checkpoint.save(run.targets, path)
    else:
        checkpoint.load(run.targets, path)
    state = run.metric.state_dict()["generators"]["cpu"]
    generator = torch.Generator()
    generator.set_state(state)
    return torch.randint(2**31, (8,), generator=generator).tolist()


def test_no_two_ranks_draw_the_same_labels(tmp_path: Path, pool_of: PoolOf) -> None:
    two = pool_of(2).run(streams, str(tmp_path / "c"))
    four = pool_of(4).run(streams, str(tmp_path / "c"))
    assert four[:2] == two
    assert len({tuple(s) for s in four}) == 4


def test_every_tensor_is_written_once(tmp_path: Path, pool_of: PoolOf) -> None:
    pool_of(2).run(saved, str(tmp_path / "two"))
    saved(0, 1, str(tmp_path / "one"))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {n.rpartition(".")[0] for n in set(two) - set(one)} == {"opt.stream.1"}
    metadata = Reader(tmp_path / "two").read_metadata()
    assert len(metadata.storage_data) == len(two)
    files = {i.relative_path for i in metadata.storage_data.values()}
    assert files == {"__0_0.distcp", "__1_0.distcp"}, "the ranks share the work of writing"


# in the background -----------------------------------------------------------------------------------------


class Slow(Writer):
    """Gives training time to overwrite what it has not written yet."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        time.sleep(0.5)
        return super().write_data(plan, planner)


def in_the_background(rank: int, size: int, folder: str) -> bool:
    run = Trained(rank, size)
    run.steps(0, 7)
    checkpoint.save(run.targets, f"{folder}/step-7")
    inner.Writer = Slow
    try:
        future = checkpoint.async_save(run.targets, f"{folder}/async-7")
    finally:
        inner.Writer = Writer
    run.steps(7, 14)
    still_writing = not future.done()
    future.result()
    run.steps(14, 16)
    checkpoint.async_save(run.targets, f"{folder}/async-16").result()
    checkpoint.save(run.targets, f"{folder}/step-16")
    return still_writing


@pytest.mark.parametrize("size", [1, 2])
def test_a_save_in_the_background_is_that_of_its_step(size: int, tmp_path: Path, pool_of: PoolOf) -> None:
    runs = pool_of(2).run(in_the_background, str(tmp_path)) if size > 1 else [in_the_background(0, 1, str(tmp_path))]
    assert all(runs), "training was over before anything was written, so this shows nothing"
    for step in (7, 16):
        assert same(contents(tmp_path / f"step-{step}"), contents(tmp_path / f"async-{step}"))
    assert not same(contents(tmp_path / "step-7"), contents(tmp_path / "step-16"))


def test_a_save_that_fails_in_the_background_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trained(0, 1)
    with monkeypatch.context() as patched:
        patched.setattr(inner, "Writer", Full)
        future = checkpoint.async_save(run.targets, tmp_path / "step-1")
    with pytest.raises(OSError, match="no space left"):
        future.result()
    with pytest.raises(OSError, match="no space left"):
        checkpoint.async_save(run.targets, tmp_path / "step-2")
    checkpoint.async_save(run.targets, tmp_path / "step-2").result()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-2"


class Full(Writer):
    def write_data(self, plan: Any, planner: Any) -> Any:
        raise OSError("no space left")


def full(rank: int, size: int, folder: str) -> tuple[str, str]:
    run = Trained(rank, size)
    checkpoint.save(run.targets, f"{folder}/step-1")
    inner.Writer = Full if rank == 1 else Writer
    try:
        checkpoint.save(run.targets, f"{folder}/step-2")
    except OSError as error:
        return str(error), str(checkpoint.latest(folder))
    finally:
        inner.Writer = Writer
    return "", ""


def test_a_save_that_fails_on_one_rank_leaves_the_last_one(tmp_path: Path, pool_of: PoolOf) -> None:
    for said, newest in pool_of(2).run(full, str(tmp_path)):
        assert "step-2 could not be written on rank 1: no space left" in said
        assert newest == str(tmp_path / "step-1")


# what is refused ---------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    (path / "__1_0.distcp").unlink()


def cut(path: Path) -> None:
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def cut_description(path: Path) -> None:
    file = path / ".metadata"
    file.write_bytes(file.read_bytes()[:500])


def cut_description_and_checksum(path: Path) -> None:
    """As in a checkpoint by torch's own writer."""
    cut_description(path)
    (path / ".metadata.crc32").unlink()


def unfinished(path: Path) -> None:
    (path / ".metadata").unlink()


def overwritten(path: Path) -> None:
    file = path / "__1_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (remove, r"is incomplete: __1_0.distcp is missing"),
    "short": (cut, r"is incomplete: __1_0.distcp has \d+ of \d+ bytes"),
    "description": (cut_description, r".metadata is not as it was saved"),
    "no checksum": (cut_description_and_checksum, r".metadata is cut short or no description"),
    "unfinished": (unfinished, r"is no complete checkpoint: it has no .metadata"),
    "overwritten": (overwritten, r"cannot be read on rank \d"),
}


def refused(rank: int, size: int, path: str, other: str) -> tuple[str, str, bool]:
    run = Trained(rank, size, model=other if rank == size - 1 else "mlp")
    run.steps(0, 2)
    before = run.state()
    try:
        checkpoint.load(run.targets, path)
    except Exception as error:
        return type(error).__name__, str(error), same(run.state(), before)
    return "", "", False


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_refused_on_all_ranks(case: str, tmp_path: Path, pool_of: PoolOf) -> None:
    damage, words = DAMAGE[case]
    pool_of(2).run(saved, str(tmp_path / "step-9"))
    damage(tmp_path / "step-9")
    for kind, said, unchanged in pool_of(2).run(refused, str(tmp_path / "step-9"), "mlp"):
        assert kind == ("FileNotFoundError" if case == "unfinished" else "ValueError")
        assert re.search(words, said), said
        assert unchanged
    seen = case not in ("unfinished", "overwritten")
    with pytest.warns(UserWarning, match="taking the one before") if seen else contextlib.nullcontext():
        checkpoint.latest(tmp_path)


def test_another_model(tmp_path: Path) -> None:
    saved(0, 1, str(tmp_path / "c"))
    kind, said, unchanged = refused(0, 1, str(tmp_path / "c"), "moved")
    assert (kind, unchanged) == ("ValueError", True)
    assert "the checkpoint's 'model' is another model: power is missing in the checkpoint" in said


def test_another_optimizer_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    first = Trained(0, 1)
    first.steps(0, 5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(first.opt, 0.9)
    checkpoint.save({**first.targets, "scheduler": scheduler}, tmp_path / "c")
    other = Trained(0, 1, average=None)
    schedule = torch.optim.lr_scheduler.ExponentialLR(other.opt, 0.5)
    before, gamma = other.state(), schedule.state_dict()
    with pytest.raises(ValueError, match="keeps none of averaged weights and the state one"):
        checkpoint.load({"scheduler": schedule, **other.targets}, tmp_path / "c")
    assert same(other.state(), before)
    assert schedule.state_dict() == gamma


def one_differs(rank: int, size: int, path: str) -> tuple[str, bool]:
    dist.barrier()
    run = Trained(0, 1, model="moved" if rank else "mlp")  # a model of its own on each rank
    run.steps(0, 2)
    before = run.state()
    try:
        checkpoint.load({"model": run.net}, path)
    except ValueError as error:
        return str(error), same(run.state(), before)
    return "", False


@pytest.mark.filterwarnings("ignore:there are 2 processes")
def test_a_failure_of_one_rank_is_one_of_all(tmp_path: Path, pool_of: PoolOf) -> None:
    saved(0, 1, str(tmp_path / "c"))
    first, second = pool_of(2).run(one_differs, str(tmp_path / "c"))
    assert "rank 1 could not load: the checkpoint's 'model' is another model" in first[0]
    assert "power is missing in the checkpoint" in second[0]
    assert first[1]
    assert second[1]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    run = Trained(0, 1)
    checkpoint.save({"model": run.model}, tmp_path / "c")
    with pytest.raises(FileExistsError, match="already; give each a name of its own"):
        checkpoint.save({"model": run.model}, tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        checkpoint.load(run.targets, tmp_path / "d")
    with pytest.raises(ValueError, match=r"has no 'opt'.*it has \['model'\]"):
        checkpoint.load(run.targets, tmp_path / "c")
    with pytest.raises(TypeError, match=r"'x\.f' is a Linear, which a checkpoint cannot hold without pickle"):
        checkpoint.save({"x": {"f": nn.Linear(1, 1)}}, tmp_path / "d")


def test_the_latest_is_the_highest_whole_one(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    run = Trained(0, 1)
    for n in (9, 10, 11):
        checkpoint.save({"model": run.model}, tmp_path / f"step-{n}")
    (tmp_path / "step-12.partial").mkdir()
    (tmp_path / "step-11" / "__0_0.distcp").unlink()
    with pytest.warns(UserWarning, match="step-11 is incomplete.*taking the one before"):
        assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
    with pytest.raises(FileNotFoundError, match=r"only .*step-12.partial, whose writing was cut short"):
        checkpoint.load({"model": run.model}, tmp_path / "step-12")


# safety ------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"import pathlib; pathlib.Path({self.mark!r}).touch()",)


def test_nothing_runs_on_loading(tmp_path: Path) -> None:
    run = Trained(0, 1)
    run.steps(0, 2)
    checkpoint.save(run.targets, tmp_path / "c")
    whole = (tmp_path / "c" / ".metadata").read_bytes()
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"metadata is not as it was saved: it or its checksum .* is damaged"):
        checkpoint.load(run.targets, tmp_path / "c")
    (tmp_path / "c" / ".metadata.crc32").unlink()
    with pytest.raises(ValueError, match=r"it names builtins.exec, which no checkpoint consists of"):
        checkpoint.load(run.targets, tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(whole)
    checkpoint.load(run.targets, tmp_path / "c")

    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return Malicious(tmp_path / "ran")

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError(state)

    checkpoint.save({"model": Odd(2, 2)}, tmp_path / "odd")
    with pytest.raises(ValueError, match="cannot be read on rank 0: Weights only load failed"):
        checkpoint.load({"model": Odd(2, 2)}, tmp_path / "odd")
    assert not (tmp_path / "ran").exists()


def test_no_link_is_followed(tmp_path: Path) -> None:
    run = Trained(0, 1)
    run.steps(0, 2)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    (tmp_path / "step-9.partial").symlink_to(precious)
    with pytest.raises(OSError, match=r"step-9.partial is no folder that natgrad has made, but a link"):
        checkpoint.save(run.targets, tmp_path / "step-9")
    (tmp_path / "step-9.partial").unlink()
    (tmp_path / "step-9.partial").mkdir()
    for name in ("__0_0.distcp", ".metadata.tmp", ".metadata.crc32", ".metadata.crc32.partial"):
        (tmp_path / "step-9.partial" / name).symlink_to(precious / "thesis.tex")
    checkpoint.save(run.targets, tmp_path / "step-9")
    checkpoint.load(run.targets, tmp_path / "step-9")
    (tmp_path / "step-10").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="already"):
        checkpoint.save(run.targets, tmp_path / "step-10")
    for link in ("metric.safetensors", "metric.safetensors.partial"):
        (tmp_path / link).symlink_to(precious / "thesis.tex")
    run.metric.save(tmp_path / "metric.safetensors")
    run.metric.load(tmp_path / "metric.safetensors")
    assert not (tmp_path / "metric.safetensors").is_symlink()
    assert [p.name for p in precious.iterdir()] == ["thesis.tex"]
    assert (precious / "thesis.tex").read_text() == "years of work"


def rewritten(folder: Path, change: Callable[[Any], None]) -> None:
    """The description of a checkpoint, changed on purpose: with a checksum that fits."""
    metadata = Reader(folder).read_metadata()
    change(metadata)
    data = pickle.dumps(metadata)
    (folder / ".metadata").write_bytes(data)
    (folder / ".metadata.crc32").write_bytes(b"%08x" % zlib.crc32(data))


def all_infos(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda metadata: [change(info) for info in metadata.storage_data.values()]  # type: ignore[func-returns-value]


def huge(metadata: Any) -> None:
    name = next(n for n in metadata.state_dict_metadata if n.endswith(".about"))
    metadata.state_dict_metadata[name].size = torch.Size([2**50])


def backwards(metadata: Any) -> None:
    name = next(n for n in metadata.state_dict_metadata if n.endswith(".about"))
    metadata.state_dict_metadata[name].size = (-3,)


CRAFTED: dict[str, tuple[Callable[[Any], None], str]] = {
    "up": (all_infos(lambda i: setattr(i, "relative_path", "../../secret")), "leads out of the folder"),
    "absolute": (all_infos(lambda i: setattr(i, "relative_path", "/etc/hostname")), "leads out of the folder"),
    "link": (all_infos(lambda i: setattr(i, "relative_path", "link")), "leads out of the folder"),
    "size": (huge, r"is said to have 1125899906842624 bytes, and its file holds \d+"),
    "below zero": (backwards, r"has the size \(-3,\)"),
    "offset": (all_infos(lambda i: setattr(i, "offset", -1)), "at -1, length"),
    "length": (all_infos(lambda i: setattr(i, "length", 2**50)), r"has \d+ of \d+ bytes"),
    "nothing": (lambda metadata: metadata.__dict__.update(storage_data=None), "no description of a checkpoint"),
    "no names": (lambda metadata: metadata.__dict__.update(state_dict_metadata=3), "no description of a checkpoint"),
}


@pytest.mark.parametrize("how", CRAFTED)
def test_a_crafted_description_is_refused_before_memory_is_taken(how: str, tmp_path: Path) -> None:
    run = Trained(0, 1)
    run.steps(0, 2)
    checkpoint.save(run.targets, tmp_path / "a" / "step-1")
    (tmp_path / "secret").write_bytes(bytes(10_000))
    (tmp_path / "a" / "step-1" / "link").symlink_to(tmp_path / "secret")
    change, words = CRAFTED[how]
    rewritten(tmp_path / "a" / "step-1", change)
    before = run.state()
    with pytest.raises(ValueError, match=words):
        checkpoint.load(run.targets, tmp_path / "a" / "step-1")
    assert same(run.state(), before)


def test_no_piece_is_pickled(tmp_path: Path) -> None:
    run = Trained(0, 1)
    run.steps(0, 2)
    checkpoint.save({**run.targets, "more": {"a": [1.5, None, (True, "x")], 3: torch.arange(3)}}, tmp_path / "c")
    about = Reader(tmp_path / "c").read_metadata().state_dict_metadata
    assert {type(a).__name__ for a in about.values()} == {"TensorStorageMetadata"}
    more = checkpoint.load({}, tmp_path / "c")["more"]
    assert more["a"] == [1.5, None, (True, "x")]
    assert torch.equal(more[3], torch.arange(3))


# torch's own calls -------------------------------------------------------------------------------------------


def with_torch(rank: int, size: int, path: str) -> tuple[list[float], list[float]]:
    run = Trained(rank, size)
    run.steps(0, 6)
    dcp.save({"model": run.model, "opt": checkpoint.Saved(run.opt)}, checkpoint_id=path)
    other = Trained(rank, size)
    dcp.load(
        {"model": other.model, "opt": checkpoint.Saved(other.opt)}, checkpoint_id=path, planner=checkpoint.Planner()
    )
    return run.steps(6, 12), other.steps(6, 12)


def test_torch_saves_and_loads_with_saved_and_planner(tmp_path: Path, pool_of: PoolOf) -> None:
    for straight, again in pool_of(2).run(with_torch, str(tmp_path / "c")):
        assert straight == again


def test_torch_alone_is_refused(tmp_path: Path) -> None:
    run = Trained(0, 1)
    run.steps(0, 3)
    for optimizer in (run.opt, Trained(0, 1).opt):
        with pytest.raises(TypeError, match=r"get_state_dict .* Use natgrad.checkpoint.save"):
            get_state_dict(run.model, optimizer)
    with checkpoint.quiet():
        dcp.save({"metric": run.metric}, checkpoint_id=tmp_path / "c")
        with pytest.raises(ValueError, match=r"lacks \d+ of its statistics"):
            dcp.load({"metric": ng.Fisher(build("mlp"), nn.CrossEntropyLoss())}, checkpoint_id=tmp_path / "c")


# sharded state -----------------------------------------------------------------------------------------------


class Holder:
    """Stands for an optimizer whose state is sharded as its parameters are."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.moments = {n: {"first": p * 2, "steps": 3} for n, p in parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = state["moments"]


def sharded(rank: int, size: int, path: str, save: bool) -> tuple[Any, Any, list[int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(24.0).reshape(8, 3)
    if save:
        holder = Holder({"w": distribute_tensor(whole, mesh, [Shard(0)])})
        checkpoint.save({"holder": holder}, path)
    else:
        holder = Holder({"w": distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])})
        checkpoint.load({"holder": holder}, path)
    first = holder.moments["w"]["first"]
    assert isinstance(first, DTensor)
    return (
        (first.full_tensor() - 2 * whole).abs().max().item(),
        holder.moments["w"]["steps"],
        list(first.to_local().shape),
    )


def test_sharded_state(tmp_path: Path, pool_of: PoolOf) -> None:
    path = str(tmp_path / "c")
    assert pool_of(2).run(sharded, path, True) == [(0.0, 3, [4, 3])] * 2
    assert pool_of(4).run(sharded, path, False) == [(0.0, 3, [2, 3])] * 4
    alone = Holder({"w": torch.zeros(8, 3)})
    checkpoint.load({"holder": alone}, path)
    assert torch.equal(alone.moments["w"]["first"], 2 * torch.arange(24.0).reshape(8, 3))


def test_packing() -> None:
    tree = {"a": {1: torch.ones(2), "b.c": [torch.zeros(()), -0.0, float("inf")]}, "a.b": {"c.0": torch.ones(1)}}
    found = unpack(pack(tree))
    assert list(found["a"]) == [1, "b.c"]
    assert torch.equal(found["a"]["b.c"][0], torch.zeros(()))
    assert torch.equal(found["a.b"]["c.0"], torch.ones(1))
    assert found["a"]["b.c"][2] == float("inf")
    with pytest.raises(ValueError, match="no packed state"):
        unpack(Pieces())
    pieces = pack(tree)
    del pieces["a.1"]
    with pytest.raises(ValueError, match=r"lacks the tensor 'a\.1'"):
        unpack(pieces)
