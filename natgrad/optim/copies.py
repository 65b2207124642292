"""Copies of an optimizer: of ``copy.deepcopy((model, opt))`` both pairs go on bit for bit."""

from __future__ import annotations

import copy
from typing import Any


def deep_copy_of(opt: Any, memo: dict[int, Any]) -> Any:
    """Return an optimizer of the copied model, with a metric of its own; hooks of the user are the same functions.

    Raises:
        TypeError: the metric is made of functions of the user, which may mean the model that was copied.
    """
    if not opt.metric.copies_with_model:
        raise TypeError(
            f"an optimizer by {type(opt.metric).__name__} cannot be copied: the functions that the metric is made of "
            "may mean the model that was copied. Copy the model, make metric and optimizer of it as before, and load "
            "opt.state_dict() into that"
        )
    memo[id(opt)] = twin = object.__new__(type(opt))
    # a scheduler wraps `step` of the optimizer that it was made for
    vars(twin).update({k: copy.deepcopy(v, memo) for k, v in vars(opt).items() if k != "step"})
    twin.metric.drive(twin)
    twin.metric.expect(twin.refresh_due)
    return twin
