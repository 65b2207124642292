"""`natgrad merge`: files in, a file out, and nothing overwritten."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import natgrad as ng
from natgrad.cli.app import main


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def run(folder: Path, seed: int, structure: str = "kfac") -> Path:
    torch.manual_seed(seed)
    folder.mkdir()
    metric = ng.Fisher(model := net(), nn.CrossEntropyLoss(), kind="exact", structure=structure)
    metric.update(torch.randn(20, 4), torch.randint(3, (20,)))
    metric.save(folder / "metric.safetensors")
    save_file(model.state_dict(), folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "model.pt")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [run(tmp_path / n, i) for i, n in enumerate("ab")]


def expected(runs: list[Path], **options: float) -> dict[str, torch.Tensor]:
    return ng.merge({str(r): (load_file(r / "model.safetensors"), r / "metric.safetensors") for r in runs}, **options)


def test_folders_and_files(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, read in (("m.safetensors", load_file), ("m.pt", lambda p: torch.load(p, weights_only=True))):
        given = [str(runs[0]), f"{runs[1] / 'model.pt'},{runs[1] / 'metric.safetensors'}"]
        assert main(["merge", *given, "--out", str(tmp_path / name), "--damping", "0.1"]) == 0
        found, right = read(tmp_path / name), expected(runs, damping=0.1)
        assert list(found) == list(right) or sorted(found) == sorted(right)
        assert all(torch.equal(found[n], t) for n, t in right.items())
        assert f"Merged 2 models, 51 numbers, into {tmp_path / name}" in capsys.readouterr().out
        net().load_state_dict(found)


def test_nothing_is_overwritten_without_force(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"mine")
    command = ["merge", *map(str, runs), "--out", str(out)]
    assert main(command) == 2
    assert out.read_bytes() == b"mine"
    assert f"natgrad: {out} is there already; give another --out, or --force" in capsys.readouterr().err
    (runs[1] / "metric.safetensors").write_bytes(b"cut short")
    assert main([*command, "--force"]) == 2
    assert out.read_bytes() == b"mine"
    run(tmp_path / "c", 1)
    assert main(["merge", str(runs[0]), str(tmp_path / "c"), "--out", str(out), "--force"]) == 0
    assert len(load_file(out)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "m.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["A"], "name two models at least"),
        (["A", "A"], "is named twice"),
        (["A", "none"], "none is no folder; give one with model.safetensors"),
        (["A", "x,y"], "there is no file x"),
        (["A", "A/metric.safetensors,A/metric.safetensors"], "'A/metric.safetensors,A/metric.safetensors' lacks"),
        (["A", "A/poor.pt,A/metric.safetensors"], "holds no weights that can be read"),
        (["A", "A/list.pt,A/metric.safetensors"], "holds no state_dict"),
        (["A", "B", "--damping", "-1"], "--damping -1 is none"),
        (["A", "B", "--damping", "nan"], "--damping nan is none"),
        (["A", "B", "--structure", "full"], "unknown structure 'full'"),
        (["A", "B", "--structure", "dense"], "has structure 'kfac', which does not hold what 'dense' keeps"),
        (["A", "B", "--out", "m.txt"], "must end in .safetensors"),
        (["A", "B", "--out", "no/m.pt"], "must be a file in a folder that exists"),
        (["A", "other"], "the state_dicts have different entries"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    said: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    os.rename("a", "A")
    os.rename("b", "B")
    Path("A/poor.pt").write_bytes(b"no zip")
    torch.save([1, 2], "A/list.pt")
    if "other" in words:
        run(Path("other"), 0)
        save_file({"w": torch.zeros(3)}, "other/model.safetensors")
    out = [] if "--out" in words else ["--out", "m.pt"]
    assert main(["merge", *words, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("natgrad: ")
    assert said in error
    assert error.count("\n") == 1
    assert not Path("m.pt").exists()


def test_warnings_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    for i, n in enumerate("ab"):
        torch.manual_seed(i)
        (tmp_path / n).mkdir()
        metric = ng.Fisher(model := Odd(), nn.CrossEntropyLoss(), kind="exact")
        metric.update(torch.randn(20, 4), torch.randint(3, (20,)))
        metric.save(tmp_path / n / "metric.safetensors")
        save_file(model.state_dict(), tmp_path / n / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "m.safetensors")]) == 0
    assert "'b.weight' (its file has no block for it)" in capsys.readouterr().err
