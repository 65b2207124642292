"""State of a Fisher metric: as a dictionary and as a safetensors file.

Statistics are tensors under ``block.statistic.source.sum`` and ``….mass``; everything else (names and shapes of the
parameters, options, layers) is one JSON string, so that a file can be checked before anything is taken over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from natgrad.blocks.average import Average
from natgrad.blocks.base import Block
from natgrad.blocks.structures import block_from_json, block_to_json

FORMAT = 12


def state_of(
    said: Mapping[str, Any], blocks: Sequence[Block], generators: Mapping[str, torch.Generator]
) -> dict[str, Any]:
    """Return a state. `said`: what the metric is, as `about` has it."""
    tensors: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        for key, average in block.statistics.items():
            for source, total in average.sums.items():
                tensors[f"{i}.{key}.{source}.sum"] = total.clone()  # a state is its own
                tensors[f"{i}.{key}.{source}.mass"] = average.masses[source].clone()
    text = {**said, "blocks": [block_to_json(b) for b in blocks], "tensors": sorted(tensors)}
    states = {name: g.get_state() for name, g in generators.items()}
    return {"about": json.dumps(text), "tensors": tensors, "generators": states}


@dataclass
class Restored:
    """What a state says, checked."""

    said: dict[str, Any]
    blocks: list[Block]
    generators: dict[str, Tensor]


def restored(
    state: Mapping[str, Any], said: Mapping[str, Any], shapes: Mapping[str, torch.Size], device: torch.device
) -> Restored:
    """Return what a state holds.

    Args:
        said: what the metric is that is to take it over.
        shapes: of its parameters.

    Raises:
        ValueError: it is no state of a metric, of another one, or not whole.
    """
    if missing := {"about", "tensors"} - set(state):
        raise ValueError(f"this is no state of a Fisher metric: it lacks {sorted(missing)} and has {sorted(state)}")
    there = json.loads(state["about"])
    check_differences(said, there)
    if lacks := sorted(set(there["tensors"]) - set(state["tensors"])):
        raise ValueError(
            f"the metric's state lacks {len(lacks)} of its statistics, {lacks[0]!r} the first: it was not read in "
            "full. Checkpoints of torch.distributed.checkpoint are read by natgrad.distributed.checkpoint.checkpoint"
        )
    return Restored(there, blocks_from(there, state["tensors"], shapes, device), dict(state.get("generators", {})))


def blocks_from(
    there: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], device: torch.device
) -> list[Block]:
    """The blocks of a state, with their statistics. `shapes`: of the parameters."""
    blocks = []
    for i, data in enumerate(there["blocks"]):
        block = block_from_json(data, shapes)
        for name, tensor in tensors.items():
            number, key, rest = name.split(".", 2)
            source, part = rest.rsplit(".", 1)
            if int(number) == i:
                average = block.statistics.setdefault(key, Average())
                (average.sums if part == "sum" else average.masses)[source] = tensor.to(device, copy=True)
        blocks.append(block)
    return blocks


def check_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what differs."""
    if there.get("format") != FORMAT:
        raise ValueError(
            f"the metric's state has format {there.get('format')!r}; this version of natgrad reads format {FORMAT}"
        )
    said = []
    mine, theirs = here["parameters"], there["parameters"]
    if missing := [n for n in mine if n not in theirs]:
        said.append(f"parameters that the state lacks: {missing}")
    if extra := [n for n in theirs if n not in mine]:
        said.append(f"parameters that this model lacks: {extra}")
    said += [
        f"{n} has shape {tuple(mine[n])} here and {tuple(theirs[n])} in the state"
        for n in mine
        if n in theirs and mine[n] != theirs[n]
    ]
    said += [
        f"{k} is {here[k]!r} here and {there[k]!r} in the state"
        for k in ("kind", "criterion", "reduction")
        if here[k] != there[k]
    ]
    said += [
        f"the {k} of {n} is {here[k][n]!r} here and {there[k][n]!r} in the state"
        for k in ("structure", "sharing", "max_factor_dim")
        for n in here[k]
        if n in there[k] and here[k][n] != there[k][n]
    ]
    if said:
        raise ValueError("the state belongs to another metric: " + "; ".join(said))


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise OSError(f"cannot write the metric to {target}: it must be a file in a folder that exists")
    beside = target.with_name(target.name + ".partial")
    tensors = {n: t.detach().contiguous() for n, t in state["tensors"].items()}
    tensors.update({f"generator.{d}": g for d, g in state["generators"].items()})
    try:
        save_file(tensors, beside, metadata={"natgrad": state["about"]})
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state in a file. Raises as `read`."""
    about, tensors = read(path)
    generators = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith("generator.")}
    rest = {n: t for n, t in tensors.items() if not n.startswith("generator.")}
    return {"about": about, "tensors": rest, "generators": generators}


def read(path: str | os.PathLike[str]) -> tuple[str, dict[str, Tensor]]:
    """What a metric file says of itself, as JSON, and its tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is cut short, or no metric file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no metric file {path}; metric.save(path) writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 -- not a dictionary
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or is no safetensors file: {error}") from error
    if "natgrad" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but holds no natgrad metric")
    return metadata["natgrad"], tensors
