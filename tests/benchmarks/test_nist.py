"""NIST's regressions: a share of the table of `benchmarks.nist` that is quick, and what is read from the files."""

from __future__ import annotations

import pytest
import torch

import natgrad as ng
from benchmarks import nist

pytestmark = pytest.mark.skipif(not nist.DATA.is_dir(), reason=f"needs NIST's problems in {nist.DATA}: NATGRAD_DATA")
QUICK = ["Misra1a", "DanWood", "Rat42", "Kirby2", "Gauss1", "Roszman1", "Thurber", "Bennett5"]


@pytest.mark.parametrize("name", nist.MODELS)
def test_the_certified_values_have_the_certified_sum_of_squares(name: str) -> None:
    problem = nist.read(name)
    text = (nist.DATA / f"{name}.dat").read_text()
    certified = float(text.split("Residual Sum of Squares:")[1].split()[0])
    curve = nist.Curve(name, problem.certified)
    with torch.no_grad():
        found = torch.stack([curve(x) for x in problem.x])
    assert float((found - problem.y).square().sum()) == pytest.approx(certified, rel=1e-6, abs=1e-19)
    assert f"{len(problem.y)} Observations" in text


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("rule", ["default", "levenberg-marquardt"])
def test_rules_reach_six_certified_digits(name: str, start: int, rule: str) -> None:
    assert nist.fit(nist.read(name), start, nist.RULES[rule](), steps=100)[0] >= nist.WANTED


@pytest.mark.parametrize("name", ["Eckerle4", "Rat43", "MGH17"])
def test_levenberg_marquardt_gets_there_where_the_default_does_not(name: str) -> None:
    assert nist.fit(nist.read(name), 0, ng.LevenbergMarquardt(), steps=200)[0] >= nist.WANTED


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    nist.main(["DanWood", "--steps", "30"])
    said = capsys.readouterr().out
    assert "default: 2 of 2 to 6 digits" in said
    assert "levenberg-marquardt: 2 of 2 to 6 digits" in said
