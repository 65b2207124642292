"""Nests of tensors: what models return and receive."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor, ...]


def leaves_of(tree: Any) -> list[Tensor]:
    """Tensors in a nest of tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for v in tree.values() for t in leaves_of(v)]
    if isinstance(tree, (tuple, list)):
        return [t for v in tree for t in leaves_of(v)]
    if hasattr(tree, "__dataclass_fields__"):
        return [t for k in tree.__dataclass_fields__ for t in leaves_of(getattr(tree, k))]
    return []


def replace_tensors(tree: Any, old: Tensors, new: Tensors) -> Any:
    """`tree` with each tensor of `old` replaced by its partner in `new`."""
    if isinstance(tree, Tensor):
        return next((n for o, n in zip(old, new) if o is tree), tree)
    if isinstance(tree, Mapping):
        swapped = {k: replace_tensors(v, old, new) for k, v in tree.items()}
        return swapped if type(tree) is dict else type(tree)(swapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(replace_tensors(v, old, new) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(replace_tensors(v, old, new) for v in tree)
    if hasattr(tree, "__dataclass_fields__"):
        twin = copy.copy(tree)
        for k in tree.__dataclass_fields__:
            object.__setattr__(twin, k, replace_tensors(getattr(tree, k), old, new))
        return twin
    return tree


def describe(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
