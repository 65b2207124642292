"""Bad input: every message says what was given, what is supported and what to do, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import STRUCTURES, mlp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributions as td

import natgrad as ng
from natgrad.capture.tape import CaptureError

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
Y = torch.tensor([0, 2, 1, 2])


def metric(**options: Any) -> ng.Fisher:
    return ng.Fisher(mlp(), options.pop("criterion", nn.CrossEntropyLoss()), **options)


def filled(**options: Any) -> ng.Fisher:
    m = metric(**options)
    m.update(X, Y)
    return m


def vector(m: ng.Metric) -> dict[str, Tensor]:
    return {n: torch.ones_like(p) for n, p in m.parameters.items()}


def said(*parts: str) -> str:
    """A pattern for all parts in order."""
    return "(?s)" + ".*".join(re.escape(p) for p in parts)


# options ------------------------------------------------------------------------------------------------------


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=said("unknown kind 'exat'", "'exact'", "'sampled'", "'empirical'")):
        metric(kind="exat")


@pytest.mark.parametrize("structure", ["kron", {"0.*": "kron"}])
def test_unknown_structure(structure: Any) -> None:
    with pytest.raises(
        ValueError, match=said("unknown structure 'kron'", "'dense'", "'block'", "'diagonal'", "'kfac'")
    ):
        metric(structure=structure)


def test_structure_of_another_type() -> None:
    with pytest.raises(TypeError, match=said("structure takes one of", "'dense'", "{name pattern: structure}", "int")):
        metric(structure=3)


def test_structure_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=said("structure", "'fc*'", "there are", "'0.weight'")):
        metric(structure={"fc*": "dense"})


def test_unknown_sharing() -> None:
    with pytest.raises(ValueError, match=said("unknown sharing 'both'", "'expand'", "'reduce'")):
        metric(sharing="both")


@pytest.mark.parametrize("samples", [0, -1, 1.5])
def test_number_of_samples(samples: Any) -> None:
    with pytest.raises(ValueError, match=said("samples must be a whole number of at least 1", str(samples))):
        metric(samples=samples)


@pytest.mark.parametrize("option", ["output", "targets"])
def test_callables(option: str) -> None:
    with pytest.raises(TypeError, match=said(f"{option}= takes a callable")):
        metric(**{option: "logits"})


class Focal(nn.Module):
    reduction = "mean"


class MyCrossEntropy(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("criterion", "given"),
    [
        (nn.CTCLoss(), "CTCLoss"),
        (Focal(), "Focal"),
        (MyCrossEntropy(), "MyCrossEntropy"),
        (nn.CrossEntropyLoss, "the class CrossEntropyLoss itself (pass an instance)"),
        (nn.functional.cross_entropy, "function"),
        ("mse", "str"),
        (None, "NoneType"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_unknown_criterion(criterion: Any, given: str) -> None:
    expected = said(given, "nn.CrossEntropyLoss", "nn.MSELoss", "nn.PoissonNLLLoss", "ng.Loss(", "ng.Likelihood(")
    with pytest.raises(TypeError, match=expected):
        metric(criterion=criterion)


@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.GaussianNLLLoss, nn.PoissonNLLLoss, nn.NLLLoss],
)
def test_reduction_none(criterion: Any) -> None:
    with pytest.raises(ValueError, match=said("reduction='none'", '"mean" or "sum"')):
        metric(criterion=criterion(reduction="none"))


def test_likelihood_options() -> None:
    with pytest.raises(ValueError, match=said("Likelihood(reduction='none')", '"mean" or "sum"')):
        ng.Likelihood(lambda f: td.Normal(f, 1.0), reduction="none")
    with pytest.raises(TypeError, match=said("Likelihood takes a callable", "Distribution", "3")):
        ng.Likelihood(3)


# models -------------------------------------------------------------------------------------------------------


def test_no_trainable_parameter() -> None:
    for model in (nn.ReLU(), mlp().requires_grad_(False)):
        with pytest.raises(ValueError, match=said("no parameters", "requires grad")):
            ng.Fisher(model, nn.MSELoss())
    with pytest.raises(ValueError, match="no parameters"):
        ng.Euclidean([])


def test_params_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=said("params", "'fc.*'", "there are", "'0.weight'")):
        metric(params="fc.*")


def test_no_module() -> None:
    with pytest.raises(TypeError, match=said("torch.nn.Module", "function")):
        ng.Fisher(lambda x: x, nn.MSELoss())


def test_complex_and_meta_parameters() -> None:
    with pytest.raises(ValueError, match=said("'weight' is complex", "real parameters")):
        ng.Fisher(nn.Linear(2, 2, dtype=torch.complex128), nn.MSELoss())
    with pytest.raises(ValueError, match=said("'weight' is on the meta device", "to_empty")):
        ng.Fisher(nn.Linear(2, 2, device="meta"), nn.MSELoss())


class Uses(nn.Module):
    """A weight used by a linear layer and, as told, by other means too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(3, 3).double(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "matmul":
            return x @ self.fc.weight.T + self.fc.bias
        out = self.fc(x)
        if self.how == "both":
            return out + x @ (2 * self.fc.weight).T
        if self.how == "penalty":
            return out + self.fc.weight.square().mean()
        return out.detach() if self.how == "detached" else out


@pytest.mark.parametrize("how", ["both", "penalty"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_partly_uncaptured_use(how: str, structure: str) -> None:
    m = ng.Fisher(Uses(how), nn.MSELoss(), structure=structure)
    expected = said("parameter 'fc.weight'", "linear", "no op rule covers", "reached through", "params=")
    with pytest.raises(CaptureError, match=expected):
        m.update(X)
    assert m.seen == 0


@pytest.mark.parametrize("how", ["both", "penalty"])
def test_partly_uncaptured_use_while_training(how: str) -> None:
    model, criterion = Uses(how), nn.MSELoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion))
    assert opt.refresh_due
    with pytest.raises(CaptureError, match=said("parameter 'fc.weight'", "params=")):
        criterion(model(X), X)


def test_an_output_that_depends_on_no_parameter() -> None:
    m = ng.Fisher(Uses("detached"), nn.MSELoss())
    with pytest.raises(CaptureError, match=said("does not depend on any parameter", "detached")):
        m.update(X)


def test_passes_without_end() -> None:
    m = ng.Fisher(nn.Linear(3, 20_000).double(), nn.MSELoss(), kind="exact")
    with pytest.raises(ValueError, match=said('kind="exact"', "20000 backward passes", 'kind="sampled"')):
        m.update(X)


# outputs and targets ------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.what = mlp(), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.body(x))


@pytest.mark.parametrize(
    ("what", "given"),
    [
        (lambda f: (f, f), "a tuple of 2"),
        (lambda f: {"logits": f}, "with keys ['logits']"),
        (lambda f: f.argmax(1), "torch.int64"),
    ],
    ids=["tuple", "dict", "integers"],
)
@pytest.mark.parametrize("labels", [Y, None], ids=["labels", "no-labels"])
def test_output_of_another_type(what: Any, given: str, labels: Any) -> None:
    m = ng.Fisher(Returns(what), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=said("CrossEntropyLoss takes", given)):
        m.update(X, labels)


def test_output_picks_the_tensor() -> None:
    ng.Fisher(Returns(lambda f: {"logits": f}), nn.CrossEntropyLoss(), output=lambda o: o["logits"]).update(X, Y)


def test_gaussian_takes_a_pair() -> None:
    with pytest.raises(ValueError, match=said("pair (mean, variance)", "a tensor of shape (4, 3)", "output=")):
        metric(criterion=nn.GaussianNLLLoss()).update(X)


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (Y + 2, "out of bounds"),
        (Y[:2], "batch_size"),
        (torch.randn(4, 2).double(), "target"),
        ([0, 1, 2, 0], "a list of 4"),
    ],
    ids=["range", "length", "shape", "type"],
)
def test_labels_that_do_not_fit(labels: Any, why: str) -> None:
    m = metric()
    with pytest.raises(ValueError, match=said("CrossEntropyLoss cannot take a tensor of shape (4, 3)")) as error:
        m.update(X, labels)
    assert why in str(error.value)
    assert "output=" in str(error.value)
    assert m.seen == 0


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.PoissonNLLLoss(), nn.BCEWithLogitsLoss()], ids=lambda c: type(c).__name__
)
def test_targets_that_would_be_broadcast(criterion: nn.Module) -> None:
    m = ng.Fisher(mlp(1), criterion)
    with pytest.raises(ValueError, match=said("cannot take a tensor of shape (4, 1)", "shape (4,)", "output=")):
        m.update(X, torch.zeros(4).double())


NEEDS_TARGETS = [
    ("empirical", nn.CrossEntropyLoss(), "kind='empirical'"),
    ("exact", nn.CrossEntropyLoss(weight=torch.ones(3).double()), "`weight`"),
    ("sampled", nn.CrossEntropyLoss(weight=torch.ones(3).double()), "`weight`"),
    ("sampled", nn.CrossEntropyLoss(ignore_index=0), "`ignore_index=0`"),
    ("sampled", nn.NLLLoss(ignore_index=0), "`ignore_index=0`"),
    ("exact", nn.BCEWithLogitsLoss(pos_weight=torch.ones(3).double()), "`pos_weight`"),
]


@pytest.mark.parametrize(("kind", "criterion", "why"), NEEDS_TARGETS, ids=lambda v: v if isinstance(v, str) else "")
def test_missing_targets(kind: str, criterion: nn.Module, why: str) -> None:
    m = metric(kind=kind, criterion=criterion)
    with pytest.raises(ValueError, match=said("needs targets", why, "update(inputs, targets)", "targets=")):
        m.update(X)
    with pytest.raises(ValueError, match="needs targets"):
        m.fit([X], progress=False)
    assert m.seen == 0


def test_missing_targets_with_a_functional_loss() -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind="empirical"))
    with pytest.raises(ValueError, match=said("needs targets", "call the criterion", "targets=")):
        nn.functional.cross_entropy(model(X), Y).backward()
    assert opt.steps == 0


def test_empty_batch_and_empty_loader() -> None:
    m = metric()
    for loader in ([], torch.utils.data.DataLoader([], batch_size=2)):
        with pytest.raises(ValueError, match=said("loader is empty", "at least one batch")):
            m.fit(loader, progress=False)
    with pytest.raises(ValueError, match="batch is empty"):
        m.update(X[:0], Y[:0])


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite(kind: str, bad: float) -> None:
    m = filled(kind=kind)
    before = m.dense()
    broken = X.clone()
    broken[1, 0] = bad
    model = m.model
    if bad == float("inf"):  # tanh would hide it
        model.get_submodule("2").register_forward_hook(lambda _, __, out: out + bad)
    with pytest.raises(ValueError, match=said("NaN or Inf", "nothing was added")):
        m.update(broken, Y)
    assert torch.equal(m.dense(), before)


# vectors, damping and order of calls -----------------------------------------------------------------------------


METRICS = [
    *(pytest.param(lambda s=s: filled(structure=s), id=s) for s in STRUCTURES),
    pytest.param(lambda: ng.Euclidean(mlp()), id="euclidean"),
]


@pytest.mark.parametrize("make", METRICS)
def test_vectors_that_do_not_fit(make: Any) -> None:
    m = make()
    good = vector(m)
    verbs: list[Callable[[Any], Any]] = [
        m.flat,
        lambda v: m.sharp(v, 0.1),
        m.norm,
        lambda v: m.inner(v, good),
        lambda v: m.inner(good, v),
    ]
    missing = {n: t for n, t in good.items() if n != "0.bias"}
    extra = {**good, "fc.weight": torch.ones(2)}
    misshaped = {**good, "2.weight": torch.ones(4, 3).double()}
    for verb in verbs:
        with pytest.raises(ValueError, match=said("missing ['0.bias']", "The names are", "'2.weight'")):
            verb(missing)
        with pytest.raises(ValueError, match=said("unknown ['fc.weight']", "The names are")):
            verb(extra)
        with pytest.raises(ValueError, match=said("['2.weight']", "shape (3, 4)", "got (4, 3)")):
            verb(misshaped)
        with pytest.raises(ValueError, match=said("['0.bias']", "shape (4,)", "got list")):
            verb({**good, "0.bias": [0.0] * 4})
        with pytest.raises(TypeError, match=said("dict {parameter name: tensor}", "Tensor")):
            verb(torch.ones(31))


@pytest.mark.parametrize("make", METRICS)
@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf"), "small", None])
def test_damping_out_of_range(make: Any, damping: Any) -> None:
    m = make()
    if isinstance(m, ng.Euclidean) and damping == 0:
        return  # the identity needs no damping
    verbs = [lambda: m.sharp(vector(m), damping), lambda: m.logdet(damping), lambda: m.sample(damping)]
    if isinstance(m, ng.Fisher):
        for p in m.parameters.values():
            p.grad = torch.ones_like(p)
        verbs.append(lambda: m.precondition_(damping))
    for verb in verbs:
        with pytest.raises(ValueError, match=said("damping must be a positive finite number", repr(damping))):
            verb()
    if isinstance(m, ng.Fisher):
        assert all(bool((p.grad == 1).all()) for p in m.parameters.values())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_verbs_before_any_update(structure: str) -> None:
    m = metric(structure=structure)
    v = vector(m)
    verbs: dict[str, Callable[[], Any]] = {
        "sharp": lambda: m.sharp(v, 0.1),
        "flat": lambda: m.flat(v),
        "inner": lambda: m.inner(v, v),
        "norm": lambda: m.norm(v),
        "dense": m.dense,
        "diagonal": m.diagonal,
        "trace": m.trace,
        "logdet": lambda: m.logdet(0.1),
        "sample": lambda: m.sample(0.1),
        "factors": lambda: m.factors("0.weight"),
    }
    for verb in verbs.values():
        with pytest.raises(RuntimeError, match=said("no data yet", "update(inputs, targets)", "fit(loader)")):
            verb()
    m.update(X)
    m.reset()
    with pytest.raises(RuntimeError, match="no data yet"):
        m.sharp(v, 0.1)


def test_precondition_without_gradients() -> None:
    with pytest.raises(ValueError, match=said("no parameter has a gradient", "backward()")):
        filled().precondition_(0.1)


def test_factors_of_what_has_none() -> None:
    with pytest.raises(ValueError, match=said("no parameter 'fc'", "'0.weight'")):
        filled().factors("fc")
    with pytest.raises(ValueError, match=said("'0.weight'", "'dense'", "no Kronecker factors", "structure='kfac'")):
        filled(structure="dense").factors("0.weight")


def test_update_of_a_driven_metric() -> None:
    m = metric()
    ng.NaturalGradient(m)
    with pytest.raises(RuntimeError, match=said("driven by an optimizer", "count them twice", "ng.Fisher(")):
        m.update(X, Y)
    with pytest.raises(RuntimeError, match="driven by an optimizer"):
        m.fit([(X, Y)], progress=False)


# files --------------------------------------------------------------------------------------------------------


def test_metric_file_of_another_model(tmp_path: Any) -> None:
    filled().save(path := tmp_path / "m.safetensors")
    other = ng.Fisher(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False)).double(), nn.CrossEntropyLoss())
    other.update(X, Y)
    before = other.dense()
    with pytest.raises(ValueError, match="belongs to another metric") as error:
        other.load(path)
    for part in ("lacks: ['1.weight']", "['2.weight', '2.bias']", "0.weight has shape (5, 3) here and (4, 3)"):
        assert part in str(error.value)
    assert torch.equal(other.dense(), before)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"kind": "exact"}, "kind is 'exact' here and 'sampled'"),
        ({"criterion": nn.MSELoss()}, "criterion is 'MSELoss' here and 'CrossEntropyLoss'"),
        ({"criterion": nn.CrossEntropyLoss(reduction="sum")}, "reduction is 'sum' here and 'mean'"),
        ({"structure": {"2.*": "dense"}}, "structure of 2.weight is 'dense' here and 'kfac'"),
        ({"sharing": "reduce"}, "sharing of 0.weight is 'reduce' here and 'expand'"),
        ({"params": "0.*"}, "lacks: ['2.weight', '2.bias']"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_metric_file_of_another_kind(options: dict[str, Any], differs: str, tmp_path: Any) -> None:
    filled().save(path := tmp_path / "m.safetensors")
    m = metric(**options)
    with pytest.raises(ValueError, match=said("belongs to another metric", differs)):
        m.load(path)
    assert m.seen == 0


def test_broken_metric_files(tmp_path: Any) -> None:
    m = filled()
    m.save(path := tmp_path / "m.safetensors")
    before, whole = m.dense(), path.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=said(str(path), "cut short")):
            m.load(path)
    path.write_bytes(b"not a metric at all, but long enough to have a header")
    with pytest.raises(ValueError, match="no safetensors file"):
        m.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no natgrad metric"):
        m.load(path)
    with pytest.raises(FileNotFoundError, match=said("no metric file", "absent")):
        m.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=said("no state of a Fisher metric", "about", "state")):
        m.load_state_dict({"state": {}, "param_groups": []})
    assert torch.equal(m.dense(), before)


def test_saving_where_it_cannot(tmp_path: Any) -> None:
    m = filled()
    for path in (tmp_path / "none" / "m.safetensors", tmp_path):
        with pytest.raises(OSError, match=said("cannot write the metric to", str(path), "folder that exists")):
            m.save(path)


def test_a_failed_save_keeps_the_file_before(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    m = filled()
    m.save(path := tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("natgrad.metric.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        m.save(path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


# the optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -0.1},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"damping": 0.0},
        {"damping": -1.0},
        {"damping": float("nan")},
        {"weight_decay": -1.0},
        {"refresh": 0},
        {"refresh": 2.5},
    ],
    ids=str,
)
def test_optimizer_options_out_of_range(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=said(f"{name} must be", repr(value))):
        ng.NaturalGradient(metric(), **options)


@pytest.mark.parametrize("name", ["lr", "momentum", "damping", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", True, [0.1], 1j, torch.ones(2)], ids=str)
def test_optimizer_options_that_are_no_numbers(name: str, value: Any) -> None:
    why = said(f"{name} must be a number", repr(value), "leave it out")
    with pytest.raises(TypeError, match=why):
        ng.NaturalGradient(metric(), **{name: value})
    with pytest.raises(TypeError, match=why):
        ng.NaturalGradient(metric(), groups=[{"params": "0.*", name: value}])


@pytest.mark.parametrize("name", ["lr", "momentum", "damping", "weight_decay"])
def test_a_group_leaves_an_option_out_instead_of_none(name: str) -> None:
    with pytest.raises(TypeError, match=said(f"{name} must be a number", "None", "leave it out")):
        ng.NaturalGradient(metric(), groups=[{"params": "0.*", name: None}])


def test_numbers_of_numpy_and_tensors_are_numbers() -> None:
    opt = ng.NaturalGradient(metric(), lr=torch.tensor(0.05), damping=np.float32(0.2), weight_decay=np.int64(1))
    opt.metric.criterion(opt.metric.model(X), Y).backward()
    opt.step()
    assert opt.info["step_length"] == pytest.approx(0.05)


def test_a_group_with_an_unknown_key_is_refused_and_not_added() -> None:
    why = said("unknown keys ['weightdecay']", "'params'", "'lr'", "'momentum'", "'damping'", "'weight_decay'")
    with pytest.raises(ValueError, match=why):
        ng.NaturalGradient(metric(), groups=[{"params": "0.*", "weightdecay": 0.1}])
    opt = ng.NaturalGradient(metric())
    for wrong in ({"weightdecay": 0.1}, {"lr": -1.0}, {"lr": 0.5, "weight_decay": 2.0}):
        with pytest.raises(ValueError):  # noqa: PT011 -- each has its own
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **wrong})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "initial_lr": 0.1})  # a scheduler's


@pytest.mark.parametrize("groups", [[{"lr": 0.1}], {"params": "0.*"}], ids=str)
def test_what_is_no_parameter_group(groups: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=said("parameter group", "params")):
        ng.NaturalGradient(metric(), groups=groups)


def test_a_decay_that_takes_more_than_the_weights_is_refused_wherever_it_comes_from() -> None:
    why = said("lr · weight_decay must be below 1, got", "0.5 · 2 = 1", "smaller")
    with pytest.raises(ValueError, match=why):
        ng.NaturalGradient(metric(), lr=0.5, weight_decay=2.0)
    with pytest.raises(ValueError, match=why):
        ng.NaturalGradient(metric(), lr=0.5, groups=[{"params": "0.*", "weight_decay": 2.0}])
    refused_at_step({"lr": 0.5}, why, weight_decay=2.0)


@pytest.mark.parametrize(
    "written",
    [{"lr": -0.1}, {"lr": float("nan")}, {"momentum": 1.0}, {"damping": 0.0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_what_a_schedule_writes_is_checked_at_the_step(written: dict[str, float]) -> None:
    ((name, value),) = written.items()
    refused_at_step(written, said(f"{name} must be", repr(value)))


def refused_at_step(written: dict[str, float], why: str, **options: Any) -> None:
    opt = ng.NaturalGradient(metric(), **options)
    opt.metric.criterion(opt.metric.model(X), Y).backward()
    before = [p.detach().clone() for p in opt.metric.model.parameters()]
    opt.param_groups[0].update(written)
    with pytest.raises(ValueError, match=why):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(opt.metric.model.parameters(), before))


def test_optimizer_without_a_metric() -> None:
    with pytest.raises(TypeError, match=said("takes a metric first", "Sequential", "ng.Fisher(model, criterion)")):
        ng.NaturalGradient(mlp())
    with pytest.raises(TypeError, match=said("takes a metric first", "generator")):
        ng.NaturalGradient(mlp().parameters(), lr=0.1)


def test_a_step_without_a_forward_pass_of_the_model() -> None:
    model = mlp()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()))
    before = [p.detach().clone() for p in model.parameters()]
    nn.CrossEntropyLoss()(model.forward(X), Y).backward()  # hooks of the model do not run
    with pytest.raises(RuntimeError, match=said("no forward pass", "model(x)", "backpropagate")):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_a_batch_for_a_metric_that_takes_backward() -> None:
    opt = ng.NaturalGradient(metric())
    with pytest.raises(TypeError, match=said("loss.backward()", "without a batch")):
        opt.step((X, Y))
