"""``natgrad solve PROBLEM``: run a shipped problem, watch the error fall, and put it beside the published results."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from natgrad.cli.problems.catalogue import PROBLEMS
from natgrad.cli.problems.pictures import curve_picture
from natgrad.cli.problems.problem import Problem, Setting
from natgrad.optim.optimizer import NaturalGradient

SHOW_EVERY = 0.5  # wall seconds between live updates
SAVE_EVERY = 30.0  # wall seconds between checkpoints


def solve(
    problem: Annotated[str, typer.Argument(help="One of: " + ", ".join(PROBLEMS))],
    solver: Annotated[str, typer.Option(help="auto, dense, kernel or cg")] = "auto",
    network: Annotated[
        str, typer.Option(help='A name of the problem ("small", "large") or widths such as 2-64-64-1')
    ] = "",
    seconds: Annotated[
        float | None, typer.Option(help="CPU seconds to run; the default is the problem's", min=0.0)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps in all", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the network and the points")] = 1,
    out: Annotated[
        Path,
        typer.Option(help="Folder for pictures, log and checkpoint; the default is runs/PROBLEM-NETWORK"),
    ] = Path(),
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in the output folder")] = False,
) -> None:
    """Solve a shipped problem by natural gradient and compare with the published results."""
    console = Console()
    chosen = pick_problem(problem)
    label, widths = pick_network(chosen, network)
    folder = Path("runs") / f"{chosen.name}-{label}" if out == Path() else out
    torch.set_num_threads(1)
    setting = chosen.prepare(widths, seed)
    try:
        opt = NaturalGradient(setting.metric(solver))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--solver") from error
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"problem": chosen.name, "network": list(widths), "solver": solver, "seed": seed}
    log: list[tuple[int, float, float, float]] = restore(folder, facts, opt, setting) if resume else []
    count = sum(p.numel() for p in setting.model.parameters())
    console.print(
        f"[bold]{chosen.name}[/]  {chosen.title}\nnetwork {'-'.join(map(str, widths))}, {count:,} parameters, "
        f"float64, one thread → {folder}"
    )
    budget = chosen.seconds if seconds is None else seconds
    try:
        run(chosen, setting, opt, log, budget, steps, console, lambda: save(folder, facts, opt, setting, log))
    except KeyboardInterrupt:
        console.print("[yellow]stopped; what was reached is kept[/]")
    except (MemoryError, ValueError) as error:
        console.print(f"[red]error:[/] {error}")
        raise typer.Exit(1) from error
    if not log:
        console.print("[yellow]no step was taken[/]")
        raise typer.Exit(1)
    save(folder, facts, opt, setting, log)
    if "solver" in opt.info:
        console.print(f"solver {opt.info['solver']}")
    console.print(table(chosen, label, setting, log))
    for path in write(folder, chosen, label, setting, log):
        console.print(f"wrote {path}")


def pick_problem(name: str) -> Problem:
    """The problem of that name.

    Raises:
        typer.BadParameter: there is none.
    """
    if name not in PROBLEMS:
        raise typer.BadParameter(
            f"there is no problem {name!r}; the problems are {', '.join(PROBLEMS)}", param_hint="PROBLEM"
        )
    return PROBLEMS[name]


def pick_network(problem: Problem, text: str) -> tuple[str, tuple[int, ...]]:
    """Label and widths of a named network, or of widths written 2-64-1.

    Raises:
        typer.BadParameter: neither a name nor widths that fit the problem.
    """
    first = next(iter(problem.networks))
    if not text or text in problem.networks:
        return text or first, problem.networks[text or first]
    expected = problem.networks[first]
    parts = text.split("-")
    if not all(p.isdigit() and int(p) > 0 for p in parts) or len(parts) < 2:
        raise typer.BadParameter(
            f"{text!r} is neither one of {', '.join(problem.networks)} nor widths such as "
            f"{'-'.join(map(str, expected))}",
            param_hint="--network",
        )
    widths = tuple(int(p) for p in parts)
    fits = len(widths) == 2 if problem.name == "ising-chain" else (widths[0], widths[-1]) == (expected[0], expected[-1])
    if not fits:
        raise typer.BadParameter(
            f"a network for {problem.name} looks like {'-'.join(map(str, expected))}, got {text}",
            param_hint="--network",
        )
    return text, widths


def run(
    problem: Problem,
    setting: Setting,
    opt: NaturalGradient,
    log: list[tuple[int, float, float, float]],
    seconds: float,
    steps: int | None,
    console: Console,
    keep: Any,
) -> None:
    """Step until the CPU seconds or the steps are spent.

    `log` grows by (step, CPU seconds, loss before the step, error after it).
    """
    step, spent = (log[-1][0], log[-1][1]) if log else (0, 0.0)
    shown = saved = time.monotonic()
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while spent < seconds and (steps is None or step < steps):
            began = time.process_time()
            loss = opt.step(setting.batch(step))
            assert loss is not None  # a step on a batch returns it
            spent += time.process_time() - began  # the error and the display are not the method's cost
            step += 1
            log.append((step, spent, float(loss), setting.error()))
            now = time.monotonic()
            if now - shown > SHOW_EVERY:
                live.update(progress(problem, setting, opt, log, seconds))
                shown = now
            if now - saved > SAVE_EVERY:
                keep()
                saved = now
    if log:
        console.print(progress(problem, setting, opt, log, seconds))


def progress(
    problem: Problem,
    setting: Setting,
    opt: NaturalGradient,
    log: list[tuple[int, float, float, float]],
    seconds: float,
) -> str:
    """One line."""
    step, spent, loss, error = log[-1]
    return (
        f"step {step:>5}  {spent:5.1f}/{seconds:g} s  {problem.loss_name} {loss:.4e}  "
        f"{setting.error_name} [bold]{error:.2e}[/]  λ {opt.info['damping']:.0e}"
    )


def table(problem: Problem, label: str, setting: Setting, log: list[tuple[int, float, float, float]]) -> Table:
    """This run beside the published results."""
    out = Table(title=f"{problem.name}: {setting.error_name}")
    for column in ("method", "error", "seconds", "steps"):
        out.add_column(column, justify="left" if column == "method" else "right")
    step, spent, _, error = log[-1]
    rows: list[tuple[str, float, float | None, int | None]] = [("natgrad", error, spent, step)]
    rows += [(p.who, p.error, p.seconds, p.steps) for p in problem.published.get(label, [])]
    for who, reached, after, steps in sorted(rows, key=lambda row: row[1]):
        mark = "[bold green]" if who == "natgrad" else ""
        out.add_row(
            f"{mark}{who}",
            f"{mark}{reached:.2e}",
            f"{mark}{after:.0f}" if after else "",
            f"{mark}{steps:,}" if steps else "",
        )
    if label in problem.published:
        out.caption = f"seconds: CPU on one core for natgrad; the others as reported by {problem.source}"
    else:
        out.caption = "seconds: CPU on one core; no published figure for this network and these points"
    return out


def write(
    folder: Path, problem: Problem, label: str, setting: Setting, log: list[tuple[int, float, float, float]]
) -> list[Path]:
    """Pictures and the log; returns what was written."""
    with open(folder / "log.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["step", "cpu_seconds", problem.loss_name, setting.error_name.replace(" ", "_")])
        writer.writerows(log)
    published = {p.who: (p.error, p.seconds) for p in problem.published.get(label, [])}
    curve = curve_picture(
        [r[0] for r in log],
        [max(r[1], 1e-3) for r in log],
        [r[3] for r in log],
        setting.error_name,
        published,
        folder / "error_curve.png",
    )
    return [*setting.draw(folder), curve, folder / "log.csv", folder / "checkpoint.pt"]


def save(
    folder: Path,
    facts: dict[str, Any],
    opt: NaturalGradient,
    setting: Setting,
    log: list[tuple[int, float, float, float]],
) -> None:
    """Everything to go on from, replaced in one move so that an interruption leaves the old one whole."""
    state = {
        "facts": json.dumps(facts),
        "model": setting.model.state_dict(),
        "optimizer": opt.state_dict(),
        "random": torch.get_rng_state(),
        "log": [list(row) for row in log],
    }
    torch.save(state, folder / "checkpoint.part")
    (folder / "checkpoint.part").replace(folder / "checkpoint.pt")


def restore(
    folder: Path, facts: dict[str, Any], opt: NaturalGradient, setting: Setting
) -> list[tuple[int, float, float, float]]:
    """Load a checkpoint into the model, the optimizer and the random state; returns the log so far.

    Raises:
        typer.BadParameter: there is none, or it is of another run.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise typer.BadParameter(f"there is no checkpoint {path}; run without --resume first", param_hint="--resume")
    state = torch.load(path, weights_only=True)
    if (before := json.loads(state["facts"])) != facts:
        differs = {k: (before[k], facts[k]) for k in facts if before.get(k) != facts[k]}
        raise typer.BadParameter(
            f"{path} is of another run: {', '.join(f'{k} was {a}, is {b}' for k, (a, b) in differs.items())}",
            param_hint="--resume",
        )
    setting.model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return [(int(s), float(t), float(l), float(e)) for s, t, l, e in state["log"]]


if __name__ == "__main__":
    typer.run(solve)
