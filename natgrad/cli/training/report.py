"""Tables and pictures of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from natgrad.cli.training.runs import Race, Run, best, race

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette, which readers with any of the common colour deficiencies can tell apart
# (https://jfly.uni-koeln.de/color/). The leader takes the first, in a heavier line.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#8A8A8A"


def times(ratio: float) -> str:
    """A ratio with two figures: 8.1×, 17×."""
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def comparison_table(runs: Sequence[Run], leader: str, edges: Sequence[str] = ()) -> Table:
    """One line for each optimizer at its best rate; a rival's says when the leader reached its final loss.

    Args:
        runs: all runs of all rates.
        leader: the optimizer that the others are measured against.
        edges: optimizers whose best rate lies at the edge of their sweep; they get a star.
    """
    chosen = best(runs)
    first = next((r for r in chosen if r.optimizer == leader), None)
    rivals = first is not None and len(chosen) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("optimizer", "rate", "steps", "CPU s", "train loss", "test loss"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right", no_wrap=True)
    if rivals:
        table.add_column(f"{leader} reaches its train loss in")
    for run in chosen:
        rate = "default" if run.rate is None else f"{run.rate:g}" + ("*" if run.optimizer in edges else "")
        last = run.last
        steps = str(last.step) if run.complete else f"{last.step}, cut short"
        row = [
            run.optimizer,
            rate,
            steps,
            f"{last.cpu_seconds:.2f}",
            number(last.train),
            number(last.test),
        ]
        if rivals and first is not None:
            row.append("" if run is first else race_text(race(first, run)))
        table.add_row(*row, style="bold" if run is first else None)
    return table


def number(value: float) -> str:
    """A loss with four figures."""
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def race_text(result: Race | None) -> str:
    """When the leader was there, and how many times sooner than the rival."""
    if result is None:
        return "rival diverged"
    if result.leader is None or result.time_ratio is None or result.step_ratio is None:
        return "not reached"
    there, time, steps = result.leader, result.time_ratio, result.step_ratio
    sooner = f"{times(time)} sooner" if time >= 1 else f"{times(1 / time)} later"
    fewer = f"{times(steps)} fewer" if steps >= 1 else f"{times(1 / steps)} more"
    return f"{there.cpu_seconds:.2f} s ({sooner}), {there.step} steps ({fewer})"


def draw_curves(path: Path, runs: Sequence[Run], leader: str, title: str, measured: str) -> None:
    """Training loss against steps and against CPU seconds, as a PNG.

    Best rates in full colour, the rest of each sweep faint; the leader in a heavier line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window system, no global state
    from matplotlib.figure import Figure

    drawn = [r for r in runs if len(r.points) > 1]
    chosen = best(drawn)
    chosen.sort(key=lambda r: r.optimizer != leader)
    colour = {run.optimizer: PALETTE[i % len(PALETTE)] for i, run in enumerate(chosen)}
    figure = Figure(figsize=(10.5, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, quantity, label in ((left, "step", "steps"), (right, "cpu_seconds", "CPU seconds, one thread")):
        for run in drawn:
            if run not in chosen:
                draw_line(axes, run, quantity, color=colour[run.optimizer], linewidth=0.8, alpha=0.28)
        for run in reversed(chosen):  # the leader on top
            heavy = run.optimizer == leader
            draw_line(
                axes,
                run,
                quantity,
                color=colour[run.optimizer],
                linewidth=2.8 if heavy else 1.6,
                label=run.label,
            )
        decorate(axes, label)
    set_loss_axis(left, chosen)
    left.set_ylabel(f"training loss\n{measured}", color=INK, fontsize=10.5)
    mark_race(right, chosen, leader)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        right.legend(
            handles[::-1],
            labels[::-1],
            frameon=True,
            framealpha=0.9,
            edgecolor="none",
            fontsize=10,
            loc="upper right",
            labelcolor=INK,
        )
    figure.suptitle(title, color=INK, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, format="png")


def draw_line(axes: Axes, run: Run, quantity: str, **style: object) -> None:
    """The curve of one run; what is not finite leaves a gap."""
    xs = [getattr(p, quantity) for p in run.points]
    ys = [p.train if math.isfinite(p.train) else math.nan for p in run.points]
    axes.plot(xs, ys, solid_capstyle="round", **style)  # type: ignore[arg-type]


def decorate(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, color=INK, fontsize=10.5)
    axes.set_xlim(left=0)
    axes.grid(True, which="major", color="#E3E3E3", linewidth=0.7)
    axes.tick_params(colors=INK, labelsize=9.5, length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def set_loss_axis(axes: Axes, chosen: Sequence[Run]) -> None:
    """A logarithmic axis from the start to the lowest loss, with plain numbers also within one decade.

    It ends two decades below the second best: further down, a training loss says no more than that the data are fitted.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    losses = [p.train for run in chosen for p in run.points if math.isfinite(p.train) and p.train > 0]
    if not losses:
        return
    start = max(run.points[0].train for run in chosen)
    lows = sorted(min((p.train for p in run.points if math.isfinite(p.train)), default=math.inf) for run in chosen)
    low = max(min(losses), lows[1] / 100) if len(lows) > 1 and math.isfinite(lows[1]) else min(losses)
    high = start if math.isfinite(start) and start > 0 else max(losses)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.05, max(high, low * 1.01) * 1.05)
    short = high / low < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if short else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def mark_race(axes: Axes, chosen: Sequence[Run], leader: str) -> None:
    """A dotted line at the best rival's final loss, from when the leader reached it to when the rival did."""
    first = next((r for r in chosen if r.optimizer == leader), None)
    rivals = [r for r in chosen if r.optimizer != leader and math.isfinite(r.score)]
    if first is None or not rivals:
        return
    rival = min(rivals, key=lambda r: r.score)
    result = race(first, rival)
    if result is None or result.leader is None or result.time_ratio is None or result.time_ratio <= 1:
        return
    start, end, level = result.leader.cpu_seconds, result.rival.cpu_seconds, rival.score
    axes.plot(
        [start, end],
        [level, level],
        color=INK,
        linewidth=1,
        linestyle=(0, (2, 2)),
        marker="o",
        markersize=3.5,
    )
    text = f"{rival.optimizer}'s final loss, {times(result.time_ratio)} sooner"
    style = {"ha": "right", "fontsize": 9.5, "color": INK}
    axes.annotate(text, (end, level), xytext=(0, -15), textcoords="offset points", **style)  # type: ignore[arg-type]
