"""What the optimizer did, a line of JSON at a time: what `natgrad inspect` draws over time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from natgrad.optim.optimizer import NaturalGradient

NAME = "info.jsonl"  # in the folder of a run
NUMBERS = ("steps", "refreshes", "share_of_time", "damping")


def record(opt: NaturalGradient) -> dict[str, Any]:
    """``opt.info`` and the cosines between direction and gradient, as JSON can hold them: no NaN, no Inf."""
    values = {k: plain(v) for k, v in opt.info.items() if isinstance(v, (int, float, str, type(None)))}
    return {**values, "cosines": {n: plain(c) for n, c in opt.cosines().items()}}


def append(path: str | os.PathLike[str], opt: NaturalGradient) -> None:
    """Add a line for the last step."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record(opt)) + "\n")


def lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a journal.

    Raises:
        ValueError: a line is no JSON object; the message has its number.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                found = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(found, dict):
                raise ValueError(f"{path}, line {number} is no JSON object")
            check(found, f"{path}, line {number}")
            yield found


def check(record: dict[str, Any], where: str) -> None:
    """Raise a ValueError for an entry that is no number where `record` writes one."""
    cosines = record.get("cosines", {})
    if not isinstance(cosines, dict):
        raise ValueError(f"{where}: 'cosines' must be numbers by name, got {cosines!r:.80}")
    for name, value in [*((k, record[k]) for k in NUMBERS if k in record), *cosines.items()]:
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{where}: {name!r} must be a number, got {value!r:.80}")


def plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
