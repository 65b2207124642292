"""The library runs without what only the command line needs, and the command line says what it lacks."""

from __future__ import annotations

import subprocess
import sys


def test_without_the_packages_of_the_command_line() -> None:
    code = """
import sys
sys.modules.update(typer=None, matplotlib=None, rich=None, sklearn=None)
import torch, natgrad as ng
metric = ng.Fisher(torch.nn.Linear(3, 2), torch.nn.MSELoss())
metric.update(torch.randn(4, 3))
metric.fit([(torch.randn(4, 3), None)])
print(metric.coverage())
from natgrad.cli import main
sys.exit(main(["train"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "natgrad: the command line needs typer; pip install 'natgrad[cli]'\n"
    assert "kfac" in done.stdout
