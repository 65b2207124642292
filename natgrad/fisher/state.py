"""State of a Fisher metric: as a dictionary and as a safetensors file.

Statistics are tensors under ``block.statistic.source.sum`` and ``….mass``; everything else (names and shapes of the
parameters, options, layers) is one JSON string. A state is sealed (`natgrad.metric.seal`), and checked from end to end
before anything is taken over.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from natgrad.blocks.average import Average
from natgrad.blocks.base import Block
from natgrad.blocks.structures import block_from_json, block_to_json
from natgrad.metric.files import write_whole
from natgrad.metric.seal import SEAL, sealed, unsealed

FORMAT = 14
WHAT = "the metric's state"
GENERATOR = "generator."  # begins the names of random streams in a file
KEYS = ("about", "tensors", "generators")


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
    return sealed({"about": json.dumps(text), "tensors": tensors, "generators": states})


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
        ValueError: it is no state of a metric, of another one, damaged, or has values that no metric has.
    """
    there, state = opened(state)
    check_differences(said, there)
    return Restored(there, blocks_from(there, state["tensors"], shapes, device), dict(state["generators"]))


def opened(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a state says of itself, and the state without its seal.

    Raises:
        ValueError: it is no state of a metric, of another format, damaged, or says what no metric says.
    """
    if not isinstance(state, Mapping) or (missing := {"about", "tensors"} - set(state)):
        has = f"it lacks {sorted(missing)} and has {sorted(map(str, state))}" if isinstance(state, Mapping) else ""
        raise ValueError(f"this is no state of a Fisher metric: {has or type(state).__name__}")
    there = None
    try:
        there = json.loads(state["about"])
        number, named = there["format"], set(there["tensors"])
    except (ValueError, TypeError, KeyError, RecursionError):
        number, named = FORMAT, set()  # what is no JSON any more has lost its checksum too
    if number != FORMAT:
        raise ValueError(f"the metric's state has format {number!r}; this version of natgrad reads format {FORMAT}")
    if lacks := sorted(named - set(state["tensors"])):
        raise ValueError(
            f"the metric's state lacks {len(lacks)} of its statistics, {lacks[0]!r} the first: it was not read in "
            "full. Checkpoints of torch.distributed.checkpoint are read by natgrad.checkpoint"
        )
    plain = unsealed(state, WHAT)
    if not isinstance(there, dict) or set(plain) != set(KEYS):
        raise ValueError(f"{WHAT} says nothing of itself, or holds what no metric has: {sorted(map(str, plain))}")
    check_values(there)
    return there, plain


def check_values(there: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what a state says of itself and no metric says."""

    def text(v: Any) -> bool:
        return isinstance(v, str)

    def count(v: Any) -> bool:
        return type(v) is int and v >= 0

    def number(v: Any) -> bool:
        return type(v) in (int, float) and math.isfinite(v)

    def each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda v: isinstance(v, dict) and all(fits(x) for x in v.values())

    def several(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda v: isinstance(v, list) and all(fits(x) for x in v)

    fields: dict[str, tuple[Callable[[Any], bool], str]] = {
        "parameters": (each(several(count)), "shapes by name"),
        "kind": (text, "a string"),
        "criterion": (text, "a string"),
        "reduction": (text, "a string"),
        "structure": (each(text), "strings by name"),
        "sharing": (each(text), "strings by name"),
        "max_factor_dim": (each(lambda v: v is None or count(v)), "whole numbers by name"),
        "seen": (count, "a whole number"),
        "labels": (count, "a whole number"),
        "rank": (count, "a whole number"),
        "masses": (each(lambda v: number(v) and v >= 0), "numbers by name"),
        "nats": (lambda v: v is None or (several(number)(v) and len(v) == 2), "two numbers or none"),
        "blocks": (several(lambda v: isinstance(v, dict)), "a list of blocks"),
        "tensors": (several(text), "names"),
    }
    for name, (fits, words) in fields.items():
        if name not in there or not fits(there[name]):
            raise ValueError(f"{name!r} in {WHAT} must be {words}, got {there.get(name)!r:.80}")


def blocks_from(
    there: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], device: torch.device
) -> list[Block]:
    """Return the blocks of a state, with their statistics. `shapes`: of the parameters.

    Raises:
        ValueError: a block that is none, or statistics that do not fit it; the message names them.
    """
    blocks = []
    for data in there["blocks"]:
        try:
            blocks.append(block_from_json(data, shapes))
            blocks[-1].shapes_of_statistics()  # finds sizes that no layer has
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{WHAT} holds a block that this version does not know: {data!r:.200} ({error})"
            ) from error
    for name in tensors:
        try:
            number, key, rest = name.split(".", 2)
            source, part = rest.rsplit(".", 1)
            block = blocks[int(number)]
            shape = block.shapes_of_statistics()[key]
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{WHAT} holds {name!r}, which is no statistic of its blocks") from error
        partner = tensors.get(f"{number}.{key}.{source}.{'mass' if part == 'sum' else 'sum'}")
        tensor = tensors[name]
        check_statistic(name, tensor, shape, part, partner)
        average = block.statistics.setdefault(key, Average())
        (average.sums if part == "sum" else average.masses)[source] = tensor.to(device, copy=True)
    return blocks


def check_statistic(name: str, tensor: Any, shape: tuple[int, ...], part: str, partner: Tensor | None) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{name!r} in {WHAT} must be a tensor of real numbers")
    if part not in ("sum", "mass") or partner is None:
        raise ValueError(f"{name!r} in {WHAT} stands without its sum or its mass")
    fits = tuple(tensor.shape) == shape if part == "sum" else broadcasts(tensor.shape, shape)
    if not fits:
        raise ValueError(f"{name!r} in {WHAT} has shape {tuple(tensor.shape)}; its block takes {shape}")
    if not bool(torch.isfinite(tensor).all()) or (part == "mass" and bool((tensor < 0).any())):
        raise ValueError(f"{name!r} in {WHAT} holds NaN, Inf or a mass below zero")


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to)))


def check_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what differs."""
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
    """Write a state to a file.

    Raises:
        OSError: it cannot be written; a file that was there stays.
    """
    target = Path(path)
    if not target.parent.is_dir() or target.is_dir():
        raise OSError(f"cannot write the metric to {target}: it must be a file in a folder that exists")
    tensors = {n: t.detach().contiguous() for n, t in state["tensors"].items()}
    tensors.update({GENERATOR + d: g for d, g in state["generators"].items()})
    write_whole(target, to_bytes(tensors, metadata={"natgrad": state["about"], SEAL: json.dumps(state[SEAL])}))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state in a file, unchecked: `opened` and `restored` check it.

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
    except (SafetensorError, ValueError, TypeError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or is no safetensors file: {error}") from error
    if "natgrad" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but holds no natgrad metric")
    try:
        seal = json.loads(metadata.get(SEAL, "null"))
    except (ValueError, RecursionError):
        seal = None
    return {
        "about": metadata["natgrad"],
        "tensors": {n: t for n, t in tensors.items() if not n.startswith(GENERATOR)},
        "generators": {n.removeprefix(GENERATOR): t for n, t in tensors.items() if n.startswith(GENERATOR)},
        SEAL: seal,
    }
