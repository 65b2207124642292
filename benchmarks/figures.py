"""The figures of docs/benchmarks.md, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_high

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.analysis import OURS, Study
from natgrad.cli.inspect.figures import tidy
from natgrad.cli.training.report import FAINT, INK, PALETTE

# Beyond the first six, Paul Tol's muted colours (https://personal.sron.nl/~pault/), and a marker each.
COLOURS = (*PALETTE[1:], "#882255", "#332288", "#117733", "#999933", "#777777")
MARKERS = "sD^vP*Xh<p"
FURTHEST = 16  # times the fastest: where the profile ends


def style(optimizers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{optimizer: (colour, marker)}; natgrad has the first colour."""
    rest = [name for name in optimizers if name != OURS]
    pairs = {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(rest)}
    return {OURS: (PALETTE[0], "o"), **pairs}


def plain(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)


def speed(study: Study, path: Path) -> None:
    """Time to the target over natgrad's, a row a workload, a mark a rival; hollow where it missed."""
    figure = Figure(figsize=(9.6, 0.62 * len(study.workloads) + 1.7), layout="constrained")
    axes = figure.add_subplot()
    looks = style(study.optimizers)
    axes.axvline(1, color=PALETTE[0], lw=2, zorder=1)
    spread = np.linspace(-0.3, 0.3, max(2, len(study.rivals)))
    for row, workload in enumerate(study.workloads):
        axes.axhspan(row - 0.44, row + 0.44, color="#F4F4F4", lw=0, zorder=0)
        for lift, rival in zip(spread, study.rivals):
            found = study.ratio(workload, [rival])
            if found is None:
                continue
            colour, marker = looks[rival]
            axes.plot([found.low, found.high], [row + lift] * 2, color=colour, lw=1, alpha=0.6, zorder=2)
            face = "white" if found.rival_missed else colour
            axes.plot(found.value, row + lift, marker, mfc=face, mec=colour, mew=1.3, ms=6.5, zorder=3)
    for rival in study.rivals:
        axes.plot([], [], looks[rival][1], color=looks[rival][0], ls="none", ms=6.5, label=rival)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = min(low, 0.45), max(high, 2.2)
    axes.set_xlim(low, high)
    plain(axes, "x", [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high])
    names = [w + "\n(natgrad missed)" * study.mostly_missed(w, OURS) for w in study.workloads]
    axes.set_yticks(range(len(names)), names, fontsize=9.5)
    axes.set_ylim(len(study.workloads) - 0.5, -0.5)
    axes.set_xlabel(
        "time to target relative to natgrad's: right of the line natgrad is faster, left of it the rival\n"
        "bars: 95 % intervals; hollow: the rival missed the target, which counts as 4/3 of the budget",
        fontsize=9,
        color=INK,
    )
    tidy(axes)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=min(10, max(1, len(study.rivals))),
                  columnspacing=1.1, handletextpad=0.2)  # fmt: skip
    figure.savefig(path, dpi=150)


def profile(study: Study, path: Path) -> None:
    """For each optimizer the share of problems that it solved within so many times the fastest one's time."""
    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    looks = style(study.optimizers)
    ends: list[tuple[float, str, str]] = []
    for name, values in study.profile().items():
        if not values:
            continue
        solved = [v for v in values if v <= FURTHEST]
        xs = [1.0, *solved, FURTHEST]
        ys = [sum(v <= x for v in values) / len(values) for x in xs]
        ours = name == OURS
        colour, marker = looks[name]
        axes.step(xs, ys, where="post", color=colour, lw=2.8 if ours else 1.3, zorder=3 if ours else 2)
        axes.plot(xs[-1], ys[-1], marker, color=colour, ms=6 if ours else 5, zorder=4, clip_on=False)
        ends.append((ys[-1], name, colour))
    for height, (share, name, colour) in zip(apart([e[0] for e in sorted(ends)], 0.052), sorted(ends)):
        axes.annotate(
            name, (FURTHEST, share), (FURTHEST * 1.09, height), color=colour, fontsize=9, va="center",
            annotation_clip=False, fontweight="bold" if name == OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.5, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(1, FURTHEST)
    axes.set_ylim(0, 1.02)
    plain(axes, "x", (1, 1.5, 2, 3, 4, 6, 8, FURTHEST))
    axes.set_xlabel("time to target over the fastest optimizer's", fontsize=9, color=INK)
    axes.set_ylabel("share of problems solved", fontsize=9, color=INK)
    axes.grid(True, axis="y", color="#E3E3E3", lw=0.7)
    tidy(axes)
    figure.savefig(path, dpi=150)


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved so that none is closer than `gap` to the next, as little as one pass up and down does."""
    out = list(heights)
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + gap)
    if out and out[-1] > 1:
        out[-1] = 1.0
        for i in range(len(out) - 2, -1, -1):
            out[i] = min(out[i], out[i + 1] - gap)
    return out


def sensitivity(found: Mapping[tuple[str, str, float], Sequence[float]], knobs: Sequence[str], path: Path) -> None:
    """Time to the target over the default's against the factor of a knob, a panel a knob, a line a workload."""
    figure = Figure(figsize=(10.2, 3.1), layout="constrained")
    panels = figure.subplots(1, len(knobs), sharey=True)
    names = list(dict.fromkeys(workload for workload, _, _ in found))
    top = 2.0  # a run has twice the default's time
    finite = [r for rs in found.values() for r in rs if math.isfinite(r)]
    low = min([0.7, *finite]) * 0.93
    for axes, knob in zip(panels, knobs):
        axes.axhline(1, color=FAINT, lw=0.9, ls="--")
        axes.axhspan(top, top * 1.5, color="#F4F4F4", lw=0)
        for i, name in enumerate(names):
            here = {f: rs for (w, k, f), rs in found.items() if (w, k) == (name, knob)} | {1.0: [1.0]}
            shift = 1.05 ** (i - (len(names) - 1) / 2)
            middles = {f: median_high([math.inf if math.isnan(r) else r for r in rs]) for f, rs in here.items()}
            xs = sorted(middles)
            ys = [math.nan if math.isinf(middles[f]) else middles[f] for f in xs]
            axes.plot([f * shift for f in xs], ys, "o-", color=PALETTE[i], ms=4.5, lw=1.6, label=name)
            for f, rs in here.items():
                real = [r for r in rs if math.isfinite(r)]
                if real:
                    axes.plot([f * shift] * 2, [min(real), max(real)], color=PALETTE[i], lw=1, alpha=0.6)
                lost = any(math.isnan(r) for r in rs)
                if lost or math.isinf(middles[f]):
                    axes.plot(f * shift, top * 1.2, "x" if lost else "^", color=PALETTE[i], ms=6.5, mew=1.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain(axes, "x", (0.25, 0.5, 1, 2, 4))
        axes.set_ylim(low, top * 1.5)
        plain(axes, "y", [t for t in (0.25, 0.5, 0.7, 1, 1.4, 2) if t >= low])
        axes.set_xlabel(f"{knob}, times the default", fontsize=9, color=INK)
        tidy(axes)
    panels[0].set_ylabel("time to target\nover the default's", fontsize=9, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    for marker, label in (("^", "missed (more than twice the time)"), ("x", "diverged")):
        handles += panels[0].plot([], [], marker, color=INK, ls="none", ms=6.5)
        labels.append(label)
    figure.legend(handles, labels, frameon=False, fontsize=8.5, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=150)
