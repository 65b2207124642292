"""Write docs/benchmarks.md and its figures from the committed runs: ``python -m benchmarks.report``."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import analysis, figures, sensitivity
from benchmarks.analysis import FIRST_ORDER, OURS, OVERTIME, Line, Ratio, Study
from benchmarks.rivals import RIVALS, Knob

ROOT = Path(__file__).parents[1]
TITLES = {
    "mnist_ae": "autoencoder on MNIST",
    "curves_ae": "autoencoder on drawn curves",
    "convnet": "small convnet on MNIST",
    "transformer_32": "character transformer, batch 32",
    "transformer_256": "character transformer, batch 256",
    "concrete": "tabular regression (UCI concrete)",
    "recurrent": "LSTM over the rows of digits",
    "pinn": "physics-informed net, Poisson on a square",
}


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
    head = ["optimizer", "state bytes per parameter byte", "runs that reached the target", "not finite", "marked"]
    return table(head, rows)


def knob(k: Knob) -> str:
    return f"{k.name} in {', '.join(f'{v:g}' for v in k.values)}" if k.values else f"{k.name} {k.low:g} – {k.high:g}"


def spaces(study: Study) -> str:
    rows = [(name, "; ".join(map(knob, RIVALS[name].knobs)) or "nothing") for name in study.optimizers]
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


def page(study: Study, lines: list[Line], found: dict[tuple[str, str, float], list[float]]) -> str:
    head = study.geometric_mean(FIRST_ORDER)
    verdicts = [r.verdict for w in study.workloads if (r := study.ratio(w, FIRST_ORDER)) is not None]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    trials = " or ".join(map(str, sorted(tuning_trials(lines)))) or "the same number of"
    budgets = {w: study.of(w, OURS)[0]["budget"] for w in study.workloads}
    where = study.lines[0]["environment"]
    marked = sum(bool(line["marked"]) for line in study.lines)
    parameters = {w: study.of(w, OURS)[0]["parameter_bytes"] for w in study.workloads}
    return f"""# Benchmarks

<!-- Written by `python -m benchmarks.report` from benchmarks/runs; what is changed here by hand is lost. -->

**natgrad with no option set, beside tuned rivals.** Time to the target of the best of tuned AdamW, NAdamW and SGD over
natgrad's, geometric mean over {head[1] if head else 0} workloads: **{times(head[0] if head else None)}**; by workload:
{counts}. Above 1 natgrad is faster, below 1 the rival is. What is in brackets is a 95 % interval.

† the rival missed the target, ‡ natgrad did, in the median over seeds (in a mean: on some workload). A miss counts as
{OVERTIME:.2f} times the budget for either; that is a convention and not a measurement.

## Time to target

{headline(study)}

{marks(study)}

![Time to target relative to natgrad's, by workload and rival](img/benchmarks_speed.png)

{coarse(study)}

### Against each rival

{against_each(study)}

![Performance profile](img/benchmarks_profile.png)

The profile shows the share of problems (a workload and a seed) that an optimizer solved within so many times the time
of the fastest; the left end says how often it was the fastest, the right end how often it arrived. Optimizers that did
not run on every workload are left out of it.

## Quality

Medians over seeds, lower is better, the lowest in bold. The metric is the held-out loss, for `pinn` the relative L2
error.

Held out at **equal CPU time**, when the budget is spent (natgrad's overtime does not count):

{by_optimizer(study, analysis.at_budget)}

Best held out within the run:

{by_optimizer(study, lambda line: analysis.finite(line["best_metric"]))}

Final training loss:

{by_optimizer(study, lambda line: analysis.finite(line["final_train"]))}

## State and faults

{upkeep(study)}

State is the median over workloads, with the range. "Marked" are runs whose wall time was more than 1.2 times their CPU
time, as the machine was busy with something else: {marked} of {len(study.lines)}.
{sensitivity_section(found)}
## Protocol

- The clock is the CPU time of one thread, curvature included, evaluation not. A ratio is of runs of one study on one
  machine (here {where.get("machine", "?")}, torch {where.get("torch", "?")}).
- **natgrad is not tuned.** Each rival is, by {trials} quasi-random (Sobol) trials a workload over one space for
  all workloads (below), on a seed of its own; the lowest held-out metric counts. Warm-up and cosine have the budget as
  their horizon; natgrad, schedule-free AdamW and L-BFGS have no schedule.
- **The target** of a workload comes from the first-order rivals: the lowest of their medians over seeds of the best
  held-out metric. natgrad and the others without a horizon may go on to 4/3 of the budget. A miss counts as
  {OVERTIME:.2f} times the budget, for natgrad and for a rival alike.
- Seed s fixes initial weights and the order of the data for every optimizer. No run is stopped early.
- Forward-backwards count all of a run's, those that natgrad takes to sample labels too, in proportion to its steps.
- Intervals come from a bootstrap over paired seeds; a win or a loss is claimed where they exclude 1. The best rival is
  picked anew in every draw.

| workload | what | parameters, MB | budget, CPU s |
| --- | --- | ---: | ---: |
{chr(10).join(f"| {w} | {TITLES.get(w, w)} | {parameters[w] / 1e6:.3g} | {budgets[w]:g} |" for w in study.workloads)}

{spaces(study)}

## Run it again

```text
pip install -e ".[bench]"
export NATGRAD_DATA=…              # MNIST's t10k files, tiny Shakespeare, UCI's tables
natgrad bench --smoke              # two workloads, about a minute
natgrad bench                      # says what it costs, runs it, and goes on where it was interrupted
python -m benchmarks.sensitivity   # the defaults, four times up and down
python -m benchmarks.report        # this page
```

Every run, the tuning too, is a line of `benchmarks/runs/*.jsonl`.
"""


def tuning_trials(lines: list[Line]) -> set[int]:
    """How many trials a rival had on a workload."""
    return set(Counter((x["workload"], x["optimizer"]) for x in lines if x.get("phase") == "tune").values())


def marks(study: Study) -> str:
    """Who missed the target in most of its runs, by name."""
    lost = [
        f"{o} on {w} ({n} of {every})"
        for o in study.optimizers
        for w in study.workloads
        if (n := study.misses(w, o)[0]) and study.mostly_missed(w, o) and (every := study.misses(w, o)[1])
    ]
    return f"The target was missed by {', '.join(lost)}." if lost else "Every optimizer reached every target."


def sensitivity_section(found: dict[tuple[str, str, float], list[float]]) -> str:
    if not found:
        return ""
    rows = [
        [f"{workload}, {k}", *(sensitivity.cell(found.get((workload, k, f), [])) for f in sensitivity.FACTORS)]
        for workload in dict.fromkeys(w for w, _, _ in found)
        for k in sensitivity.KNOBS
    ]
    seeds = max(map(len, found.values()))
    return f"""
## How far the defaults may be off

CPU time to the training loss that the default reaches at half its budget, over the default's own time, with one knob
at a multiple of its default (median over seeds, of which there are {seeds}). A variant that takes more than twice as
long has missed.

{table(["", *(f"×{f:g}" for f in sensitivity.FACTORS)], rows)}

![Time to target against the factor of each knob](img/sensitivity.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    study = Study(analysis.read_finals(args.runs))
    if not study.workloads:
        raise SystemExit(f"no final runs of {OURS} in {args.runs}; run 'natgrad bench' first")
    lines = [json.loads(text) for path in sorted(args.runs.glob("*.jsonl")) for text in path.read_text().splitlines()]
    found = sensitivity.ratios(sensitivity.read(args.runs / "sensitivity.jsonl"))
    images = args.docs / "img"
    images.mkdir(parents=True, exist_ok=True)
    figures.speed(study, images / "benchmarks_speed.png")
    figures.profile(study, images / "benchmarks_profile.png")
    if found:
        figures.sensitivity(found, sensitivity.KNOBS, images / "sensitivity.png")
    (args.docs / "benchmarks.md").write_text(page(study, lines, found))
    print(f"wrote {args.docs / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
