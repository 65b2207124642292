"""natgrad as it comes against AdamW at its best rate, by steps, on clean and on noisy data:
``python -m benchmarks.clean_and_noisy [--seeds 3] [--workloads …]``.

AdamW has four rates, each with a cosine to zero over the same steps; the best by its held-out loss counts, which is in
its favour. friedman1 is drawn with noise of 0,
0.1, 1 and 3, beside a signal of standard deviation 5. Every entry is training / held-out loss, the mean over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from sklearn.datasets import make_friedman1
from torch import nn

from benchmarks.against_tuned import ALL, FIXED, RATES
from benchmarks.fresh import fresh
from benchmarks.step_rule import STEPS, default, fit, train
from benchmarks.workloads import Workload


def friedman(noise: float) -> Callable[[], Workload]:
    def build() -> Workload:
        x, y = (torch.tensor(a, dtype=torch.float32) for a in make_friedman1(4000, noise=noise, random_state=0))
        return fresh(f"friedman1, noise {noise:g}", x, y, [10, 128, 128, 1], nn.ReLU, 4)

    return build


SETS: dict[str, tuple[Callable[[], Workload], int]] = {
    **{f"friedman1_{noise:g}": (friedman(noise), 3000) for noise in (0.0, 0.1, 1.0, 3.0)},
    **{name: (ALL[name], STEPS[name]) for name in ("concrete", "power_plant", "wine", "digits_classifier")},
}


def adamw(workload: Workload, rate: float, steps: int, seed: int) -> list[float]:
    """Return the training and held-out loss."""
    torch.manual_seed(seed)
    model = workload.model()
    fixed = FIXED["adamw"]
    opt = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=fixed["weight_decay"], betas=(fixed["beta1"], 0.999)
    )
    rates = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    fit(workload, model, opt, rates, steps, seed)
    return [workload.evaluate(model, rows) for rows in (workload.train_eval, workload.valid)]


def mean_of(runs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Training and held-out loss."""
    return statistics.mean(run[0] for run in runs), statistics.mean(run[1] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=SETS, default=list(SETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':20s}{'natgrad':>20s}{'AdamW':>20s}{'rate':>8s}{'held out over AdamW':>21s}")
    for name in args.workloads:
        build, steps = SETS[name]
        workload = build()
        ours = mean_of([train(workload, default, steps, seed)[0] for seed in range(args.seeds)])
        theirs = {rate: [adamw(workload, rate, steps, seed) for seed in range(args.seeds)] for rate in RATES["adamw"]}
        means = {rate: mean_of(runs) for rate, runs in theirs.items()}
        rate = min(means, key=lambda r: means[r][1])
        shown = "".join(f"{train:.3g} / {held_out:.3g}".rjust(20) for train, held_out in (ours, means[rate]))
        print(f"{name:20s}{shown}{rate:8g}{ours[1] / means[rate][1]:21.2f}", flush=True)


if __name__ == "__main__":
    main()
