"""The example runs under torchrun as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_trains(tmp_path: Path) -> None:
    """And goes on from where it was stopped."""
    first = run(tmp_path)
    accuracies = [float(a) for a in re.findall(r"test accuracy ([\d.]+)%", first)]
    assert len(accuracies) == 4, first
    assert accuracies[-1] > 85
    assert "'inverses'" in first
    assert (tmp_path / "step-40").exists()
    for later in ("step-40", "step-30"):
        shutil.rmtree(tmp_path / later)
    again = run(tmp_path)
    assert f"going on from {tmp_path}/step-20" in again
    epochs = re.findall(r"epoch .: loss.*", first)
    assert re.findall(r"epoch .: loss.*", again) == epochs[1:]


def run(folder: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "ddp.py"), "--checkpoint", str(folder)],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
