"""Parameter groups and their options, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from natgrad.metric.metric import Metric
from natgrad.optim.step_rule import Options

GROUP_KEYS = ("params", "lr", "momentum", "damping", "weight_decay", "maximize", "initial_lr")  # the last is torch's

LARGEST_LR = 1e12  # a larger one overflows where it is squared beside a direction in float32
FULL_LR = "full_lr"  # a key of parameter groups: the lr that a group was made with, which schedules are a share of


def split_groups(parameters: Mapping[str, Tensor], groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups from names and patterns; parameters that none names come first.

    Raises:
        ValueError: a group names no parameter, or one that another group has.
    """
    left = dict(parameters)
    found = []
    for group in groups:
        check_keys(group)
        wanted = group["params"]
        patterns = [wanted] if isinstance(wanted, str) else list(wanted)
        names = [n for n in parameters if any(fnmatchcase(n, p) for p in patterns)]
        taken = [n for n in names if n not in left]
        if not names or taken:
            why = f"{taken} are in another group already" if taken else f"no parameter matches {patterns}"
            raise ValueError(f"parameter group {dict(group)}: {why}; there are {list(parameters)}")
        found.append({**group, "params": [left.pop(n) for n in names]})
    return [{"params": list(left.values())}, *found] if left else found


def taken_in(metric: Metric, parameter: Tensor, groups: list[dict[str, Any]]) -> str | None:
    """Have a metric take in a parameter of the last group; return its name. A group that is refused goes again."""
    try:
        return metric.include(parameter)
    except ValueError:
        groups.pop()
        raise


def check_keys(group: Any) -> None:
    """Raise an error for a parameter group that is none, or that has a key which would be passed over."""
    if not isinstance(group, Mapping):
        raise TypeError(
            f'a parameter group is a dictionary {{"params": names or patterns, "lr": …}}, got {type(group).__name__}'
        )
    unknown = [k for k in group if k not in GROUP_KEYS]
    if unknown or "params" not in group:
        said = f"has unknown keys {unknown}" if unknown else "has no 'params'"
        raise ValueError(f"a parameter group {said}; supported are {', '.join(map(repr, GROUP_KEYS))}")


def check_options(values: Mapping[str, Any], positive_definite: bool) -> None:
    """Raise an error for an option that is no number or out of range, and where a step would take the weights to zero
    and beyond.
    """
    ranges: dict[str, tuple[Callable[[float], bool], str]] = {
        "lr": (lambda v: 0 <= v <= LARGEST_LR, f"from 0 to {LARGEST_LR:g}"),
        "momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "damping": (lambda v: v > 0 or (v == 0 and positive_definite), "positive"),
        "weight_decay": (lambda v: v >= 0, "at least 0"),
    }
    for name, (fits, words) in ranges.items():
        value = values[name]
        one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
        if isinstance(value, bool) or not (one or isinstance(value, Real)):
            raise TypeError(
                f"{name} must be a number, {words} and finite, got {value!r}; leave it out to take the default"
            )
        if not (float(value) < float("inf") and fits(float(value))):
            raise ValueError(f"{name} must be {words} and finite, got {value!r}")
    lr, weight_decay = float(values["lr"]), float(values["weight_decay"])
    if lr * weight_decay >= 1:
        raise ValueError(
            f"lr · weight_decay must be below 1, got {lr:g} · {weight_decay:g} = {lr * weight_decay:g}: each step "
            "multiplies the weights by 1 − lr · weight_decay. Make weight_decay smaller, or the lr that a schedule "
            "reaches"
        )


def options_in_force(
    groups: Iterable[Mapping[str, Any]], name_of: Mapping[Tensor, str], positive_definite: bool
) -> dict[str, Options]:
    """Return the options of every parameter: one object a group, so that who compares them sees which are the same."""
    found: dict[str, Options] = {}
    for g in groups:
        check_options(g, positive_definite)  # schedules write here at any time
        lr, full = float(g["lr"]), g[FULL_LR]
        mine = Options(
            lr,
            float(g["momentum"]),
            float(g["damping"]),
            g["maximize"],
            float(g["weight_decay"]),
            lr / full if full else 1.0,
        )
        found.update(dict.fromkeys((name_of[p] for p in g["params"]), mine))
    return found
