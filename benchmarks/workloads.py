"""The workloads: data, model, loss and metric of each, all offline.

Data that is not shipped with scikit-learn or drawn here comes from a folder named by ``NATGRAD_DATA`` (MNIST test
images, tiny Shakespeare, UCI tables).
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad as ng
from benchmarks.rivals import Hyper, Rival
from natgrad.operators import laplacian

DATA = Path(os.environ.get("NATGRAD_DATA", Path(__file__).parents[2] / "shared" / "data"))


@dataclass
class Workload:
    """One training problem. Evaluation is by the mean of `metric` over `train_eval` and `valid`; lower is better."""

    name: str
    model: Callable[[], nn.Module]
    criterion: nn.Module
    train: tuple[Tensor, Tensor]
    train_eval: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    batch: int
    seconds: float  # CPU budget of one run
    unit: float = 1.0  # the loss is reported times this (784: a sum over pixels)

    def build(self, rival: Rival, model: nn.Module, hyper: Hyper) -> list[torch.optim.Optimizer]:
        return rival.build(model, self.criterion, hyper)

    def step(self, opts: Sequence[torch.optim.Optimizer], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """One step on a batch: the loss before it, and the forward-backwards it took."""
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            for opt in opts:
                opt.zero_grad()
            loss = self.loss(model, x, y)
            loss.backward()
            return loss

        if isinstance(opts[0], torch.optim.LBFGS):
            return torch.as_tensor(opts[0].step(closure)), calls
        loss = closure()
        for opt in opts:
            opt.step()
        return loss.detach(), calls

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = model(x)
        return self.criterion(out.flatten(0, -2), y.flatten()) if out.dim() == 3 else self.criterion(out, y)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.train[0]), (self.batch,), generator=generator)
        return self.train[0][index], self.train[1][index]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        model.eval()
        total = 0.0
        for x, y in zip(data[0].split(1000), data[1].split(1000)):
            total += float(self.loss(model, x, y)) * len(x)
        model.train()
        return self.unit * total / len(data[0])


def perceptron(sizes: list[int], activation: type[nn.Module], xavier: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        linear = nn.Linear(a, b)
        if xavier:
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def mirror(*sizes: int) -> list[int]:
    return [*sizes, *sizes[-2::-1]]


def mnist() -> tuple[Tensor, Tensor]:
    """The 10,000 test images (10000, 784) in [0, 1] and their labels."""
    folder = DATA / "mnist_t10k"
    images = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.tensor(images.reshape(-1, 784) / 255, dtype=torch.float32), torch.tensor(labels, dtype=torch.long)


def autoencoder(
    name: str, data: Tensor, split: int, sizes: list[int], batch: int, seconds: float, xavier: bool = False
) -> Workload:
    train, valid = data[:split], data[split:]
    return Workload(
        name,
        lambda: perceptron(sizes, nn.Tanh, xavier),
        nn.BCEWithLogitsLoss(),
        (train, train),
        (train[:2000], train[:2000]),
        (valid, valid),
        batch,
        seconds,
        unit=float(data.shape[1]),
    )


def digits_autoencoder() -> Workload:
    return autoencoder("digits_ae", digits()[0], 1497, mirror(64, 128, 64, 32, 10), 256, 5)


MNIST_SIZES = mirror(784, 400, 200, 100, 50, 25, 6)


def mnist_autoencoder() -> Workload:
    return autoencoder("mnist_ae", mnist()[0], 8000, MNIST_SIZES, 512, 10)


def mnist_autoencoder_xavier() -> Workload:
    return autoencoder("mnist_ae_xavier", mnist()[0], 8000, MNIST_SIZES, 512, 10, xavier=True)


def curves(count: int, seed: int = 0) -> Tensor:
    """Cubic Bézier curves through four random points, drawn with a soft pen on 28 × 28: (count, 784) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 4, 2, generator=generator) * 22 + 3
    t = torch.linspace(0, 1, 40)
    basis = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])  # (4, 40)
    path = torch.einsum("npc,pt->ntc", points, basis)  # (count, 40, 2)
    grid = torch.arange(28.0)
    dx = torch.exp(-0.5 * (path[:, :, 0, None] - grid) ** 2 / 0.6**2)  # (count, 40, 28)
    dy = torch.exp(-0.5 * (path[:, :, 1, None] - grid) ** 2 / 0.6**2)
    return (dy.unsqueeze(-1) * dx.unsqueeze(-2)).amax(1).flatten(1).clamp(0, 1)


def curves_autoencoder() -> Workload:
    return autoencoder("curves_ae", curves(6000), 5000, MNIST_SIZES, 512, 10)


def small_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def convnet() -> Workload:
    x, y = mnist()
    x = x.reshape(-1, 1, 28, 28)
    return Workload(
        "convnet",
        small_convnet,
        nn.CrossEntropyLoss(),
        (x[:8000], y[:8000]),
        (x[:2000], y[:2000]),
        (x[8000:], y[8000:]),
        128,
        6,
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, t, d))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CharTransformer(nn.Module):
    def __init__(self, vocabulary: int, width: int = 128, heads: int = 4, layers: int = 3, context: int = 96) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        return self.head(self.norm(self.layers(h)))


def transformer(batch: int, seconds: float) -> Workload:
    text = (DATA / "tinyshakespeare.txt").read_text()
    symbols = sorted(set(text))
    codes = torch.tensor([symbols.index(c) for c in text])
    cut, context = int(0.9 * len(codes)), 96

    def windows(part: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        w = part.unfold(0, context + 1, stride)
        return w[:, :-1], w[:, 1:]

    train, valid = windows(codes[:cut], 7), windows(codes[cut:], context)
    some = windows(codes[:cut], 8009)
    valid = (valid[0][:128], valid[1][:128])
    return Workload(
        f"transformer_{batch}",
        lambda: CharTransformer(len(symbols)),
        nn.CrossEntropyLoss(),
        train,
        some,
        valid,
        batch,
        seconds,
    )


def table(file: str, separator: str | None, header: int = 0) -> tuple[Tensor, Tensor]:
    """A UCI table, standardised, target last, shuffled."""
    raw = np.loadtxt(DATA / "uci" / file, delimiter=separator, skiprows=header)
    order = np.random.default_rng(0).permutation(len(raw))
    values = torch.tensor(raw[order], dtype=torch.float32)
    values = (values - values.mean(0)) / values.std(0)
    return values[:, :-1], values[:, -1:]


def tabular(name: str, file: str, separator: str | None, header: int, seconds: float) -> Workload:
    x, y = table(file, separator, header)
    cut = int(0.9 * len(x))
    sizes = [x.shape[1], 128, 128, 128, 1]
    return Workload(
        name,
        lambda: perceptron(sizes, nn.ReLU),
        nn.MSELoss(),
        (x[:cut], y[:cut]),
        (x[:cut], y[:cut]),
        (x[cut:], y[cut:]),
        128,
        seconds,
    )


def concrete() -> Workload:
    return tabular("concrete", "concrete.txt", None, 0, 2)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits (1797, 64) in [0, 1], shuffled, and their labels."""
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def digits_classifier() -> Workload:
    x, y = digits()
    train, valid = (x[:1497], y[:1497]), (x[1497:], y[1497:])
    return Workload(
        "digits_classifier",
        lambda: perceptron([64, 128, 128, 10], nn.Tanh),
        nn.CrossEntropyLoss(),
        train,
        train,
        valid,
        128,
        3,
    )


class RowReader(nn.Module):
    """A recurrent net that reads an 8 × 8 digit row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def recurrent() -> Workload:
    flat, y = digits()
    x = flat.view(-1, 8, 8)
    return Workload(
        "recurrent",
        RowReader,
        nn.CrossEntropyLoss(),
        (x[:1497], y[:1497]),
        (x[:1497], y[:1497]),
        (x[1497:], y[1497:]),
        128,
        3,
    )


class Pinn(Workload):
    """−Δu = f on the unit square, u = 0 on its edge, all points in every batch; the metric is the relative L2 error."""

    def terms(self, model: nn.Module) -> dict[str, Callable[..., Tensor]]:
        return {"interior": lambda u, x, f: laplacian(u, x) + f, "boundary": lambda u, x: u(x)}

    def build(self, rival: Rival, model: nn.Module, hyper: Hyper) -> list[torch.optim.Optimizer]:
        if rival.name == "natgrad":
            return [ng.NaturalGradient(ng.GaussNewton(model, self.terms(model)))]
        return super().build(rival, model, hyper)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.train

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """½ mean of the squared residuals, inside and on the edge: what `GaussNewton` minimises."""
        terms = self.terms(model)
        inside = torch.func.vmap(lambda x, f: terms["interior"](model, x, f))(x, source(x))
        edge = torch.func.vmap(lambda x: terms["boundary"](model, x))(y)
        return 0.5 * (inside.square().mean() + edge.square().mean())

    def step(self, opts: Sequence[torch.optim.Optimizer], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        if isinstance(opts[0], ng.NaturalGradient):
            return torch.as_tensor(opts[0].step({"interior": (x, source(x)), "boundary": y})), 1
        return super().step(opts, model, x, y)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        x, u = data
        if x.shape[1:] == u.shape[1:]:  # interior and edge points
            return float(self.loss(model, x, u))
        return float((model(x) - u).norm() / u.norm())


def source(x: Tensor) -> Tensor:
    return 2 * math.pi**2 * torch.sin(math.pi * x).prod(-1, keepdim=True)


def pinn() -> Workload:
    generator = torch.Generator().manual_seed(0)
    inside, test = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (400, 2000))
    edge = torch.rand(120, 2, generator=generator, dtype=torch.float64)
    edge[torch.arange(120), torch.arange(120) % 2] = (torch.arange(120) // 2 % 2).double()
    exact = torch.sin(math.pi * test).prod(1, keepdim=True)
    points = (inside, edge)
    return Pinn(
        "pinn",
        lambda: perceptron([2, 64, 64, 48, 48, 1], nn.Tanh).double(),
        nn.MSELoss(),
        points,
        points,
        (test, exact),
        520,
        3,
    )


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits_ae": digits_autoencoder,
    "mnist_ae": mnist_autoencoder,
    "mnist_ae_xavier": mnist_autoencoder_xavier,
    "curves_ae": curves_autoencoder,
    "convnet": convnet,
    "transformer_32": lambda: transformer(32, 10),
    "transformer_256": lambda: transformer(256, 12),
    "concrete": concrete,
    "power_plant": lambda: tabular("power_plant", "power-plant.txt", None, 0, 5),
    "wine": lambda: tabular("wine", "wine-quality-red.txt", None, 0, 3),
    "digits_classifier": digits_classifier,
    "recurrent": recurrent,
    "pinn": pinn,
}
STUDY = ("mnist_ae", "curves_ae", "convnet", "transformer_32", "transformer_256", "concrete", "recurrent", "pinn")
