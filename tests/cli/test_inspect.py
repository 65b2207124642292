"""`natgrad inspect`: the numbers, the page, and the command."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_cases import Scaled, batches, classifier, natural, train

import natgrad as ng
from natgrad.cli.app import main
from natgrad.cli.inspect import report as inspect_report
from natgrad.cli.inspect import spectra
from natgrad.fisher import state as metric_file
from natgrad.optim import journal
from natgrad.state.seal import SEAL, sealed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with a journal of ten lines and a parameter without curvature."""
    model = Scaled()
    opt = natural(model)
    for batch in batches(10):
        train(model, opt, [batch])
        journal.append(tmp_path / journal.NAME, opt)
    opt.metric.save(tmp_path / inspect_report.METRIC)
    return tmp_path


def unbiased() -> nn.Module:
    """A classifier without biases, which have a damping of their own."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


# numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "dense", "block", "diagonal"])
@pytest.mark.parametrize("relative", [True, False])
def test_spectra_are_those_of_the_dense_metric(structure: str, relative: bool, tmp_path: Path) -> None:
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure=structure)
    metric.update(*next(batches(1)))
    metric.save(tmp_path / "metric.safetensors")
    found = spectra.load(tmp_path / "metric.safetensors", 0.1, relative)
    values = torch.cat([s.values for s in found.spectra]).sort().values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(metric.dense()), rtol=1e-9, atol=1e-9)
    assert found.uncovered == []
    for s, block in zip(found.spectra, metric.blocks):
        assert s.effective_rank == pytest.approx(float(s.values.sum() ** 2 / s.values.square().sum()))
        if relative:
            eye = torch.eye(block.dimension, dtype=torch.float64).reshape(
                -1, *block.pack(dict(metric.parameters)).shape
            )
            inverse = block.relative_inverse(0.1).apply(eye).reshape(block.dimension, -1)
            shape = torch.linalg.eigvalsh(inverse).flip(0)
            expected = (1 / s.damped).sort(descending=True).values
            torch.testing.assert_close(shape / shape[0], expected / expected[0], rtol=1e-8, atol=1e-12)
        else:
            torch.testing.assert_close(s.damped, s.values + 0.1)


def test_the_cosine_to_expect_is_that_of_gradients_drawn_from_the_metric(tmp_path: Path) -> None:
    model = classifier()
    metric = ng.Fisher(model, nn.CrossEntropyLoss(), kind="exact", structure="dense")
    metric.update(*next(batches(1)))
    metric.save(tmp_path / "metric.safetensors")
    for damping in (1e-3, 0.1, 1e4):
        (s,) = spectra.load(tmp_path / "metric.safetensors", damping, relative=False).spectra
        values = torch.linalg.eigvalsh(metric.dense())
        z = torch.randn(4000, len(values), dtype=torch.float64) * values.clamp(min=0).sqrt()
        d = z / (values + damping)
        cos = (z * d).sum() / (z.square().sum() * d.square().sum()).sqrt()
        assert s.cosine == pytest.approx(float(cos), abs=0.02)
    assert s.cosine > 0.999


def test_cosines_of_the_optimizer() -> None:
    """In a metric of identity blocks they are 1; a fixed step has exactly those of its direction."""
    model = classifier()
    opt = ng.NaturalGradient(ng.Euclidean(model))
    train(model, opt, batches(2), nn.CrossEntropyLoss())
    assert all(c == pytest.approx(1) for c in opt.cosines().values())
    opt = natural(model, step=ng.FixedStep(damping=0.01))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, opt, batches(1))
    for n, p in model.named_parameters():
        step, g = (p.detach() - before[n]).flatten(), p.grad.flatten()
        assert opt.cosines()[n] == pytest.approx(float(-step @ g / step.norm() / g.norm()), rel=1e-6)
    opt = natural(model)
    assert opt.cosines() == {}
    train(model, opt, batches(3))
    assert set(opt.cosines()) == {"0.weight", "2.weight"}
    assert all(0 < c < 0.99 for c in opt.cosines().values())
    model = unbiased()
    opt = natural(model, damping=1e8)
    train(model, opt, batches(3))
    assert all(c > 0.999 for c in opt.cosines().values())


# the journal -------------------------------------------------------------------------------------------------------


def test_the_journal_is_lines_of_plain_json(run: Path) -> None:
    records = list(journal.lines(run / journal.NAME))
    assert [r["steps"] for r in records] == list(range(1, 11))
    assert records[-1]["cosines"].keys() == {"first.weight", "second.weight"}
    assert all(math.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
    with (run / journal.NAME).open("a") as file:
        file.write('{"steps": 11, "cos')
    with pytest.raises(ValueError, match=r"info.jsonl, line 11"):
        list(journal.lines(run / journal.NAME))


# the page --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset") and v]


def test_the_page_fetches_nothing_and_shows_everything(run: Path) -> None:
    page, *pictures = inspect_report.write(run)
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert len(links.found) == 3
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert "url(" not in text
    assert "@import" not in text
    assert {p.name for p in pictures} == {"inspect-cosines.png", "inspect-spectra.png", "inspect-over-time.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    for said in ("first.weight, first.bias", "effective rank", "condition", "gate", "10</b><span>steps", "skipped"):
        assert said in text
    assert "No block has become plain gradient descent" in text


def test_the_page_says_when_natural_gradient_has_become_plain(tmp_path: Path) -> None:
    model = unbiased()
    opt = natural(model, damping=1e8)
    for batch in batches(3):
        train(model, opt, [batch])
        journal.append(tmp_path / journal.NAME, opt)
    opt.metric.save(tmp_path / inspect_report.METRIC)
    assert "Every block: the direction is the gradient" in inspect_report.write(tmp_path)[0].read_text()


def test_a_metric_alone_is_enough(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / inspect_report.METRIC, alone / "mine.safetensors")
    page, *pictures = inspect_report.write(alone / "mine.safetensors", damping=0.5)
    assert {p.name for p in pictures} == {"inspect-cosines.png", "inspect-spectra.png"}
    assert "damping 0.5 (relative to the mean eigenvalue)" in page.read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    model = nn.ModuleDict({"<script>": nn.Linear(4, 3)}).double()
    forward = nn.Module()
    forward.inner = model
    forward.forward = lambda x: model["<script>"](x)
    metric = ng.Fisher(forward, nn.CrossEntropyLoss())
    metric.update(*next(batches(1)))
    metric.save(tmp_path / inspect_report.METRIC)
    text = inspect_report.write(tmp_path)[0].read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
def test_the_page_renders_in_a_browser(run: Path) -> None:
    page = inspect_report.write(run)[0]
    shot = run / "shot.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run / 'profile'}"]
    dump = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    assert len(re.findall(r"<tr>", dump.stdout)) == 5
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=90, check=True)
    assert shot.stat().st_size > 20_000


# the command -------------------------------------------------------------------------------------------------------


def test_train_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--optimizers", "natgrad", "--steps", "12", "--out", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path)]) == 0
    assert (
        "Wrote inspect.html, inspect-cosines.png, inspect-spectra.png, inspect-over-time.png" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "info.jsonl").read_text().splitlines()[-1])["steps"] == 12


def test_the_command_says_in_one_line_what_is_wrong(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    ng.Fisher(classifier(), nn.CrossEntropyLoss()).save(empty / "metric.safetensors")
    (empty / "cut.safetensors").write_bytes((run / "metric.safetensors").read_bytes()[:100])
    wrong = {
        ("nowhere",): "there is no file nowhere; `natgrad train --out DIR` writes one",
        (str(tmp_path.parent),): "holds no metric.safetensors",
        (str(empty),): "has seen no data",
        (str(empty / "cut.safetensors"),): "is cut short or is no safetensors file",
        (str(run), "--damping", "-1"): "--damping -1 is no damping; give a positive number",
        (str(run), "--damping", "nan"): "--damping nan is no damping",
        (str(run), "--out", str(empty)): "is a folder; name the HTML file",
    }
    for arguments, message in wrong.items():
        assert main(["inspect", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.splitlines()) == 1


class Tags(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(name for name, _ in attrs)]


EVIL = "<script onload=x>alert(1)</script><img src=x onerror=y>$\\frac{$"


def evil(state: dict[str, Any], place: str) -> dict[str, Any]:
    """The state of a metric whose file says what no metric says, with right checksums."""
    text = state["about"]
    if place in ("kind", "reduction", "criterion"):
        text = json.dumps({**json.loads(text), place: EVIL})
    elif place == "a name":
        text = text.replace("first.weight", json.dumps(EVIL)[1:-1])
    elif place == "a name without a block":
        text = text.replace('"gate"', json.dumps(EVIL))
    return sealed({**{k: v for k, v in state.items() if k != SEAL}, "about": text})


@pytest.mark.parametrize("place", ["kind", "reduction", "criterion", "a name", "a name without a block", "the journal"])
def test_what_files_say_is_shown_and_not_run(place: str, run: Path, tmp_path: Path) -> None:
    names: set[str] = set()
    for number in range(2):
        if number:
            state = metric_file.load(run / inspect_report.METRIC)
            metric_file.save(evil(state, place), run / inspect_report.METRIC)
            if place == "the journal":
                lines = [json.loads(line) for line in (run / journal.NAME).read_text().splitlines()]
                lines[-1].update(skipped=EVIL, dropped_statistics=EVIL, damping_meaning=EVIL)
                lines[-1]["cosines"] = {EVIL: 0.5}
                (run / journal.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        (page, *_) = inspect_report.write(run)
        tags = Tags()
        tags.feed(page.read_text())
        if not number:
            names = set(tags.found)
    assert "&lt;script" in page.read_text()
    assert set(tags.found) <= names


@pytest.mark.parametrize("entry", [{"steps": EVIL}, {"cosines": EVIL}, {"cosines": {"a": "b"}}, {"share_of_time": []}])
def test_a_journal_that_holds_no_numbers_is_refused(entry: dict[str, Any], run: Path) -> None:
    with (run / journal.NAME).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=rf"info.jsonl, line 11: '({'|'.join(entry)}|a)' must be"):
        inspect_report.write(run)


def test_a_damaged_metric_is_not_shown(run: Path) -> None:
    path = run / inspect_report.METRIC
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not as it was saved"):
        inspect_report.write(run)


def test_a_page_is_written_through_no_link(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    for name in (inspect_report.PAGE, "inspect-spectra.png"):
        (run / name).symlink_to(precious)
    inspect_report.write(run)
    assert precious.read_text() == "years of work"
    assert not (run / inspect_report.PAGE).is_symlink()
