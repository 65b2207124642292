"""200 random models, see `tests.fuzz`, and 80 random programs, see `tests.programs`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests import programs
from tests.fuzz import REFUSALS, Spec, specs, try_one

PARTS = 4  # so that workers share them


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_models_meet_the_oracle_or_are_refused(part):
    counts = {"met": 0}

    @seed(part)  # each part has models of its own
    @settings(
        max_examples=200 // PARTS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def run(spec: Spec) -> None:
        said = try_one(spec)
        assert said == "met" or said in REFUSALS, f"{said}: {spec}"
        counts["met"] += said == "met"

    run()
    assert counts["met"] >= 0.6 * 200 / PARTS  # some ops are there to be refused


@pytest.mark.filterwarnings("ignore")  # of what single programs warn, as of losses without curvature
@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_meet_the_oracle_or_are_refused_and_take_steps(part):
    met = 0
    for number in range(20 * part, 20 * (part + 1)):
        case, structure, said = programs.try_program(number)
        assert said == "met" or said in programs.REFUSALS, f"{said} [{structure}]: {case}"
        met += said == "met"
    assert met >= 17
