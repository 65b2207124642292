"""``natgrad train --nproc``: the run of one process, shared out; stopped as a whole; errors in a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from natgrad.cli.app import main

ROOT = Path(__file__).parents[2]
COMMAND = ["train", "digits-classifier", "--quiet", "--optimizers"]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([environment.pop("FIRST", ""), str(ROOT)]).strip(os.pathsep)
    return subprocess.Popen(
        [sys.executable, "-m", "natgrad", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        start_new_session=True,
    )


def records(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The header, and {optimizer: [(step, training loss), …]} at its first rate."""
    header, *lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found: dict[str, list[Any]] = {}
    for line in lines:
        if line["rate_given"] in (None, 0.001):
            found.setdefault(line["optimizer"], []).append((line["step"], line["train"]))
    return header, found


def test_two_processes_do_the_run_of_one(tmp_path: Path) -> None:
    run = [*COMMAND, "natgrad,adamw", "--steps", "20"]
    process = start([*run, "--nproc", "2", "--out", str(tmp_path / "two")])
    assert main([*run, "--out", str(tmp_path / "one")]) == 0
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert out.count("natgrad        step 20") == 1, out
    (first, one), (second, two) = records(tmp_path / "one"), records(tmp_path / "two")
    assert (first["processes"], second["processes"]) == (1, 2)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    assert [s for s, _ in one["adamw"]] == [s for s, _ in two["adamw"]] == [*range(21)]
    for (_, a), (_, b) in zip(one["adamw"], two["adamw"]):
        assert b == pytest.approx(a, rel=1e-5)  # the sum of two halves, in float32
    first_loss = one["natgrad"][0][1]
    for (step, a), (_, b) in zip(one["natgrad"], two["natgrad"]):
        if a > 0.1 * first_loss:  # the second rank draws labels of its own, and small losses differ by more
            assert b == pytest.approx(a, rel=1e-5 if step == 0 else 0.25)
    assert two["natgrad"][-1][1] < 0.1 * two["natgrad"][0][1]


def test_ctrl_c_stops_all_and_keeps_what_there_is(tmp_path: Path) -> None:
    run = [*COMMAND, "natgrad,sgd", "--steps", "100000", "--nproc", "2", "--out", str(tmp_path)]
    process = start(run)
    until = time.monotonic() + 60
    while not children(process.pid) or not began(process.pid):
        assert time.monotonic() < until
        time.sleep(0.1)
    workers = children(process.pid)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Interrupted. Kept in" in out
    assert "Traceback" not in err
    assert (tmp_path / "log.jsonl").exists()
    assert len(workers) == 2
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def began(pid: int) -> bool:
    """Whether the ranks have joined: then each has connections to the others."""
    return all(len(list(Path(f"/proc/{c}/task").iterdir())) > 4 for c in children(pid))


BROKEN = """
import os
if os.environ.get("RANK") == "1":
    from natgrad.cli.training.workers import Workers

    def part(self, batch):
        raise ZeroDivisionError("of the second rank")

    Workers.part = part
"""


def test_an_error_of_one_rank_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    run = [*COMMAND, "sgd", "--steps", "3", "--nproc", "2", "--out", str(tmp_path / "out")]
    process = start(run, FIRST=str(tmp_path))
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == (
        "natgrad: rank 1 of 2 failed: ZeroDivisionError: of the second rank; all were stopped"
    )


@pytest.mark.parametrize(
    ("nproc", "words"),
    [("7", "does not divide the batch of 256 evenly; give one of 2, 4, 8, 16"), ("0", "is no number of processes")],
)
def test_a_number_that_does_not_fit(nproc: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "sgd", "--nproc", nproc]) == 2
    assert words in capsys.readouterr().err
