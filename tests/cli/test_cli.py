"""`natgrad train`: what it writes, what it says, and what it says to wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import natgrad
from natgrad.cli.app import main
from natgrad.cli.tasks import TASKS, CommandError
from natgrad.cli.training.contenders import CONTENDERS
from natgrad.cli.training.files import write_whole

RIVALS = [name for name, contender in CONTENDERS.items() if contender.swept]


def test_a_small_comparison_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--steps", "2", "--out", str(tmp_path / "deep" / "out")]) == 0
    out = tmp_path / "deep" / "out"
    assert {p.name for p in out.iterdir()} == {
        "curves.png",
        "info.jsonl",
        "log.jsonl",
        "metric.safetensors",
        "model.safetensors",
    }
    said = capsys.readouterr().out
    for name in CONTENDERS:
        assert name in said
    header, *records = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    assert header["task"] == "digits-autoencoder"
    curves = {(r["optimizer"], r["rate_given"]) for r in records}
    assert curves == {("natgrad", None)} | {(n, r) for n in RIVALS for r in TASKS["digits-autoencoder"].rates[n]}
    assert len({r["train"] for r in records if r["step"] == 0}) == 1  # one start for all
    model = TASKS["digits-autoencoder"].build(0, "default")
    model.load_state_dict(load_file(out / "model.safetensors"))


def test_the_metric_that_was_written_loads(tmp_path: Path) -> None:
    assert main(["train", "digits-classifier", "--optimizers", "natgrad", "--steps", "2", "--out", str(tmp_path)]) == 0
    task = TASKS["digits-classifier"]
    model = task.build(0, "default")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    metric = natgrad.Fisher(model, task.criterion())
    metric.load(tmp_path / "metric.safetensors")
    assert float(metric.trace()) > 0


def test_one_rival_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train",
        "digits-classifier",
        "--optimizers",
        "adamw",
        "--steps",
        "1",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    assert main(arguments) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "log.jsonl", "model.safetensors"}
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["train", "foo"],
            "unknown task 'foo'; there are digits-autoencoder, digits-classifier, mnist-autoencoder",
        ),
        (["train", "digits-autoencode"], "Did you mean digits-autoencoder?"),
        (
            ["train", "--optimizers", "natgrad,adam"],
            "unknown optimizer 'adam'; there are natgrad, adamw, sgd",
        ),
        (["train", "--optimizers", "sgd,sgd"], "names one twice"),
        (["train", "--optimizers", ""], "unknown optimizer ''"),
        (["train", "--init", "he"], "there are default, xavier"),
        (["train", "--steps", "0"], "--steps 0 is no budget"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--seconds", "0"], "--seconds 0 is no budget"),
        (["train", "--seconds", "nan"], "--seconds nan is no budget"),
        (["train", "--seconds", "inf"], "--seconds inf is no budget"),
        (["train", "--seconds", "1", "--steps", "1"], "both given"),
        (["train", "--seed", "-1"], "--seed -1 is out of range"),
        (["train", "mnist-autoencoder"], "--data-dir or NATGRAD_DATA"),
        (["train", "mnist-autoencoder", "--data-dir", "/nowhere"], "/nowhere is not a folder"),
        (["train", "mnist-autoencoder", "--data-dir", "."], "lacks t10k-images-idx3-ubyte[.gz]"),
        (["train", "--out", "file/deeper"], "cannot be written"),
        (["train", "--out", "file"], "it is a file"),
        (["train", "--bogus"], "--bogus"),
        (["trian"], "trian"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    (tmp_path / "file").touch()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("natgrad: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert {p.name for p in tmp_path.iterdir()} == {"file"}  # nothing was begun


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert natgrad.__version__ in capsys.readouterr().out


def test_control_c_keeps_what_was_written(tmp_path: Path) -> None:
    # a background job starts with SIGINT ignored, and its children too: CI may be one
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; import sys; from natgrad.cli.app import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["train", "digits-classifier", "--optimizers", "adamw", "--seconds", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(natgrad.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    while "adamw at 0.001" not in process.stdout.readline():  # the first of four runs is over
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted. Kept in" in said
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "log.jsonl", "model.safetensors"}
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) > 1


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")

    def fail(beside: Path) -> None:
        beside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(CommandError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


OWN = """
from torch import nn, randn
from torch.nn.functional import mse_loss
from natgrad.cli.tasks import Data, Task

def load(folder):
    x = randn(64, 3)
    return Data(x[:48], x[:48].sum(1, keepdim=True), x[48:], x[48:].sum(1, keepdim=True), "made up")

TASK = Task("own", "a sum", load, lambda init: nn.Linear(3, 1), nn.MSELoss, mse_loss, "squared error", 16, 1.0,
            {"adamw": (1e-2, 1e-1), "sgd": (1e-2, 1e-1)})
"""


def test_a_task_in_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(OWN)
    assert main(["train", str(tmp_path / "my_task.py"), "--steps", "3", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["task"] == "own"
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is no file; give one with a TASK of type natgrad.cli.tasks.Task"),
        ("x = 1", "has no TASK of type natgrad.cli.tasks.Task"),
        ("TASK = 1", "has no TASK of type natgrad.cli.tasks.Task"),
        ("import no_such_module", "cannot be run: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_file_that_is_no_task_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: str
) -> None:
    path = tmp_path / "my_task.py"
    if text is not None:
        path.write_text(text)
    assert main(["train", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert words in " ".join(said.split())
    assert not (tmp_path / "out").exists()
