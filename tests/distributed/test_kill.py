"""A rank is killed and the run ends as if it had not been. ``python -m tests.distributed.kill`` does it 20 times."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.distributed.kill import RANKS, STEPS, compare, run, train
from tests.distributed.pool import Pool


def undisturbed(rank: int, size: int, folder: Path) -> None:
    train(folder, "0")


def test_a_killed_rank_costs_nothing_but_the_steps_since_the_last_checkpoint(
    tmp_path: Path, pool_of: Callable[[int], Pool]
) -> None:
    (tmp_path / "straight" / "checkpoints").mkdir(parents=True)
    pool_of(RANKS).run(undisturbed, tmp_path / "straight")
    run(tmp_path / "disturbed", random.randrange(RANKS), random.randrange(1, STEPS - 1))
    compare(tmp_path / "disturbed", tmp_path / "straight")
