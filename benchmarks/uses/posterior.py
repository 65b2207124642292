"""What the posterior predicts and costs, beside laplace-torch.

    python -m benchmarks.uses.posterior [--parts same tables digits last] [--seeds 2] [--data-dir DIR]

- same: evidence and predictions under one prior, both packages on the same weights. Layers have no bias, since laplace
  keeps a block of its own for each bias and natgrad one block for a layer.
- tables: held-out negative log-likelihood on five tables, each package's prior chosen on the same validation data.
- digits: the t10k images of MNIST; trained on 0 to 4, the same, and how well 5 to 9 are told apart (AUROC of the
  largest probability). DIR has them, as for `natgrad train mnist-autoencoder`.
- last: variances of 64 data at a last layer of 128 inputs and 3,100 outputs, in time and memory.

laplace-torch 0.3 is taken where it is installed: kron over all weights, GLM predictive, probit.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

import natgrad as ng

RIVAL = importlib.util.find_spec("laplace") is not None
Data = tuple[Tensor, Tensor]


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1], bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(
    model: nn.Module, data: Data, loss: Callable[[Tensor, Tensor], Tensor], steps: int, decay: float = 1e-4
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=decay)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (min(128, len(data[0])),), generator=g)
        optimizer.zero_grad()
        loss(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()


def said(met: bool) -> str:
    return "met" if met else "not met"


# one prior, the same numbers ---------------------------------------------------------------------------------


def same() -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float64) / 16, torch.tensor(found.target)
    torch.manual_seed(0)
    model = mlp(64, 16, 10, bias=False).double()
    train(model, (x[:600], y[:600]), nn.functional.cross_entropy, 300)
    if not RIVAL:
        print("same: laplace-torch is not installed")
        return
    from laplace import Laplace

    loader = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=600)
    for structure, theirs in (("kfac", "kron"), ("dense", "full"), ("diagonal", "diag")):
        metric = ng.Fisher(model, nn.CrossEntropyLoss(reduction="sum"), kind="exact", structure=structure)
        post = ng.posterior(metric.fit(loader, progress=False), prior=2.0)
        rival = Laplace(model, "classification", subset_of_weights="all", hessian_structure=theirs, prior_precision=2.0)
        rival.fit(loader)
        a, b = float(post.evidence(loader)), float(rival.log_marginal_likelihood())
        p = post.predict(x[600:700])
        q = rival(x[600:700], pred_type="glm", link_approx="probit").detach()
        relative, most = abs(a - b) / abs(b), float((p - q).abs().max())
        print(
            f"same, {structure}: evidence {a:.4f} and {b:.4f} ({relative:.1e}, {said(relative <= 1e-4)}), predictions "
            f"within {most:.1e} ({said(most <= 1e-3)})",
            flush=True,
        )


# tables ------------------------------------------------------------------------------------------------------


def tables(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    import numpy as np
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine

    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, load in (("cancer", load_breast_cancer), ("wine", load_wine), ("digits", load_digits)):
        raw = load()
        found[name] = torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target)
    raw = load_diabetes()
    found["diabetes"] = torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target, dtype=torch.float32)
    if (path := folder / "uci/concrete.txt").is_file():
        rows = torch.tensor(np.loadtxt(path), dtype=torch.float32)
        found["concrete"] = rows[:, :-1], rows[:, -1]
    else:
        print(f"there is no {path}; concrete is left out")
    return found


def split(x: Tensor, y: Tensor, seed: int) -> list[Data]:
    """Training, validation and test data, inputs and numbers to predict standardised."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    a, b = int(0.6 * len(x)), int(0.8 * len(x))
    x = (x - x[order[:a]].mean(0)) / (x[order[:a]].std(0) + 1e-6)
    if y.is_floating_point():
        y = ((y - y[order[:a]].mean()) / y[order[:a]].std())[:, None]
    return [(x[i], y[i]) for i in (order[:a], order[a:b], order[b:])]


def ours(model: nn.Module, parts: list[Data], structure: str, sigma: float | None) -> Callable[[Tensor], Any]:
    criterion: nn.Module = nn.CrossEntropyLoss(reduction="sum")
    if sigma is not None:
        criterion = ng.Likelihood(lambda f: Normal(f, sigma), reduction="sum")
    metric = ng.Fisher(model, criterion, kind="exact", structure=structure).fit([parts[0]], progress=False)
    return ng.posterior(metric).tune([parts[1]]).predict


def theirs(model: nn.Module, parts: list[Data], sigma: float | None) -> Callable[[Tensor], Any]:
    from laplace import Laplace

    likelihood = "classification" if sigma is None else "regression"
    options: dict[str, Any] = {} if sigma is None else {"sigma_noise": sigma}
    rival = Laplace(model, likelihood, subset_of_weights="all", hessian_structure="kron", **options)
    loaders = [DataLoader(TensorDataset(*d), batch_size=256) for d in parts]
    rival.fit(loaders[0])

    def predict(x: Tensor) -> Any:
        return rival(x, pred_type="glm", link_approx="probit")

    # its own grid search goes by the squared error of a regression, which no prior changes: by likelihood, as ours
    losses: dict[float, float] = {}
    for prior in [10 ** (e / 2) for e in range(-8, 9)]:
        rival.prior_precision = prior
        losses[prior] = held_out(predict, parts[1], sigma)
    rival.prior_precision = min(losses, key=lambda p: losses[p])
    return predict


def held_out(predict: Callable[[Tensor], Any], data: Data, sigma: float | None) -> float:
    x, y = data
    if sigma is None:
        p = predict(x).detach()
        return float(-p[torch.arange(len(y)), y].clamp(min=1e-12).log().mean())
    mean, variance = (t.detach().reshape(len(x), 1) for t in predict(x))
    spread = variance + sigma**2
    return float((0.5 * (y - mean).square() / spread + 0.5 * (2 * math.pi * spread).log()).mean())


def report(name: str, parts: list[Data], model: nn.Module, sigma: float | None) -> dict[str, float]:
    found = {
        "plain": held_out(
            (lambda x: model(x).softmax(1)) if sigma is None else lambda x: (model(x), 0 * model(x)), parts[2], sigma
        )
    }
    for structure in ("kfac", "ekfac"):
        found[structure] = held_out(ours(model, parts, structure, sigma), parts[2], sigma)
    if RIVAL:
        found["laplace"] = held_out(theirs(model, parts, sigma), parts[2], sigma)
    print(f"  {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()), flush=True)
    return found


def run_tables(folder: Path, seeds: int) -> None:
    print("tables: held-out negative log-likelihood, nats")
    means: dict[str, dict[str, float]] = {}
    for name, (x, y) in tables(folder).items():
        every = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            parts = split(x, y, seed)
            regression = y.is_floating_point()
            model = mlp(x.shape[1], 50, 1 if regression else int(y.max()) + 1)
            train(model, parts[0], nn.functional.mse_loss if regression else nn.functional.cross_entropy, 1000)
            sigma = None
            if regression:  # of the residuals on validation data
                sigma = float((model(parts[1][0]) - parts[1][1]).detach().square().mean().sqrt())
            every.append(report(f"{name}, split {seed}", parts, model, sigma))
        means[name] = {k: statistics.mean(e[k] for e in every) for k in every[0]}
    summary(means)


def summary(means: dict[str, dict[str, float]]) -> None:
    if not RIVAL:
        return
    worst = max(m["ekfac"] - m["laplace"] for m in means.values())
    better = sum(m["ekfac"] < m["laplace"] for m in means.values())
    print(
        f"  EKFAC worse than laplace by at most {worst:.4f} ({said(worst <= 0.01)}, bar .01), better on {better} "
        f"({said(better >= 2)}, bar 2)"
    )


def digits(folder: Path) -> None:
    from natgrad.cli.tasks import idx

    paths = [idx.find(folder / "mnist_t10k", f"t10k-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if None in paths:
        print(f"digits: there are no t10k files in {folder / 'mnist_t10k'}; name the folder above with --data-dir")
        return
    images, labels = (idx.read(p) for p in paths if p is not None)
    images, labels = images.float().flatten(1) / 255, labels.long()
    inside = labels < 5
    x, y, away = images[inside], labels[inside], images[~inside][:500]
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    parts = [(x[i], y[i]) for i in (order[:2000], order[2000:2200], order[3500:4000])]
    model = mlp(784, 50, 5)
    train(model, parts[0], nn.functional.cross_entropy, 600)
    print("digits: negative log-likelihood on 0 to 4, AUROC against 5 to 9")
    ways: dict[str, Callable[[Tensor], Any]] = {"plain": lambda x: model(x).softmax(1)}
    for structure in ("kfac", "ekfac"):
        ways[structure] = ours(model, parts, structure, None)
    if RIVAL:
        ways["laplace"] = theirs(model, parts, None)
    found = {}
    for name, predict in ways.items():
        known, other = (predict(t).detach().amax(1) for t in (parts[2][0], away))
        auroc = float((known[:, None] > other).float().mean() + 0.5 * (known[:, None] == other).float().mean())
        found[name] = held_out(predict, parts[2], None), 100 * auroc
        print(f"  {name}: {found[name][0]:.4f}, {found[name][1]:.2f}", flush=True)
    if RIVAL:
        nll, auroc = (found["ekfac"][i] - found["laplace"][i] for i in range(2))
        print(
            f"  EKFAC beside laplace: {nll:+.4f} nats ({said(nll <= 0.01)}), AUROC {auroc:+.2f} ({said(auroc >= -0.5)})"
        )


# the last layer ----------------------------------------------------------------------------------------------


def peak(reset: bool = False) -> float:
    """Most memory held so far, MB; from here on with `reset` (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    said = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in said.splitlines() if line.startswith("VmHWM")) / 1024


def last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 3100))
    x, y = torch.randn(512, 32), torch.randint(3100, (512,))
    for structure in ("diagonal", "kfac"):
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), structure=structure, params="2.*")
        post = ng.posterior(metric.fit([(x, y)], progress=False))
        start = time.process_time()
        post.variance(x[:1], diagonal=True)
        once = time.process_time() - start
        before = peak(reset=True)
        start = time.process_time()
        found = post.variance(x[:64], diagonal=True)
        took = time.process_time() - start
        grown = peak() - before
        print(
            f"last, {structure}: variances {tuple(found.shape)} in {took:.3f} s ({said(took < 1)}), {grown:.0f} MB "
            f"more ({said(grown < 200)}); once before {once:.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["same", "tables", "digits", "last"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("NATGRAD_DATA", "../shared/data")))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts: dict[str, Callable[[], None]] = {
        "same": same,
        "tables": lambda: run_tables(given.data_dir, given.seeds),
        "digits": lambda: digits(given.data_dir),
        "last": last,
    }
    for name in given.parts:
        parts[name]()


if __name__ == "__main__":
    main()
