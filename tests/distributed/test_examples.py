"""The examples run under torchrun as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("example", "sent"), [("ddp.py", ("'inverses'",)), ("fsdp.py", ("'gradients'", "'directions'", "3 blocks"))]
)
def test_the_example_trains(example: str, sent: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / example)], capture_output=True, text=True, timeout=90, env=environment
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(a) for a in re.findall(r"test accuracy ([\d.]+)%", done.stdout)]
    assert len(accuracies) == 4, done.stdout
    assert accuracies[-1] > 85
    for words in sent:
        assert words in done.stdout
