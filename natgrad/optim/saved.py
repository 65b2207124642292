"""The state of an optimizer: checked from end to end before any of it is taken over."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.optim.groups import check_options
from natgrad.optim.step_rule import StepRule
from natgrad.state.seal import unsealed

COUNTS = ("steps", "refreshes", "next_refresh", "skipped")
OWN = (*COUNTS, "average", "rule", "rule_state", "metric")  # keys of natgrad's own part


def checked(
    state: Any, groups: Sequence[Mapping[str, Any]], rule: StepRule, names: Mapping[Tensor, str], averages: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an optimizer state without its seal, and natgrad's own part of it.

    Args:
        groups: the parameter groups here.
        rule: the step rule here.
        names: of the parameters here.
        averages: whether weights are averaged.

    Raises:
        ValueError: it is damaged, no state of NaturalGradient, or of one with other groups, another rule or no such
            average.
    """
    if not isinstance(state, Mapping) or "natgrad" not in state:
        has = f"has the keys {list(state)}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
        raise ValueError(f"this is no NaturalGradient state: it {has} but not 'natgrad'")
    state = unsealed(state, "the optimizer's state")
    mine = state["natgrad"]
    if not isinstance(mine, Mapping) or set(mine) != set(OWN):
        raise ValueError(f"the optimizer's state has no part of natgrad's own: {mine!r:.200}")
    if mine["rule"] != type(rule).__name__:
        raise ValueError(f"the state is of the step rule {mine['rule']}, this optimizer has {type(rule).__name__}")
    for name in COUNTS:
        if type(mine[name]) is not int or mine[name] < 0:
            raise ValueError(f"{name!r} in the optimizer's state must be a whole number, got {mine[name]!r:.80}")
    sizes, theirs = ([len(g["params"]) for g in part] for part in (groups, state["param_groups"]))
    if sizes != theirs:
        raise ValueError(f"the state has parameter groups of {theirs} parameters, this optimizer of {sizes}")
    if (mine["average"] is None) == averages:
        here, there = ("one", "none") if averages else ("none", "one")
        raise ValueError(f"this optimizer keeps {here} of averaged weights and the state {there}; see `average`")
    if averages:
        check_average(mine["average"]["values"], {n: p for p, n in names.items()})
    return state, dict(mine)


def check_average(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if values.keys() != parameters.keys():
        raise ValueError(f"the state averages the weights {list(values)}, this optimizer {list(parameters)}")
    for n, p in parameters.items():
        if values[n].shape != p.shape or not bool(torch.isfinite(values[n]).all()):
            raise ValueError(f"the average of {n!r} in the state is not finite, or of another shape than the parameter")


def check_groups(groups: Sequence[Mapping[str, Any]], positive_definite: bool) -> None:
    """Raise a ValueError that names an option of a saved parameter group that is missing or out of range."""
    for group in groups:
        try:
            check_options(group, positive_definite)
            check_options({**group, "lr": group["full_lr"]}, positive_definite)
        except KeyError as error:
            raise ValueError(f"a parameter group of the optimizer's state lacks {error}") from error
        except TypeError as error:
            raise ValueError(f"in the optimizer's state: {error}") from error


def loaded(rule: StepRule, state: Any) -> dict[str, Any]:
    """Return what a step rule would have in its attributes after taking over a state; the rule stays as it is.

    The copy is one of attributes: a rule's `load_state_dict` replaces them and changes none in place. Parts of the rule
    that have a `load_state_dict` of their own are copied likewise.

    Raises:
        ValueError: the state is none of this rule.
    """
    twin = twin_of(rule)
    try:
        twin.load_state_dict(copy.deepcopy(state))
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"the state is none of {type(rule).__name__}: {type(error).__name__} {error}") from error
    return vars(twin)


@contextmanager
def kept_on_failure(holder: Any, *names: str) -> Iterator[None]:
    """Attributes are as before if what is inside raises."""
    before = {n: getattr(holder, n) for n in names}
    try:
        yield
    except BaseException:
        vars(holder).update(before)
        raise


def twin_of(held: Any) -> Any:
    twin = copy.copy(held)
    for name, part in vars(held).items():
        if hasattr(part, "load_state_dict"):
            setattr(twin, name, twin_of(part))
    return twin
