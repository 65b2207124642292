"""`natgrad merge`: several saved models into one, by the metrics that were saved with them."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from natgrad.cli.inspect.report import METRIC
from natgrad.cli.tasks.task import CommandError
from natgrad.metric.files import write_whole
from natgrad.uses.merging import merge as merged

MODEL = "model.safetensors"  # in the folder of a run, beside the metric
TORCH = (".pt", ".pth", ".bin")
EVERYTHING = "all"  # in place of a structure


def merge(
    models: Annotated[
        list[str], typer.Argument(help=f"Folders with {MODEL} and {METRIC}, or WEIGHTS,METRIC with a comma between.")
    ],
    out: Annotated[Path, typer.Option(help=f"File for the merged weights, .safetensors or {', '.join(TORCH)}.")],
    damping: Annotated[
        float, typer.Option(help="Over the mean eigenvalue of the sum; pulls to the plain mean.")
    ] = 1e-2,
    structure: Annotated[
        str, typer.Option(help=f"What of the metrics is used: input, kfac, diagonal, or {EVERYTHING}.")
    ] = "input",
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
) -> None:
    """Merge models of one architecture into one, each weighed by its own metric.

    Weights and metrics are those that `natgrad train` writes, or of metric.save(path) and of safetensors or torch.save
    of a state_dict. No data and no code of the models are needed.
    """
    if len(models) < 2:
        raise CommandError("name two models at least; each is a folder, or WEIGHTS,METRIC")
    if not (math.isfinite(damping) and damping >= 0):
        raise CommandError(f"--damping {damping:g} is none; give zero or a positive number")
    if out.suffix not in (".safetensors", *TORCH):
        raise CommandError(f"--out {out} must end in .safetensors or {', '.join(TORCH)}")
    if out.is_dir() or not out.parent.is_dir():
        raise CommandError(f"--out {out} must be a file in a folder that exists")
    if out.exists() and not force:
        raise CommandError(f"{out} is there already; give another --out, or --force to replace it")
    pairs = {}
    for given in models:
        if given in pairs:
            raise CommandError(f"{given} is named twice; each model counts once")
        weights, metric = files_of(given)
        pairs[given] = (read(weights), metric)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state = merged(pairs, damping, None if structure == EVERYTHING else structure)
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            raise CommandError(str(error)) from error
    for said in dict.fromkeys(str(w.message) for w in caught):
        typer.echo(f"natgrad: {said}", err=True)
    write(state, out)
    typer.echo(f"Merged {len(pairs)} models, {sum(t.numel() for t in state.values()):,} numbers, into {out}")


def files_of(given: str) -> tuple[Path, Path]:
    """Return the files of weights and metric that an argument names.

    Raises:
        CommandError: they are not there.
    """
    folder = Path(given)
    parts = [Path(part) for part in given.split(",")]
    if folder.is_dir():
        parts = [folder / MODEL, folder / METRIC]
    elif len(parts) != 2:
        raise CommandError(f"{given} is no folder; give one with {MODEL} and {METRIC}, or WEIGHTS,METRIC")
    for path in parts:
        if not path.is_file():
            raise CommandError(
                f"there is no file {path}; a model is a folder with {MODEL} and {METRIC}, or WEIGHTS,METRIC"
            )
    return parts[0], parts[1]


def read(path: Path) -> dict[str, Tensor]:
    """Return a state_dict from a file. Nothing in the file is run.

    Raises:
        CommandError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix in TORCH:
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = from_bytes(path.read_bytes())
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise CommandError(f"{path} holds no weights that can be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CommandError(f"{path} holds no state_dict, which has a tensor for each name; save model.state_dict()")
    return dict(found)


def write(state: Mapping[str, Tensor], out: Path) -> None:
    try:
        if out.suffix in TORCH:
            buffer = BytesIO()
            torch.save(dict(state), buffer)
            data = buffer.getvalue()
        else:  # which keeps no tensor twice
            data = to_bytes({n: t.detach().contiguous().clone() for n, t in state.items()})
        write_whole(out, data)
    except OSError as error:
        raise CommandError(f"{out} cannot be written ({error.strerror or error}); make room or rights there") from error
