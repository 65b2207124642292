"""The arithmetic of the default step rule on lists of tensors, one entry a block. docs/step.md derives it.

For a block with gradient g, direction d = ĝ⁻¹g, weights of size r and velocity v:

    α = min(e^{κ c̄} min(η r / size(d), ν / s), ν / ⟨g, d⟩), then all α times min(1, √(ε / Σ ½ α² s ⟨g, d⟩))
    v ← v − β α d,   θ ← θ − (1 − β) α d + c v,   v ← (1 − c) v,   c = k / (k + τ)

c̄ is the running cosine between −d and v, and τ the age of the block's mean, which is halved where the block turns back.
``torch.compile`` makes these functions slower: its checks before a call cost more than fusing saves.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Each value is explained in docs/step.md, with the experiment that chose it (`python -m benchmarks.step_rule`).
STRETCH = 3.0  # κ: a step is at most e³ times as long as η says, or as short
MEMORY = 5.0  # steps that c̄ averages over, while a mean is young
MEMORY_SHARE = 0.1  # of its age, that c̄ averages over besides: noise must not look like a turn
NEWTON_SHARE = 0.5  # ν: of the block's damped Newton step, as blocks do not know of each other's steps
NATS = 0.2  # ε: how far one step may move the predictions, in nats by the metric's own reckoning
PROMISE = NEWTON_SHARE  # nats by which a block may promise to lower the loss: ν Newton steps promise ν nats at most
WINDOW = 3.0  # k: the mean is over about the last third of the steps
TURNED = -0.3  # c̄ below which a block has turned back


class Lengths(NamedTuple):
    """One entry a block; the last two are scalars."""

    alpha: Tensor  # α before the bound on the predictions
    decay: Tensor  # ρ²/η, ρ = min(η, ν size(d) / s r): the way without stretching, as a share of the weights' size
    coherence: Tensor  # c̄ with the new direction in it
    nats: Tensor  # ½ Σ α² s ⟨g, d⟩, how far the predictions move, in units of the loss
    at_newton: Tensor  # share of the blocks whose Newton step was the shorter one


def lengths(
    directions: list[Tensor],
    gradients: list[Tensor],
    velocities: list[Tensor],
    coherence: Tensor,
    ages: Tensor,
    norms: Tensor,
    sizes: Tensor,
    rates: Tensor,
    weights: Tensor,
    newton_scale: Tensor | None,
    nat: Tensor | None,
) -> Lengths:
    """Return how far each block goes along its direction.

    ν / ⟨g, d⟩ holds where the metric has not seen what the gradient is of, as of rare tokens in a large vocabulary.

    Args:
        directions: d of each block; `gradients`: g; `velocities`: v.
        coherence: c̄, (blocks,); `ages`: τ, (blocks,).
        norms: ‖d‖, (blocks,); `sizes`: size(d), (blocks,).
        rates: η, (blocks,); `weights`: r, (blocks,).
        newton_scale: s, how many times the Newton step each direction is, (blocks,); None where that is not known.
        nat: how much of the loss one nat is; None sets no bound on what a block promises.
    """
    speeds = torch.stack(torch._foreach_norm(velocities))
    along = torch.stack([dot(d, v) for d, v in zip(directions, velocities)])
    cosines = (-along / norms / speeds).nan_to_num(0, 0, 0)  # 0 where one of them is
    now = coherence + (cosines - coherence) / (MEMORY + MEMORY_SHARE * ages)
    plain = full = torch.where(sizes > 0, rates * weights / sizes, 0.0)
    if newton_scale is not None:
        plain = torch.minimum(full, NEWTON_SHARE / newton_scale)
    alpha = (STRETCH * now).exp() * plain
    shares = plain * sizes / weights
    decay = torch.where(rates > 0, shares.square() / rates, 0.0)
    if newton_scale is None:
        nothing = alpha.new_zeros(())
        return Lengths(alpha, decay, now, nothing, nothing)
    slopes = torch.stack([dot(g, d) for g, d in zip(gradients, directions)])
    if nat is not None:
        nat = nat.to(slopes)
        alpha = torch.minimum(alpha, torch.where((slopes > 0) & (nat > 0), PROMISE * nat / slopes, math.inf))
    nats = 0.5 * (alpha.square() * newton_scale * slopes).sum()
    return Lengths(alpha, decay, now, nats, (plain < full).to(alpha).mean())


def bound(nats: Tensor, nat: Tensor | None) -> Tensor:
    """Return what all α are multiplied by, 1 at most: a step moves the predictions by ε nats at most.

    Args:
        nats: how far the predictions move, in units of the loss.
        nat: how much of the loss one nat is; None sets no bound.
    """
    if nat is None:
        return torch.ones_like(nats)
    nat = nat.to(nats)
    near = (NATS * nat / nats.clamp(min=0)).sqrt().clamp(max=1.0)
    return torch.where(nat > 0, near, 1.0).nan_to_num(1.0)


def move_(directions: list[Tensor], velocities: list[Tensor], alpha: Tensor, momenta: Tensor, ages: Tensor) -> None:
    """Write the increments of θ over `directions`, and the next velocities over `velocities`."""
    share = WINDOW / (WINDOW + ages)  # c
    torch._foreach_mul_(directions, list((-alpha).unbind()))
    kicks = torch._foreach_mul(directions, list(momenta.unbind()))
    torch._foreach_add_(velocities, kicks)
    torch._foreach_sub_(directions, kicks)
    drifts = torch._foreach_mul(velocities, list(share.unbind()))
    torch._foreach_add_(directions, drifts)
    torch._foreach_sub_(velocities, drifts)


def aged(ages: Tensor, coherence: Tensor) -> Tensor:
    """Return τ after the step: halved where a block has turned back, so that its mean starts anew."""
    return torch.where(coherence < TURNED, ages / 2, ages + 1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))
