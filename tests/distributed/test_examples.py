"""The examples run under torchrun as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


EXAMPLES = {"ddp.py": ("'inverses'",), "fsdp.py": ("'gradients'", "'directions'", "3 blocks")}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_trains(example: str, tmp_path: Path) -> None:
    """And the first goes on from where it was stopped."""
    resumes = ["--checkpoint", str(tmp_path)] if example == "ddp.py" else []
    first = run(example, resumes)
    accuracies = [float(a) for a in re.findall(r"test accuracy ([\d.]+)%", first)]
    assert len(accuracies) == 4, first
    assert accuracies[-1] > 85
    for words in EXAMPLES[example]:
        assert words in first
    if not resumes:
        return
    assert (tmp_path / "step-40").exists()
    for later in ("step-40", "step-30"):
        shutil.rmtree(tmp_path / later)
    again = run(example, resumes)
    assert f"going on from {tmp_path}/step-20" in again
    assert re.findall(r"epoch .: loss.*", again) == re.findall(r"epoch .: loss.*", first)[1:]


def run(example: str, arguments: list[str]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / example), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
