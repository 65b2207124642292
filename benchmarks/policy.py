"""NaturalPolicyGradient beside the TRPO of sb3-contrib: returns and KL divergences on two tasks of gymnasium.

    pip install 'natgrad[rl]'
    python -m benchmarks.policy [--tasks CartPole-v1 Pendulum-v1] [--seeds 3] [--structure dense]

Both have the same networks, seeds, rollouts, advantages and critic, those of sb3-contrib at its defaults; natgrad takes
the step of the policy. Columns: mean return of the last 100 episodes of training, mean return of 50 episodes with
the most likely action afterwards, the smallest and the largest KL divergence over the radius among steps that were
not shortened for the surrogate, steps taken, and seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn import functional as F

import natgrad as ng

TASKS = {"CartPole-v1": 50_000, "Pendulum-v1": 100_000}
EPISODES = 50
PARAMETERS = ["policy.mlp_extractor.policy_net.*", "policy.action_net.*", "policy.log_std"]


class Actor(nn.Module):
    """The part of a policy of stable-baselines that acts: observations → logits, or mean and log of the deviation."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observations: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.policy.extract_features(observations, self.policy.pi_features_extractor)
        found = self.policy.action_net(self.policy.mlp_extractor.forward_actor(features))
        return (found, self.policy.log_std.expand_as(found)) if hasattr(self.policy, "log_std") else found


def distribution(output: Tensor | tuple[Tensor, Tensor]) -> Distribution:
    if isinstance(output, Tensor):
        return Categorical(logits=output)
    return Independent(Normal(output[0], output[1].exp()), 1)


def natural_class() -> type:
    """Return sb3-contrib's TRPO with the policy's step by natgrad."""
    from sb3_contrib import TRPO

    class Natural(TRPO):
        structure = "kfac"

        def _setup_model(self) -> None:
            super()._setup_model()
            self.actor = Actor(self.policy)
            acting = PARAMETERS if hasattr(self.policy, "log_std") else PARAMETERS[:-1]
            likelihood = ng.Likelihood(distribution)
            metric = ng.Fisher(self.actor, likelihood, kind="exact", structure=self.structure, params=acting)
            self.natural = ng.NaturalGradient(metric, step=ng.NaturalPolicyGradient(radius=self.target_kl))
            self.steps: list[dict[str, Any]] = []

        def train(self) -> None:
            self.policy.set_training_mode(True)
            (batch,) = self.rollout_buffer.get(batch_size=None)
            advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
            actions = batch.actions if hasattr(self.policy, "log_std") else batch.actions.long().flatten()

            def surrogate() -> Tensor:
                self.natural.zero_grad()
                log_prob = distribution(self.actor(batch.observations)).log_prob(actions)
                loss = -(advantages * (log_prob - batch.old_log_prob).exp()).mean()
                loss.backward()
                return loss

            self.natural.step(surrogate)
            self.steps.append(self.natural.info)
            for _ in range(self.n_critic_updates):
                for part in self.rollout_buffer.get(self.batch_size):
                    loss = F.mse_loss(self.policy.predict_values(part.observations).flatten(), part.returns)
                    self.policy.optimizer.zero_grad()
                    loss.backward()
                    self.policy.optimizer.step()  # the actor has no gradient here

    return Natural


def run(task: str, seed: int, structure: str | None, timesteps: int) -> str:
    """Return a line of the table; `structure` None is sb3-contrib's own."""
    import gymnasium
    from sb3_contrib import TRPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    kind = TRPO if structure is None else natural_class()
    if structure is not None:
        kind.structure = structure
    began = time.perf_counter()
    agent = kind("MlpPolicy", task, seed=seed, device="cpu")
    agent.learn(timesteps)
    seconds = time.perf_counter() - began
    last = sum(e["r"] for e in agent.ep_info_buffer) / len(agent.ep_info_buffer)
    env = Monitor(gymnasium.make(task))
    env.reset(seed=1000 + seed)
    after, _ = evaluate_policy(agent, env, EPISODES)
    line = f"{last:12.1f}{after:12.1f}"
    if structure is not None:
        binding = [s["kl"] / agent.target_kl for s in agent.steps if s["accepted"] and not s["tries"]]
        taken = sum(s["accepted"] for s in agent.steps)
        line += f"{min(binding):8.3f}{max(binding):8.3f}{taken:5d}/{len(agent.steps)}"
    else:
        line += " " * 23
    return f"{line}{seconds:7.0f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--structure", default="kfac")
    parser.add_argument("--timesteps", type=int, help="instead of the task's own number")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'':32s}{'training':>12s}{'evaluation':>12s}{'KL / radius':>16s}{'steps':>8s}")
    for task in given.tasks:
        for seed in range(given.seeds):
            for name, structure in (("sb3-contrib", None), ("natgrad", given.structure)):
                line = run(task, seed, structure, given.timesteps or TASKS[task])
                print(f"{task:12s} seed {seed}  {name:12s}{line}", flush=True)


if __name__ == "__main__":
    main()
