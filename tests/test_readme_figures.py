"""The figures of the README are those of the committed runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.analysis import FIRST_ORDER, OURS, Study, read_finals, seconds

ROOT = Path(__file__).parents[1]


def test_the_readme_says_what_the_runs_say() -> None:
    study = Study(read_finals(ROOT / "benchmarks" / "runs"))
    text = (ROOT / "README.md").read_text()
    mean = study.geometric_mean(FIRST_ORDER)
    assert mean is not None
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| **geometric mean**") and f"**{mean[0].value:.1f} " in line for line in rows)
    for workload in study.workloads:
        ratio = study.ratio(workload, FIRST_ORDER)
        assert ratio is not None
        ours = study.median(workload, OURS, seconds)
        shown = f"{ratio.value:.1f}" if ratio.value >= 1 else f"{ratio.value:.2f}"  # a loss is not to round to 1.0
        assert any(f"| {ours:.2f} s |" in line and f"| {shown} (" in line for line in rows), workload
