"""What must not matter does not: how a batch is split, how a loss is reduced, in which coordinates a layer is.

20 steps in float64 with the exact kind. The default step rule is invariant to orthogonal changes of a layer's
coordinates; the undamped natural gradient to all linear ones (Martens 2020, arXiv:1412.1193, §9).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import Batch, batches, classifier, distance, natural, train, weights

import natgrad as ng

STEPS = 20
BOUND = 1e-9
RULES: dict[str, Any] = {
    "default": lambda: None,
    "fixed": lambda: ng.FixedStep(lr=0.05, momentum=0.5, damping=0.1),
    "trust region": lambda: ng.KLTrustRegion(radius=0.01),
}
each_rule = pytest.mark.parametrize("rule", RULES)
STRUCTURES = ("kfac", "dense", "block", "diagonal")


def trained(
    data: list[Batch], rule: str = "default", structure: str = "kfac", reduction: str = "mean", **options: Any
) -> dict[str, Tensor]:
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(reduction=reduction), kind="exact", structure=structure)
    train(model, ng.NaturalGradient(metric, step=RULES[rule](), **options), data)
    return weights(model)


@each_rule
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_batch_repeated_twice(rule: str, structure: str) -> None:
    data = list(batches(STEPS))
    twice = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data]
    assert distance(trained(data, rule, structure), trained(twice, rule, structure)) <= BOUND


@each_rule
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sizes", [(8, 8), (1, 5, 10)])
def test_a_batch_split_into_micro_batches(rule: str, structure: str, sizes: tuple[int, ...]) -> None:
    data = list(batches(STEPS, size=16))
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure)
    opt = ng.NaturalGradient(metric, step=RULES[rule]())
    for x, y in data:
        opt.zero_grad()
        for part, labels in zip(x.split(sizes), y.split(sizes)):
            (metric.criterion(model(part), labels) * len(part) / len(x)).backward()
        opt.step()
    assert distance(trained(data, rule, structure), weights(model)) <= BOUND


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_summed_loss(structure: str) -> None:
    """The default rule measures both lr and damping in units of its own: nothing needs scaling."""
    data = list(batches(STEPS, size=16))
    assert distance(trained(data, structure=structure), trained(data, structure=structure, reduction="sum")) <= BOUND


@pytest.mark.parametrize("rule", ["fixed", "trust region"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_summed_loss_with_damping_and_radius_to_match(rule: str, structure: str) -> None:
    """Metric and gradient are 16 times as large, so λ and the radius (of a divergence that adds) are; η stays."""
    data = list(batches(STEPS, size=16))
    mean = trained(data, rule, structure)
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(reduction="sum"), kind="exact", structure=structure)
    made = RULES[rule]()
    if rule == "trust region":
        made.radius *= 16
    train(model, ng.NaturalGradient(metric, step=made, damping=made.damping * 16), data)
    assert distance(mean, weights(model)) <= BOUND


class Recoordinated(nn.Module):
    """4-6-3, whose first layer lives in other coordinates: W = R⁻¹ W' S, b = R⁻¹ b'."""

    def __init__(self, left: Tensor, right: Tensor, d_out: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, d_out).double()
        self.left_inverse, self.right = torch.linalg.inv(left), right
        with torch.no_grad():
            self.first.weight.copy_(left @ self.first.weight @ torch.linalg.inv(right))
            self.first.bias.copy_(left @ self.first.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x @ self.right.mT) @ self.left_inverse.mT).tanh())

    def plain(self) -> dict[str, Tensor]:
        """The weights in the first coordinates."""
        found = weights(self)
        found["first.weight"] = self.left_inverse @ found["first.weight"] @ self.right
        found["first.bias"] = self.left_inverse @ found["first.bias"]
        return found


def in_coordinates(left: Tensor, right: Tensor, opt_of: Any, data: list[Batch], d_out: int) -> dict[str, Tensor]:
    model = Recoordinated(left, right, d_out)
    train(model, opt_of(model), data)
    return model.plain()


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def general(n: int) -> Tensor:
    """Singular values from ⅓ to 3."""
    return orthogonal(n) @ torch.diag(torch.logspace(-0.477, 0.477, n, dtype=torch.float64)) @ orthogonal(n)


@each_rule
@pytest.mark.parametrize("structure", ["kfac", "dense", "block"])
def test_orthogonal_changes_of_a_layers_coordinates(rule: str, structure: str) -> None:
    data = list(batches(STEPS))

    def opt_of(model: nn.Module) -> ng.NaturalGradient:
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure)
        return ng.NaturalGradient(metric, step=RULES[rule]())

    one = in_coordinates(eye(6), eye(4), opt_of, data, 3)
    two = in_coordinates(orthogonal(6), orthogonal(4), opt_of, data, 3)
    assert distance(one, two) <= BOUND


@pytest.mark.parametrize("structure", ["kfac", "dense", "block"])
def test_general_linear_changes_of_a_layers_coordinates(structure: str) -> None:
    truth = torch.randn(4, 3, dtype=torch.float64)
    data = [(x, (x @ truth).sin()) for x, _ in batches(STEPS, size=60)]

    def opt_of(damping: float) -> Any:
        return lambda model: ng.NaturalGradient(
            ng.Fisher(model, nn.MSELoss(), kind="exact", structure=structure),
            step=ng.FixedStep(lr=0.2, damping=damping),
        )

    def error(damping: float) -> float:
        torch.manual_seed(0)
        one = in_coordinates(eye(6), eye(4), opt_of(damping), data, 3)
        return distance(one, in_coordinates(general(6), general(4), opt_of(damping), data, 3))

    assert error(1e-12) <= 1e-5
    assert error(1e-2) > 1e-3  # damping is what breaks it


def test_the_default_is_not_invariant_to_what_it_should_not_be() -> None:
    data = list(batches(STEPS))
    one = in_coordinates(eye(6), eye(4), natural, data, 3)
    assert distance(one, in_coordinates(general(6), general(4), natural, data, 3)) > 1e-3
    assert distance(trained(data), trained([(x, y.flip(0)) for x, y in data])) > 1e-3
