"""Weights that change in training: numbers, tensors a point, callables; and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import natgrad as ng

torch.set_num_threads(1)
F64 = torch.float64
X, EDGE = torch.linspace(-1, 1, 9, dtype=F64)[:, None], torch.tensor([[-1.0], [1.0]], dtype=F64)
BATCH = {"inside": (X, X[:, 0].sin()), "edge": EDGE}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 2)).double()


TERMS = {"inside": lambda u, x, f: u(x) - f, "edge": lambda u, x: u(x)[0] - 1}


def residuals(model: nn.Module, p: dict[str, Tensor]) -> dict[str, Tensor]:
    """Before weighting, (points, components)."""
    u = lambda x: functional_call(model, p, (x,))  # noqa: E731
    inside = vmap(lambda x, f: u(x) - f)(*BATCH["inside"])
    return {"inside": inside, "edge": (vmap(u)(EDGE)[:, 0] - 1)[:, None]}


def check(metric: Any, weights: dict[str, Tensor]) -> None:
    """Loss, df and ĝ of Σ ½ mean w ‖r‖² at the metric's parameters, w (points,) or ()."""
    model, params = metric.residuals.model, {n: p.detach() for n, p in metric.parameters.items()}

    def stacked(p: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [
                (r * (weights[n] / len(r)).sqrt().expand(len(r))[:, None]).reshape(-1)
                for n, r in residuals(model, p).items()
            ]
        )

    r, jac = stacked(params), torch.cat([j.reshape(20, -1) for j in jacrev(stacked)(params).values()], dim=1)
    torch.testing.assert_close(metric.loss, 0.5 * r @ r, rtol=1e-12, atol=0)
    torch.testing.assert_close(metric.vector_to_flat(metric.gradient()), jac.mT @ r, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metric.dense(), jac.mT @ jac, rtol=1e-10, atol=1e-12)
    assert metric.loss_at({}) == pytest.approx(float(0.5 * r @ r), rel=1e-12)
    assert metric.loss_at({n: torch.zeros_like(p) for n, p in params.items()}) == pytest.approx(
        float(0.5 * r @ r), rel=1e-12
    )


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


@pytest.mark.parametrize("at_points", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_weights_of_every_kind(at_points: bool, chunk: int | None) -> None:
    ramp = torch.linspace(0, 2, 9, dtype=F64)
    kinds: list[tuple[Any, Tensor]] = [
        (2, one(2.0)),
        (one(0.1), one(0.1)),
        (ramp, ramp),
        (ramp.float(), ramp.float().double()),
        (torch.arange(9), torch.arange(9).double()),
        (lambda: 0.3, one(0.3)),
        (lambda: ramp + 1, ramp + 1),
        (lambda w=0.7: w, one(0.7)),
        (lambda r, x, f: (x[:, 0] + 1) * f.abs(), (X[:, 0] + 1) * X[:, 0].sin().abs()),
        (nn.Parameter(ramp), ramp),
    ]
    for given, right in kinds:
        metric = ng.GaussNewton(net(), TERMS, {"inside": given, "edge": 3.0}, chunk=chunk)
        metric._by_layer = not at_points
        metric.observe(BATCH)
        check(metric, {"inside": right, "edge": one(3.0)})


def test_residuals_come_before_weighting_at_the_parameters_in_force() -> None:
    metric = ng.GaussNewton(
        net(), TERMS, {"inside": lambda r: r.square().sum(1), "edge": lambda *a: a[0].abs()[:, 0] * len(a)}
    )
    opt = ng.NaturalGradient(metric)
    for _ in range(3):
        before = residuals(metric.residuals.model, {n: p.detach() for n, p in metric.parameters.items()})
        metric.observe(BATCH)
        check(metric, {"inside": before["inside"].square().sum(1), "edge": before["edge"].abs()[:, 0] * 2})
        opt.step(BATCH)


def test_weights_may_change_at_any_time() -> None:
    metric = ng.GaussNewton(net(), TERMS)
    opt = ng.NaturalGradient(metric)
    opt.step(BATCH)
    assert dict(metric.weights) == {"inside": 1.0, "edge": 1.0}
    metric.weights["edge"] = 10.0
    metric.observe(BATCH)
    check(metric, {"inside": one(1.0), "edge": one(10.0)})
    metric.weights = {"inside": 0.25}
    opt.step(BATCH)
    metric.observe(BATCH)
    check(metric, {"inside": one(0.25), "edge": one(1.0)})
    w = torch.ones(9, dtype=F64)
    metric.weights.update(inside=w)
    w[3] = 5  # a tensor is read anew as well
    metric.observe(BATCH)
    check(metric, {"inside": w, "edge": one(1.0)})
    del metric.weights["inside"]
    metric.observe(BATCH)
    check(metric, {"inside": one(1.0), "edge": one(1.0)})


def test_a_weight_is_asked_once_a_step_and_held_within_it() -> None:
    asked = []
    metric = ng.GaussNewton(net(), TERMS, {"edge": lambda: asked.append(1) or 2.0 ** len(asked)})
    opt = ng.NaturalGradient(metric)
    for i in range(4):
        opt.step(BATCH)  # tries many points
        assert len(asked) == i + 1


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (-1.0, ValueError, "weight of term 'inside' must be a non-negative number, got -1.0"),
    (math.nan, ValueError, "weight of term 'inside' must be a non-negative number, got nan"),
    (math.inf, ValueError, "weight of term 'inside' must be a non-negative number, got inf"),
    ("1", TypeError, "weight of term 'inside' must be a number.*got str"),
    (True, TypeError, "weight of term 'inside' must be a number.*got bool"),
    ([1.0, 2.0], TypeError, "weight of term 'inside' must be a number.*got list"),
    (
        -torch.ones(9),
        ValueError,
        r"weight of term 'inside' must be non-negative and finite; 9 of 9 are not: entry 0 is -1",
    ),
    (torch.tensor([1.0] * 8 + [math.nan]), ValueError, "1 of 9 are not: entry 8 is nan"),
    (torch.ones(7), ValueError, "weight of term 'inside' has 7 entries, its batch has 9 points"),
    (torch.ones(1), ValueError, "weight of term 'inside' has 1 entries, its batch has 9 points"),
    (torch.ones(9, 1), ValueError, r"of shape \(points,\), got \(9, 1\)"),
    (torch.ones(9, dtype=torch.complex64), ValueError, "of torch.complex64"),
    (lambda a, b, c, d: 1.0, TypeError, "weight of term 'inside' asks for 4 arguments"),
]


@pytest.mark.parametrize(("given", "error", "words"), REFUSED)
def test_weights_that_are_none(given: Any, error: type[Exception], words: str) -> None:
    """At once where that can be seen, else when a batch comes; from a callable at each step."""
    with pytest.raises(error, match=words):
        ng.GaussNewton(net(), TERMS, {"inside": given}).observe(BATCH)
    metric = ng.GaussNewton(net(), TERMS)
    opt = ng.NaturalGradient(metric)
    before = [p.clone() for p in metric.parameters.values()]

    def step() -> None:
        metric.weights["inside"] = given if callable(given) else lambda: given
        opt.step(BATCH)

    with pytest.raises(error, match=words):
        step()
    assert all(torch.equal(p, q) for p, q in zip(metric.parameters.values(), before))
    metric.weights["inside"] = 1.0
    opt.step(BATCH)


def test_terms_that_do_not_exist_have_no_weight() -> None:
    metric = ng.GaussNewton(net(), TERMS)
    for wrong in (lambda: metric.weights.update(rand=1.0), lambda: setattr(metric, "weights", {"rand": 1.0})):
        with pytest.raises(
            ValueError, match=r"terms that do not exist: \['rand'\]; the terms are \['inside', 'edge'\]"
        ):
            wrong()
    with pytest.raises(TypeError, match=r"weights takes .*got list"):
        metric.weights = [1.0, 2.0]


def test_a_residual_that_is_not_finite_is_named_before_its_weight() -> None:
    metric = ng.GaussNewton(net(), {"inside": lambda u, x: (u(x) - 100).log()}, {"inside": lambda r: r.abs().sum(1)})
    with pytest.raises(ValueError, match="term 'inside': the residual is not finite"):
        metric.observe({"inside": X})


@pytest.mark.parametrize("takes", [0, 1, 2])
def test_a_module_as_a_weight_gets_what_its_forward_takes(takes: int) -> None:
    class Weighing(nn.Module):
        if takes == 0:

            def forward(self) -> torch.Tensor:
                return torch.tensor(4.0)

        elif takes == 1:

            def forward(self, r: torch.Tensor) -> torch.Tensor:
                return torch.full((len(r),), 4.0)

        else:

            def forward(self, r: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
                return torch.full((len(x),), 4.0)

    model, x = nn.Linear(2, 1).double(), torch.rand(5, 2).double()
    metric = ng.GaussNewton(model, {"t": lambda u, x: u(x)}, {"t": Weighing()})
    plain = ng.GaussNewton(model, {"t": lambda u, x: u(x)})
    torch.testing.assert_close(metric.observe({"t": x}), 4 * plain.observe({"t": x}))
