"""`natgrad bench`: run the benchmark of a checkout. The study itself is no part of the package."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import natgrad
from natgrad.tasks.task import CommandError


def bench(
    smoke: Annotated[bool, typer.Option("--smoke", help="Two small workloads, three minutes at most.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the lines.", show_default="benchmarks/runs; with --smoke a temporary one"),
    ] = None,
    scale: Annotated[float, typer.Option(help="Of every run's CPU budget.")] = 1.0,
) -> None:
    """Compare natgrad's defaults with tuned rivals, as docs/benchmarks.md does. Needs a checkout of the repository.

    Without --smoke this is the whole study: it says how many CPU hours it takes, and goes on where it was interrupted.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise CommandError(f"--scale {scale:g} is no part of a budget; give a positive number")
    if out is not None and out.exists() and not out.is_dir():
        raise CommandError(f"--out {out} is a file; give a folder")
    root = checkout()
    command = [sys.executable, "-m", "benchmarks.bench", "--scale", str(scale)]
    command += ["--smoke"] if smoke else []
    command += [] if out is None else ["--out", str(out.absolute())]
    raise typer.Exit(subprocess.run(command, cwd=root, check=False).returncode)


def checkout() -> Path:
    """The folder that holds `benchmarks`.

    Raises:
        CommandError: natgrad was installed without it.
    """
    root = Path(natgrad.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "bench.py").exists():
        raise CommandError(
            f"bench runs from a checkout of the repository: {root / 'benchmarks'} is not there, as the installed "
            "package does not hold the benchmarks. Clone the repository and install it with pip install -e '.[bench]'"
        )
    return root
