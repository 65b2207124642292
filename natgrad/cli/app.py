"""The command line: `natgrad train`. This file reads what the user typed; the work is in `natgrad.cli.tasks`.

A further command is one more function under ``@app.command()``.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console

import natgrad
from natgrad.cli.inspect.command import inspect
from natgrad.cli.merge import merge
from natgrad.cli.solve import solve
from natgrad.cli.tasks import TASKS, task_in
from natgrad.cli.tasks.networks import INITIALISATIONS
from natgrad.cli.tasks.task import CommandError
from natgrad.cli.training.compare import Comparison
from natgrad.cli.training.contenders import CONTENDERS
from natgrad.cli.training.display import Bars, Lines
from natgrad.cli.training.files import writable_folder
from natgrad.cli.training.launch import check_nproc, launch, launched
from natgrad.cli.training.report import comparison_table
from natgrad.cli.training.training import Budget

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes: the shell's conventions for misuse and for Ctrl-C
DEFAULT_TASK = "digits-autoencoder"

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
app.command()(solve)


def version(asked: bool) -> None:
    if asked:
        typer.echo(f"natgrad {natgrad.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the versions and stop.")
    ] = False,
) -> None:
    """Natural-gradient descent for PyTorch."""


@app.command()
def train(
    task: Annotated[
        str, typer.Argument(help="; ".join(f"{t.name}: {t.summary}" for t in TASKS.values()) + "; or your own file.")
    ] = DEFAULT_TASK,
    optimizers: Annotated[
        str, typer.Option(help=f"Names with commas between, from {', '.join(CONTENDERS)}.")
    ] = ",".join(CONTENDERS),
    seconds: Annotated[
        float | None, typer.Option(help="CPU seconds of each run.", show_default="the task's own")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each run, instead of --seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initialisation and of the order of the data.")] = 0,
    init: Annotated[
        str, typer.Option(help=f"{' or '.join(INITIALISATIONS)}: PyTorch's own initialisation, or Glorot's.")
    ] = "default",
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/TASK")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="NATGRAD_DATA", help="Folder with the data of mnist-autoencoder.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Plain lines instead of live bars.")] = False,
    nproc: Annotated[int, typer.Option(help="Processes that share each batch.")] = 1,
) -> None:
    """Compare natural-gradient descent with tuned rivals on real data.

    Every run starts from the same weights and sees the same batches. natgrad runs once with nothing set; each
    rival runs at four learning rates with a cosine schedule, and its best final training loss counts. Writes
    curves.png, log.jsonl, model.safetensors and metric.safetensors.
    """
    chosen = task_in(Path(task)) if task.endswith(".py") else TASKS[one_of(task, TASKS, "task")]
    names = [one_of(name.strip(), CONTENDERS, "optimizer") for name in optimizers.split(",")]
    if len(set(names)) != len(names):
        raise CommandError(f"--optimizers {optimizers} names one twice; each runs once")
    one_of(init, INITIALISATIONS, "initialisation")
    budget = read_budget(seconds, steps, chosen.seconds)
    if not 0 <= seed < 2**32:
        raise CommandError(f"--seed {seed} is out of range; give a whole number from 0 to {2**32 - 1}")
    check_nproc(nproc, chosen.batch_size)
    if nproc > 1 and not launched():
        again = ["train", task, "--optimizers", optimizers, "--seed", str(seed), "--init", init, "--nproc", str(nproc)]
        given = {"--seconds": seconds, "--steps": steps, "--out": out, "--data-dir": data_dir}
        again += [word for name, value in given.items() if value is not None for word in (name, str(value))]
        raise typer.Exit(launch(nproc, [*again, *["--quiet"] * quiet]))
    data = chosen.load(data_dir)
    folder = writable_folder(out if out is not None else Path("runs") / chosen.name)
    if nproc > 1:
        dist.init_process_group("gloo")
    comparison = Comparison(chosen, data, names, budget, seed, init, folder)
    if comparison.crew.leads:
        run_comparison(comparison, plain=quiet)
    else:
        follow(comparison)
    if nproc > 1:
        dist.destroy_process_group()


app.command()(inspect)
app.command()(merge)


def follow(comparison: Comparison) -> None:
    """What ranks do that only take part: no word, and no file."""
    torch.set_num_threads(1)
    try:
        with open(os.devnull, "w") as nowhere:
            comparison.execute(Lines(Console(file=nowhere)))
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)  # at once: the first rank may be waiting in an exchange


def run_comparison(comparison: Comparison, plain: bool) -> None:
    """Run, show, write; on Ctrl-C write what there is and leave with 130."""
    torch.set_num_threads(1)  # CPU seconds then mean work done, not threads that wait for each other
    terminal = sys.stdout.isatty()
    console = Console() if terminal else Console(width=132, color_system=None)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=not terminal)  # files keep long lines whole
    say(f"{comparison.task.name} on {comparison.data.source}")
    for name in comparison.optimizers:
        say(f"{name}: {comparison.describe(name)}")
    say(f"{len(comparison.planned())} runs of {comparison.budget}; loss: {comparison.task.measured}")
    interrupted = False
    try:
        comparison.execute(Bars(console) if terminal and not plain else Lines(console))
    except KeyboardInterrupt:
        interrupted = True
    comparison.runs = [run for run in comparison.runs if run.points]
    if comparison.runs:
        comparison.write_log()
        comparison.write_picture()
        edges = comparison.edges()
        console.print(comparison_table(comparison.runs, comparison.leader, edges))
        for name in edges:
            rates = ", ".join(f"{rate:g}" for rate in comparison.task.rates[name])
            say(f"* {name}: at the edge of the sweep {rates}, so another rate might do better")
    kept = ", ".join(path.name for path in comparison.written)
    if interrupted:
        say(f"Interrupted. Kept in {comparison.out}: {kept or 'nothing, as no run had begun'}.")
        raise typer.Exit(INTERRUPTED)
    say(f"Wrote {kept} to {comparison.out}")


def one_of(given: str, known: Iterable[str], what: str) -> str:
    """`given`, if it is one of the known names.

    Raises:
        CommandError: it is not; the message lists them.
    """
    names = list(known)
    if given not in names:
        close = difflib.get_close_matches(given, names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise CommandError(f"unknown {what} {given!r}; there are {', '.join(names)}.{hint}")
    return given


def read_budget(seconds: float | None, steps: int | None, default: float) -> Budget:
    """The budget of each run.

    Raises:
        CommandError: both are given, or one that is not positive.
    """
    if seconds is not None and steps is not None:
        raise CommandError("--seconds and --steps are both given; a run ends by one of them, leave the other out")
    if steps is not None:
        if steps < 1:
            raise CommandError(f"--steps {steps} is no budget; give a whole number from 1 on")
        return Budget(None, steps)
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise CommandError(f"--seconds {seconds:g} is no budget; give a positive number of CPU seconds")
    return Budget(default if seconds is None else seconds, None)


def main(arguments: list[str] | None = None) -> int:
    """The console script. What the user got wrong is one line and exit code 2, never a traceback."""
    try:
        code = app(arguments, prog_name="natgrad", standalone_mode=False)
    except CommandError as error:
        if os.environ.get("RANK", "0") == "0" or not launched():  # once, not from every rank
            typer.echo(f"natgrad: {error}", err=True)
        return BAD_INPUT
    except Exception as error:
        # typer's own parse errors; their class is click's or typer's, depending on the version of typer
        if type(error).__name__ == "Abort":  # Ctrl-C before the runs or while results are written
            typer.echo("natgrad: interrupted", err=True)
            return INTERRUPTED
        if not hasattr(error, "format_message"):
            raise
        message = str(error.format_message()).strip().rstrip(".")
        if message:  # empty where no command was given and the help has been shown
            words = sys.argv[1:] if arguments is None else arguments
            command = f" {words[0]}" if words[:1] and words[0] in ("train", "solve", "inspect", "merge") else ""
            end = "" if message.endswith("?") else "."
            typer.echo(f"natgrad: {message}{end} Try 'natgrad{command} --help'.", err=True)
        return BAD_INPUT
    return code if isinstance(code, int) else 0
