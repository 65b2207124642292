"""Seals: checksums beside the entries of a state, so that what is loaded is what was saved.

A state is a nest of dictionaries and lists of tensors, numbers and strings. Its seal has the CRC-32 of the bytes of
each tensor, and one of everything else: names, numbers, dtypes and shapes. A file that keeps the state keeps the seal
in it, whoever writes the file. Strides are in the seal too: files lose them, and the last bits of a product follow
them.

CRC-32 finds every flipped bit and every burst of up to 32 bits, and other damage but for one in 4·10⁹. It is in the
standard library. It keeps no one from changing a state on purpose: who can write the state can write its seal.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SEAL = "seal"  # the entry of a state that holds its seal
REST = "names and numbers"  # the key of what is no tensor
NAMED = 3  # entries that a message lists


@dataclass
class _Walk:
    """What a nest consists of, gone through in an order that no file changes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by the path to it

    def outline(self, tree: Any, path: tuple[str, ...]) -> Any:
        """Return the nest as JSON, with dtype and shape in the place of each tensor."""
        if isinstance(tree, Tensor):
            name = ".".join(path)
            while name in self.tensors:  # paths with dots in them may look alike
                name += "'"
            self.tensors[name] = tree
            return ["tensor", str(tree.dtype), list(tree.shape)]
        if isinstance(tree, Mapping):
            if SEAL in tree and path:
                return ["sealed", tree[SEAL]]  # has been looked through, or will be, by whom it belongs to
            items = sorted(((str(k), k) for k in tree if path or k != SEAL), key=lambda item: item[0])
            return [[type(k).__name__, name, self.outline(tree[k], (*path, name))] for name, k in items]
        if isinstance(tree, (list, tuple)):
            return [self.outline(v, (*path, str(i))) for i, v in enumerate(tree)]
        return tree if tree is None or isinstance(tree, (bool, int, float, str)) else type(tree).__name__


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with its seal. Reads every tensor, from its device too."""
    walk = _Walk()
    outline = walk.outline(state, ())
    strides = {n: list(t.stride()) for n, t in walk.tensors.items() if keeps_strides(t)}
    return {**state, SEAL: {"strides": strides, "checksums": checksums(walk, outline, strides)}}


def unsealed(state: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a state without its seal, as it was when it was sealed.

    Args:
        what: the state in words, for messages.

    Raises:
        ValueError: it has no seal, or is not what was sealed; the message names the entries.
    """
    seal, advice = state.get(SEAL), "Load it as it was saved, and change values afterwards"
    if not isinstance(seal, Mapping) or not all(isinstance(seal.get(k), Mapping) for k in ("strides", "checksums")):
        raise ValueError(f"{what} has no checksums ({SEAL!r}): it was not saved by this version of natgrad, or changed")
    walk = _Walk()
    strides, there = seal["strides"], seal["checksums"]
    try:
        here = checksums(walk, walk.outline(state, ()), strides)
    except (TypeError, ValueError) as error:  # a damaged pickle may hold anything
        raise ValueError(f"{what} is not as it was saved: {error}") from error
    if lacks := [n for n in there if n not in here]:
        raise ValueError(f"{what} lacks {len(lacks)} of its entries, {lacks[0]!r} the first: it was not read in full")
    if differ := [n for n in here if here[n] != there.get(n)]:
        named = ", ".join(map(repr, differ[:NAMED])) + (f" and {len(differ) - NAMED} more" * (len(differ) > NAMED))
        raise ValueError(
            f"{what} is not as it was saved: the checksum differs of {named}. The file is damaged, or the state was "
            f"changed. {advice}"
        )
    found = {id(t): with_strides(t, strides[n]) for n, t in walk.tensors.items() if n in strides}
    return {k: replaced(v, found) for k, v in state.items() if k != SEAL}


def checksums(walk: _Walk, outline: Any, strides: Any) -> dict[str, int]:
    text = json.dumps([outline, strides], sort_keys=True)
    return {
        REST: zlib.crc32(text.encode("utf-8", "surrogatepass")),
        **{n: checksum(t) for n, t in walk.tensors.items()},
    }


def checksum(t: Tensor) -> int:
    """Return the CRC-32 of the entries of a tensor, in order."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return zlib.crc32(data)


def keeps_strides(t: Tensor) -> bool:
    """Whether the entries lie side by side in another order than the usual one."""
    return not t.is_contiguous() and torch.empty_like(t, device="meta").stride() == t.stride()


def with_strides(t: Tensor, strides: list[int]) -> Tensor:
    if list(t.stride()) == list(strides):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def replaced(tree: Any, by: Mapping[int, Tensor]) -> Any:
    """Return a nest with the tensors of these ids replaced."""
    if isinstance(tree, Tensor):
        return by.get(id(tree), tree)
    if isinstance(tree, Mapping):
        return {k: replaced(v, by) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(replaced(v, by) for v in tree)
    return tree
