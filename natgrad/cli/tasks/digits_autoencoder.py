"""A deep autoencoder on the 1,797 handwritten digits (8 × 8 pixels) that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from natgrad.cli.tasks.networks import autoencoder, initialise
from natgrad.cli.tasks.task import Data, Task

HELD_OUT = 297  # 1,500 digits to train on


def load_images() -> tuple[Tensor, Tensor]:
    """(1797, 64) grey values in [0, 1] and (1797,) labels, in scikit-learn's order."""
    from sklearn.datasets import load_digits  # takes a second, which other tasks and --help need not wait for

    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def load(directory: Path | None) -> Data:
    """The images as inputs and as targets."""
    images, _ = load_images()
    train, test = images[:-HELD_OUT], images[-HELD_OUT:]
    source = f"scikit-learn's digits: {len(train)} images to train on, {len(test)} held out"
    return Data(train, train, test, test, source)


def model(init: str) -> nn.Module:
    """64-256-128-64-32 with tanh units, and the mirror."""
    return initialise(autoencoder((64, 256, 128, 64, 32), nn.Tanh), init)


def reconstruction_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels, mean over the images."""
    return binary_cross_entropy_with_logits(logits, images, reduction="none").sum(1).mean()


TASK = Task(
    name="digits-autoencoder",
    summary="deep autoencoder on scikit-learn's 8 × 8 digits, no download",
    load=load,
    model=model,
    criterion=nn.BCEWithLogitsLoss,
    measure=reconstruction_loss,
    measured="reconstruction loss (nats per image)",
    batch_size=512,
    seconds=5.0,
    rates={"adamw": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.3, 1.0, 3.0, 10.0)},
)
