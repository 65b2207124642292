"""How ranks find out that they hold the same statistics, and what to exchange where they do not.

Everything here is a pure function of what the ranks have told each other, so that all of them come to the same end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from natgrad.blocks.base import Block
from natgrad.blocks.batch_statistics import BatchStatistics
from natgrad.blocks.collection import BlockCollection
from natgrad.blocks.structures import block_from_json, block_to_json


@dataclass(frozen=True)
class Entry:
    """One sum of a block's statistics, and how the ranks exchange it."""

    block: int
    key: str
    source: str
    shape: tuple[int, ...]
    mass: tuple[int, ...] | None  # shape of a mass of its own; None takes that of all data

    @property
    def name(self) -> tuple[int, str, str]:
        return self.block, self.key, self.source


def entries_of(blocks: Sequence[Block], batch: BatchStatistics) -> list[Entry]:
    place = {b: i for i, b in enumerate(blocks)}
    found = [
        Entry(place[b], key, source, tuple(s.shape), tuple(a.masses[source].shape) if b.is_mean(key) else None)
        for b, new in batch.statistics
        for key, a in new.items()
        for source, s in a.sums.items()
    ]
    return sorted(found, key=lambda e: e.name)


def reconcile(collection: BlockCollection, texts: Sequence[Mapping[str, Any]]) -> tuple[list[Entry], list[str]]:
    """Give every rank the same blocks in the same order, and the entries that any rank has.

    Ranks differ where a batch of one does not use a layer, or where it has no data.
    """
    every: dict[str, dict[str, Any]] = {}
    entries: dict[tuple[int, str, str], Entry] = {}
    names = [[name_of(b) for b in text["blocks"]] for text in texts]
    for text, known in zip(texts, names):
        for name, data in zip(known, text["blocks"]):
            joined(every.setdefault(name, json.loads(json.dumps(data))), data)
    order = list(every)
    for text, known in zip(texts, names):
        for number, key, source, shape, mass in text["entries"]:
            e = Entry(order.index(known[number]), key, source, tuple(shape), None if mass is None else tuple(mass))
            if entries.setdefault(e.name, e) != e:
                raise RuntimeError(
                    f"the block of {known[number]} has statistics {key!r} of shape {list(e.shape)} on one rank and "
                    f"{list(entries[e.name].shape)} on another: its layers are used in different ways. Let every "
                    "rank run the same forward pass, or leave them out with `params=`"
                )
    mine = {name_of(block_to_json(b)): b for b in collection.blocks}
    shapes = collection.layers.shapes
    for name, data in every.items():
        if name not in mine:
            mine[name] = block = block_from_json(data, shapes)
            collection.set_up(block)
            collection.layers.found.update({layer.key: layer for layer in block.layers})
        for layer, d in zip(mine[name].layers, data["layers"]):
            layer.fan_in = d["fan_in"]
    collection.blocks[:] = [mine[name] for name in order]
    ordered = sorted(entries.values(), key=lambda e: e.name)
    return ordered, sorted({s for text in texts for s in text["masses"]})


def name_of(block: Mapping[str, Any]) -> str:
    """What a block is called on every rank: the piece that its first layer is known by."""
    first = block["layers"][0]
    return json.dumps([block["structure"], first["weight"] or first["biases"][0]])  # tuples are lists once sent


def joined(held: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Take the larger fan-in of two descriptions of one block; they must agree otherwise."""
    for mine, theirs in zip(held["layers"], other["layers"]):
        mine["fan_in"] = fan_in = max(mine["fan_in"], theirs["fan_in"])
        if mine != {**theirs, "fan_in": fan_in}:
            raise RuntimeError(
                f"the layer of {mine['weight'] or mine['biases']} is {mine} on one rank and {dict(theirs)} on another. "
                "Let every rank run the same forward pass, or leave it out with `params=`"
            )
    if len(held["layers"]) != len(other["layers"]):
        names = [[d["weight"] or d["biases"] for d in b["layers"]] for b in (held, other)]
        raise RuntimeError(
            f"one joint block is over {names[0]} on one rank and over {names[1]} on another; let every rank use every "
            "layer in its first forward pass, or use a structure with a block a layer"
        )


def digest_of(said: Mapping[str, Any]) -> int:
    """63 bits of a hash, which fit into a message of integers."""
    return int.from_bytes(hashlib.sha256(json.dumps(said).encode()).digest()[:8], "big") >> 1


def flattened(said: Mapping[str, Any], path: str = "") -> dict[str, str]:
    out = {}
    for key, value in said.items():
        name = f"{path} {key}".strip()
        out.update(flattened(value, name) if isinstance(value, Mapping) else {name: repr(value)})
    return out
