"""A state dictionary as tensors alone, so that storing and loading it runs no code.

torch.distributed.checkpoint pickles what is no tensor, and unpickling may run anything. Here the tree of dictionaries,
lists and numbers becomes JSON, the bytes of that text one more tensor, and the tensors of the tree stand beside it:

    {"a": {"step": 3, "m": t}}   →   {"about": uint8 bytes of the JSON, "a.m": t}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ABOUT = "about"
Place = Callable[[tuple[str, ...], Tensor], Tensor]


class Pieces(dict[str, Tensor]):
    """What a packed state consists of. A type of its own, for loaders to know it by."""


def pack(state: Any) -> Pieces:
    """Pieces of a state, tensors copied: what happens to the originals later is not seen.

    Raises:
        TypeError: something in it is neither a tensor nor a dictionary, list, tuple, number, string or None.
    """
    pieces = Pieces()
    text = json.dumps(_packed(state, (), pieces))
    pieces[ABOUT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return pieces


def _packed(value: Any, path: tuple[str, ...], pieces: Pieces) -> Any:
    if isinstance(value, Tensor):
        name = ".".join(path)
        while name in pieces or name == ABOUT:
            name += "'"
        pieces[name] = value.detach().clone()
        return {"tensor": name, "sharded": hasattr(value, "device_mesh")}
    if isinstance(value, Mapping):
        items = []
        for k, v in value.items():
            if not isinstance(k, (str, int)):
                raise TypeError(f"the state has a key {k!r} under {'.'.join(path)!r}; keys must be strings or integers")
            items.append([k, _packed(v, (*path, str(k)), pieces)])
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(v, (*path, str(i)), pieces) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{'.'.join(path)!r} is a {type(value).__name__}, which a checkpoint cannot hold without pickle; keep tensors, "
        "dictionaries, lists, tuples, numbers, strings or None"
    )


def unpack(pieces: Mapping[str, Tensor], place: Place | None = None) -> Any:
    """The state that `pack` was given.

    `place`: what to make of a tensor that was sharded, from the path to it in the state and the whole of it.

    Raises:
        ValueError: a piece is missing.
    """
    if ABOUT not in pieces:
        raise ValueError(f"this is no packed state: it has {list(pieces)[:5]} but not {ABOUT!r}")
    tree = json.loads(pieces[ABOUT].cpu().numpy().tobytes())
    return _unpacked(tree, (), pieces, place)


def _unpacked(value: Any, path: tuple[str, ...], pieces: Mapping[str, Tensor], place: Place | None) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        if value["tensor"] not in pieces:
            raise ValueError(f"the state lacks the tensor {value['tensor']!r}, which it says that it has")
        t = pieces[value["tensor"]]
        return place(path, t) if value["sharded"] and place is not None else t
    if "dict" in value:
        return {k: _unpacked(v, (*path, str(k)), pieces, place) for k, v in value["dict"]}
    parts = [
        _unpacked(v, (*path, str(i)), pieces, place)
        for i, v in enumerate(value["list" if "list" in value else "tuple"])
    ]
    return parts if "list" in value else tuple(parts)
