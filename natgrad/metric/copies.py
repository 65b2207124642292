"""Copies that would watch another model, or none."""

from __future__ import annotations

from typing import Any


def refuse_pickle(what: Any) -> Any:
    """Raise a TypeError that says what to do instead."""
    raise TypeError(
        f"a {type(what).__name__} cannot be pickled, saved whole by torch.save or copied by copy.copy: it is tied to "
        "the model and the criterion that it watches. Save its state_dict() and load that into one that is made anew; "
        "copy.deepcopy((model, opt)) copies both together"
    )
