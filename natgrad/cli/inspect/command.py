"""`natgrad inspect`: reads what the user typed; the work is in `natgrad.cli.inspect.report`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from natgrad.cli.tasks.task import CommandError


def inspect(
    run_or_metric: Annotated[Path, typer.Argument(help="Folder of a run, or a metric.safetensors file.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file.", show_default="inspect.html beside the metric")
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Relative damping to show.", show_default="the run's own")
    ] = None,
) -> None:
    """Write a page about a metric: spectra, damping, and whether it still has a say in the direction.

    The page opens without a network; its figures stand beside it as PNG. With the info.jsonl that `natgrad train`
    leaves it shows the run over time as well.
    """
    if damping is not None and not (math.isfinite(damping) and damping > 0):
        raise CommandError(f"--damping {damping:g} is no damping; give a positive number")
    if out is not None and out.is_dir():
        raise CommandError(f"--out {out} is a folder; name the HTML file")
    from natgrad.cli.inspect import report as inspect_report  # matplotlib is loaded where it is needed

    try:
        written = inspect_report.write(run_or_metric, out, damping)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    typer.echo(f"Wrote {', '.join(p.name for p in written)} to {written[0].parent}")
