"""Merging: against the formula in dense matrices, and the regression on all data together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_of_uses import F64, STRUCTURES, fisher, flat, net
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import natgrad as ng
from natgrad.uses import merging as module

Close = Callable[[Tensor, Tensor, float], None]


def pair(structure: str, seed: int, count: int = 20) -> tuple[dict[str, Tensor], ng.Fisher]:
    metric = fisher(structure, seed, count)
    return metric.model.state_dict(), metric


def by_formula(models: list[tuple[dict[str, Tensor], ng.Fisher]], damping: float) -> Tensor:
    """(Σ nᵢĝᵢ + λ)⁻¹ Σ (nᵢĝᵢ + λ/k) θᵢ"""
    parts = [(m.seen * m.dense(), flat(m, state)) for state, m in models]
    total = torch.stack([a for a, _ in parts]).sum(0)
    eye = damping * total.trace() / len(total) * torch.eye(len(total), dtype=F64)
    right = torch.stack([(a + eye / len(parts)) @ t for a, t in parts]).sum(0)
    return torch.linalg.solve(total + eye, right)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_it_is_the_formula(structure: str, damping: float, close: Close) -> None:
    models = [pair(structure, 0), pair(structure, 1, 31), pair(structure, 2, 7)]
    found = ng.merge(dict(zip("abc", models)), damping, structure=None)
    close(flat(models[0][1], found), by_formula(models, damping), 1e-8)


@pytest.mark.parametrize(("held", "used"), [("kfac", "input"), ("ekfac", "input"), ("ekfac", "kfac")])
def test_structures_of_the_same_factors(held: str, used: str, close: Close) -> None:
    models = [pair(held, 0), pair(held, 1, 31)]
    expected = by_formula([pair(used, 0), pair(used, 1, 31)], 0.01)
    close(flat(models[0][1], ng.merge(dict(zip("ab", models)), structure=used)), expected, 1e-8)


@pytest.mark.parametrize("held", ["dense", "block"])
def test_the_inputs_of_matrices(held: str, close: Close) -> None:
    """I ⊗ V of each layer, V the mean over the outputs of their blocks of the matrix."""
    models = [pair(held, 0), pair(held, 1, 31)]
    parts = []
    for state, metric in models:
        dense, kept = metric.dense(), torch.zeros(39, 39, dtype=F64)
        for start, out, into in ((0, 4, 5), (24, 3, 4)):
            grid = torch.arange(out * into).reshape(out, into)
            rows = start + torch.cat([grid, out * into + torch.arange(out)[:, None]], 1)  # with the bias
            mean = torch.stack([dense[r][:, r] for r in rows]).mean(0)
            for r in rows:
                kept[r[:, None], r] = mean
        parts.append((metric.seen * kept, flat(metric, state)))
    total = parts[0][0] + parts[1][0]
    pull = 0.01 * total.trace() / 39 * torch.eye(39, dtype=F64)
    expected = torch.linalg.solve(total + pull, sum(((a + pull / 2) @ t for a, t in parts), torch.zeros(39, dtype=F64)))
    close(flat(models[0][1], ng.merge(dict(zip("ab", models)))), expected, 1e-9)


@pytest.mark.parametrize("held", STRUCTURES)
def test_the_diagonal_of_any(held: str, close: Close) -> None:
    models = [pair(held, 0), pair(held, 1, 31)]
    found = ng.merge(dict(zip("ab", models)), structure="diagonal")
    n = [m.seen * flat(m, m.diagonal()) for _, m in models]
    theta = [flat(m, s) for s, m in models]
    damping = 0.01 * (n[0] + n[1]).mean()
    close(
        flat(models[0][1], found),
        sum(n_ * t + damping / 2 * t for n_, t in zip(n, theta)) / (n[0] + n[1] + damping),
        1e-10,
    )


def regression(x: Tensor, y: Tensor, reduction: str, structure: str) -> tuple[dict[str, Tensor], ng.Fisher]:
    model = nn.Linear(4, 2).double()
    full = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(full[:-1].mT)
        model.bias.copy_(full[-1])
    metric = ng.Fisher(model, nn.MSELoss(reduction=reduction), kind="exact", structure=structure)
    metric.fit([(x[:5], y[:5]), (x[5:], y[5:])], progress=False)
    return model.state_dict(), metric


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("structure", ["dense", "kfac", "input", "ekfac"])
def test_two_regressions_are_that_on_both_data_sets(structure: str, reduction: str, close: Close) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=g, dtype=F64), torch.randn(40, 2, generator=g, dtype=F64)
    models = {
        "few": regression(x[:11], y[:11], reduction, structure),
        "many": regression(x[11:], y[11:], reduction, structure),
    }
    expected, _ = regression(x, y, reduction, structure)
    for damping, bound in ((0.0, 1e-9), (1e-12, 1e-8)):
        found = ng.merge(models, damping, structure=None)
        for n in expected:
            close(found[n], expected[n], bound)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [1e-12, 1e-2, 1e3])
def test_equal_models_are_that_model(structure: str, damping: float) -> None:
    state, first = pair(structure, 0)
    _, other = pair(structure, 0, 9)
    found = ng.merge({"a": (state, first), "b": (state, other), "c": (state, first)}, damping, structure=None)
    assert all(torch.equal(found[n], t) for n, t in state.items())


def test_structures_by_name(close: Close) -> None:
    models = [pair({"0.*": "kfac", "2.*": "diagonal"}, seed, count) for seed, count in ((0, 20), (1, 31))]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'diagonal', which does not hold what 'input' keeps; take structure=None"):
        ng.merge(dict(zip("ab", models)))
    close(flat(models[0][1], ng.merge(dict(zip("ab", models)), structure=None)), by_formula(models, 0.01), 1e-8)


def test_much_damping_is_the_mean(close: Close) -> None:
    models = [pair("kfac", 0), pair("kfac", 1, 31)]
    found = ng.merge(dict(zip("ab", models)), 1e12)
    close(flat(models[0][1], found), (flat(models[0][1], models[0][0]) + flat(models[0][1], models[1][0])) / 2, 1e-9)


class Normed(nn.Module):
    """Buffers, a tied entry, a frozen parameter, and one that is no parameter at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("order", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)) + self.frozen)


def normed(seed: int, tied: bool) -> tuple[dict[str, Tensor], ng.Fisher]:
    torch.manual_seed(seed)
    model = Normed()
    model(torch.randint(6, (5 + seed,)))
    model.eval()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact")
    metric.update(torch.randint(6, (8,)), torch.randint(6, (8,)))
    state = model.state_dict()
    if seed == 1:
        model(torch.randint(6, (5,)))
        state["norm.num_batches_tracked"] += 1
    return (state if tied else {n: t.clone() for n, t in state.items()}), metric


@pytest.mark.parametrize("tied", [True, False])
def test_entries_outside_the_metrics(tied: bool) -> None:
    models = {"a": normed(0, tied), "b": normed(1, tied)}
    found = ng.merge(models)
    a, b = (models[n][0] for n in "ab")
    assert list(found) == list(a)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in a.items()}
    assert torch.equal(found["head.weight"], found["embed.weight"])
    assert not torch.allclose(found["embed.weight"], (a["embed.weight"] + b["embed.weight"]) / 2)
    for n in ("norm.running_mean", "frozen"):
        assert torch.allclose(found[n], (a[n] + b[n]) / 2)
    assert int(found["norm.num_batches_tracked"]) == 2
    assert torch.equal(found["order"], torch.arange(3))
    Normed().load_state_dict(found)


def test_of_files(tmp_path: Path) -> None:
    models: dict[str, Any] = {"a": pair("ekfac", 0), "b": pair("ekfac", 1, 31)}
    files = {}
    for name, (state, metric) in models.items():
        metric.save(tmp_path / name)
        files[name] = (state, tmp_path / name)
    found, again = ng.merge(models), ng.merge(files)
    assert all(torch.equal(found[n], again[n]) for n in found)


def test_files_of_an_older_format_and_damaged_ones(tmp_path: Path) -> None:
    state, metric = pair("kfac", 0)
    metric.save(tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        tensors, said = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    about = {**json.loads(said["natgrad"]), "format": 12}
    save_file(tensors, tmp_path / "old", {**said, "natgrad": json.dumps(about)})
    (tmp_path / "cut").write_bytes((tmp_path / "m").read_bytes()[:-9])
    for name, words in (("old", "has format 12; this version of natgrad reads"), ("cut", "cut short")):
        path = tmp_path / name
        for use in (
            lambda path=path: ng.merge({"a": (state, path)}),
            lambda path=path: ng.anchor(path, state),
            lambda path=path: ng.nearest(path, state, {}, 0.1),
            lambda path=path: ng.prune(path, 0.5, theta=state),
            lambda path=path: ng.round_weights(path, lambda n, w: w, theta=state),
            lambda path=path: ng.effective_dimension(path, 0.1),
        ):
            with pytest.raises(ValueError, match=words):
                use()


def test_half_precision(close: Close) -> None:
    """Parameters in bfloat16, statistics in float32."""
    models = {}
    for seed in range(2):
        torch.manual_seed(seed)
        model = net(seed).bfloat16()
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact")
        metric.update(torch.randn(20, 5, dtype=torch.bfloat16), torch.randint(3, (20,)))
        models[str(seed)] = model.state_dict(), metric
    found, (state, metric) = ng.merge(models), models["0"]
    for result in (found, ng.prune(metric, 0.5)[1], ng.round_weights(metric, lambda n, w: (4 * w).round() / 4)):
        assert all(t.dtype == torch.bfloat16 for t in result.values())
    near = ng.anchor(metric)
    moved = {n: t.double() for n, t in found.items()}
    step = {n: (t - state[n].double()).float() for n, t in moved.items()}
    close(near.penalty(moved).detach().double(), metric.inner(step, step).double() / 2, 1e-5)


def test_one_that_has_not_seen_a_layer(close: Close) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, both: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if bool(both) else self.a(x)

    models = {}
    for seed, both in enumerate((True, False)):
        torch.manual_seed(seed)
        model = Two().double()
        metric = ng.Fisher(model, nn.MSELoss(), kind="exact")
        metric.update((torch.randn(9, 3, dtype=F64), torch.tensor(both)), torch.randn(9, 2, dtype=F64))
        models[str(seed)] = model.state_dict(), metric
    found = ng.merge(models, 1e-13)
    close(found["b.weight"], models["0"][0]["b.weight"], 1e-9)  # all that is known of it
    with pytest.raises(ValueError, match=r"singular|no curvature"):
        ng.merge({"1": models["1"]}, 0.0)


def test_zero_damping_where_the_sum_is_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    for structure in (s for s in STRUCTURES if s != "diagonal"):
        models = {"a": pair(structure, 0, 1), "b": pair(structure, 1, 1)}
        with pytest.raises(ValueError, match="damping 0: the sum of the metrics is singular in the block of"):
            ng.merge(models, 0.0, structure=None)
    x = torch.randn(40, 4, dtype=F64)
    each = {"a": (0, x[:9].clone()), "b": (1, x[9:].clone())}
    for i, part in each.values():
        part[:, i] = 0  # an input that is dead for one and alive for the other
    models = {
        n: regression(part + 0, torch.randn(len(part), 2, dtype=F64), "mean", "kfac") for n, (_, part) in each.items()
    }
    assert all(bool(torch.isfinite(t).all()) for t in ng.merge(models, 0.0).values())
    assert all(bool(torch.isfinite(t).all()) for t in ng.merge(models, 0.0, structure="kfac").values())
    monkeypatch.setattr(module, "DENSE_PARAMETERS", 0)
    with pytest.raises(ValueError, match="not found out"):
        ng.merge(models, 0.0, structure="kfac")


def test_what_does_not_fit() -> None:
    a, b = pair("kfac", 0), pair("kfac", 1)
    with pytest.raises(TypeError, match=r"merge takes \{name: \(state_dict, metric or path\)\}"):
        ng.merge([a, b])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="merge takes"):
        ng.merge({})
    with pytest.raises(TypeError, match="the model 'b' must be"):
        ng.merge({"a": a, "b": b[1]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"takes an ng\.Fisher"):
        ng.merge({"a": a, "b": (b[0], 3)})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match=r"the metric of 'b': .*seen no data"):
        ng.merge({"a": a, "b": (b[0], ng.Fisher(net(), nn.CrossEntropyLoss()))})
    for damping in (-1.0, float("nan"), True, "much"):
        with pytest.raises(ValueError, match="damping must be a finite number"):
            ng.merge({"a": a, "b": b}, damping)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown structure 'full'"):
        ng.merge({"a": a, "b": b}, structure="full")
    with pytest.raises(ValueError, match="has structure 'diagonal', which does not hold what 'input' keeps"):
        ng.merge({"a": pair("diagonal", 0), "b": pair("diagonal", 1)})
    renamed = {("module." + n if n == "0.bias" else n): t for n, t in b[0].items()}
    with pytest.raises(ValueError, match=r"'b' lacks \['0.bias'\]; 'b' has besides \['module.0.bias'\]"):
        ng.merge({"a": a, "b": (renamed, b[1])})
    with pytest.raises(ValueError, match=r"the state_dict of 'b'\['0.bias'\] must be a tensor of shape \(4,\)"):
        ng.merge({"a": a, "b": ({**b[0], "0.bias": torch.zeros(5)}, b[1])})
    with pytest.raises(ValueError, match="structure 'kfac' and 'diagonal'"):
        ng.merge({"a": a, "b": pair("diagonal", 1)}, structure=None)
    wide = ng.Fisher(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), nn.CrossEntropyLoss())
    wide.update(torch.randn(4, 5, dtype=F64), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"0\.weight has shape \(4, 5\) in 'a' and \(6, 5\) in 'b'"):
        ng.merge({"a": a, "b": (b[0], wide)})
    for key, values in (("order", (torch.arange(2), torch.arange(2) + 1)), ("extra", (1, 2))):
        with pytest.raises(ValueError, match=f"the entry '{key}'"):
            ng.merge({"a": ({**a[0], key: values[0]}, a[1]), "b": ({**b[0], key: values[1]}, b[1])})  # type: ignore[dict-item]
