"""The policies of `benchmarks.policy`; a run needs the packages of natgrad[rl]."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as td

from benchmarks import policy


def test_outputs_of_the_actor_are_distributions() -> None:
    logits = torch.randn(5, 3)
    mean, log_std = torch.randn(5, 2), torch.randn(2).expand(5, 2)
    torch.testing.assert_close(policy.distribution(logits).probs, logits.softmax(1))
    found, y = policy.distribution((mean, log_std)), torch.randn(5, 2)
    torch.testing.assert_close(found.log_prob(y), td.Normal(mean, log_std.exp()).log_prob(y).sum(1))


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("task", policy.TASKS)
def test_a_short_run_keeps_to_the_radius(task: str) -> None:
    pytest.importorskip("sb3_contrib", reason="needs sb3-contrib and gymnasium, natgrad[rl]")
    words = policy.run(task, 0, "kfac", 2048).split()
    assert 0.95 <= float(words[2]) <= float(words[3]) <= 1.0
    assert words[4] == "1/1"
