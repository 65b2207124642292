"""Inverse problems: terms that read parameters beside u, against torch.func with every parameter written out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

import natgrad as ng
from natgrad.operators import gradient, laplacian

torch.set_num_threads(1)
F64 = torch.float64
Vector = dict[str, Tensor]


def mlp(seed: int = 0, width: int = 7, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    ).double()


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values if len(values) > 1 else values[0], dtype=F64))


class Coefficient(nn.Module):
    """A network with a coefficient of the equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.k = mlp(), parameter(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Polynomial(nn.Module):
    """No linear layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.c = parameter(0.3, -0.2, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        return (self.c[0] + self.c[1] * x[0] ** 2 + self.c[2] * x[0] * x[1] ** 3)[None]


class Product(torch.autograd.Function):
    """One that torch functions do not show the arguments of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g * w, g * x


class Case(NamedTuple):
    """Model, the term "inside", `params`, and the same residual with the parameters written out."""

    model: nn.Module
    inside: Callable[..., Tensor]
    params: Any
    written: Callable[[Vector, Tensor, Tensor], Tensor]
    u: Callable[[Vector], Callable[[Tensor], Tensor]] | None = None  # where functional_call will not do


def lap(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Δu for one output, (1,), by nested reverse mode."""
    return hessian(lambda y: u(y)[0])(x).trace()[None]


def under(p: Vector, prefix: str) -> Vector:
    return {n.removeprefix(prefix): t for n, t in p.items() if n.startswith(prefix)}


def calls(net: nn.Module, p: Vector, prefix: str = "") -> Callable[[Tensor], Tensor]:
    return lambda y: functional_call(net, {n: t for n, t in under(p, prefix).items() if n in own(net)}, (y,))


def own(net: nn.Module) -> set[str]:
    return {n for n, _ in net.named_parameters()}


def of_the_module() -> Case:
    m = Coefficient()
    return Case(m, lambda u, x, f: m.k * laplacian(u, x) + f, None, lambda p, x, f: p["k"] * lap(calls(m, p), x) + f)


def of_the_module_through_a_function() -> Case:
    m = Coefficient()
    return Case(
        m, lambda u, x, f: Product.apply(laplacian(u, x), m.k) + f, None,
        lambda p, x, f: p["k"] * lap(calls(m, p), x) + f,
    )  # fmt: skip


def of_a_second_network() -> Case:
    m, source = mlp(), mlp(1, 4)
    return Case(
        m, lambda u, x, f: laplacian(u, x) + source(x) * f, {"source": source},
        lambda p, x, f: lap(calls(m, p), x) + calls(source, p, "source.")(x) * f,
    )  # fmt: skip


def of_a_second_network_in_an_operator() -> Case:
    m, flow = mlp(), mlp(1, 4)
    return Case(
        m, lambda u, x, f: gradient(u, x)[:, 0] @ gradient(flow, x)[:, 0] + u(x) * laplacian(flow, x), {"flow": flow},
        lambda p, x, f: jacrev(calls(m, p))(x)[0] @ jacrev(calls(flow, p, "flow."))(x)[0]
        + calls(m, p)(x) * lap(calls(flow, p, "flow."), x),
    )  # fmt: skip


def loose() -> Case:
    m, k = mlp(), parameter(0.5)
    return Case(m, lambda u, x, f: laplacian(u, x) * k + f, {"k": k}, lambda p, x, f: p["k"] * lap(calls(m, p), x) + f)


def loose_without_names() -> Case:
    m, k, c = mlp(), parameter(0.5), parameter(1.5, -0.5)
    return Case(
        m, lambda u, x, f: k * laplacian(u, x) + (c @ x) * u(x), [k, c],
        lambda p, x, f: p["param0"] * lap(calls(m, p), x) + (p["param1"] @ x) * calls(m, p)(x),
    )  # fmt: skip


def loose_in_a_dictionary() -> Case:
    m, held = mlp(), nn.ParameterDict({"nu": parameter(0.1), "A": parameter(0.2, 0.4)})
    return Case(
        m, lambda u, x, f: torch.stack([held["nu"] * laplacian(u, x)[0], held["A"] @ x * f]), held,
        lambda p, x, f: torch.cat([p["nu"] * lap(calls(m, p), x), (p["A"] @ x * f)[None]]),
    )  # fmt: skip


def a_loose_matrix_called_weight() -> Case:
    m, matrix = mlp(), nn.Parameter(torch.tensor([[1.0, 0.3], [-0.2, 2.0]], dtype=F64))
    return Case(
        m, lambda u, x, f: x @ matrix @ gradient(u, x), {"weight": matrix},
        lambda p, x, f: x @ p["weight"] @ jacrev(calls(m, p))(x).mT,
    )  # fmt: skip


def by_another_name() -> Case:
    m = mlp()
    return Case(
        m, lambda u, x, f: laplacian(m, x) * u(x) + m(x), None,
        lambda p, x, f: (lap(calls(m, p), x) + 1) * calls(m, p)(x),
    )  # fmt: skip


def a_part_of_the_network() -> Case:
    m = mlp()
    return Case(
        m, lambda u, x, f: u(x) + m[0](x).square().sum(), None,
        lambda p, x, f: calls(m, p)(x) + (p["0.weight"] @ x + p["0.bias"]).square().sum(),
    )  # fmt: skip


def a_weight_from_a_closure() -> Case:
    m = mlp()
    w = m[0].weight
    return Case(
        m, lambda u, x, f: u(x) + w.sum() * x[0], None, lambda p, x, f: calls(m, p)(x) + p["0.weight"].sum() * x[0]
    )


def no_layers() -> Case:
    m, k = Polynomial(), parameter(0.5)
    return Case(m, lambda u, x, f: k * laplacian(u, x) + f, {"k": k}, lambda p, x, f: p["k"] * lap(calls(m, p), x) + f)


def shared_with_the_model() -> Case:
    m = mlp()
    second = nn.Sequential(m[0], nn.Tanh(), mlp(3)[4])
    return Case(
        m, lambda u, x, f: laplacian(u, x) + second(x), {"second": second},
        lambda p, x, f: lap(calls(m, p), x)
        + functional_call(second, {**under(p, "second."), "0.weight": p["0.weight"], "0.bias": p["0.bias"]}, (x,)),
    )  # fmt: skip


def a_layer_that_is_registered_twice() -> Case:
    torch.manual_seed(4)
    layer, k = nn.Linear(2, 2).double(), parameter(0.5)
    m = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(2, 1).double())

    def u(p: Vector) -> Callable[[Tensor], Tensor]:
        def twice(y: Tensor) -> Tensor:
            return torch.tanh(p["0.weight"] @ torch.tanh(p["0.weight"] @ y + p["0.bias"]) + p["0.bias"])

        return lambda y: p["4.weight"] @ twice(y) + p["4.bias"]

    return Case(m, lambda v, x, f: k * laplacian(v, x) + f, k, lambda p, x, f: p["param0"] * lap(u(p), x) + f, u)


def a_transform_of_u() -> Case:
    m, k = mlp(), parameter(0.5)
    return Case(
        m, lambda u, x, f: k * jacrev(u)(x).sum() + u(x), {"k": k},
        lambda p, x, f: p["k"] * jacrev(calls(m, p))(x).sum() + calls(m, p)(x),
    )  # fmt: skip


def a_loose_parameter_alone() -> Case:
    m, k = mlp(), parameter(0.5)
    return Case(
        m, lambda u, x, f: torch.stack([u(x)[0] - f, (k - 1) * x[0]]), k,
        lambda p, x, f: torch.stack([calls(m, p)(x)[0] - f, (p["param0"] - 1) * x[0]]),
    )  # fmt: skip


CASES = {
    f.__name__: f
    for f in (
        of_the_module, of_the_module_through_a_function, of_a_second_network,
        of_a_second_network_in_an_operator, loose,
        loose_without_names, loose_in_a_dictionary, a_loose_matrix_called_weight, by_another_name,
        a_part_of_the_network, a_weight_from_a_closure, no_layers, shared_with_the_model,
        a_layer_that_is_registered_twice, a_transform_of_u,
        a_loose_parameter_alone,
    )
}  # fmt: skip
EDGE = 3.0


def data(n: int = 9) -> dict[str, Any]:
    """Points that lie in pairs ±x, so that sums over them may cancel."""
    g = torch.Generator().manual_seed(1)
    half = torch.rand(n, 2, generator=g, dtype=F64)
    points = torch.cat([half, -half])
    return {"inside": (points, torch.rand(2 * n, generator=g, dtype=F64)), "edge": half[:4]}


def observed(case: Case, **options: Any) -> Any:
    terms = {"inside": case.inside, "edge": lambda u, x: u(x) - 1}
    metric = ng.GaussNewton(case.model, terms, {"edge": EDGE}, params=case.params, **options)
    metric.observe(data())
    return metric


def oracle(case: Case, metric: Any) -> tuple[Tensor, Tensor]:
    """Residuals and Jacobian, (N,) and (N, P)."""
    params = {n: p.detach() for n, p in metric.parameters.items()}
    (x, f), edge = data()["inside"], data()["edge"]

    def u(p: Vector) -> Callable[[Tensor], Tensor]:
        return case.u(p) if case.u is not None else calls(case.model, p)

    def stacked(p: Vector) -> Tensor:
        inside = vmap(lambda x, f: case.written(p, x, f).reshape(-1))(x, f) / math.sqrt(len(x))
        return torch.cat([inside.reshape(-1), (vmap(u(p))(edge) - 1).reshape(-1) * math.sqrt(EDGE / 4)])

    r = stacked(params)
    jac = jacrev(stacked)(params)
    return r, torch.cat([jac[n].reshape(len(r), -1) for n in params], dim=1)


def near(got: Tensor, right: Tensor, tolerance: float = 1e-10) -> None:
    assert float((got - right).norm() / (1e-300 + right.norm())) < tolerance


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", CASES)
def test_what_terms_read_is_in_the_jacobian(name: str, chunk: int | None) -> None:
    case = CASES[name]()
    metric = observed(case, chunk=chunk)
    r, jac = oracle(case, metric)
    near(metric.root, r)
    near(metric.rows.matrix(), jac)
    near(metric.vector_to_flat(metric.gradient()), jac.mT @ r)
    near(metric.dense(), jac.mT @ jac)
    v = torch.cos(torch.arange(jac.shape[1]).double())
    near(metric.vector_to_flat(metric.flat(metric.flat_to_vector(v))), jac.mT @ (jac @ v))
    near(metric.vector_to_flat(metric.diagonal()), jac.square().sum(0))
    moved = metric.flat_to_vector(1e-3 * v)
    with torch.no_grad():
        for n, p in metric.parameters.items():
            p += moved[n]
    after = oracle(case, metric)[0]
    assert metric.loss_at(moved) == pytest.approx(0.5 * float(after @ after), rel=1e-10)


@pytest.mark.parametrize("solver", ["dense", "kernel", "cg"])
@pytest.mark.parametrize("name", CASES)
def test_every_solver_takes_them(name: str, solver: str) -> None:
    case = CASES[name]()
    metric = observed(case, solver=solver)
    r, jac = oracle(case, metric)
    shifted = jac.mT @ jac + 1e-2 * torch.eye(jac.shape[1], dtype=F64)
    near(metric.vector_to_flat(metric.direction(1e-2)), torch.linalg.solve(shifted, jac.mT @ r), 1e-7)
    right = torch.sin(torch.arange(jac.shape[1]).double())
    near(
        metric.vector_to_flat(metric.sharp(metric.flat_to_vector(right), 1e-2)),
        torch.linalg.solve(shifted, right),
        1e-7,
    )
    if solver != "cg":
        near(metric.logdet(1e-2), torch.logdet(shifted))


@pytest.mark.parametrize("name", CASES)
def test_modules_hold_their_own_parameters_again(name: str) -> None:
    case = CASES[name]()
    before = [(n, id(p)) for n, p in case.model.named_parameters(remove_duplicate=False)]
    observed(case).direction(1e-2)
    assert [(n, id(p)) for n, p in case.model.named_parameters(remove_duplicate=False)] == before


def test_a_coefficient_keeps_the_factors_of_layers() -> None:
    assert observed(loose())._by_layer
    assert observed(of_the_module())._by_layer
    assert observed(no_layers())._by_layer
    assert not observed(a_part_of_the_network())._at_points
    assert observed(a_weight_from_a_closure())._at_points


# k of −k u″ = f, three ways ----------------------------------------------------------------------------------------


def three_ways(way: str) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    fit = {"data": lambda u, x, y: u(x) - y}
    if way == "module":
        net.register_parameter("k", parameter(0.5))
        return ng.GaussNewton(net, {"pde": lambda u, x, f: net.k * laplacian(u, x) + f, **fit}), net.k
    if way == "second module":
        second = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(second.weight, 0.5)
        term = lambda u, x, f: second(torch.ones_like(x)) * laplacian(u, x) + f  # noqa: E731
        return ng.GaussNewton(net, {"pde": term, **fit}, params={"second": second}), second.weight
    k = parameter(0.5)
    return ng.GaussNewton(net, {"pde": lambda u, x, f: k * laplacian(net, x) + f, **fit}, params=[k]), k


@pytest.mark.parametrize("way", ["module", "second module", "loose"])
def test_the_coefficient_is_found(way: str) -> None:
    metric, k = three_ways(way)
    x = torch.linspace(0, 1, 40, dtype=F64)[:, None]
    u = torch.sin(math.pi * x[:, 0])
    opt = ng.NaturalGradient(metric)
    for _ in range(60):
        opt.step({"pde": (x, 2 * math.pi**2 * u), "data": (x, u)})
    assert abs(float(k.detach()) - 2) < 1e-6


def test_spring_goes_on_from_its_state_with_a_loose_parameter() -> None:
    x = torch.linspace(0, 1, 12, dtype=F64)[:, None]
    batch = {"pde": (x, x[:, 0]), "data": (x, x[:, 0])}
    (one, k), (two, other) = three_ways("loose"), three_ways("loose")
    first, second = (ng.NaturalGradient(m, step=ng.Spring()) for m in (one, two))
    for _ in range(2):
        first.step(batch)
    state = first.state_dict()
    with torch.no_grad():
        for n, p in two.parameters.items():
            p.copy_(one.parameters[n])
    second.load_state_dict(state)
    for opt in (first, second):
        for _ in range(2):
            opt.step(batch)
    assert "param0" in state["natgrad"]["rule_state"]["last"]
    assert torch.equal(k, other)


# Energy and QuantumGeometry ----------------------------------------------------------------------------------------


def test_parameters_of_a_density_are_entries_of_its_second_variation() -> None:
    """F = ½(1 + k²)|u′|² + c·u² − f u: df and ĝ = Σ w ∂zᵀ (F_zz)₊ ∂z with z = (u, u′, k, c) written out."""
    net, k, c = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double(), parameter(0.5), parameter(0.3)
    x, w = torch.linspace(-1, 1, 9, dtype=F64)[:, None], torch.full((9,), 0.2, dtype=F64)
    f = torch.cos(x[:, 0])
    densities = {"inside": lambda u, du, x, f: 0.5 * (1 + k**2) * du @ du + c * u**2 - f * u}
    params = {**{n: p.detach() for n, p in net.named_parameters()}, "c": c.detach(), "k": k.detach()}

    def z(p: Vector, x: Tensor) -> Tensor:
        u = lambda y: functional_call(net, {n: p[n] for n in own(net)}, (y,))[0]  # noqa: E731
        return torch.stack([u(x), jacrev(u)(x)[0], p["c"], p["k"]])

    def density(z: Tensor, f: Tensor) -> Tensor:
        return 0.5 * (1 + z[3] ** 2) * z[1] ** 2 + z[2] * z[0] ** 2 - f * z[0]

    jac = vmap(jacrev(z), (None, 0))(params, x)
    rows = torch.cat([jac[n].reshape(9, 4, -1) for n in params], dim=2)
    at = vmap(z, (None, 0))(params, x)
    values, vectors = torch.linalg.eigh(vmap(hessian(density))(at, f))
    kept = vectors @ (values.clamp(min=0)[:, :, None] * vectors.mT)
    expected = torch.einsum("n,nip,nij,njq->pq", w, rows, kept, rows)
    slope = torch.einsum("n,nip,ni->p", w, rows, vmap(jacrev(density))(at, f))
    for solver in ("dense", "kernel", "cg"):
        metric = ng.Energy(net, densities, solver=solver, params={"c": c, "k": k})
        energy = metric.observe({"inside": (x, w, f)})
        near(energy, w @ vmap(density)(at, f))
        near(metric.dense(), expected)
        near(metric.vector_to_flat(metric.gradient()), slope)
        shifted = expected + 1e-2 * torch.eye(len(expected), dtype=F64)
        near(metric.vector_to_flat(metric.direction(1e-2)), torch.linalg.solve(shifted, slope), 1e-7)


def test_a_density_that_reads_a_network_is_told_to_make_it_an_output() -> None:
    net, second = nn.Linear(1, 1).double(), mlp(0, 60)
    x, w = torch.linspace(-1, 1, 200, dtype=F64)[:, None], torch.full((200,), 0.01, dtype=F64)
    metric = ng.Energy(net, {"e": lambda u, du, x: u**2 * second(x.expand(2))[0] ** 2}, params={"second": second})
    with pytest.raises(
        ValueError, match=r"density 'e' reads 3\d\d\d parameters itself \(second.0.weight.*an output of"
    ):
        metric.observe({"e": (x, w)})


def test_log_psi_may_read_more_than_its_own_parameters() -> None:
    field = parameter(0.4)

    class Psi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1).double()

        def forward(self, s: Tensor) -> Tensor:
            return torch.tanh(self.net(s)) + field * s[0]

    psi = Psi()
    states = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    batch = {"states": states, "local_energy": states[:, 0]}
    with pytest.raises(ValueError, match=r"log_psi reads 'field' of shape \(\), which requires grad.*by params="):
        ng.QuantumGeometry(psi).observe(batch)
    metric = ng.QuantumGeometry(psi, params={"field": field})
    metric.observe(batch)
    assert metric.names == ["net.weight", "net.bias", "field"]
    inner = 1 - torch.tanh(psi.net(states)).detach() ** 2
    o = torch.cat([inner * states, inner, states[:, :1]], dim=1)
    centred = o - o.mean(0)
    near(metric.dense(), centred.mT @ centred / 6)


# what is refused, by name ------------------------------------------------------------------------------------------


def refusals() -> dict[str, Any]:
    k, second = parameter(0.5), mlp(1)
    square = k**2
    read = lambda u, x: k * u(x)  # noqa: E731
    return {
        "a tensor of nobody": (read, None, ValueError, r"term 'inside' reads 'k' of shape \(\), which requires grad"),
        "a network of nobody": (lambda u, x: u(x) + second(x), None, ValueError, r"reads 'second\.\d\.\w+' of shape"),
        "an entry that no term reads": (lambda u, x: u(x), {"k": k}, ValueError, "nothing depends on 'k' of params"),
        "an entry that is detached": (lambda u, x: k.detach() * u(x), {"k": k}, ValueError, "nothing depends on 'k'"),
        "a number": (lambda u, x: float(k) * u(x), {"k": k}, TypeError, r"'k' is read as a plain number \(__float__\)"),
        "an item": (lambda u, x: k.item() * u(x), {"k": k}, TypeError, r"'k' is read as a plain number \(item\)"),
        "a function from a closure": (
            lambda u, x: Product.apply(u(x), k), {"k": k}, ValueError, "reads parameter 'k' by a way that cannot be",
        ),
        "a tensor from outside": (
            lambda u, x: square * u(x) + k, {"k": k}, ValueError, "'k' by a way .*computed from it outside",
        ),
        "no parameter at all": (lambda u, x: x.sum(), None, ValueError, "term 'inside' does not depend on the param"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_residuals_that_would_be_wrong_are_refused(name: str) -> None:
    term, params, error, words = refusals()[name]
    metric = ng.GaussNewton(mlp(), {"inside": term}, params=params)
    with pytest.raises(error, match=words):
        metric.observe({"inside": data()["edge"]})


def test_parameters_of_another_dtype_are_named() -> None:
    k = nn.Parameter(torch.tensor(0.5))
    metric = ng.GaussNewton(mlp(), {"inside": lambda u, x: k * u(x)}, params={"k": k})
    with pytest.raises(TypeError, match=r"must share dtype and device: .*'k' is torch.float32 on cpu"):
        metric.observe({"inside": data()["edge"]})


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"k": 3.0}, TypeError, r"params takes .*got 'k': float"),
        (7, TypeError, r"params takes .*got 'param0': int"),
        ({"k": torch.tensor(1.0)}, ValueError, "'k' is a tensor of torch.float32 that does not require grad"),
        ({"k": parameter(1.0) * 2}, ValueError, "'k' is computed from other tensors"),
        ({"k": nn.Tanh()}, ValueError, "the module 'k' has no parameters"),
        ({"0.weight": parameter(1.0)}, ValueError, "'0.weight' is the name of another parameter already"),
    ],
)
def test_params_that_are_none(params: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ng.GaussNewton(mlp(), {"inside": lambda u, x: u(x)}, params=params)


def test_a_parameter_of_the_model_may_be_named_twice() -> None:
    m = Coefficient()
    metric = ng.GaussNewton(m, {"inside": lambda u, x: m.k * u(x)}, params={"k": m.k, "net": m.net})
    metric.observe({"inside": data()["edge"]})
    assert metric.names == [n for n, _ in m.named_parameters()]
