"""Variants of the default step rule side by side, by steps: ``python -m benchmarks.step_rule [--seeds 2] [--workloads
…] [--variants …] [--schedule cosine]``.

For each small workload and variant: training and held-out loss after a fixed number of steps, with the weights as they
are and with an exponential average of them (decay 0.98), the mean over seeds. Steps and not seconds, so that the
numbers do not depend on the machine; the columns say how many refreshes a variant took.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import natgrad as ng
from benchmarks.against_tuned import ALL
from benchmarks.soundness import SCHEDULES
from benchmarks.workloads import Workload
from natgrad.blocks import kronecker as kronecker_blocks
from natgrad.optim import block_state, optimizer, step_arithmetic

STEPS = {
    "digits_ae": 600,
    "concrete": 800,
    "wine": 600,
    "convnet": 250,
    "digits_classifier": 400,
    "transformer_32": 40,
    "transformer_256": 12,
    "next_letter": 3000,
    "mnist_ae": 40,
    "curves_ae": 40,
    "breast_cancer": 3000,
    "friedman1": 3000,
    "friedman3": 3000,
    "diabetes": 3000,
    "power_plant": 3000,
    "spirals": 3000,
    "clusters": 3000,
    "hastie": 3000,
    "swiss_roll": 3000,
    "friedman2": 3000,
    "digits_conv": 400,
    "s_curve": 3000,
    "quantiles": 3000,
    "sparse": 3000,
    "mnist_mlp": 1500,
    "other_half": 1500,
    "letters_gru": 400,
    "mnist_ae_xavier": 40,
    "recurrent": 300,
}
AVERAGE = 0.98

Make = Callable[[torch.nn.Module, torch.nn.Module], ng.NaturalGradient]


def with_constant(module: object, name: str, value: float, make: Make) -> Make:
    """`make` with a constant of the rule replaced."""

    def build(model: torch.nn.Module, criterion: torch.nn.Module) -> ng.NaturalGradient:
        setattr(module, name, value)
        return make(model, criterion)

    return build


def natural(model: torch.nn.Module, criterion: torch.nn.Module, **options: float) -> ng.NaturalGradient:
    return ng.NaturalGradient(ng.Fisher(model, criterion), average=AVERAGE, **options)


def default(model: torch.nn.Module, criterion: torch.nn.Module) -> ng.NaturalGradient:
    return natural(model, criterion)


def decayed(decay: float) -> Make:
    return lambda model, criterion: natural(model, criterion, weight_decay=decay)


VARIANTS: dict[str, Make] = {
    "default": default,
    "refresh after half of the steps": with_constant(optimizer, "GAP_GROWTH", 0.5, default),
    "refresh after twice the steps": with_constant(optimizer, "GAP_GROWTH", 2.0, default),
    "mean over the last fifth of the steps": with_constant(step_arithmetic, "WINDOW", 5.0, default),
    "mean over the last tenth": with_constant(step_arithmetic, "WINDOW", 10.0, default),
    "no mean: momentum 0": lambda model, criterion: natural(model, criterion, momentum=0.0),
    "a mean that never starts anew": with_constant(step_arithmetic, "TURNED", -2.0, default),
    "turns seen over five steps": with_constant(step_arithmetic, "MEMORY_SHARE", 0.0, default),
    "steps of a fixed length": with_constant(step_arithmetic, "STRETCH", 0.0, default),
    "half the stretch": with_constant(step_arithmetic, "STRETCH", 1.5, default),
    "no limit by the Newton step": with_constant(step_arithmetic, "NEWTON_SHARE", 1e9, default),
    "up to the whole Newton step": with_constant(step_arithmetic, "NEWTON_SHARE", 1.0, default),
    "up to 0.3 of the Newton step": with_constant(step_arithmetic, "NEWTON_SHARE", 0.3, default),
    "a Newton limit that follows at once": with_constant(block_state, "SCALE_MEMORY", 0.0, default),
    "no bound on the predictions": with_constant(step_arithmetic, "NATS", 1e9, default),
    "no bound on the promise": with_constant(step_arithmetic, "PROMISE", 1e9, default),
    "steps that always grow with the weights": with_constant(block_state, "AGREE", -2.0, default),
    "steps that never do": with_constant(block_state, "AGREE", 2.0, default),
    "sides in blocks of 200": with_constant(kronecker_blocks, "TRAINING_FACTOR_DIM", 200, default),
    "sides in blocks of 400": with_constant(kronecker_blocks, "TRAINING_FACTOR_DIM", 400, default),
    "sides whole": with_constant(kronecker_blocks, "TRAINING_FACTOR_DIM", 4096, default),
    "half the learning rate": lambda model, criterion: natural(model, criterion, lr=0.05),
    "twice the learning rate": lambda model, criterion: natural(model, criterion, lr=0.2),
    "no weight decay": decayed(0.0),
    "half the weight decay": decayed(0.06),
    "twice the weight decay": decayed(0.24),
}
CONSTANTS = (
    (optimizer, "GAP_GROWTH"),
    *((step_arithmetic, n) for n in ("WINDOW", "TURNED", "MEMORY_SHARE", "STRETCH", "NEWTON_SHARE", "NATS", "PROMISE")),
    (block_state, "SCALE_MEMORY"),
    (block_state, "AGREE"),
    (kronecker_blocks, "TRAINING_FACTOR_DIM"),
)


def fit(
    workload: Workload, model: torch.nn.Module, opt: torch.optim.Optimizer, rates: Any, steps: int, seed: int
) -> None:
    """Train for so many steps. `rates`: a scheduler, or None."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = workload.draw(generator)
        opt.zero_grad()
        workload.loss(model, x, y).backward()
        opt.step()
        if rates is not None:
            rates.step()


def train(workload: Workload, make: Make, steps: int, seed: int, schedule: str = "none") -> tuple[list[float], int]:
    """Training and held-out loss, as the weights are and averaged; and the number of refreshes."""
    before = [(module, name, getattr(module, name)) for module, name in CONSTANTS]
    torch.manual_seed(seed)
    model = workload.model()
    try:
        opt = make(model, workload.criterion)
        rates = SCHEDULES[schedule](opt, steps)
        fit(workload, model, opt, rates, steps, seed)
    finally:
        for module, name, value in before:
            setattr(module, name, value)
    losses = [workload.evaluate(model, workload.train_eval), workload.evaluate(model, workload.valid)]
    with opt.averaged():
        losses += [workload.evaluate(model, workload.train_eval), workload.evaluate(model, workload.valid)]
    return losses, opt.info["refreshes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="in place of each workload's own number")
    parser.add_argument("--schedule", choices=[s for s in SCHEDULES if s != "plateau"], default="none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    for name in args.workloads:
        workload = ALL[name]()
        steps = args.steps or STEPS[name]
        table = Table(title=f"{name}, {steps} steps, schedule {args.schedule}, mean of {args.seeds} seeds")
        for column in ("variant", "train", "held out", "train, averaged", "held out, averaged", "refreshes"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for variant in args.variants:
            runs = [train(workload, VARIANTS[variant], steps, seed, args.schedule) for seed in range(args.seeds)]
            means = [statistics.mean(losses[i] for losses, _ in runs) for i in range(4)]
            table.add_row(variant, *(f"{m:.4g}" for m in means), str(runs[0][1]))
        console.print(table)


if __name__ == "__main__":
    main()
