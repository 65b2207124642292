"""The tables of docs/benchmarks.md, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks import analysis
from benchmarks.analysis import FIRST_ORDER, OURS, Line, Ratio, Study
from benchmarks.rivals import RIVALS, Knob


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite" if math.isinf(value) else "–"


def times(ratio: Ratio | None) -> str:
    """3.10† (2.40 – 3.90)."""
    if ratio is None:
        return "–"
    return f"{ratio.value:.2f}{ratio.misses} ({ratio.low:.2f} – {ratio.high:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def to_target(study: Study, workload: str, optimizer: str) -> str:
    """Median seconds, and how many runs missed."""
    none, every = study.misses(workload, optimizer)
    if none == every:
        return "missed"
    text = f"{study.median(workload, optimizer, analysis.seconds):.2f} s"
    return f"{text}, {none} of {every} missed" if none else text


def headline(study: Study) -> str:
    """A row for each workload: natgrad beside the best first-order rival, by time and by forward-backwards."""
    rows = []
    for workload in study.workloads:
        ratio = study.ratio(workload, FIRST_ORDER)
        if ratio is None:
            continue
        ours, theirs = (to_target(study, workload, name) for name in (OURS, ratio.rival))
        by_passes = study.ratio(workload, FIRST_ORDER, analysis.passes)
        row = [workload, ours, f"{ratio.rival}, {theirs}", times(ratio), ratio.verdict, times(by_passes)]
        rows.append(row)
    for rivals, name in ((FIRST_ORDER, "the best of them"), (("adamw",), "adamw alone")):
        mean, by_passes = study.geometric_mean(rivals), study.geometric_mean(rivals, analysis.passes)
        if mean is not None and by_passes is not None:
            row = [f"**geometric mean of {mean[1]}**", "", name, times(mean[0]), "", times(by_passes[0])]
            rows.append(row)
    head = ["workload", OURS, "best of AdamW, NAdamW, SGD", "time ratio (95 %)", "", "forward-backward ratio (95 %)"]
    return table(head, rows)


def against_each(study: Study) -> str:
    """A row for each rival, its wins and losses by name."""
    rows = []
    for rival in study.rivals:
        mean = study.geometric_mean([rival])
        if mean is None:
            continue
        verdicts: dict[str, list[str]] = {"win": [], "loss": [], "undecided": [], "neither reached it": []}
        for workload in study.workloads:
            ratio = study.ratio(workload, [rival])
            if ratio is not None:
                verdicts[ratio.verdict].append(f"{workload} {ratio.value:.2f}{ratio.misses}")
        rows.append([rival, f"{times(mean[0])} of {mean[1]}", *(", ".join(v) or "–" for v in verdicts.values())])
    head = ["rival", "geometric mean", "natgrad faster", "rival faster", "undecided", "neither reached the target"]
    return table(head, rows)


def by_optimizer(study: Study, cost: Callable[[Line], float]) -> str:
    """Medians, a row a workload and a column an optimizer; the lowest in bold."""
    rows = []
    for workload in study.workloads:
        values = [study.median(workload, o, cost) for o in study.optimizers]
        lowest = min((v for v in values if math.isfinite(v)), default=math.nan)
        rows.append([workload, *(f"**{number(v)}**" if v == lowest else number(v) for v in values)])
    return table(["workload", *study.optimizers], rows)


def upkeep(study: Study) -> str:
    """What each optimizer needs and how often it failed."""
    rows = []
    for name in study.optimizers:
        ratios = [study.state_ratio(w, name) for w in study.workloads if study.of(w, name)]
        lost = [study.misses(w, name) for w in study.workloads]
        every = sum(n for _, n in lost)
        reached = f"{every - sum(n for n, _ in lost)} of {every}"
        state = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} – {max(ratios):.1f})" if ratios else "–"
        rows.append([name, state, reached, str(study.not_finite(name)), str(study.marked(name))])
    head = [
        "optimizer",
        "state bytes per parameter byte",
        "runs that reached the target",
        "not finite or failed",
        "marked",
    ]
    return table(head, rows)


def knob(k: Knob) -> str:
    return f"{k.name} in {', '.join(f'{v:g}' for v in k.values)}" if k.values else f"{k.name} {k.low:g} – {k.high:g}"


def spaces() -> str:
    rows = [(name, "; ".join(map(knob, rival.knobs)) or "nothing") for name, rival in RIVALS.items()]
    return table(["optimizer", "what is searched"], rows).replace("---:", "---")


def coarse(study: Study) -> str:
    """What the number of seeds lets one say."""
    counts = sorted({len(study.of(w, o)) for w in study.workloads for o in study.optimizers if study.of(w, o)})
    fewest = counts[0]
    text = f"There are {' or '.join(map(str, counts))} seeds a workload and optimizer. "
    if fewest <= 3:
        text += (
            f"That is coarse: with {fewest} the interval is the range of all that redrawing them can give, and it "
            "excludes 1 exactly where one optimizer was faster on every seed. Of two equally fast ones, one is so by "
            f"chance in one case of {2 ** (fewest - 1)}, so that a single win or loss is a hint; the geometric means "
            "rest on all workloads together. "
        )
    return text + "Intervals say how much seeds differ; they say nothing of other data, models or machines."


def marks(study: Study) -> str:
    """Who missed the target in most of its runs, by name."""
    lost = [
        f"{o} on {w} ({n} of {every})"
        for o in study.optimizers
        for w in study.workloads
        if (n := study.misses(w, o)[0]) and study.mostly_missed(w, o) and (every := study.misses(w, o)[1])
    ]
    return f"The target was missed by {', '.join(lost)}." if lost else "Every optimizer reached every target."
