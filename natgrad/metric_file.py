"""State of a Fisher metric: as a dictionary and as a safetensors file.

Statistics are tensors under ``block.statistic.source.sum`` and ``….mass``; everything else (names and shapes of the
parameters, options, layers) is one JSON string, so that a file can be checked before anything is taken over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from natgrad.averages import Average
from natgrad.blocks import Block
from natgrad.layers import Layer
from natgrad.layouts import LAYOUTS
from natgrad.pieces import Piece

if TYPE_CHECKING:
    from natgrad.fisher import Fisher

FORMAT = 10
ROWS = "rows"  # the generator that draws the rows of a factor, beside those of the labels by device


def state_of(metric: Fisher) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    for i, block in enumerate(metric.blocks):
        for key, average in block.statistics.items():
            for source, total in average.sums.items():
                tensors[f"{i}.{key}.{source}.sum"] = total.clone()  # a state is its own
                tensors[f"{i}.{key}.{source}.mass"] = average.masses[source].clone()
    generators = {str(d): g.get_state() for d, g in metric.curvature.generators.items()}
    generators[ROWS] = metric.curvature.row_generator.get_state()
    said = {**about(metric), "tensors": sorted(tensors)}
    return {"about": json.dumps(said), "tensors": tensors, "generators": generators}


def about(metric: Fisher) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "parameters": {n: list(p.shape) for n, p in metric.parameters.items()},
        "kind": metric.kind,
        "criterion": metric.reading.name,
        "reduction": metric.reading.reduction,
        "structure": {n: metric.curvature.structure_of(n) for n in metric.parameters},
        "sharing": {n: metric.curvature.sharing_of(n) for n in metric.parameters},
        "max_side": {n: metric.curvature.max_side_of(n) for n in metric.parameters},
        "seen": metric.seen,
        "rank": 0 if metric.ranks is None else metric.ranks.rank,
        "masses": {source: float(mass) for source, mass in metric._masses.items()},
        "nats": None if metric.nats is None else metric.nats.tolist(),
        "blocks": [block_to_json(block) for block in metric.blocks],
    }


def block_to_json(block: Block) -> dict[str, Any]:
    return {
        "structure": block.structure,
        "sharing": getattr(block, "sharing", "expand"),
        "max_side": getattr(block, "max_side", None),
        "trains": getattr(block, "trains", False),
        "layers": [layer_to_json(layer) for layer in block.layers],
    }


def block_from_json(data: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Block:
    """An empty block. `shapes`: of the parameters."""
    from natgrad.curvature import block_of

    layers = [layer_from_json(d, shapes) for d in data["layers"]]
    return block_of(data["structure"], layers, data["sharing"], data["max_side"], data["trains"])


def layer_to_json(layer: Layer) -> dict[str, Any]:
    return {
        "op": layer.op,
        "layout": [type(layer.layout).__name__, dict(vars(layer.layout))],
        "weight": None if layer.weight is None else [layer.weight.name, layer.weight.rows],
        "biases": [[b.name, b.rows] for b in layer.biases],
        "one_hot": layer.one_hot,
        "swapped": layer.swapped,
        "fan_in": layer.fan_in,
    }


def layer_from_json(data: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Layer:
    name, fields = data["layout"]
    layout = LAYOUTS[name](**{k: tuples(v) for k, v in fields.items()})
    weight = None if data["weight"] is None else piece(data["weight"])
    rest = {k: data[k] for k in ("one_hot", "swapped", "fan_in")}
    return Layer(data["op"], layout, weight, [piece(b) for b in data["biases"]], shapes, **rest)


def piece(data: list[Any]) -> Piece:
    return Piece(data[0], None if data[1] is None else tuple(data[1]))


def tuples(value: Any) -> Any:
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


def restore(metric: Fisher, state: Mapping[str, Any]) -> None:
    from natgrad.curvature import statistics_dtype

    if missing := {"about", "tensors"} - set(state):
        raise ValueError(f"this is no state of a Fisher metric: it lacks {sorted(missing)} and has {sorted(state)}")
    there = json.loads(state["about"])
    refuse_differences(about(metric), there)
    if lacks := sorted(set(there["tensors"]) - set(state["tensors"])):
        raise ValueError(
            f"the metric's state lacks {len(lacks)} of its statistics, {lacks[0]!r} the first: it was not read in "
            "full. Checkpoints of torch.distributed.checkpoint are read by natgrad.checkpoint"
        )
    blocks = blocks_from(there, state["tensors"], metric.curvature.layers.shapes, metric._like().device)
    metric.curvature.blocks = blocks
    metric.curvature.layers.found = {layer.key: layer for block in blocks for layer in block.layers}
    metric.seen = there["seen"]
    like = torch.zeros((), dtype=statistics_dtype(metric.parameters.values()), device=metric._like().device)
    metric.nats = None if there["nats"] is None else like.new_tensor(there["nats"])
    metric._masses = {source: like.new_tensor(mass) for source, mass in there["masses"].items()}
    for block in blocks:
        metric.curvature.set_up(block)
    metric.curvature.generators.clear()  # one that had not drawn yet starts from its seed again
    for which, saved in state.get("generators", {}).items():
        rows = which == ROWS
        generator = metric.curvature.row_generator if rows else metric.curvature.generator(torch.device(which))
        generator.set_state(saved.cpu())
        if metric.ranks is not None and metric.ranks.rank != there.get("rank", 0):
            # another rank's stream: one of our own follows from it, so that no two ranks draw the same labels
            start = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            generator.manual_seed(metric.ranks.seed(start))


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


def refuse_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
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
        for k in ("structure", "sharing", "max_side")
        for n in here[k]
        if n in there[k] and here[k][n] != there[k][n]
    ]
    if said:
        raise ValueError("the state belongs to another metric: " + "; ".join(said))


def save(metric: Fisher, path: str | os.PathLike[str]) -> None:
    state = state_of(metric)
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


def load(metric: Fisher, path: str | os.PathLike[str]) -> None:
    about, tensors = read(path)
    generators = {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith("generator.")}
    rest = {n: t for n, t in tensors.items() if not n.startswith("generator.")}
    restore(metric, {"about": about, "tensors": rest, "generators": generators})


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
