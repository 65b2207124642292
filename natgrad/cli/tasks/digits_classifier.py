"""A small classifier of the 1,797 handwritten digits that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.nn.functional import cross_entropy

from natgrad.cli.tasks.digits_autoencoder import HELD_OUT, load_images
from natgrad.cli.tasks.networks import initialise, perceptron
from natgrad.cli.tasks.task import Data, Task


def load(directory: Path | None) -> Data:
    """The images as inputs, the digits as targets."""
    images, labels = load_images()
    train, test = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    source = f"scikit-learn's digits: {len(images) - HELD_OUT} images to train on, {HELD_OUT} held out"
    return Data(images[train], labels[train], images[test], labels[test], source)


def model(init: str) -> nn.Module:
    """64-128-64-10 with tanh units."""
    return initialise(perceptron((64, 128, 64, 10), nn.Tanh), init)


TASK = Task(
    name="digits-classifier",
    summary="classifier of scikit-learn's 8 × 8 digits, no download",
    load=load,
    model=model,
    criterion=nn.CrossEntropyLoss,
    measure=cross_entropy,
    measured="cross-entropy (nats per image)",
    batch_size=256,
    seconds=3.0,
    rates={"adamw": (1e-3, 3e-3, 1e-2, 3e-2), "sgd": (0.03, 0.1, 0.3, 1.0)},
)
