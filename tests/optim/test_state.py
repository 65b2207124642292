"""Checkpoints: complete, strict, safe to load, and exact to continue from."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_cases import Scaled, batches, classifier, distance, natural, same, train, weights

import natgrad as ng
from natgrad.state.seal import SEAL

RULES: dict[str, Any] = {
    "default": lambda: None,
    "fixed": lambda: ng.FixedStep(momentum=0.5),
    "trust region": ng.KLTrustRegion,
    "grafted": ng.Grafted,
}


def saved(path: Path, model: nn.Module, opt: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), **more}, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("structure", ["kfac", "dense", "diagonal"])
@pytest.mark.parametrize("stop", [1, 7, 31])
def test_resume_continues_bit_for_bit(tmp_path: Path, rule: str, structure: str, stop: int) -> None:
    def build() -> tuple[nn.Module, ng.NaturalGradient]:
        model = Scaled(torch.float32)
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="sampled", structure=structure)  # draws labels
        return model, ng.NaturalGradient(metric, step=RULES[rule](), average=0.9)

    data = list(batches(60, dtype=torch.float32))
    model, opt = build()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)
    for batch in data[:stop]:
        train(model, opt, [batch])
        scheduler.step()
    state = saved(tmp_path / "checkpoint.pt", model, opt, scheduler=scheduler.state_dict())

    def go_on(model: nn.Module, opt: ng.NaturalGradient, scheduler: Any) -> list[float]:
        losses = []
        for batch in data[stop:]:
            losses += train(model, opt, [batch])
            scheduler.step()
        return losses

    straight = go_on(model, opt, scheduler)
    torch.manual_seed(99)
    again, other = build()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(other, 60)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["opt"])
    scheduler.load_state_dict(state["scheduler"])
    assert go_on(again, other, scheduler) == straight
    assert distance(weights(again), weights(model)) == 0
    with opt.averaged(), other.averaged():
        assert distance(weights(again), weights(model)) == 0
    assert other.info["skipped"] == opt.info["skipped"]
    assert [other.steps, other.refreshes] == [opt.steps, opt.refreshes]


def test_factors_keep_their_dtype_beside_half_precision_parameters(tmp_path: Path) -> None:
    model = classifier(torch.bfloat16)
    opt = natural(model)
    train(model, opt, batches(3, dtype=torch.bfloat16))
    state = saved(tmp_path / "checkpoint.pt", model, opt)
    again = classifier(torch.bfloat16)
    other = natural(again)
    other.load_state_dict(state["opt"])
    for a, b in zip(opt.metric.factors("0.weight"), other.metric.factors("0.weight")):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


def test_a_state_from_before_the_first_draw_starts_the_draws_again() -> None:
    model = classifier()
    opt = natural(model, kind="sampled")
    start, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    losses = train(model, opt, batches(8))
    model.load_state_dict(start)
    opt.load_state_dict(state)
    assert train(model, opt, batches(8)) == losses


def fresh_state(**options: Any) -> dict[str, Any]:
    model = classifier()
    opt = natural(model, **options)
    train(model, opt, batches(2))
    return copy.deepcopy(opt.state_dict())


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def renamed() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(4, 6), nn.Linear(6, 3)).double()


STRANGERS: dict[str, tuple[Any, str]] = {
    "shapes": (lambda: natural(wider()), r"0.weight has shape \(7, 4\) here and \(6, 4\) in the state"),
    "names": (lambda: natural(renamed()), r"parameters that the state lacks: \['1.weight', '1.bias'\]"),
    "kind": (lambda: natural(classifier(), kind="sampled"), "kind is 'sampled' here and 'exact' in the state"),
    "criterion": (lambda: natural(classifier(), nn.MSELoss()), "criterion is 'MSELoss' here and 'CrossEntropyLoss'"),
    "reduction": (lambda: natural(classifier(), nn.CrossEntropyLoss(reduction="sum")), "reduction is 'sum' here"),
    "rule": (lambda: natural(classifier(), step=ng.FixedStep()), "of the step rule NormalisedStep, .* has FixedStep"),
    "groups": (
        lambda: natural(classifier(), groups=[{"params": "2.*"}]),
        r"groups of \[4\] parameters, .* of \[2, 2\]",
    ),
    "average": (lambda: natural(classifier(), average=0.9), "keeps one of averaged weights and the state none"),
    "structure": (
        lambda: ng.NaturalGradient(ng.Fisher(classifier(), nn.CrossEntropyLoss(), kind="exact", structure="diagonal")),
        "the structure of 0.weight is 'diagonal' here and 'kfac' in the state",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_state_of_something_else_is_refused_and_changes_nothing(name: str) -> None:
    build, message = STRANGERS[name]
    state, opt = fresh_state(), build()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert same(opt.state_dict(), before)


def test_a_state_of_another_optimizer_is_refused() -> None:
    state = torch.optim.SGD(classifier().parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="no NaturalGradient state"):
        natural(classifier()).load_state_dict(state)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_refused_and_changes_nothing(tmp_path: Path, share: float) -> None:
    model = classifier()
    opt = natural(model)
    train(model, opt, batches(3))
    metric, whole = tmp_path / "metric.safetensors", tmp_path / "checkpoint.pt"
    opt.metric.save(metric)
    torch.save(opt.state_dict(), whole)
    for file in (metric, whole):
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    before = opt.metric.dense()
    with pytest.raises(ValueError, match=r"metric.safetensors is cut short or is no safetensors file"):
        opt.metric.load(metric)
    with pytest.raises((RuntimeError, OSError)):  # torch's own
        torch.load(whole, weights_only=True)
    assert torch.equal(opt.metric.dense(), before)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path(MARK).touch()",)


def test_a_malicious_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setattr("builtins.MARK", str(mark), raising=False)
    opt = natural(classifier())
    state = opt.state_dict()
    state["natgrad"]["metric"]["about"] = Malicious()
    torch.save(state, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "evil.pt", weights_only=True)
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="no safetensors file"):
        opt.metric.load(tmp_path / "evil.safetensors")
    assert not mark.exists()


def test_the_metric_goes_through_safetensors(tmp_path: Path) -> None:
    model = classifier()
    opt = natural(model, kind="sampled")
    train(model, opt, batches(5))
    opt.metric.save(tmp_path / "metric.safetensors")
    assert all(isinstance(t, Tensor) for t in load_file(tmp_path / "metric.safetensors").values())
    other = ng.Fisher(classifier(), nn.CrossEntropyLoss(), kind="sampled")
    other.load(tmp_path / "metric.safetensors")
    assert torch.equal(other.dense(), opt.metric.dense())
    generators = opt.metric.estimator.generators, other.estimator.generators
    states = [{str(d): g.get_state().tolist() for d, g in found.items()} for found in generators]
    assert states[0] == states[1]
    torch.save({}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        other.load(tmp_path / "other.safetensors")


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {p: v for k, t in tree.items() for p, v in leaves(t, f"{path}.{k}").items()}
    if isinstance(tree, (list, tuple)):
        return {p: v for i, t in enumerate(tree) for p, v in leaves(t, f"{path}.{i}").items()}
    return {path: tree}


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense", "diagonal", "input"])
def test_a_state_holds_sums_over_data_and_nothing_of_one_datum(structure: str) -> None:
    """The data of a batch in another order change every entry by rounding alone: no list of data, and no hash of one,
    survives that. Nor does a state grow with them.
    """

    def state(order: Tensor, size: int = 16) -> dict[str, Any]:
        model = Scaled()
        opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure))
        for x, y in batches(6, size):
            train(model, opt, [(x[order], y[order])])
        return leaves({k: v for k, v in opt.state_dict().items() if k != SEAL})

    one, other = state(torch.arange(16)), state(torch.randperm(16, generator=torch.Generator().manual_seed(1)))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            scale = float(value.abs().max()) or 1.0
            # eigenvectors have a sign, and turn where eigenvalues are close
            if ".Q_" not in name:
                assert float((value - other[name]).abs().max()) < 1e-7 * scale, name
        elif isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        elif isinstance(value, float):
            assert value == pytest.approx(other[name]), name
        elif ".seal" not in name:
            assert rounded(value) == rounded(other[name]), name
    more = state(torch.arange(160), 160)
    assert {n: v.shape for n, v in more.items() if isinstance(v, Tensor)} == {
        n: v.shape for n, v in one.items() if isinstance(v, Tensor)
    }


def rounded(value: Any) -> Any:
    """A text with its numbers to eight digits."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\d+\.\d+(e-?\d+)?", lambda m: f"{float(m.group()):.8g}", value)
