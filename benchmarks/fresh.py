"""Data sets beside the study, to see what the defaults do where they were not chosen.

Each was fixed before anything was run on it.

`SEEN` is unseen no more: the share of the Newton step was chosen with a look at some of these, and a penalty on the
weights, which is gone again, with a look at all of them:

- ``diabetes``       scikit-learn's 442 patients, 10 columns, a regression by an MLP 10-64-64-1;
- ``breast_cancer``  scikit-learn's 569 biopsies, 30 columns, two classes, an MLP 30-64-64-2;
- ``friedman1``      4,000 drawn points of scikit-learn's ``make_friedman1`` with noise 1, an MLP 10-128-128-1;
- ``spirals``        4,000 points of two interleaved spirals of two turns, drawn here, an MLP 2-64-64-64-2 with tanh;
- ``friedman3``      4,000 drawn points of scikit-learn's ``make_friedman3`` with noise 0.1, an MLP 4-128-128-1;
- ``clusters``       4,000 points of scikit-learn's ``make_classification``, 20 columns of which 8 inform, five classes,
  one label in twenty drawn anew, an MLP 20-128-128-5;
- ``next_letter``    the letter after eight letters of tiny Shakespeare, an embedding and an MLP 128-128-65;
- ``hastie``         8,000 points of scikit-learn's ``make_hastie_10_2``, two classes, an MLP 10-64-64-2;
- ``swiss_roll``     4,000 points of scikit-learn's ``make_swiss_roll`` with noise 0.5, a regression to the position
  along the roll, an MLP 3-64-64-64-1 with tanh;
- ``friedman2``      4,000 drawn points of scikit-learn's ``make_friedman2`` with noise 50, an MLP 4-128-128-1;
- ``digits_conv``    scikit-learn's 1,797 digits of 8 × 8, two convolutions and two linear layers.

No default was chosen by `UNSEEN`:

- ``s_curve``      4,000 points of scikit-learn's ``make_s_curve`` with noise 0.1, a regression to the position along
  the curve, an MLP 3-64-64-1 with tanh;
- ``quantiles``    6,000 points of scikit-learn's ``make_gaussian_quantiles``, 10 columns, four classes, an MLP
  10-128-128-4;
- ``sparse``       4,000 points of scikit-learn's ``make_sparse_uncorrelated``, 10 columns of which 4 count, with noise
  as large as they are, an MLP 10-64-64-1;
- ``mnist_mlp``    the 10,000 test images of MNIST and their labels, an MLP 784-128-64-10;
- ``other_half``   the right half of scikit-learn's digits from the left, a regression by an MLP 32-128-128-32;
- ``letters_gru``  the letter after 24 letters of tiny Shakespeare, an embedding, a GRU of 64 and a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    make_classification,
    make_friedman1,
    make_friedman2,
    make_friedman3,
    make_gaussian_quantiles,
    make_hastie_10_2,
    make_s_curve,
    make_sparse_uncorrelated,
    make_swiss_roll,
)
from torch import Tensor, nn

from benchmarks.workloads import DATA, Workload, digits, mnist, perceptron


def fresh(name: str, x: Tensor, y: Tensor, sizes: list[int], activation: type[nn.Module], seconds: float) -> Workload:
    """Shuffled, inputs standardised, an eighth held out; the loss by the kind of `y`."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = (x - x.mean(0)) / x.std(0)
    if y.is_floating_point():
        y = ((y - y.mean()) / y.std()).unsqueeze(1)
    cut = len(x) * 7 // 8
    criterion: nn.Module = nn.MSELoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    seen, kept = (x[:cut], y[:cut]), (x[cut:], y[cut:])
    return Workload(name, lambda: perceptron(sizes, activation), criterion, seen, seen, kept, 128, seconds)


def diabetes() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in load_diabetes(return_X_y=True))
    return fresh("diabetes", x, y, [10, 64, 64, 1], nn.ReLU, 3)


def breast_cancer() -> Workload:
    x, y = load_breast_cancer(return_X_y=True)
    return fresh("breast_cancer", torch.tensor(x, dtype=torch.float32), torch.tensor(y), [30, 64, 64, 2], nn.ReLU, 3)


def friedman1() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_friedman1(4000, noise=1.0, random_state=0))
    return fresh("friedman1", x, y, [10, 128, 128, 1], nn.ReLU, 4)


def spirals() -> Workload:
    generator = torch.Generator().manual_seed(0)
    turn = torch.rand(4000, generator=generator).sqrt() * 4 * math.pi
    y = torch.randint(0, 2, (4000,), generator=generator)
    angle = turn + math.pi * y
    x = turn.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * torch.randn(4000, 2, generator=generator)
    return fresh("spirals", x, y, [2, 64, 64, 64, 2], nn.Tanh, 5)


def friedman3() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_friedman3(4000, noise=0.1, random_state=0))
    return fresh("friedman3", x, y, [4, 128, 128, 1], nn.ReLU, 4)


def clusters() -> Workload:
    shape = {"n_features": 20, "n_informative": 8, "n_redundant": 4, "n_classes": 5}
    x, y = make_classification(4000, **shape, flip_y=0.05, random_state=0)
    return fresh("clusters", torch.tensor(x, dtype=torch.float32), torch.tensor(y), [20, 128, 128, 5], nn.ReLU, 4)


def hastie() -> Workload:
    x, y = make_hastie_10_2(8000, random_state=0)
    labels = (torch.tensor(y) > 0).long()
    return fresh("hastie", torch.tensor(x, dtype=torch.float32), labels, [10, 64, 64, 2], nn.ReLU, 4)


def swiss_roll() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_swiss_roll(4000, noise=0.5, random_state=0))
    return fresh("swiss_roll", x, y, [3, 64, 64, 64, 1], nn.Tanh, 4)


def friedman2() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_friedman2(4000, noise=50.0, random_state=0))
    return fresh("friedman2", x, y, [4, 128, 128, 1], nn.ReLU, 4)


def digits_conv() -> Workload:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, labels = ((x[order] - x.mean()) / x.std()).view(-1, 1, 8, 8), torch.tensor(y)[order]
    cut = len(x) * 7 // 8
    seen, kept = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return Workload("digits_conv", small_convnet, nn.CrossEntropyLoss(), seen, seen, kept, 128, 5)


def small_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def letter_net(symbols: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(symbols, 16), nn.Flatten(), *perceptron([128, 128, symbols], nn.ReLU))


def letters(name: str, before: int, model: Callable[[int], nn.Module], batch: int, seconds: float) -> Workload:
    """The letter of tiny Shakespeare after so many others."""
    text = (DATA / "tinyshakespeare.txt").read_text()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([number[c] for c in text])
    cut = len(codes) * 9 // 10
    seen, kept = ((part.unfold(0, before + 1, 5)) for part in (codes[:cut], codes[cut:]))
    pairs = [(w[:, :-1].contiguous(), w[:, -1].contiguous()) for w in (seen, kept)]
    looked_at = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:10_000]
    return Workload(
        name,
        lambda: model(len(number)),
        nn.CrossEntropyLoss(),
        pairs[0],
        (pairs[0][0][looked_at], pairs[0][1][looked_at]),
        (pairs[1][0][:10_000], pairs[1][1][:10_000]),
        batch,
        seconds,
    )


def next_letter() -> Workload:
    return letters("next_letter", 8, letter_net, 256, 8)


def s_curve() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_s_curve(4000, noise=0.1, random_state=0))
    return fresh("s_curve", x, y, [3, 64, 64, 1], nn.Tanh, 4)


def quantiles() -> Workload:
    x, y = make_gaussian_quantiles(n_samples=6000, n_features=10, n_classes=4, random_state=0)
    return fresh("quantiles", torch.tensor(x, dtype=torch.float32), torch.tensor(y), [10, 128, 128, 4], nn.ReLU, 4)


def sparse() -> Workload:
    x, y = (torch.tensor(a, dtype=torch.float32) for a in make_sparse_uncorrelated(4000, random_state=0))
    return fresh("sparse", x, y, [10, 64, 64, 1], nn.ReLU, 4)


def mnist_mlp() -> Workload:
    x, y = mnist()
    seen, kept = (x[:8000], y[:8000]), (x[8000:], y[8000:])
    some = (x[:2000], y[:2000])
    sizes = [784, 128, 64, 10]
    return Workload("mnist_mlp", lambda: perceptron(sizes, nn.ReLU), nn.CrossEntropyLoss(), seen, some, kept, 128, 5)


def other_half() -> Workload:
    images = digits()[0].view(-1, 8, 8)
    left, right = images[:, :, :4].flatten(1), images[:, :, 4:].flatten(1)
    seen, kept = (left[:1497], right[:1497]), (left[1497:], right[1497:])
    sizes = [32, 128, 128, 32]
    return Workload("other_half", lambda: perceptron(sizes, nn.ReLU), nn.MSELoss(), seen, seen, kept, 128, 4)


class LetterReader(nn.Module):
    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.letters, self.rnn = nn.Embedding(symbols, 16), nn.GRU(16, 64, batch_first=True)
        self.head = nn.Linear(64, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.letters(x))[0][:, -1])


def letters_gru() -> Workload:
    return letters("letters_gru", 24, LetterReader, 128, 8)


Makers = dict[str, Callable[[], Workload]]
SEEN: Makers = {
    f.__name__: f
    for f in (
        diabetes, breast_cancer, friedman1, spirals, friedman3, clusters, next_letter, hastie, swiss_roll, friedman2,
        digits_conv,
    )
}  # fmt: skip
UNSEEN: Makers = {f.__name__: f for f in (s_curve, quantiles, sparse, mnist_mlp, other_half, letters_gru)}
FRESH: Makers = SEEN | UNSEEN
