"""The shipped tasks, the training loop and its clock."""

from __future__ import annotations

import gzip
import itertools
import math
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from natgrad.cli.tasks import TASKS, CommandError, idx
from natgrad.cli.training.contenders import CONTENDERS
from natgrad.cli.training.runs import Run
from natgrad.cli.training.training import Budget, Clock, batches, evaluate, train

MNIST = Path(os.environ.get("NATGRAD_DATA", Path(__file__).parents[3] / "shared" / "data"))
HERE = [name for name in TASKS if name != "mnist-autoencoder"]


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def fake_mnist(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (1100, 28, 28))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    return tmp_path


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_a_few_steps_lower_the_loss(name: str, contender: str) -> None:
    task = TASKS[name]
    data = task.load(None)
    rate = task.rates[contender][1] if CONTENDERS[contender].swept else None
    run = Run(contender, rate)
    train(task, data, task.build(0, "default"), CONTENDERS[contender], run, Budget(None, 8), 0, lambda *_: None)
    assert run.complete
    assert run.last.step == 8
    assert run.last.train < run.points[0].train


@pytest.mark.parametrize("name", HERE)
def test_the_criterion_is_what_is_measured_up_to_a_factor(name: str) -> None:
    task = TASKS[name]
    data = task.load(None)
    model = task.build(0, "default")
    output = model(data.inputs).detach()
    loss = task.criterion()(output, data.targets)
    factor = data.targets.shape[1] if data.targets.dim() == 2 else 1  # pixels
    assert float(task.measure(output, data.targets)) == pytest.approx(float(loss) * factor, rel=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_fixes_the_model_and_the_order(name: str) -> None:
    task = TASKS[name]
    for init in ("default", "xavier"):
        a, b, other = (task.build(seed, init).state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert not all(torch.equal(a[k], other[k]) for k in a)
    data = TASKS["digits-classifier"].load(None)
    first, second, third = (list(itertools.islice(batches(data, 64, seed), 30)) for seed in (3, 3, 4))
    assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second))
    assert not torch.equal(first[0][0], third[0][0])


def test_every_rival_has_rates_for_every_task() -> None:
    for task in TASKS.values():
        for name, contender in CONTENDERS.items():
            if contender.swept:
                assert len(task.rates[name]) == 4
                assert list(task.rates[name]) == sorted(task.rates[name])


def test_an_epoch_sees_each_example_once() -> None:
    data = TASKS["digits-classifier"].load(None)
    epoch = torch.cat([x for x, _ in itertools.islice(batches(data, 500, 0), 3)])
    assert torch.equal(epoch.sum(0), data.inputs.sum(0))


def test_evaluation_leaves_the_model_in_training_mode() -> None:
    task = TASKS["digits-classifier"]
    model = task.build(0, "default")
    losses = evaluate(task, model, task.load(None))
    assert model.training
    assert all(math.isfinite(loss) for loss in losses)


def test_the_clock_stands_still_while_paused() -> None:
    clock = Clock()
    clock.pause()
    before = clock.seconds()
    start = time.process_time()
    while time.process_time() - start < 0.02:
        pass
    assert clock.seconds() == before
    clock.resume()
    start = time.process_time()
    while time.process_time() - start < 0.02:
        pass
    assert clock.seconds() - before >= 0.02


def test_a_run_in_seconds_ends_by_the_clock() -> None:
    task = TASKS["digits-classifier"]
    run = Run("adamw", 1e-3)
    model = task.build(0, "default")
    train(task, task.load(None), model, CONTENDERS["adamw"], run, Budget(0.05, None), 0, lambda *_: None)
    assert run.last.cpu_seconds >= 0.05
    assert [p.cpu_seconds for p in run.points] == sorted(p.cpu_seconds for p in run.points)


def test_a_rival_that_diverges_stops_and_scores_infinity() -> None:
    task = TASKS["digits-classifier"]
    run = Run("sgd", 1e38)
    model = task.build(0, "default")
    train(task, task.load(None), model, CONTENDERS["sgd"], run, Budget(None, 50), 0, lambda *_: None)
    assert run.score == math.inf
    assert run.last.step < 50


def test_idx_raw_and_gzipped(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for name in ("a", "a.gz"):
        write_idx(tmp_path / name, array)
        assert torch.equal(idx.read(tmp_path / name), torch.tensor(array, dtype=torch.uint8))


def test_idx_says_what_is_wrong(tmp_path: Path) -> None:
    good = tmp_path / "good"
    write_idx(good, np.zeros((2, 3)))
    (tmp_path / "short").write_bytes(good.read_bytes()[:-1])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(good.read_bytes())[:-9])
    (tmp_path / "text.gz").write_text("hello")
    for name, said in (
        ("short", "truncated"),
        ("text", "no IDX file"),
        ("cut.gz", "cannot be read"),
        ("text.gz", "cannot be read"),
    ):
        with pytest.raises(CommandError, match=said):
            idx.read(tmp_path / name)


def test_mnist_splits_what_is_there(fake_mnist: Path) -> None:
    data = TASKS["mnist-autoencoder"].load(fake_mnist)
    assert (len(data.inputs), len(data.test_inputs)) == (100, 1000)
    write_idx(fake_mnist / "train-images-idx3-ubyte", np.zeros((1200, 28, 28)))
    data = TASKS["mnist-autoencoder"].load(fake_mnist)
    assert (len(data.inputs), len(data.test_inputs)) == (1200, 1100)


def test_mnist_refuses_other_images(tmp_path: Path) -> None:
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((1200, 8, 8)))
    with pytest.raises(CommandError, match="28 × 28"):
        TASKS["mnist-autoencoder"].load(tmp_path)


def test_mnist_itself() -> None:
    if not any(MNIST.glob("**/t10k-images*")):
        pytest.skip(f"no MNIST files in {MNIST}; set NATGRAD_DATA")
    task = TASKS["mnist-autoencoder"]
    data = task.load(MNIST)
    assert data.inputs.shape[1] == 784
    assert sum(p.numel() for p in task.build(0, "default").parameters()) == 842_340
    assert float(data.inputs.max()) == 1.0
