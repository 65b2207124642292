"""Is the default step sound? ``python -m benchmarks.soundness [--decay 0] [--schedules none cosine …] [--starts]``.

Convex problems, of which the optimum is known by other means, from the constructor's defaults in float64. One line a
problem and schedule: (loss − optimum) / (first loss − optimum) after so many steps, and the largest value met after
step 50, which must not climb. Full batches and noise-free minibatches are to go to rounding. With noise in the labels
what is left is the noise over the number of data that the mean stands for. A schedule has the last of ``--steps`` as
its horizon.

``--starts`` trains transformers with weights from N(0, 0.02) on random tokens of a Zipf law instead, beside AdamW: the
largest loss met on the way and the loss at the end. The larger one takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import natgrad as ng

DATA, COLUMNS, BATCH = 2000, 20, 128


@dataclass(frozen=True)
class Problem:
    """A generalised linear model of drawn data."""

    kind: str = "linear"  # or "logistic", "binary", "poisson"
    condition: float = 100.0  # of the inputs' covariance, whose columns are independent
    noise: float = 0.0  # of the labels, as a standard deviation
    batch: int | None = None  # None for all data
    data: int = DATA
    outputs: int = 1
    inputs_in: float = 1.0  # the size of the inputs
    targets_in: float = 1.0
    intercept: float = 0.0

    def draw(self) -> tuple[Tensor, Tensor, nn.Module]:
        generator = torch.Generator().manual_seed(0)
        scales = torch.logspace(0, -math.log10(self.condition) / 2, COLUMNS)
        x = torch.randn(self.data, COLUMNS, generator=generator) * scales
        f = x @ torch.randn(COLUMNS, self.outputs, generator=generator) + self.intercept
        x = x * self.inputs_in
        if self.kind == "logistic":
            labels = torch.multinomial((0.7 * f).softmax(1), 1, generator=generator)[:, 0]
            return x, labels, nn.CrossEntropyLoss()
        if self.kind == "binary":
            return x, torch.bernoulli((0.7 * f).sigmoid(), generator=generator), nn.BCEWithLogitsLoss()
        if self.kind == "poisson":
            return x, torch.poisson((0.3 * f).exp(), generator=generator), nn.PoissonNLLLoss()
        noise = self.noise * torch.randn(self.data, self.outputs, generator=generator)
        return x, self.targets_in * (f + noise), nn.MSELoss()

    def optimum(self, x: Tensor, y: Tensor, criterion: nn.Module) -> float:
        """Return the least loss, by a direct solve or by L-BFGS."""
        if self.kind == "linear":
            a = torch.cat([x / self.inputs_in, torch.ones(len(x), 1)], 1)
            return float(criterion(a @ torch.linalg.lstsq(a, y, driver="gelsd").solution, y))
        x, model = x / x.std(), nn.Linear(COLUMNS, self.outputs)
        opt = torch.optim.LBFGS(
            model.parameters(), max_iter=3000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> float:
            opt.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return float(loss)

        opt.step(closure)
        return float(criterion(model(x), y))


PROBLEMS = {
    "isotropic": Problem(condition=1),
    "condition 100": Problem(),
    "condition 100, noise 1": Problem(noise=1),
    "condition 1e6": Problem(condition=1e6),
    "condition 100, batches": Problem(batch=BATCH),
    "condition 100, noise 1, batches": Problem(noise=1, batch=BATCH),
    "five outputs": Problem(outputs=5, noise=0.5),
    "five outputs, batches": Problem(outputs=5, batch=BATCH),
    "30 data": Problem(data=30, noise=0.5),
    "15 data": Problem(condition=1, data=15),
    "targets in thousands": Problem(condition=10, targets_in=1e3),
    "targets in thousands, noise 1, batches": Problem(condition=10, targets_in=1e3, noise=1, batch=BATCH),
    "targets in thousandths": Problem(condition=10, targets_in=1e-3),
    "inputs in thousands": Problem(condition=10, inputs_in=1e3, intercept=1, noise=0.1),
    "inputs in thousands, batches": Problem(condition=10, inputs_in=1e3, batch=BATCH),
    "inputs in thousandths": Problem(condition=10, inputs_in=1e-3),
    "both in thousands": Problem(condition=10, inputs_in=1e3, targets_in=1e3),
    "logistic": Problem("logistic", condition=1, outputs=3),
    "logistic, condition 100, batches": Problem("logistic", outputs=3, batch=BATCH),
    "logistic, inputs in thousands": Problem("logistic", condition=1, outputs=3, inputs_in=1e3),
    "binary": Problem("binary", condition=10),
    "Poisson": Problem("poisson", condition=1),
    "Poisson, condition 100, batches": Problem("poisson", batch=BATCH),
}
Schedule = Callable[[ng.NaturalGradient, int], lr_scheduler.LRScheduler | None]


def by_share(share: Callable[[float], float]) -> Schedule:
    return lambda opt, steps: lr_scheduler.LambdaLR(opt, lambda k: share(min(1.0, k / steps)))


SCHEDULES: dict[str, Schedule] = {
    "none": lambda opt, steps: None,
    "cosine": by_share(lambda done: 0.5 * (1 + math.cos(math.pi * done))),
    "linear": by_share(lambda done: 1 - done),
    "warm-up": by_share(lambda done: min(1.0, 0.001 + done / 0.05)),
    "one-cycle": lambda opt, steps: lr_scheduler.OneCycleLR(
        opt, max_lr=opt.param_groups[0]["lr"], total_steps=steps + 1, cycle_momentum=False
    ),
    "plateau": lambda opt, steps: lr_scheduler.ReduceLROnPlateau(opt, patience=10),
}


def excesses(problem: Problem, schedule: Schedule, steps: int, decay: float | None) -> Iterator[float]:
    """Yield (loss − optimum) / (first loss − optimum) after each step."""
    x, y, criterion = problem.draw()
    best = problem.optimum(x, y, criterion)
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, problem.outputs)
    opt = ng.NaturalGradient(ng.Fisher(model, criterion), weight_decay=decay)
    rates = schedule(opt, steps)
    generator = torch.Generator().manual_seed(1)
    first = float(criterion(model(x), y).detach()) - best
    for _ in range(steps):
        rows = slice(None) if problem.batch is None else torch.randint(len(x), (problem.batch,), generator=generator)
        opt.zero_grad()
        loss = criterion(model(x[rows]), y[rows])
        loss.backward()
        opt.step()
        if isinstance(rates, lr_scheduler.ReduceLROnPlateau):
            rates.step(float(loss.detach()))
        elif rates is not None:
            rates.step()
        with torch.no_grad():
            yield (float(criterion(model(x), y)) - best) / first


def convex(args: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.float64)
    print(f"{'schedule':10s}{'problem':40s}" + "".join(f"{s:>10d}" for s in args.steps) + f"{'worst':>10s}")
    for name in args.schedules:
        for title, problem in PROBLEMS.items():
            if args.only not in title:
                continue
            found = list(excesses(problem, SCHEDULES[name], max(args.steps), args.decay))
            shown = [found[s - 1] for s in args.steps] + [max(found[50:], default=math.nan)]
            print(f"{name:10s}{title:40s}" + "".join(f"{v:10.1e}" for v in shown), flush=True)


class Language(nn.Module):
    """A pre-norm transformer with weights from N(0, 0.02)."""

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, tied: bool, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.head.weight.dtype)
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.layers(h, mask=mask, is_causal=True)).flatten(0, 1)


STARTS = {  # vocabulary, width, depth, heads, tied, steps
    "8,000 × 128, 2 layers": (8000, 128, 2, 4, False, 100),
    "8,000 × 128, 2 layers, tied": (8000, 128, 2, 4, True, 100),
    "32,000 × 512, 6 layers, tied": (32000, 512, 6, 8, True, 45),
}


def starts(only: str) -> None:
    batch, context = 4, 64  # 256 tokens
    print(f"{'model':34s}{'optimizer':10s}{'first':>8s}{'largest':>9s}{'last':>8s}")
    for title, (vocabulary, width, depth, heads, tied, steps) in STARTS.items():
        if only not in title:
            continue
        for name in ("natgrad", "adamw"):
            torch.manual_seed(0)
            model, criterion = Language(vocabulary, width, depth, heads, tied, context), nn.CrossEntropyLoss()
            opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            if name == "natgrad":
                opt = ng.NaturalGradient(ng.Fisher(model, criterion))
            generator = torch.Generator().manual_seed(1)
            law = 1 / torch.arange(1, vocabulary + 1).double()  # Zipf's
            losses = []
            for _ in range(steps):
                drawn = torch.multinomial(law, batch * (context + 1), replacement=True, generator=generator)
                tokens = drawn.view(batch, -1)
                opt.zero_grad()
                loss = criterion(model(tokens[:, :-1]), tokens[:, 1:].flatten())
                loss.backward()
                opt.step()
                losses.append(float(loss.detach()))
            last = sum(losses[-10:]) / 10
            print(f"{title:34s}{name:10s}{losses[0]:8.2f}{max(losses):9.2f}{last:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decay", type=float, help="weight_decay; the constructor's default where not given")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["none"])
    parser.add_argument("--steps", nargs="+", type=int, default=[30, 300, 1000])
    parser.add_argument("--only", default="", help="problems with this in their names")
    parser.add_argument("--starts", action="store_true", help="GPT-like starts in place of the convex problems")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    if args.starts:
        starts(args.only)
    else:
        convex(args)


if __name__ == "__main__":
    main()
