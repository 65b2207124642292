"""Pictures of solutions and of their errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 101  # grid points a side


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # slow to import, and only needed once something is drawn

    return Figure(figsize=(width, height), layout="constrained")


def field_picture(
    values: Tensor,
    extent: tuple[float, float, float, float],
    title: str,
    labels: tuple[str, str],
    path: Path,
    diverging: bool = False,
) -> Path:
    """An image of values (vertical, horizontal) with a colour bar."""
    figure = new_figure(5, 4)
    axes = figure.add_subplot()
    limit = float(values.abs().max()) or 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if diverging else {"cmap": "viridis"}
    image = axes.imshow(values.numpy(), origin="lower", extent=extent, aspect="auto", **scale)
    figure.colorbar(image, format="%.2g")
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    figure.savefig(path, dpi=130)
    return path


def box_pictures(model: nn.Module, solution: Callable[[Tensor], Tensor], d: int, folder: Path) -> list[Path]:
    """u and u − u_exact over the first two coordinates of the unit cube.

    The others are at ½, off the planes where the solution has symmetric zeros.
    """
    line = torch.linspace(0, 1, SIDE, dtype=torch.float64)
    x2, x1 = torch.meshgrid(line, line, indexing="ij")
    x = torch.full((SIDE * SIDE, d), 0.5, dtype=torch.float64)
    x[:, 0], x[:, 1] = x1.reshape(-1), x2.reshape(-1)
    with torch.no_grad():
        u = model(x)[:, 0]
    where = "" if d == 2 else f", x₃ … x{d} = ½"
    box, labels = (0.0, 1.0, 0.0, 1.0), ("x₁", "x₂")
    return [
        field_picture(u.reshape(SIDE, SIDE), box, f"u{where}", labels, folder / "solution.png"),
        field_picture(
            (u - solution(x)).reshape(SIDE, SIDE),
            box,
            f"u − exact solution{where}",
            labels,
            folder / "error_field.png",
            True,
        ),
    ]


def line_pictures(x: Tensor, u: Tensor, exact: Tensor, labels: tuple[str, str], folder: Path) -> list[Path]:
    """u and u − exact along a line."""
    paths = []
    for name, title, curves in (
        ("solution", "solution", {"network": u, "exact": exact}),
        ("error_field", "network − exact", {"": u - exact}),
    ):
        figure = new_figure(5, 4)
        axes = figure.add_subplot()
        for (label, y), style in zip(curves.items(), ("-", "--")):
            axes.plot(x.numpy(), y.numpy(), style, label=label)
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
        if len(curves) > 1:
            axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=130)
        paths.append(folder / f"{name}.png")
    return paths


def curve_picture(
    steps: list[int],
    seconds: list[float],
    errors: list[float],
    error_name: str,
    published: dict[str, tuple[float, float | None]],
    path: Path,
) -> Path:
    """The error against CPU seconds, others' final errors as horizontal lines."""
    figure = new_figure(6.5, 4.2)
    axes = figure.add_subplot()
    axes.loglog(seconds, errors, color="black", lw=1.6, label="natgrad")
    for i, (who, (error, after)) in enumerate(published.items()):
        axes.axhline(error, color=f"C{i}", lw=1, ls="--", label=f"{who}{f', {after:g} s' if after else ''}")
    axes.set(xlabel="CPU seconds", ylabel=error_name, title=f"{error_name} over {steps[-1]} steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right" if min(errors) < 1e-2 * max(errors) else "best")
    figure.savefig(path, dpi=130)
    return path
