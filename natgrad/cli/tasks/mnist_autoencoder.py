"""A deep autoencoder on MNIST's images, 784-400-200-100-50-25-6 and back, 842,000 parameters.

The network is that of the CURVES problem of Hinton & Salakhutdinov (2006), which Martens (2010) made the test
of second-order methods: thirteen layers of units.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from natgrad.cli.tasks import idx
from natgrad.cli.tasks.digits_autoencoder import reconstruction_loss
from natgrad.cli.tasks.networks import autoencoder, initialise
from natgrad.cli.tasks.task import CommandError, Data, Task

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
HELD_OUT = 1000  # of the 10,000 images of t10k, where they are all there is


def load(directory: Path | None) -> Data:
    """MNIST's images from IDX files; without the training file, t10k is split 9,000 to 1,000.

    Raises:
        CommandError: no directory is named, or the files are not in it.
    """
    wanted = f"{TEST}[.gz] and, for all 60,000 training images, {TRAIN}[.gz]"
    if directory is None:
        raise CommandError(f"mnist-autoencoder reads {wanted}; name their folder with --data-dir or NATGRAD_DATA")
    if not directory.is_dir():
        raise CommandError(f"--data-dir {directory} is not a folder; give the one that holds {wanted}")
    try:
        test_path, train_path = idx.find(directory, TEST), idx.find(directory, TRAIN)
    except OSError as error:
        raise CommandError(f"--data-dir {directory} cannot be read ({error.strerror}); allow reading it") from error
    if test_path is None:
        raise CommandError(f"--data-dir {directory} lacks {TEST}[.gz]; mnist-autoencoder reads {wanted}")
    test = read_images(test_path)
    if train_path is None:
        train, test = test[:-HELD_OUT], test[-HELD_OUT:]
        source = f"{test_path}: {len(train)} images to train on, {len(test)} held out"
    else:
        train = read_images(train_path)
        source = f"{train_path} ({len(train)} images), held out {test_path} ({len(test)})"
    return Data(train, train, test, test, source)


def read_images(path: Path) -> Tensor:
    """(images, 784) grey values in [0, 1].

    Raises:
        CommandError: the file does not hold images of 28 × 28 pixels, and more of them than are held out.
    """
    raw = idx.read(path)
    if raw.dim() != 3 or raw.shape[1:] != (28, 28) or len(raw) <= HELD_OUT:
        raise CommandError(f"{path} has shape {tuple(raw.shape)}; over {HELD_OUT} images of 28 × 28 are needed")
    return raw.flatten(1).float() / 255


def model(init: str) -> nn.Module:
    """784-400-200-100-50-25-6 with tanh units, and the mirror."""
    return initialise(autoencoder((784, 400, 200, 100, 50, 25, 6), nn.Tanh), init)


TASK = Task(
    name="mnist-autoencoder",
    summary="13-layer autoencoder on MNIST's images, IDX files from --data-dir",
    load=load,
    model=model,
    criterion=nn.BCEWithLogitsLoss,
    measure=reconstruction_loss,
    measured="reconstruction loss (nats per image)",
    batch_size=512,
    seconds=6.0,
    rates={"adamw": (3e-4, 1e-3, 3e-3, 1e-2), "sgd": (0.3, 1.0, 3.0, 10.0)},
)
