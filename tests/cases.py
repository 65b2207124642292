"""The lists that the contract suites run over: criteria × structures × kinds × models, small and in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STRUCTURES = ("dense", "block", "diagonal", "kfac")
KINDS = ("exact", "sampled", "empirical")
REDUCTIONS = ("mean", "sum")
ONE, UNEQUAL = (5,), (3, 1, 4)  # sizes of batches

D_IN, CLASSES = 3, 3


def mlp(d_out: int = CLASSES, d_in: int = D_IN, hidden: int = 4, last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, d_out)]
    return nn.Sequential(*layers, *([last] if last is not None else [])).double()


class PerPosition(nn.Module):
    """Linear layers on (N, T, D): outputs (N, C, T) as `nn.CrossEntropyLoss` wants them, or (N, T, C)."""

    def __init__(self, classes_first: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(D_IN, 4).double(), nn.Linear(4, CLASSES).double()
        self.classes_first = classes_first

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x).tanh())
        return out.movedim(-1, 1) if self.classes_first else out


@dataclass(frozen=True)
class Case:
    """A model, a criterion and labels for it; its exact metric is the Gauss–Newton matrix of the criterion."""

    name: str
    model: Callable[[], nn.Module]
    criterion: Callable[[str], nn.Module]  # reduction → criterion
    labels: Callable[[int, torch.Generator], Tensor]  # number of data → targets
    shape: tuple[int, ...] = (D_IN,)  # of one datum
    output: Callable[[Any], Any] | None = None

    def batches(self, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(3)
        return [(torch.randn(n, *self.shape, dtype=torch.float64, generator=g), self.labels(n, g)) for n in sizes]

    def __str__(self) -> str:
        return self.name


def classes(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randint(CLASSES, (n, *shape), generator=g)


def flat_classes(positions: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randint(CLASSES, (n * positions,), generator=g)


def probabilities(n: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, CLASSES, dtype=torch.float64, generator=g).softmax(1)


def binary(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randint(2, (n, *shape), generator=g).double()


def normal(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randn(n, *shape, dtype=torch.float64, generator=g)


def counts(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(5, (n, CLASSES), generator=g).double()


W = torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)
POS = torch.tensor([2.0, 0.5, 1.3], dtype=torch.float64)


def ce(**options: Any) -> Callable[[str], nn.Module]:
    return lambda reduction: nn.CrossEntropyLoss(reduction=reduction, **options)


def bce(**options: Any) -> Callable[[str], nn.Module]:
    return lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction, **options)


def squared(reduction: str) -> nn.Module:
    return nn.MSELoss(reduction=reduction)


def rows(out: Tensor) -> Tensor:
    """(N, T, C) → (N·T, C), as language models do before the loss."""
    return out.flatten(0, 1)


def per_position() -> nn.Module:
    return PerPosition(False)


def classes_first() -> nn.Module:
    return PerPosition(True)


def whole(reduction: str) -> nn.Module:
    return nn.PoissonNLLLoss(reduction=reduction)


GAUSS_NEWTON = [
    Case("ce", mlp, ce(), classes()),
    Case("ce-weight", mlp, ce(weight=W), classes()),
    Case("ce-ignore", mlp, ce(ignore_index=1), classes()),
    Case("ce-smoothing", mlp, ce(label_smoothing=0.2), classes()),
    Case("ce-weight-smoothing", mlp, ce(weight=W, label_smoothing=0.2), classes()),
    Case("ce-weight-ignore-smoothing", mlp, ce(weight=W, ignore_index=0, label_smoothing=0.1), classes()),
    Case("ce-probabilities", mlp, ce(), probabilities),
    Case("ce-probabilities-weight-smoothing", mlp, ce(weight=W, label_smoothing=0.1), probabilities),
    Case("ce-NCd", classes_first, ce(), classes(2), (2, D_IN)),
    Case("ce-NCd-weight-ignore", classes_first, ce(weight=W, ignore_index=2), classes(2), (2, D_IN)),
    Case("ce-NCdd-smoothing", classes_first, ce(label_smoothing=0.1), classes(2, 2), (2, 2, D_IN)),
    Case("ce-NTC-flattened", per_position, ce(), flat_classes(2), (2, D_IN), rows),
    Case("ce-NTC-flattened-ignore", per_position, ce(ignore_index=1), flat_classes(2), (2, D_IN), rows),
    Case("mse", mlp, squared, normal(CLASSES)),
    Case("mse-NTC", per_position, squared, normal(2, CLASSES), (2, D_IN)),
    Case("bce", mlp, bce(), binary(CLASSES)),
    Case("bce-weight", mlp, bce(weight=W), binary(CLASSES)),
    Case("bce-pos-weight", mlp, bce(pos_weight=POS), binary(CLASSES)),
    Case("bce-weight-pos-weight", mlp, bce(weight=W, pos_weight=POS), binary(CLASSES)),
    Case("bce-NTC-pos-weight", per_position, bce(pos_weight=POS), binary(2, CLASSES), (2, D_IN)),
    Case("poisson", mlp, whole, counts),
]


def case(name: str) -> Case:
    return next(c for c in GAUSS_NEWTON if c.name == name)


PLAIN = [case(n) for n in ("ce", "ce-weight-ignore-smoothing", "mse", "bce-pos-weight", "poisson")]
