"""The example of pruning, on less training."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from examples import prune_digits


def test_pruning_keeps_more_than_magnitude(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prune_digits.py", "--out", str(tmp_path), "--epochs", "8"])
    monkeypatch.setattr(prune_digits, "FRACTIONS", (0.0, 0.92))
    prune_digits.main()
    (whole, _), (magnitude, moved) = (
        (float(a), float(b)) for a, b in re.findall(r"([\d.]+) % by magnitude, +([\d.]+) %", capsys.readouterr().out)
    )
    assert whole > 90
    assert moved > magnitude + 5
    assert (tmp_path / "prune.png").stat().st_size > 1000
