"""Seals: what is loaded is what was saved, bit for bit, or nothing changes."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_cases import batches, classifier, natural, same, train

import natgrad as ng
from natgrad import checkpoint
from natgrad.fisher import state as metric_file
from natgrad.state.seal import SEAL, sealed, unsealed
from tests.bit_flips import KINDS, OUTCOMES, flipped


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_refused_or_says_nothing(kind: str, structure: str) -> None:
    """``python -m tests.bit_flips`` does it 500 times."""
    found = flipped(kind, 25, structure, seed=5)
    assert not found["as something else"]
    assert not found["refused and changed"]
    assert found["refused"] >= 12
    assert sum(found[o] for o in OUTCOMES) == 25


def trained(**options: Any) -> ng.NaturalGradient:
    model = classifier()
    opt = natural(model, average=0.9, **options)
    train(model, opt, batches(3))
    return opt


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a nest with another value at a path."""
    twin = copy.copy(tree)
    twin[path[0]] = value if len(path) == 1 else put(tree[path[0]], path[1:], value)
    return twin


METRIC = ("natgrad", "metric")
CHANGES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "a factor": ((*METRIC, "tensors", "0.U..sum"), torch.eye(6).double()[None], "'tensors.0.U..sum'"),
    "a velocity": (("natgrad", "rule_state", "blocks", "0.weight", "velocity"), torch.ones(1, 6, 5), "velocity'"),
    "a counter": (("natgrad", "steps"), 4, "'names and numbers'"),
    "a rate": (("param_groups", 0, "lr"), 0.5, "'names and numbers'"),
    "an average": (("natgrad", "average", "values", "0.bias"), torch.zeros(6).double(), "'natgrad.average.values.0.b"),
    "the seal": ((SEAL, "checksums", "names and numbers"), 1, "'names and numbers'"),
    "no seal": ((SEAL,), None, "no checksums"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_was_changed_is_refused_by_name(change: str) -> None:
    path, value, words = CHANGES[change]
    state, opt = put(trained().state_dict(), path, value), trained(refresh=2)
    before = opt.state_dict()
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
    assert same(opt.state_dict(), before)


def resealed(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A metric's state with other entries, as a program would write it that knows how to seal."""
    about = {**json.loads(state["about"]), **changes.pop("about", {})}
    tensors = {**state["tensors"], **changes.pop("tensors", {})}
    rest = {k: v for k, v in state.items() if k != SEAL}
    return sealed({**rest, **changes, "about": json.dumps(about), "tensors": tensors})


def other_block(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first, *rest = json.loads(state["about"])["blocks"]
    return resealed(state, about={"blocks": [{**first, **changes}, *rest]})


F64 = torch.float64
NONSENSE: dict[str, tuple[Any, str]] = {
    "shape": (lambda s: resealed(s, tensors={"0.U..sum": torch.eye(5, dtype=F64)[None]}), r"'0.U..sum' .* \(1, 5, 5\)"),
    "mass shape": (lambda s: resealed(s, tensors={"0.U..mass": torch.ones(7, dtype=F64)}), r"'0.U..mass' .* \(7,\)"),
    "NaN": (lambda s: resealed(s, tensors={"0.V..sum": torch.full((1, 5, 5), torch.nan)}), "'0.V..sum' .* NaN"),
    "negative mass": (lambda s: resealed(s, tensors={"0.V..mass": -torch.ones((), dtype=F64)}), "'0.V..mass' .* below"),
    "whole numbers": (lambda s: resealed(s, tensors={"0.V..sum": torch.ones(1, 5, 5).long()}), "real numbers"),
    "no tensor": (lambda s: resealed(s, tensors={"0.V..sum": "5"}), "'0.V..sum' .* must be a tensor"),
    "statistic": (
        lambda s: resealed(s, tensors={"0.W..sum": torch.ones(1, 5, 5)}),
        "'0.W..sum', which is no statistic",
    ),
    "without mass": (lambda s: resealed(s, tensors={"0.U.x.sum": torch.eye(6)[None]}), "'0.U.x.sum' .* stands without"),
    "structure": (lambda s: other_block(s, structure="kfoo"), "a block that this version does not know: .*kfoo"),
    "layout": (lambda s: other_block(s, layers=[{"op": "linear"}]), "a block that this version does not know"),
    "string mass": (lambda s: resealed(s, about={"masses": {"": "12"}}), "'masses' .* must be numbers"),
    "string count": (lambda s: resealed(s, about={"seen": "48"}), "'seen' .* must be a whole number"),
    "nats": (lambda s: resealed(s, about={"nats": [1.0]}), "'nats' .* must be two numbers"),
    "stream": (lambda s: resealed(s, generators={"rows": torch.zeros(3, dtype=torch.uint8)}), "random stream 'rows'"),
    "extra": (lambda s: sealed({**{k: v for k, v in s.items() if k != SEAL}, "more": 1}), "what no metric has"),
    "text": (lambda s: sealed({**{k: v for k, v in s.items() if k != SEAL}, "about": "{"}), "says nothing of itself"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_what_no_metric_has_is_refused_by_name(what: str) -> None:
    """With right checksums, so that it is the values that are looked at; by the metric and by the optimizer."""
    change, words = NONSENSE[what]
    whole, opt = trained().state_dict(), trained(refresh=2)
    before = opt.state_dict()
    state = change(whole["natgrad"]["metric"])
    with pytest.raises(ValueError, match=words):
        opt.metric.load_state_dict(state)
    assert same(opt.state_dict(), before)
    rest = {k: v for k, v in whole.items() if k != SEAL}
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(sealed(put(rest, METRIC, state)))
    assert same(opt.state_dict(), before)


def test_another_program_that_writes_the_file_is_found_out(tmp_path: Path) -> None:
    opt = trained()
    path = tmp_path / "metric.safetensors"
    opt.metric.save(path)
    header = path.read_bytes()
    metadata = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"]
    save_file({**load_file(path), "0.U..sum": torch.eye(6, dtype=F64)[None]}, path, metadata)
    before = opt.state_dict()
    with pytest.raises(ValueError, match=r"the checksum differs of 'tensors\.0\.U\.\.sum'"):
        opt.metric.load(path)
    assert same(opt.state_dict(), before)


def test_a_state_is_its_own() -> None:
    """It stays what it was while training goes on, and so it loads."""
    model = classifier()
    opt = natural(model, average=0.9)
    train(model, opt, batches(5))
    state = opt.state_dict()
    train(model, opt, batches(5))
    opt.load_state_dict(state)
    assert same(opt.state_dict(), state)


def test_a_seal_knows_strides_and_looks_at_everything() -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    state = sealed({"a": {"b": [turned, 1.5, None, (True, "x")]}, "c": torch.zeros(0)})
    flat = put(state, ("a", "b", 0), turned.contiguous())
    back = unsealed(flat, "it")
    assert torch.equal(back["a"]["b"][0], turned)
    assert back["a"]["b"][0].stride() == turned.stride()
    assert SEAL not in back
    for path, value in [(("a", "b", 1), 1.25), (("a", "b", 3), (True, "y")), (("c",), torch.zeros(0, 1))]:
        with pytest.raises(ValueError, match="it is not as it was saved"):
            unsealed(put(state, path, value), "it")


class Turned(nn.Module):
    """Layers large enough for the strides of a factor to show in the last bits, and weights that lie by column."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(40, 70), nn.Linear(70, 4)
        self.mix = nn.Parameter(0.1 * torch.randn(70, 70).T)
        self.gate = nn.Parameter(torch.ones(7, 10).T)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(nn.functional.linear(h, self.mix) * self.gate.exp().mean())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense", "diagonal", "input"])
@pytest.mark.parametrize("road", ["checkpoint", "in the background", "torch"])
def test_every_road_goes_on_bit_for_bit(structure: str, road: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, ng.NaturalGradient]:
        model = Turned()
        chosen = {"first.*": structure, "*": structure} if structure != "dense" else {"last.*": "dense", "*": "kfac"}
        metric = ng.Fisher(model, nn.CrossEntropyLoss(), structure=chosen)
        return model, ng.NaturalGradient(metric, refresh=3, average=0.9)

    def data(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(24, 40, generator=generator) for _ in range(count)]
        return [(x, x[:, :4].argmax(1)) for x in inputs]

    model, opt = build()
    train(model, opt, data(7, 1))
    path = tmp_path / "saved"
    if road == "checkpoint":
        checkpoint.save({"model": model, "opt": opt}, path)
    elif road == "in the background":
        checkpoint.async_save({"model": model, "opt": opt}, path).result()
    else:
        torch.save([model.state_dict(), opt.state_dict()], path)
    at = opt.state_dict()
    again, other = build()
    if road == "torch":
        weights, state = torch.load(path, weights_only=True)
        again.load_state_dict(weights)
        other.load_state_dict(state)
    else:
        checkpoint.load({"model": again, "opt": other}, path)
    assert same(other.state_dict(), at)  # strides too: they are in the seal
    straight = train(model, opt, data(20, 2))
    assert train(again, other, data(20, 2)) == straight


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_metric_file_comes_back_as_it_lay(structure: str, tmp_path: Path) -> None:
    model = Turned()
    metric, other = (ng.Fisher(model, nn.CrossEntropyLoss(), structure=structure) for _ in range(2))
    metric.update(torch.randn(24, 40))
    metric.save(tmp_path / "m.safetensors")
    other.load(tmp_path / "m.safetensors")
    v = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    assert same(other.sharp(v, 0.1), metric.sharp(v, 0.1))
    assert same(other.state_dict(), metric.state_dict())


FULL = """
import resource, signal, sys, torch, natgrad as ng
from natgrad import checkpoint
from torch import nn
net = nn.Linear(200, 50)
metric = ng.Fisher(net, nn.CrossEntropyLoss())
metric.update(torch.randn(8, 200))
metric.save(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the limit ends the process
resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))
for save in (lambda: metric.save(sys.argv[1]), lambda: checkpoint.save({"metric": metric}, sys.argv[2])):
    try:
        save()
    except OSError as error:
        print("OSError", error)
"""


def test_a_full_disk_is_an_oserror_and_keeps_the_file(tmp_path: Path) -> None:
    file, folder = tmp_path / "metric.safetensors", tmp_path / "step-1"
    done = subprocess.run([sys.executable, "-c", FULL, file, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OSError") == 2
    metric_file.opened(metric_file.load(file))
    assert not list(tmp_path.glob("metric*.partial"))
    assert not folder.exists()
    assert checkpoint.latest(tmp_path) is None
