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
            yield found


def plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
