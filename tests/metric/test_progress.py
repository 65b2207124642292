"""The count of batches: where a terminal is watching, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from natgrad.metric.progress import counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_batches_are_counted_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, log = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    assert list(counted([3, 4], "metric")) == [3, 4]
    assert list(counted(iter([5]), "scores")) == [5]
    assert [line for line in shown.getvalue().split("\r") if line.strip()] == [
        "metric: 1 of 2 batches",
        "metric: 2 of 2 batches",
        "scores: 1 batches",
    ]
    assert shown.getvalue().endswith("\r")
    before = shown.getvalue()
    assert list(counted([3, 4], "metric", show=False)) == [3, 4]
    monkeypatch.setattr(sys, "stderr", log)
    assert list(counted([3, 4], "metric")) == [3, 4]
    assert (shown.getvalue(), log.getvalue()) == (before, "")


def test_the_line_is_cleared_whatever_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)

    def interrupted() -> None:
        for i in counted([1, 2, 3], "metric"):
            if i == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert shown.getvalue().endswith("\r")
