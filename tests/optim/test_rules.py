"""The step rules that one chooses by name, each against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import mlp
from torch import Tensor, nn
from training_cases import Scaled, batches, classifier, natural, train, weights

import natgrad as ng
from natgrad.optim import block_state, step_arithmetic
from natgrad.optim.exact_quadratic import Linearised
from natgrad.optim.fixed import PreconditionedGradient

# raised inside torch where forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def one_step(rule: ng.FixedStep | Any, model: nn.Module | None = None, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The optimizer after one step, and the step."""
    model = model or classifier()
    opt = natural(model, step=rule, **options)
    before = weights(model)
    train(model, opt, batches(1))
    return opt, {n: p.detach() - before[n] for n, p in model.named_parameters()}


# trust region --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-6, 1e-3])
def test_a_step_that_would_change_too_much_is_shortened_to_the_radius(radius: float) -> None:
    opt, step = one_step(ng.KLTrustRegion(lr=1.0, radius=radius))
    damped = opt.metric.inner(step, step) + 1e-3 * sum(t.square().sum() for t in step.values())
    assert float(damped) / 2 == pytest.approx(opt.info["predicted_kl"], rel=1e-9)
    assert opt.info["predicted_kl"] <= radius * (1 + 1e-9)
    assert 0.3 * radius < opt.info["kl"] <= radius
    _, free = one_step(ng.FixedStep(lr=1.0, momentum=0.9))
    for n in step:
        torch.testing.assert_close(step[n] / step[n].norm(), free[n] / free[n].norm())


def test_a_step_within_the_radius_is_the_fixed_step() -> None:
    _, step = one_step(ng.KLTrustRegion(lr=0.1, radius=1e3))
    _, free = one_step(ng.FixedStep(lr=0.1))
    for n in step:
        torch.testing.assert_close(step[n], free[n])


def test_the_predicted_divergence_is_that_of_the_predictions() -> None:
    model = classifier()
    x = next(batches(1))[0]
    before = model(x).log_softmax(1).detach()
    one_step(ng.KLTrustRegion(lr=1.0, radius=1e-5, damping=1e-2), model)
    after = model(x).log_softmax(1).detach()
    divergence = float((before.exp() * (before - after)).sum(1).mean())
    assert 0.2e-5 < divergence < 5e-5  # Kronecker factors leave out what the layers share


def test_a_radius_must_be_positive() -> None:
    with pytest.raises(ValueError, match="radius must be positive"):
        ng.KLTrustRegion(radius=0.0)


# grafting ------------------------------------------------------------------------------------------------------


def test_blocks_move_as_far_as_adam_in_the_natural_direction() -> None:
    model, rival = Scaled(), Scaled()
    opt = natural(model, step=ng.Grafted(lr=0.01, momentum=0.0))
    adam = torch.optim.Adam(rival.parameters(), lr=0.01)
    before = weights(model)
    (batch,) = batches(1)
    train(model, opt, [batch])
    train(rival, adam, [batch], nn.CrossEntropyLoss())
    mine, theirs = ({n: p.detach() - before[n] for n, p in m.named_parameters()} for m in (model, rival))
    for names in (["first.weight", "first.bias"], ["second.weight", "second.bias"]):
        sizes = [torch.stack([step[n].norm() for n in names]).norm() for step in (mine, theirs)]
        torch.testing.assert_close(*sizes, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine["gate"], theirs["gate"], rtol=1e-6, atol=0)  # no curvature: Adam itself
    natural_step = opt.metric.sharp({n: p.grad for n, p in model.named_parameters()}, 1e-3)
    a, b = mine["first.weight"].flatten(), -natural_step["first.weight"].flatten()
    assert float(a @ b / a.norm() / b.norm()) == pytest.approx(1)


# the matching scale of what has no curvature ----------------------------------------------------------------------


def test_what_has_no_curvature_moves_at_the_size_of_the_rest() -> None:
    _, step = one_step(ng.FixedStep(lr=0.1), Scaled())
    covered = torch.cat([t.flatten() for n, t in step.items() if n != "gate"])
    assert float(step["gate"].square().mean().sqrt()) == pytest.approx(float(covered.square().mean().sqrt()), rel=1e-4)


def test_momentum_is_that_of_sgd() -> None:
    """With ĝ = I the rule is `torch.optim.SGD`."""
    model, rival = classifier(), classifier()
    opt = ng.NaturalGradient(ng.Euclidean(model), lr=0.1, momentum=0.9)
    train(model, opt, batches(10), nn.CrossEntropyLoss())
    train(rival, torch.optim.SGD(rival.parameters(), lr=0.1, momentum=0.9), batches(10), nn.CrossEntropyLoss())
    for a, b in zip(model.parameters(), rival.parameters()):
        torch.testing.assert_close(a, b)


def test_the_direction_needs_one_damping() -> None:
    model = classifier()
    opt = natural(model, step=ng.FixedStep(), groups=[{"params": "2.*", "damping": 0.5}])
    with pytest.raises(ValueError, match="one damping for all parameter groups"):
        train(model, opt, batches(1))
    assert PreconditionedGradient().state_dict() == {"buffer": {}, "adam": {}}


# quadratic model -------------------------------------------------------------------------------------------------


def regression(size: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(size, 4, generator=g, dtype=torch.float64)
    return x, torch.sin(x @ torch.randn(4, 3, generator=g, dtype=torch.float64))


def test_exact_products_are_those_of_the_gauss_newton_matrix() -> None:
    x, y = regression(10)
    model = classifier()
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact", structure="dense")
    metric.update(x, y)
    g = torch.Generator().manual_seed(1)
    basis = [
        {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in metric.parameters.items()} for _ in range(2)
    ]
    found = Linearised(metric, x, y).curvature(basis)
    expected = torch.stack([torch.stack([metric.inner(u, v) for v in basis]) for u in basis])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_linear_model_is_solved_in_one_step() -> None:
    x, _ = regression()
    model = nn.Linear(4, 3).double()
    y = x @ torch.randn(4, 3, dtype=torch.float64)
    opt = natural(model, nn.MSELoss(), step=ng.ExactQuadratic(x, y, damping=1e-9))
    losses = train(model, opt, [(x, y)] * 3)
    assert losses[1] < 1e-12 * losses[0]


def test_full_batch_training_beats_a_fixed_step_and_adapts_its_damping() -> None:
    x, y = regression()
    losses = {}
    for name, rule in {"quadratic": ng.ExactQuadratic(x, y), "fixed": ng.FixedStep(lr=1.0, damping=1.0)}.items():
        model = classifier()
        opt = natural(model, nn.MSELoss(), step=rule)
        losses[name] = train(model, opt, [(x, y)] * 60)
        if name == "quadratic":
            assert opt.info["damping"] < 1.0
            assert all(b <= a for a, b in zip(losses[name], losses[name][1:]))
            assert opt.info["predicted_reduction"] > 0
            assert 0.5 < opt.info["reduction_ratio"] < 1.5
    assert losses["quadratic"][-1] < 0.8 * losses["fixed"][-1]


def test_the_quadratic_model_resumes_bit_for_bit() -> None:
    x, y = regression()

    def build() -> tuple[nn.Module, Any]:
        model = classifier()
        return model, natural(model, nn.MSELoss(), step=ng.ExactQuadratic(x, y))

    model, opt = build()
    train(model, opt, [(x, y)] * 8)
    again, other = build()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    assert train(model, opt, [(x, y)] * 8) == train(again, other, [(x, y)] * 8)


def test_the_quadratic_model_says_what_it_needs() -> None:
    x, y = regression()
    model = classifier()
    opt = ng.NaturalGradient(ng.Euclidean(model), step=ng.ExactQuadratic(x, y))
    with pytest.raises(TypeError, match="from the model of a Fisher, got Euclidean"):
        train(model, opt, [(x, y)], nn.MSELoss())
    opt = natural(model, nn.MSELoss(), step=ng.ExactQuadratic(x, y), maximize=True)
    with pytest.raises(ValueError, match="cannot maximise"):
        train(model, opt, [(x, y)])


def test_the_default_step_averages_its_iterates(monkeypatch: pytest.MonkeyPatch) -> None:
    """z takes the steps, x is their weighted mean and θ = (1 − β) z + β x, kept apart here, at a fixed length."""
    monkeypatch.setattr(step_arithmetic, "STRETCH", 0.0)
    monkeypatch.setattr(step_arithmetic, "TURNED", -2.0)  # the twin has no velocity, and so no coherence
    monkeypatch.setattr(block_state, "AGREE", 2.0)
    model, twin = mlp(hidden=6), mlp(hidden=6)
    x_in = torch.linspace(-1, 1, 24).double().reshape(8, 3)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss(), kind="exact"), momentum=0.9, weight_decay=0.0)
    plain = ng.NaturalGradient(ng.Fisher(twin, nn.MSELoss(), kind="exact"), momentum=0.0, weight_decay=0.0)
    z = [p.detach().clone() for p in twin.parameters()]
    x = [p.clone() for p in z]
    for step in range(25):
        for net, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            (net(x_in) - x_in[:, :3].sin()).square().mean().backward()
        before = [p.detach().clone() for p in twin.parameters()]
        opt.step()
        plain.step()  # without momentum its increment is Δ itself
        c = 3 / (3 + step)
        with torch.no_grad():
            for i, (p, b) in enumerate(zip(twin.parameters(), before)):
                z[i] += p - b
                x[i] += c * (z[i] - x[i])
                p.copy_(0.1 * z[i] + 0.9 * x[i])
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_grafting_takes_each_parameter_by_itself_where_a_metric_has_no_blocks() -> None:
    """Along the gradient, which is natural in the Euclidean metric, and as far as Adam's first step: η a number."""
    model = nn.Linear(3, 2).double()
    opt = ng.NaturalGradient(ng.Euclidean(model), step=ng.Grafted(lr=0.01, damping=1e-9, momentum=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(5, 3).double()).square().sum().backward()
    opt.step()
    for n, p in model.named_parameters():
        expected = -0.01 * p.grad * p.numel() ** 0.5 / p.grad.norm()
        torch.testing.assert_close(p.detach() - before[n], expected, rtol=1e-6, atol=0)


def test_a_step_rule_that_is_none_and_a_metric_that_names_none() -> None:
    model = nn.Linear(2, 1)
    for wrong in ("fixed", ng.FixedStep):
        with pytest.raises(TypeError, match="step takes a step rule"):
            ng.NaturalGradient(ng.Euclidean(model), step=wrong)  # type: ignore[arg-type]
    metric = ng.Euclidean(model)
    metric.default_step = "no such"
    with pytest.raises(ValueError, match=r"Euclidean.default_step is 'no such'; there are 'normalised', 'fixed'"):
        ng.NaturalGradient(metric)
