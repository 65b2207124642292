"""NaturalPolicyGradient against its definition, with divergences of `torch.distributions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

import natgrad as ng

torch.set_num_threads(1)
F64 = torch.float64
G = torch.Generator().manual_seed(3)
STATES = torch.randn(200, 4, generator=G, dtype=F64)
ADVANTAGES = torch.randn(200, generator=G, dtype=F64)
RADIUS = 0.01


def actor(outputs: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def normal(f: Tensor) -> td.Distribution:
    return td.Independent(td.Normal(f[:, :2], (0.3 * f[:, 2:]).exp()), 1)


POLICIES: dict[str, Callable[[Tensor], td.Distribution]] = {
    "categorical": lambda f: td.Categorical(logits=f),
    "normal": normal,
    "bernoulli": lambda f: td.Independent(td.Bernoulli(logits=f), 1),
    "poisson": lambda f: td.Independent(td.Poisson(f.exp()), 1),
}


class Agent:
    """A policy, a batch of actions that it took, and the surrogate of TRPO."""

    def __init__(self, policy: str = "categorical", structure: str = "kfac", **options: Any) -> None:
        self.policy, self.net = POLICIES[policy], actor(4)
        kind = "sampled" if options.pop("sampled", False) else "exact"
        metric = ng.Fisher(self.net, ng.Likelihood(self.policy), kind=kind, structure=structure)
        given = {k: options.pop(k) for k in ("lr", "weight_decay", "maximize", "refresh") if k in options}
        rule = ng.NaturalPolicyGradient(**{"radius": RADIUS, **options})
        self.opt, self.calls = ng.NaturalGradient(metric, step=rule, **given), 0
        self.act()

    def now(self) -> td.Distribution:
        with torch.no_grad():
            return self.policy(self.net(STATES))

    def act(self) -> None:
        torch.manual_seed(5)
        self.old = self.now()
        self.actions = self.old.sample()
        self.log_prob = self.old.log_prob(self.actions)

    def value(self) -> float:
        with torch.no_grad():
            return -float((ADVANTAGES * (self.now().log_prob(self.actions) - self.log_prob).exp()).mean())

    def surrogate(self) -> Tensor:
        self.calls += 1
        self.opt.zero_grad()
        log_prob = self.policy(self.net(STATES)).log_prob(self.actions)
        loss = -(ADVANTAGES * (log_prob - self.log_prob).exp()).mean()
        loss.backward()
        return loss

    def moved(self) -> float:
        return float(td.kl_divergence(self.old, self.now()).mean())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("structure", ["kfac", "dense", "diagonal"])
def test_a_step_is_at_the_radius_and_lowers_the_surrogate(policy: str, structure: str) -> None:
    agent = Agent(policy, structure)
    for _ in range(4):
        agent.act()
        before = agent.value()
        agent.opt.step(agent.surrogate)
        info = agent.opt.info
        assert info["accepted"]
        assert agent.moved() == pytest.approx(info["kl"], rel=1e-9)
        assert agent.moved() <= RADIUS
        if not info["tries"]:
            assert agent.moved() >= 0.95 * RADIUS
        assert agent.value() == pytest.approx(info["loss_after"], rel=1e-12)
        assert info["loss"] == pytest.approx(before, rel=1e-12, abs=1e-12)
        assert agent.value() < before


def test_the_direction_is_the_natural_gradient() -> None:
    agent = Agent(structure="dense", damping=1e-3)
    before = torch.cat([p.detach().flatten() for p in agent.net.parameters()])
    agent.opt.step(agent.surrogate)
    step = torch.cat([p.detach().flatten() for p in agent.net.parameters()]) - before

    df = torch.cat([p.grad.flatten() for p in agent.net.parameters()])  # of the first call, at the old policy
    twin = actor(4)  # without hooks
    shapes = {n: p.shape for n, p in twin.named_parameters()}

    def mean_kl(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes.values()])
        f = torch.func.functional_call(twin, {n: t.reshape(s) for t, (n, s) in zip(parts, shapes.items())}, (STATES,))
        return td.kl_divergence(td.Categorical(logits=agent.old.logits), td.Categorical(logits=f)).mean()

    fisher = torch.autograd.functional.hessian(mean_kl, before)
    expected = -torch.linalg.solve(fisher + 1e-3 * torch.eye(len(df), dtype=F64), df)
    assert float(step @ expected / step.norm() / expected.norm()) == pytest.approx(1, abs=1e-9)


def test_a_surrogate_that_rises_shortens_the_step_and_then_drops_it() -> None:
    agent = Agent(backtracks=3)
    weights = [p.detach().clone() for p in agent.net.parameters()]
    wall: list[float] = []

    def stubborn() -> Tensor:
        loss = agent.surrogate()
        far = max(float((p - w).detach().abs().max()) for p, w in zip(agent.net.parameters(), weights))
        wall.append(far)
        return loss + (1e3 if far else 0.0)

    grads = None
    agent.opt.step(stubborn)
    assert len(wall) == 1 + 4  # at the parameters as they are, and at four lengths
    assert wall[1:] == pytest.approx([wall[1] * 0.8**k for k in range(4)])
    assert not agent.opt.info["accepted"]
    assert agent.opt.info["kl"] == 0
    assert all(torch.equal(p, w) for p, w in zip(agent.net.parameters(), weights))
    grads = [p.grad.clone() for p in agent.net.parameters()]
    agent.opt.zero_grad()
    agent.surrogate()
    assert all(torch.equal(p.grad, g) for p, g in zip(agent.net.parameters(), grads))

    def half() -> Tensor:
        loss = agent.surrogate()
        far = max(float((p - w).detach().abs().max()) for p, w in zip(agent.net.parameters(), weights))
        return loss + (1e3 if far > 0.7 * wall[1] else 0.0)

    agent.opt.step(half)
    assert agent.opt.info["tries"] == 2
    assert agent.opt.info["kl"] == pytest.approx(agent.moved())
    assert 0.2 * RADIUS < agent.moved() < 0.7 * RADIUS


def test_statistics_are_those_of_the_first_call_alone() -> None:
    agent = Agent(refresh=1)
    for step in range(3):
        agent.opt.step(agent.surrogate)
        assert agent.opt.info["data_seen"] == 200 * (step + 1)
    assert agent.opt.refreshes == 3
    assert ng.NaturalGradient(ng.Fisher(actor(4), nn.MSELoss()), step=ng.NaturalPolicyGradient()).refresh == 1
    assert ng.NaturalGradient(ng.Fisher(actor(4), nn.MSELoss())).refresh == 20


def test_an_error_in_a_trial_leaves_the_parameters() -> None:
    agent = Agent()
    weights = [p.detach().clone() for p in agent.net.parameters()]

    def breaks() -> Tensor:
        loss = agent.surrogate()
        if agent.calls > 1:
            raise KeyError("the environment is gone")
        return loss

    with pytest.raises(KeyError):
        agent.opt.step(breaks)
    assert all(torch.equal(p, w) for p, w in zip(agent.net.parameters(), weights))


def test_a_share_of_the_length_is_a_share() -> None:
    whole, half = Agent(), Agent(lr=0.5)
    before = [p.detach().clone() for p in whole.net.parameters()]
    for agent in (whole, half):
        agent.opt.step(agent.surrogate)
        assert not agent.opt.info["tries"]
        assert agent.opt.info["kl"] == pytest.approx(agent.moved(), rel=1e-9)
    for p, q, b in zip(whole.net.parameters(), half.net.parameters(), before):
        torch.testing.assert_close(q - b, 0.5 * (p - b))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": 0.0}, "radius must be positive"),
        ({"shrink": 1.0}, "shrink must be between 0 and 1"),
        ({"backtracks": -1}, "backtracks at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ng.NaturalPolicyGradient(**options)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"maximize": True}])
def test_a_penalty_belongs_into_the_surrogate(options: dict[str, Any]) -> None:
    agent = Agent(**options)
    with pytest.raises(ValueError, match="lowers the surrogate and nothing else"):
        agent.opt.step(agent.surrogate)


def test_what_it_needs_is_said() -> None:
    agent = Agent()
    agent.surrogate()
    with pytest.raises(TypeError, match=r"call opt.step\(closure\)"):
        agent.opt.step()
    net = actor(1)

    def closure() -> Tensor:
        net.zero_grad()
        loss = net(STATES).square().mean()
        loss.backward()
        return loss

    class Mine(ng.Metric):
        def flat(self, v: Any) -> Any:
            return v

        def sharp(self, df: Any, damping: float) -> Any:
            return df

    opt = ng.NaturalGradient(Mine(dict(net.named_parameters())), step=ng.NaturalPolicyGradient())
    with pytest.raises(TypeError, match="Mine does not know predictions"):
        opt.step(closure)

    def words() -> Any:
        closure()
        return "loss"

    opt = ng.NaturalGradient(ng.Euclidean(net), step=ng.NaturalPolicyGradient())
    with pytest.raises(TypeError, match="the closure has to return the loss, a scalar"):
        opt.step(words)
