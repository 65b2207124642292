"""The figures of `natgrad inspect`, as matplotlib draws them without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from natgrad.cli.inspect.spectra import Spectrum
from natgrad.cli.training.report import FAINT, INK, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 12  # spectra drawn, the largest blocks first
POINTS = 400  # of one curve: more are not seen
PLAIN = 0.99  # a cosine from here on means plain gradient descent


def spectra(found: Sequence[Spectrum]) -> Figure:
    """A panel for each block: eigenvalues in descending order, and as damped."""
    chosen = sorted(found, key=lambda s: -len(s.values))[:PANELS]
    chosen = [s for s in found if s in chosen]  # in the order of the model
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(2.9 * columns + 0.4, 2.2 * rows + 0.5), layout="constrained")
    for i, s in enumerate(chosen):
        ax = figure.add_subplot(rows, columns, i + 1)
        index = np.unique(np.linspace(0, len(s.values) - 1, POINTS).astype(int))
        values, damped = s.values.numpy()[index], s.damped.numpy()[index]
        floor = max(float(s.damped.min()) * 1e-3, float(s.values[0]) * 1e-12, 1e-300)
        share = (index + 1) / len(s.values)
        ax.plot(share, np.sort(damped)[::-1], color=PALETTE[1], lw=1.4, label="damped")
        ax.plot(share, np.maximum(values, floor), color=PALETTE[0], lw=1.8, label="eigenvalues")
        ax.set_yscale("log")
        ax.set_title(s.name, fontsize=8.5, color=INK, loc="left", parse_math=False)
        tidy(ax)
        if i == 0:
            ax.legend(frameon=False, fontsize=8)
        if i // columns == rows - 1:
            ax.set_xlabel("share of eigenvalues", fontsize=8)
    return figure


def cosines(names: Sequence[str], expected: Sequence[float], last: Sequence[float | None]) -> Figure:
    """A row for each block: the cosine its spectrum lets expect, and that of the last step where it is known."""
    figure = Figure(figsize=(8.2, 0.27 * len(names) + 1.3), layout="constrained")
    ax = figure.add_subplot()
    y = np.arange(len(names))
    ax.axvspan(PLAIN, 1.02, color=PALETTE[4], alpha=0.25, lw=0)
    for i, (a, b) in enumerate(zip(expected, last)):
        if b is not None and math.isfinite(a):
            ax.plot([a, b], [i, i], color=FAINT, lw=0.8, zorder=1)
    ax.plot(expected, y, "o", mfc="white", mec=PALETTE[0], ms=6, label="to expect from spectrum and damping")
    if any(c is not None for c in last):
        ax.plot([math.nan if c is None else c for c in last], y, "o", color=PALETTE[0], ms=6, label="last step")
    ax.set_yticks(y, names, fontsize=8.5, parse_math=False)  # a name is text, whatever dollars it holds
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("cos(direction, gradient); shaded: plain gradient descent in all but name", fontsize=8.5)
    tidy(ax)
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=2)
    return figure


def over_time(records: Sequence[dict[str, Any]]) -> Figure:
    """Cosines, how far steps were to move the predictions, and the step length against the step."""
    figure = Figure(figsize=(11.5, 2.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [r["steps"] for r in records]
    names = list(dict.fromkeys(n for r in records for n in r.get("cosines", {})))
    for i, name in enumerate(names):
        values = [number(r.get("cosines", {}).get(name)) for r in records]
        shade = i / max(1, len(names) - 1)  # first layers dark, last ones light
        left.plot(steps, values, color=PALETTE[0], alpha=1 - 0.75 * shade, lw=1.2)
    left.axhspan(PLAIN, 1.02, color=PALETTE[4], alpha=0.25, lw=0)
    left.set_ylim(min(0.0, *left.get_ylim()), 1.02)
    left.set_title("cos(direction, gradient), first blocks dark", fontsize=8.5, loc="left", color=INK)
    middle.plot(steps, [number(r.get("predicted_nats")) for r in records], color=PALETTE[0], lw=1.4)
    middle.set_title("how far a step is to move the predictions, in nats", fontsize=8.5, loc="left", color=INK)
    right.plot(steps, [number(r.get("step_length")) for r in records], color=PALETTE[0], lw=1.4)
    right.set_title("step length", fontsize=8.5, loc="left", color=INK)
    for ax in (left, middle, right):
        ax.set_xlabel("step", fontsize=8)
        tidy(ax)
    return figure


def tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=7.5, colors=INK)


def number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
