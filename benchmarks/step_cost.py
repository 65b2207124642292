"""What a step costs, beside AdamW and others: ``python -m benchmarks.step_cost [--steps 120] [--only convnet …]``.

One table a workload: the mean step over AdamW's, p50 and p99 of single steps, and the bytes of state over AdamW's. A
step is ``zero_grad``, forward, backward and ``step``; the mean takes in the dense refreshes of the first steps, and the
second p99 leaves them out. CPU time of one thread. The optimizers take turns in one process, so that what else the
machine does slows all of them. ``--parts`` splits natgrad's step instead.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import natgrad as ng
from benchmarks import rivals
from benchmarks.workloads import CharTransformer, Pinn, RowReader, pinn


def autoencoder() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """784-400-200-100-50-25-6-mirror, 842k parameters, batch 512."""
    sizes = [784, 400, 200, 100, 50, 25, 6]
    sizes += sizes[-2::-1]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    x = torch.rand(512, 784)
    return nn.Sequential(*layers[:-1]), nn.BCEWithLogitsLoss(), x, x


def convnet() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Two convolutions and two linear layers on 28 × 28 images, batch 128."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return model, nn.CrossEntropyLoss(), torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))


def tabular() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """8-128-128-128-1 with batch 128."""
    model = nn.Sequential(
        nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    return model, nn.MSELoss(), torch.randn(128, 8), torch.randn(128, 1)


def transformer_32() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Three layers of width 128, 65 symbols, 32 windows of 96."""
    tokens = torch.randint(0, 65, (32, 97))
    model = nn.Sequential(CharTransformer(65), nn.Flatten(0, 1))
    return model, nn.CrossEntropyLoss(), tokens[:, :-1], tokens[:, 1:].flatten()


def recurrent() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """An LSTM of width 64 on 8 rows of 8, batch 128."""
    return RowReader(), nn.CrossEntropyLoss(), torch.randn(128, 8, 8), torch.randint(0, 10, (128,))


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module, Tensor, Tensor]]] = {
    "autoencoder": autoencoder,
    "convnet": convnet,
    "transformer_32": transformer_32,
    "recurrent": recurrent,
    "tabular": tabular,
}


PHYSICS: dict[str, Callable[[], Pinn]] = {"pinn": pinn}  # losses of which natgrad takes the residuals, not the gradient


def timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


class Loop:
    """One training step after the other, with the time of each part in ms."""

    def __init__(
        self, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, opt: torch.optim.Optimizer
    ) -> None:
        self.model, self.criterion, self.x, self.y, self.opt = model, criterion, x, y, opt

    def step(self) -> dict[str, float]:
        held: list[Tensor] = []
        self.opt.zero_grad()
        forward = timed(lambda: held.append(self.criterion(self.model(self.x), self.y)))
        backward = timed(lambda: held[0].backward())
        return {"forward": forward, "backward": backward, "step": timed(self.opt.step)}


def median(rows: list[dict[str, float]], part: str) -> float:
    return statistics.median(r[part] for r in rows)


def precondition_cost(opt: ng.NaturalGradient) -> float:
    """The matrix products alone: every block's inverse applied to its gradient."""
    blocks = opt.metric.blocks  # type: ignore[attr-defined]
    grads = {n: p.grad for n, p in opt.metric.parameters.items() if p.grad is not None}
    pairs = [(b.relative_inverse(0.1), b.pack(grads)) for b in blocks]
    return statistics.median(timed(lambda: [inverse.apply(g) for inverse, g in pairs]) for _ in range(20))


def measure(name: str, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model, criterion, x, y = MODELS[name]()
    plain_model, watched_model = copy.deepcopy(model), copy.deepcopy(model)
    plain = Loop(plain_model, criterion, x, y, torch.optim.AdamW(plain_model.parameters(), lr=1e-4))
    own_criterion = copy.deepcopy(criterion)
    opt = ng.NaturalGradient(ng.Fisher(watched_model, own_criterion))
    watched = Loop(watched_model, own_criterion, x, y, opt)
    base, ordinary, refresh = [], [], []
    for i in range(steps):
        base.append(plain.step())
        row = watched.step()
        if i >= 3:
            (refresh if opt.info["refreshed"] else ordinary).append(row)
    products = precondition_cost(opt)
    return {
        "forward + backward, plain": median(base, "forward") + median(base, "backward"),
        "AdamW step": median(base, "step"),
        "forward + backward, watched": median(ordinary, "forward") + median(ordinary, "backward"),
        "products that apply the metric": products,
        "momentum, norms, writing": median(ordinary, "step") - products,
        "refresh: forward + backward": median(refresh, "forward") + median(refresh, "backward"),
        "refresh: step": median(refresh, "step"),
        "mean of all steps": statistics.mean(sum(r.values()) for r in ordinary + refresh),
    }


# beside other optimizers -------------------------------------------------------------------------------------------

Optimizers = list[torch.optim.Optimizer]
MATRIX_METHODS = {"SOAP": {"interval": 10.0}, "Shampoo": {"interval": 10.0}, "Muon": {"adam_share": 1.0}}


def rivals_here() -> dict[str, Callable[[nn.Module, nn.Module], Optimizers]]:
    """natgrad, AdamW and the matrix methods that are installed."""
    found: dict[str, Callable[[nn.Module, nn.Module], Optimizers]] = {
        "AdamW": lambda model, criterion: [torch.optim.AdamW(model.parameters(), lr=1e-4)],
        "natgrad": lambda model, criterion: [ng.NaturalGradient(ng.Fisher(model, criterion))],
    }
    builders = {"Muon": rivals.muon}
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        builders.update(SOAP=rivals.soap, Shampoo=rivals.shampoo)
    for name, build in builders.items():
        hyper = {"lr": 1e-4, "weight_decay": 0.0, "beta1": 0.9, **MATRIX_METHODS[name]}
        found[name] = lambda model, criterion, build=build, hyper=hyper: build(model, criterion, hyper)
    return found


def held_by(metric: ng.Metric) -> object:
    """Blocks, or where there are none the last linearisation and its factors, which stay until the next one."""
    return getattr(metric, "blocks", None) or [vars(metric)[n] for n in ("point", "rows", "root", "_factor")]


def state_bytes(opts: Optimizers, model: nn.Module) -> int:
    """Bytes of every tensor an optimizer holds, shared memory once, without parameters and gradients."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    todo: list[object] = []
    for opt in opts:
        todo += [opt.rule, held_by(opt.metric)] if isinstance(opt, ng.NaturalGradient) else [opt.state]
    theirs = {t.untyped_storage().data_ptr() for p in model.parameters() for t in (p, p.grad) if t is not None}
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple, set)):
            todo += item
        elif isinstance(item, MethodType):
            todo.append(item.__self__)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)):
            todo += vars(item).values()
    return sum(size for place, size in storages.items() if place not in theirs)


def compare(name: str, steps: int) -> Table:
    """A row for each optimizer."""
    loops: dict[str, tuple[Callable[[], object], Optimizers, nn.Module]] = {}
    for optimizer, build in rivals_here().items():
        loops[optimizer] = loop_of(name, optimizer, build)
    times: dict[str, list[float]] = {optimizer: [] for optimizer in loops}
    failed: dict[str, str] = {}
    for _ in range(steps):
        for optimizer, (run, _, _) in loops.items():
            if optimizer not in failed:
                try:
                    times[optimizer].append(timed(run))
                except RuntimeError as error:  # of the other packages: not every one takes every model
                    if optimizer == "natgrad":
                        raise
                    failed[optimizer] = type(error).__name__
    table = Table(title=f"{name}: CPU ms a step, {steps} steps")
    for column in ("", "mean", "over AdamW", "p50", "p99", "p99/p50", "p99/p50 late", "state MB", "over AdamW"):
        table.add_column(column, justify="left" if not column else "right")
    mean = {o: statistics.mean(t) for o, t in times.items() if o not in failed}
    held = {o: state_bytes(opts, model) for o, (_, opts, model) in loops.items()}
    for o, t in times.items():
        if o in failed:
            table.add_row(o, failed[o])
            continue
        p50, p99, late = statistics.median(t), quantile(t, 0.99), quantile(t[len(t) // 3 :], 0.99)
        ratios = (mean[o] / mean["AdamW"], held[o] / held["AdamW"])
        times_shown = [f"{mean[o]:.2f}", f"{ratios[0]:.2f}", f"{p50:.2f}", f"{p99:.2f}"]
        shares = [f"{p99 / p50:.2f}", f"{late / p50:.2f}", f"{held[o] / 1e6:.2f}", f"{ratios[1]:.2f}"]
        table.add_row(o, *times_shown, *shares)
    return table


def loop_of(
    name: str, optimizer: str, build: Callable[[nn.Module, nn.Module], Optimizers]
) -> tuple[Callable[[], object], Optimizers, nn.Module]:
    """(one step, optimizers, model)"""
    torch.manual_seed(0)
    if name in PHYSICS:
        workload = PHYSICS[name]()
        model = workload.model()
        opts = (
            [ng.NaturalGradient(ng.GaussNewton(model, workload.terms(model)))]
            if optimizer == "natgrad"
            else build(model, workload.criterion)
        )
        return partial(workload.step, opts, model, *workload.train), opts, model
    model, criterion, x, y = MODELS[name]()
    opts = build(model, criterion)
    return partial(train_once, model, criterion, x, y, opts), opts, model


def train_once(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, opts: Optimizers) -> None:
    for opt in opts:
        opt.zero_grad()
    criterion(model(x), y).backward()
    for opt in opts:
        opt.step()


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", nargs="+", choices=[*MODELS, *PHYSICS], default=[*MODELS, *PHYSICS])
    parser.add_argument("--parts", action="store_true", help="split natgrad's step instead of comparing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.parts:
        for name in given.only:
            Console(width=120).print(compare(name, given.steps))
        return
    results = {name: measure(name, given.steps) for name in given.only if name in MODELS}
    table = Table(title="CPU ms a step (ratio to plain forward + backward)")
    table.add_column("part")
    for name in results:
        table.add_column(name, justify="right")
    for part in next(iter(results.values())):
        cells = [f"{r[part]:.2f} ({r[part] / r['forward + backward, plain']:.2f})" for r in results.values()]
        table.add_row(part, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
