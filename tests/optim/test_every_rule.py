"""The battery of step rules: each descends, goes on from its state, keeps to its groups and refuses what it cannot use.

The problem is least squares with a known solution, so that every metric here is the same matrix. A new rule is one line
in `RULES`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from training_cases import same

import natgrad as ng
from natgrad.optim import registry
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.line_search import GridSearch
from natgrad.optim.step_rule import StepRule

# raised inside torch where forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

F64 = torch.float64
G = torch.Generator().manual_seed(4)
X = torch.randn(24, 5, generator=G, dtype=F64) * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1], dtype=F64)
Y = X @ torch.randn(5, 1, generator=G, dtype=F64) + 0.1 * torch.randn(24, 1, generator=G, dtype=F64)


class Line(NamedTuple):
    make: Callable[[], StepRule]
    searches: bool = False  # on a metric that knows the loss at trial points
    full: bool = False  # is made with the full batch, and takes no other
    groups: bool = True  # takes groups whose rates differ
    closure: bool = False  # tries lengths by calling the closure
    to: float = 1e-3  # the share of the loss that may be left after 60 steps


RULES: dict[str, Line] = {
    "normalised": Line(ng.NormalisedStep),
    "fixed": Line(lambda: ng.FixedStep(lr=0.5, momentum=0.5)),
    "kl trust region": Line(lambda: ng.KLTrustRegion(lr=0.5, radius=0.1), to=0.1),
    "grafted": Line(lambda: ng.Grafted(lr=0.05), to=0.1),
    "exact quadratic": Line(lambda: ng.ExactQuadratic(X, Y), full=True, groups=False),
    "natural policy gradient": Line(lambda: ng.NaturalPolicyGradient(radius=0.1, damping=1e-3), closure=True),
    "grid search": Line(GridSearch, searches=True, groups=False),
    "levenberg marquardt": Line(LevenbergMarquardt, searches=True, groups=False),
    "spring": Line(lambda: ng.Spring(lr=0.3, momentum=0.5), searches=True, groups=False, to=0.1),
    "trust region": Line(lambda: ng.TrustRegion(lr=1.0, radius=1.0), searches=True, groups=False, to=0.1),
}
each = pytest.mark.parametrize("name", RULES)


class Problem:
    """A model, an optimizer of it, and what one step is."""

    def __init__(self, name: str, **options: Any) -> None:
        line = RULES[name]
        torch.manual_seed(7)
        self.model, self.rule, self.searches = nn.Linear(5, 1).double(), line.make(), line.searches
        self.criterion, self.line = nn.MSELoss(), line
        metric: Any
        if line.searches:
            metric = ng.GaussNewton(self.model, {"fit": lambda u, x, y: u(x) - y}, solver="dense")
        else:
            metric = ng.Fisher(self.model, self.criterion, kind="exact", structure="dense")
        self.opt = ng.NaturalGradient(metric, step=self.rule, **{"weight_decay": 0.0, **options})

    def step(self, x: Tensor = X, y: Tensor = Y) -> float:
        if self.searches:
            return float(self.opt.step({"fit": (x, y[:, 0])}))

        def closure() -> Tensor:
            self.opt.zero_grad()
            loss = self.criterion(self.model(x), y)
            loss.backward()
            return loss

        if self.line.closure:
            return float(self.opt.step(closure).detach())
        loss = closure()
        self.opt.step()
        return float(loss.detach())

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def excess(self) -> float:
        """The loss above its minimum."""
        ones = torch.cat([X, torch.ones(len(X), 1, dtype=F64)], dim=1)
        best = torch.linalg.lstsq(ones, Y).solution
        with torch.no_grad():
            return float(self.criterion(self.model(X), Y) - self.criterion(ones @ best, Y))


def test_every_rule_has_a_line() -> None:
    """Those that metrics may name, and those with a public name."""
    assert set(registry.RULES) <= set(RULES)
    public = {v for n in ng.__all__ if isinstance(v := getattr(ng, n), type) and issubclass(v, StepRule)} - {StepRule}
    assert public <= {type(line.make()) for line in RULES.values()}


@each
def test_it_descends_a_quadratic(name: str) -> None:
    problem = Problem(name)
    start = problem.excess()
    for _ in range(60):
        problem.step()
    assert problem.excess() <= RULES[name].to * start
    assert math.isfinite(float(problem.opt.info["damping"]))
    assert problem.opt.info["steps"] == 60


@each
@pytest.mark.parametrize("stop", [1, 9])
def test_it_goes_on_from_its_state_bit_for_bit(name: str, stop: int) -> None:
    straight, again = Problem(name), Problem(name)
    parts = [(X, Y) if RULES[name].full else (X[i % 3 :: 3], Y[i % 3 :: 3]) for i in range(20)]
    for part in parts[:stop]:
        straight.step(*part)
    state = copy.deepcopy((straight.model.state_dict(), straight.opt.state_dict()))
    again.model.load_state_dict(state[0])
    again.opt.load_state_dict(state[1])
    assert same(again.opt.state_dict()["natgrad"], state[1]["natgrad"])
    assert [straight.step(*p) for p in parts[stop:]] == [again.step(*p) for p in parts[stop:]]
    assert torch.equal(straight.weights(), again.weights())
    assert same(again.opt.state_dict()["natgrad"], straight.opt.state_dict()["natgrad"])


@each
def test_a_gradient_of_zero_moves_nothing(name: str) -> None:
    problem = Problem(name)
    before = problem.weights()
    with torch.no_grad():
        y = problem.model(X)
    for _ in range(3):
        problem.step(X, y)
    assert float((problem.weights() - before).abs().max()) < 1e-12
    assert all(bool(torch.isfinite(p).all()) for p in problem.model.parameters())
    problem.step()
    assert bool(torch.isfinite(problem.weights()).all())
    assert not torch.equal(problem.weights(), before)


@each
def test_groups_have_their_own_rates_or_are_refused(name: str) -> None:
    problem = Problem(name, groups=[{"params": "bias", "lr": 0.0}])
    bias = problem.model.bias.detach().clone()
    if name == "normalised":  # the weight and bias of a layer share a block, which takes one step
        with pytest.raises(ValueError, match="one lr in one step for the block of"):
            problem.step()
        return
    if not RULES[name].groups:
        with pytest.raises(ValueError, match="needs one lr for all parameter groups"):
            problem.step()
        return
    before = problem.model.weight.detach().clone()
    problem.step()
    assert torch.equal(problem.model.bias, bias)
    assert not torch.equal(problem.model.weight, before)


@each
def test_a_rate_of_zero_moves_nothing(name: str) -> None:
    problem = Problem(name, lr=0.0)
    before = problem.weights()
    problem.step()
    assert torch.equal(problem.weights(), before)


@each
@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", math.nan), ("momentum", 1.0), ("damping", 0.0), ("damping", -1.0), ("weight_decay", -0.1)],
)
def test_options_out_of_range_are_refused_by_name(name: str, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be"):
        Problem(name, **{option: value})
    problem = Problem(name)
    problem.opt.param_groups[0][option] = value  # as a schedule may
    before = problem.weights()
    with pytest.raises(ValueError, match=f"{option} must be"):
        problem.step()
    assert torch.equal(problem.weights(), before)


@each
def test_the_state_of_another_rule_is_refused(name: str) -> None:
    other = next(n for n in RULES if RULES[n].searches == RULES[name].searches and n != name)
    stranger, problem = Problem(other), Problem(name)
    problem.step()
    before = copy.deepcopy(problem.opt.state_dict())
    with pytest.raises(ValueError, match="the state is of the step rule"):
        problem.opt.load_state_dict(stranger.opt.state_dict())
    assert same(problem.opt.state_dict()["natgrad"], before["natgrad"])


@each
def test_a_copy_goes_on_as_the_first_does(name: str) -> None:
    problem = Problem(name)
    problem.step()
    if RULES[name].searches:  # whose metric is made of functions that may mean the model
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(problem)
        return
    twin = copy.deepcopy(problem)
    assert [problem.step() for _ in range(5)] == [twin.step() for _ in range(5)]
    assert torch.equal(problem.weights(), twin.weights())


@each
def test_its_defaults_are_those_in_force(name: str) -> None:
    problem = Problem(name)
    assert problem.opt.info["damping_meaning"]
    (group,) = problem.opt.param_groups
    assert (group["lr"], group["momentum"], group["damping"]) == (
        problem.rule.lr,
        problem.rule.momentum,
        problem.rule.damping,
    )


class Plain(StepRule):
    """The least that a rule of one's own is."""

    lr, damping = 0.1, 0.5

    def update(self, metric: Any, df: Any, context: Any) -> dict[str, Tensor]:
        return {n: -self.lr * d for n, d in metric.sharp(df, self.damping).items()}


def test_a_rule_of_ones_own_is_one_method() -> None:
    model = nn.Linear(5, 1).double()
    opt = ng.NaturalGradient(ng.Euclidean(model), step=Plain())
    before = model.weight.detach().clone()
    nn.functional.mse_loss(model(X), Y).backward()
    opt.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * model.weight.grad / 1.5)
    assert [opt.info[k] for k in ("damping", "step_length")] == [0.5, 0.1]
    assert opt.state_dict()["natgrad"]["rule_state"] == {}
