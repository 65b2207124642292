"""Write docs/benchmarks.md and its figures from the committed runs: ``python -m benchmarks.report``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from benchmarks import against_tuned, analysis, figures, sensitivity
from benchmarks.analysis import FIRST_ORDER, OURS, OVERTIME, Line, Study
from benchmarks.fresh import SEEN, UNSEEN
from benchmarks.harness import PATIENCE, TUNING_SEED
from benchmarks.tables import against_each, by_optimizer, coarse, headline, marks, spaces, table, times, upkeep
from benchmarks.workloads import STUDY, WORKLOADS

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


HEAD = """# Benchmarks

<!-- Written by `python -m benchmarks.report` from benchmarks/runs; what is changed here by hand is lost. -->
"""
NOTHING = (
    "There are no runs of a whole study in `benchmarks/runs` yet, and so no results; `python -m benchmarks.bench` makes"
    " them."
)


def results(study: Study) -> str:
    head = study.geometric_mean(FIRST_ORDER)
    verdicts = [r.verdict for w in study.workloads if (r := study.ratio(w, FIRST_ORDER)) is not None]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    places = {tuple(line["environment"].get(k, "?") for k in ("machine", "torch", "python")) for line in study.lines}
    where = "; ".join("{}, torch {}, Python {}".format(*place) for place in sorted(places))
    marked = sum(bool(line["marked"]) for line in study.lines)
    waiting = [w for w in STUDY if w not in study.workloads]
    absent = f" Not run to the end yet: {', '.join(waiting)}." if waiting else ""
    return f"""natgrad's runs on this page are of an earlier step rule than [the present one](step.md).

**natgrad with no option set, beside tuned rivals.** Time to the target of the best of tuned AdamW,
NAdamW and SGD over natgrad's, geometric mean over {head[1] if head else 0} workloads:
**{times(head[0] if head else None)}**; by workload: {counts}. Above 1 natgrad is faster, below 1 the rival is.
What is in brackets is a 95 % interval.{absent}

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
The runs were made on: {where}.
"""


def protocol(study: Study, lines: list[Line]) -> str:
    trials = " or ".join(map(str, sorted(tuning_trials(study, lines)))) or "the same number of"
    return f"""## Protocol

- The clock is the CPU time of one thread, curvature included, evaluation not. Ratios are of runs of
  one study on one machine. natgrad, AdamW, NAdamW, SGD, Muon, SOAP and schedule-free AdamW were timed on one day; the
  other rivals on an earlier one, when AdamW made 1.1 to 1.7 times as many steps a second, which is in their favour.
- **natgrad is not tuned.** Each rival is, by {trials} quasi-random (Sobol) trials a workload over one space for
  all workloads (below), on a seed of its own; the lowest held-out metric counts. Warm-up and cosine have the budget as
  their horizon; natgrad, schedule-free AdamW and L-BFGS have no schedule.
- **The target** of a workload comes from the first-order rivals: the lowest of their medians over seeds of the best
  held-out metric. natgrad and the others without a horizon may go on to 4/3 of the budget. A miss counts as
  {OVERTIME:.2f} times the budget, for natgrad and for a rival alike.
- The final runs of those three are the runs that set the target, and a tuned rival reaches its own best late in its
  schedule, on about half the seeds. Ratios at a looser target may differ; the metric at equal time and the final
  losses do not depend on it.
- Seed s fixes initial weights and the order of the data for every optimizer. No run is stopped early, except after
  {PATIENCE} losses in a row that are not finite.
- Forward-backwards count all of a run's, those that natgrad takes to sample labels too, in proportion to its steps.
- Intervals come from a bootstrap over paired seeds; a win or a loss is claimed where they exclude 1. The best rival is
  picked anew in every draw.

{table(["workload", "what", "CPU budget, s"], workloads(study)).replace("---:", "---", 1)}

{spaces()}

## Run it again

```text
pip install -e ".[bench]"
export NATGRAD_DATA=…              # MNIST's t10k files, tiny Shakespeare, UCI's tables
python -m benchmarks.bench --smoke # two workloads, about a minute
python -m benchmarks.bench         # says what it costs, runs it, and goes on where it was interrupted
python -m benchmarks.against_tuned # swept rates, other data
python -m benchmarks.sensitivity   # the defaults, four times up and down
python -m benchmarks.report        # this page
```

Every run, the tuning too, is a line of `benchmarks/runs/*.jsonl`.
"""


def workloads(study: Study) -> list[list[str]]:
    """Name, budget and what it is: of the study's runs, or of the study that is to be run."""
    if study.workloads:
        return [[w, TITLES.get(w, w), f"{study.of(w, OURS)[0]['budget']:g}"] for w in study.workloads]
    return [[w, TITLES.get(w, w), f"{WORKLOADS[w]().seconds:g}"] for w in STUDY]


def tuning_trials(study: Study, lines: list[Line]) -> set[int]:
    """How many trials a rival had on a workload of the study."""
    tuned = [x for x in lines if x.get("phase") == "tune" and x["workload"] in study.workloads]
    return set(Counter((x["workload"], x["optimizer"]) for x in tuned).values())


def sensitivity_section(found: dict[tuple[str, str, float], list[float]]) -> str:
    rows = [
        [f"{workload}, {k}", *(sensitivity.cell(found.get((workload, k, f), [])) for f in sensitivity.FACTORS)]
        for workload in dict.fromkeys(w for w, _, _ in found)
        for k in sensitivity.KNOBS
    ]
    seeds = " or ".join(map(str, sorted({len(ratios) for ratios in found.values()})))
    return f"""## How far the defaults may be off

CPU time to the training loss that the default reaches at half its budget, over the default's own time, with one knob
at a multiple of its default (median over seeds, of which there are {seeds}). A variant that takes more than twice as
long has missed.

{table(["", *(f"×{f:g}" for f in sensitivity.FACTORS)], rows)}

![Time to target against the factor of each knob](img/sensitivity.png)
"""


def swept_section(done: dict[tuple[str, str, float | None, int], Line]) -> str:
    """The comparison with swept rates, for the workloads that have runs."""
    workloads = [w for w in against_tuned.ALL if any(w == key[0] for key in done)]
    seeds = 1 + max(seed for *_, seed in done if seed != TUNING_SEED)
    return f"""## Against swept rates, other data too

AdamW, SGD with Nesterov momentum, Muon and SOAP at the best of four rates, chosen apart for the training and for the
held-out loss, with warm-up and a cosine that ends with the budget; natgrad with no option set. No default was chosen
by {", ".join(UNSEEN)}; by {", ".join(SEEN)} some were (see
`benchmarks/fresh.py`). Medians over {seeds} seeds; the share says when natgrad is first at the rival's last training
loss. Many of these data sets are small enough, and have noise enough, for a rival to learn the noise by heart at the
rate that is best for its training loss; a penalty on weights, which natgrad had in these runs, kept it from that, and
it is then not within the budget.
The runs of all optimizers on the data sets that no default was chosen by are of one day, and so are natgrad's on the
others; its rivals' there are of an earlier one, when it made 1.3 to 1.8 times as many steps a second, in their favour.

{against_tuned.table(done, workloads, seeds)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "benchmarks" / "runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    study = Study(analysis.read_finals(args.runs))
    lines = [json.loads(text) for path in sorted(args.runs.glob("*.jsonl")) for text in path.read_text().splitlines()]
    found = sensitivity.ratios(sensitivity.read(args.runs / "sensitivity.jsonl"))
    images = args.docs / "img"
    images.mkdir(parents=True, exist_ok=True)
    if study.workloads:
        figures.speed(study, images / "benchmarks_speed.png")
        figures.profile(study, images / "benchmarks_profile.png")
    if found:
        figures.sensitivity(found, sensitivity.KNOBS, images / "sensitivity.png")
    parts = [HEAD, results(study) if study.workloads else NOTHING + "\n"]
    swept = against_tuned.read(args.runs)
    parts += [swept_section(swept)] if swept else []
    parts += [sensitivity_section(found)] if found else []
    (args.docs / "benchmarks.md").write_text("\n".join([*parts, protocol(study, lines)]))
    print(f"wrote {args.docs / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
