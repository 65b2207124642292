"""How well influence scores tell what training on other data would do, beside kronfluence: linear datamodeling scores.

    python -m benchmarks.uses.influence [--tasks digits concrete] [--models 5] [--subsets 50] [--retrain 4] [--out FILE]

The linear datamodeling score (LDS; Park et al. 2023, arXiv:2303.14186) of a query is the rank correlation, over random
halves of the training data, of the summed scores of a half with the query's loss after training on that half alone. The
mean over queries is printed for each of `--models` models. Halves are trained `--retrain` times, and the mean loss is
taken. Every method scores the same models, in the same run; kronfluence 1.0.1 and dattri 0.3.0, whose `lds` checks
ours, are taken where they are installed: an environment of their own is best.

Damping is relative to the mean eigenvalue of the metric, kronfluence's the same number, or its default (None).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import natgrad as ng

GRID = (0.003, 0.01, 0.1, 0.3, 1.0, 3.0)
STEPS = 10  # of conjugate gradients
METHODS = {"kfac": (0, GRID), "ekfac": (0, GRID), "ekfac, refined": (STEPS, (3.0, 10.0, 30.0))}
CONCRETE = "uci/concrete.txt"


@dataclass
class Task:
    name: str
    widths: tuple[int, ...]
    data: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    criterion: nn.Module
    lr: float = 0.05
    epochs: int = 20
    batch: int = 64
    decay: float = 5e-3

    def model(self, weights: list[Tensor]) -> nn.Module:
        layers: list[nn.Module] = []
        for i in range(len(self.widths) - 1):
            layers += [nn.Linear(self.widths[i], self.widths[i + 1]), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
        with torch.no_grad():
            for p, w in zip(net.parameters(), weights):
                p.copy_(w)
        return net

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        """(…, data)"""
        if isinstance(self.criterion, nn.MSELoss):
            return (out - y).square().mean(-1)
        return nn.functional.cross_entropy(
            out.reshape(-1, out.shape[-1]), y.expand(out.shape[:-1]).reshape(-1), reduction="none"
        ).reshape(out.shape[:-1])


def digits() -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:1100]
    return Task("digits", (64, 128, 128, 10), (x[train], y[train]), (x[test], y[test]), nn.CrossEntropyLoss())


def concrete(folder: Path) -> Task:
    import numpy as np

    if not (path := folder / CONCRETE).is_file():
        raise SystemExit(f"there is no {path}; name its folder with --data-dir, or leave --tasks at digits")
    rows = torch.tensor(np.loadtxt(path), dtype=torch.float32)
    rows = (rows - rows.mean(0)) / rows.std(0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    train, test = rows[order[:800]], rows[order[800:900]]
    return Task(
        "concrete",
        (8, 64, 64, 1),
        (train[:, :-1], train[:, -1:]),
        (test[:, :-1], test[:, -1:]),
        nn.MSELoss(),
        epochs=60,
    )


# training many nets at once: weights (nets, d_out, d_in) ----------------------------------------------------


def trained(task: Task, members: Tensor, seed: int) -> list[Tensor]:
    """Parameters of a net for each row of `members` (nets, data), its training data, by SGD with momentum."""
    g = torch.Generator().manual_seed(seed)
    nets, count = members.shape
    x, y = task.data
    params = []
    for a, b in zip(task.widths[:-1], task.widths[1:]):
        params += [(torch.rand(nets, b, a, generator=g) * 2 - 1) * (3 / a) ** 0.5, torch.zeros(nets, b)]
    params = [p.requires_grad_() for p in params]
    opt = torch.optim.SGD(params, lr=task.lr, momentum=0.9, weight_decay=task.decay)
    steps = task.epochs * (count // task.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(task.epochs):
        order = torch.rand(nets, count, generator=g).argsort(1)
        for start in range(0, count - task.batch + 1, task.batch):
            rows = members.gather(1, order[:, start : start + task.batch])
            loss = task.losses(forward(params, x[rows]), y[rows]).mean(1).sum()
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    return [p.detach() for p in params]


def forward(params: list[Tensor], x: Tensor) -> Tensor:
    """(nets, data, features) → (nets, data, outputs)"""
    for i in range(0, len(params), 2):
        x = torch.baddbmm(params[i + 1][:, None], x, params[i].mT)
        x = x if i == len(params) - 2 else x.relu()
    return x


def truth(task: Task, subsets: int, retrain: int) -> tuple[Tensor, Tensor]:
    """(which data each half has (subsets, data/2), the queries' losses after training on it (subsets, queries))"""
    g = torch.Generator().manual_seed(1)
    n = len(task.data[0])
    halves = torch.stack([torch.randperm(n, generator=g)[: n // 2] for _ in range(subsets)])
    qx, qy = task.queries
    total = torch.zeros(subsets, len(qx))
    for r in range(retrain):
        params = trained(task, halves, 100 + r)
        with torch.no_grad():
            total += task.losses(forward(params, qx.expand(subsets, *qx.shape)), qy)
    return halves, total / retrain


# scores -----------------------------------------------------------------------------------------------------


def ranks(t: Tensor) -> Tensor:
    return t.argsort(0).argsort(0).float()


def lds(scores: Tensor, halves: Tensor, losses: Tensor) -> float:
    """The mean over queries of the rank correlation. A datum that helps raises the loss where it is left out."""
    predicted = -torch.stack([scores[:, h].sum(1) for h in halves])  # (subsets, queries)
    a, b = (ranks(t) - (len(halves) - 1) / 2 for t in (predicted, losses))
    return float(((a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()).mean())


def natgrad_scores(
    task: Task, model: nn.Module, structure: str, shares: tuple[float, ...], refine: int
) -> dict[float, Any]:
    """{damping: (scores, CPU seconds of fit and scores)}"""
    start = time.process_time()
    metric = ng.Fisher(model, task.criterion, kind="exact", structure=structure)
    x, y = task.data
    for i in range(0, len(x), 256):
        metric.update(x[i : i + 256], y[i : i + 256])
    fit = time.process_time() - start
    mean = float(metric.trace()) / sum(p.numel() for p in model.parameters())
    found: dict[float, Any] = {}
    for share in shares:
        start = time.process_time()
        found[share] = ng.influence(metric, [task.queries], [task.data], share * mean, refine=refine)
        found[share] = found[share], fit + time.process_time() - start
    return found


def kronfluence_scores(task: Task, model: nn.Module, dampings: list[float | None]) -> dict[float | None, Any]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as Theirs

    class Losses(Theirs):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            out = model(x)
            if sample and isinstance(task.criterion, nn.MSELoss):
                y = torch.normal(out.detach(), std=0.5**0.5)
            elif sample:
                y = torch.multinomial(out.detach().softmax(-1), 1).flatten()
            return task.losses(out, y).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            x, y = batch
            return task.losses(model(x), y).sum()

    data, queries = (torch.utils.data.TensorDataset(*d) for d in (task.data, task.queries))
    found: dict[float | None, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        theirs = prepare_model(copy.deepcopy(model), Losses())
        start = time.process_time()
        analyzer = Analyzer("lds", theirs, Losses(), cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)
        analyzer.fit_all_factors(
            "ekfac",
            data,
            per_device_batch_size=256,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
        fit = time.process_time() - start
        for i, damping in enumerate(dampings):
            start = time.process_time()
            analyzer.compute_pairwise_scores(
                f"scores{i}",
                "ekfac",
                queries,
                data,
                per_device_query_batch_size=len(queries),
                per_device_train_batch_size=256,
                score_args=ScoreArguments(damping_factor=damping),
                overwrite_output_dir=True,
            )
            scores = analyzer.load_pairwise_scores(f"scores{i}")["all_modules"]
            found[damping] = scores, fit + time.process_time() - start
    return found


# the run ----------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t of up to nine differences."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[len(values)]
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def run(task: Task, models: int, subsets: int, retrain: int) -> list[dict[str, Any]]:
    n = len(task.data[0])
    start = time.time()
    halves, losses = truth(task, subsets, retrain)
    params = trained(task, torch.arange(n).expand(models, n), 0)
    print(f"{task.name}: {subsets} halves trained {retrain} times in {time.time() - start:.0f} s", flush=True)
    found: list[dict[str, Any]] = []

    def note(k: int, method: str, share: Any, scores: Tensor, seconds: float) -> None:
        found.append(
            {"task": task.name, "model": k, "method": method, "damping": share, "seconds": seconds}
            | {"lds": lds(scores, halves, losses)}
        )

    for k in range(models):
        model = task.model([p[k] for p in params])
        note(k, "identity", 0, ng.influence(plain(model, task), [task.queries], [task.data], 1e6), 0.0)
        for method, (steps, grid) in METHODS.items():
            for share, (scores, seconds) in natgrad_scores(task, model, method.split(",")[0], grid, steps).items():
                note(k, method, share, scores, seconds)
        if importlib.util.find_spec("kronfluence") is not None:
            metric = plain(model, task)
            mean = float(metric.trace()) / sum(p.numel() for p in model.parameters())
            given = [None, *(share * mean for share in GRID)]
            theirs = kronfluence_scores(task, model, given)
            for share, damping in zip(["default", *GRID], given):
                note(k, "kronfluence", share, *theirs[damping])
        print(f"  model {k}: {time.time() - start:.0f} s", flush=True)
        if k == 0 and importlib.util.find_spec("dattri") is not None:
            check_dattri(task, model, halves, losses)
    return found


def plain(model: nn.Module, task: Task) -> ng.Fisher:
    return ng.Fisher(model, task.criterion, kind="exact", structure="ekfac").fit([task.data], progress=False)


def check_dattri(task: Task, model: nn.Module, halves: Tensor, losses: Tensor) -> None:
    from dattri.metric import lds as theirs

    scores = ng.influence(plain(model, task), [task.queries], [task.data])
    found = float(theirs(-scores.mT, (losses, halves))[0].mean())
    print(f"  LDS of the first model at the default damping: {lds(scores, halves, losses):.4f}, by dattri {found:.4f}")


def report(rows: list[dict[str, Any]]) -> None:
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        means: dict[tuple[str, Any], float] = {}
        print(f"\n{task}: mean LDS over models at each damping, and CPU seconds of fit and scores")
        for method in dict.fromkeys(r["method"] for r in mine):
            line = []
            for share in dict.fromkeys(r["damping"] for r in mine if r["method"] == method):
                some = [r for r in mine if r["method"] == method and r["damping"] == share]
                means[method, share] = statistics.mean(r["lds"] for r in some)
                line.append(f"{share}: {means[method, share]:.3f}")
            seconds = statistics.median(r["seconds"] for r in mine if r["method"] == method)
            print(f"  {method:15s} {'  '.join(line)}   {seconds:.2f} s")
        each = {(r["method"], r["damping"], r["model"]): r["lds"] for r in mine}
        models = sorted({r["model"] for r in mine})
        best = max((m for m in means if m[0] in ("kfac", "ekfac")), key=lambda m: means[m])
        if len(models) > 1:
            gain = [each["ekfac, refined", 10.0, k] - each[(*best, k)] for k in models]
            mean, half = interval(gain)
            said = "met" if mean - half > 0 else "not met"
            print(
                f"  refined at its default beyond {best[0]} at its best ({best[1]}): {mean:+.3f} ± {half:.3f}, {said}"
            )
        if any(m[0] == "kronfluence" for m in means):
            theirs = max((m for m in means if m[0] == "kronfluence"), key=lambda m: means[m])
            ours = max((m for m in means if m[0] == "ekfac"), key=lambda m: means[m])
            said = "met" if means[ours] >= means[theirs] - 0.005 else "not met"
            print(
                f"  ekfac {means[ours]:.3f} beside kronfluence {means[theirs]:.3f}, each at its best: {said} (bar .005)"
            )
            cpu = [statistics.median(r["seconds"] for r in mine if r["method"] == m) for m in ("ekfac", "kronfluence")]
            print(f"  CPU seconds {cpu[0]:.2f} beside {cpu[1]:.2f}: {'met' if cpu[0] <= cpu[1] else 'not met'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["digits"], choices=["digits", "concrete"])
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--retrain", type=int, default=4)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("NATGRAD_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, help="keep the figures as JSON lines")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    build: dict[str, Callable[[], Task]] = {"digits": digits, "concrete": lambda: concrete(given.data_dir)}
    rows: list[dict[str, Any]] = []
    for name in given.tasks:
        rows += run(build[name](), given.models, given.subsets, given.retrain)
    report(rows)
    if given.out is not None:
        given.out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
