"""What a refresh costs: a watched forward-backward pass over a plain one, process time on one thread.

    python benchmarks/refresh_cost.py

The bar is 1.6. A refresh is the forward pass with capture, the draw, one more backward pass and the
statistics of every block; factorisation belongs to the step. The two passes alternate, and medians are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import natgrad as ng
from tests.models import ResNet18, ViT, as_batch, language_models

ROUNDS = 5
LIMITS = (None, 256, 64)  # of `max_positions`
BAR = 1.6
APART: list[dict[str, str]] = [
    {"structure": "kfac"},
    {"structure": "ekfac"},
    {"structure": "kfac", "sharing": "reduce"},
    {"structure": "diagonal"},
    {"structure": "kfac", "kind": "empirical"},
]


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(name: str, model: nn.Module, loss: nn.Module, value: Callable[[], torch.Tensor], **options: Any) -> float:
    def plain() -> None:
        value().backward()
        model.zero_grad()

    for _ in range(2):
        plain()
    metric = ng.Fisher(model, loss, **options)
    driver = Switch()
    metric.drive(driver)

    def refresh() -> None:
        value().backward()
        metric.advance(0.9)
        model.zero_grad()

    driver.refresh_due = True
    refresh()
    base, watched = [], []
    for _ in range(ROUNDS):
        driver.refresh_due = True
        watched.append(seconds(refresh))
        driver.refresh_due = False
        base.append(seconds(plain))
    ratio = statistics.median(watched) / statistics.median(base)
    print(
        f"{name:16s} plain {1e3 * statistics.median(base):8.1f} ms   refresh {1e3 * statistics.median(watched):8.1f} ms"
        f"   ratio {ratio:.2f}   {'met' if ratio <= BAR else 'not met'} (bar {BAR})",
        flush=True,
    )
    return ratio


class Switch:
    refresh_due = False


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    loss = nn.CrossEntropyLoss()
    runs: list[tuple[str, nn.Module, Callable[[], torch.Tensor], dict[str, Any]]] = []

    resnet, x, y = ResNet18(), torch.randn(128, 3, 64, 64), torch.randint(0, 10, (128,))
    runs.append(("ResNet-18", resnet, lambda: loss(resnet(x), y), {}))
    vit, images = ViT(width=192, depth=4, size=32), torch.randn(32, 3, 32, 32)
    runs.append(("ViT", vit, lambda: loss(vit(images), y[:32]), {}))
    found = language_models(width=256, layers=3, vocabulary=8192)  # beyond a full factor, as real ones are
    if not found:
        print("transformers is not installed: pip install natgrad[models]")
    for name, (build, output, targets) in found.items():
        model, batch = build(), as_batch(name, 32, 32 if "bert" in name else 64, 8192)
        ask = {"output": output, "targets": targets}
        runs.append((name, model, lambda model=model, batch=batch: model(**batch).loss, ask))

    print("kinds and structures that need to know whose row it is, 128 data")
    mlp = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 250), nn.ReLU(), nn.Linear(250, 10))
    flat = torch.randn(128, 784)
    for options in APART:
        measure(" ".join(options.values()), mlp, loss, lambda: loss(mlp(flat), y), **options)
    for limit in LIMITS:
        print("all positions" if limit is None else f"max_positions={limit}")
        for name, model, value, options in runs:
            measure(name, model, loss, value, max_positions=limit, **options)


if __name__ == "__main__":
    main()
