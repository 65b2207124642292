"""The default step rule of Fisher metrics. docs/step.md says why each line is there, and where each constant is from.

For every block with weights W, gradient g and damped inverse factors G̃, Ã (`natgrad.linalg.kronecker`):

    d = G̃ g Ã                                                     the natural direction
    α = min(e^{κ c̄} min(η r / size(d), ν / s), ν / ⟨g, d⟩)          a share of the weights' size, or half a Newton step
    α ← α min(1, √(ε / Σ ½ α² s ⟨g, d⟩))                           no step moves the predictions by more than ε nats
    v ← v − β α d,  θ ← θ − (1 − β) α d + c v,  v ← (1 − c) v       a mean over the last third, c = k / (k + τ)
    W ← W − w min(1, 128 / M) ρ²/η W,  ρ = min(η, ν size(d) / s r)  decay by the square of the way gone, M labels

size(d) = rms(d) √(fan_in + 1), and r is the size of W over that which PyTorch's layers start with, 1 / √(3 (fan_in +
1)); c̄ is the running cosine of −d and v, and τ, the age of the mean, is halved where c̄ falls below −0.3. Parameters
without curvature follow Adam at a matching rate (`adam`). `step_arithmetic` has the formulas as code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks.base import Block
from natgrad.blocks.batching import Preconditioning
from natgrad.blocks.collection import statistics_dtype
from natgrad.metric.metric import Metric
from natgrad.optim.adam import Adam
from natgrad.optim.block_state import BlockState, MadeFor, Plan, look, shared_options
from natgrad.optim.step_arithmetic import aged, bound, lengths, move_
from natgrad.optim.step_rule import Increments, Options, StepContext, StepRule
from natgrad.optim.step_sizes import VECTOR_SHARE, DirectionSizes, Matrix, matrices_of

# labels in a batch that the weight decay is meant for: with more of them gradients have less noise, and there is more
# to go by than a prior (docs/step.md)
DECAY_LABELS = 128.0


class NormalisedStep(StepRule):
    """See the module docstring.

    Args:
        lr: η. A step that neither agrees with the ones before nor turns back moves a block of weights by η times its
            own size, as root mean squares: 0.17 of the weights' for 0.1. The Newton step and ε may make it shorter.
        momentum: β, from 0 (plain steps, no mean) to below 1. Gradients are taken at (1 − β) z + β x, with z where the
            steps lead and x their mean.
        damping: λ, relative: √λ of the mean eigenvalue is added to each Kronecker factor, to a bias of its own.
        weight_decay: w. Each step takes lr · w of each matrix away (of no bias, norm or embedding table), as AdamW
            does. Where the Newton step is shorter than lr says, it takes less, by the square of that share; and where
            batches have more than 128 labels (one a datum and position), less in proportion. So it is a
            penalty in proportion to the variance of the gradients' noise. Where gradients vanish it does too: with full
            batches a minimum of the loss stays one. 0 switches it off.

    A schedule multiplies η. The mean over the last third of the steps anneals without one.
    """

    damping_meaning = (
        "relative and factored: (U/t_U + √λI)⁻¹ ⊗ (V/t_V + √λI)⁻¹ with t the mean eigenvalue, a bias by its own; "
        "λ times the mean eigenvalue in structures that do not factor"
    )
    on_shards = True
    decays = True
    least_lr = 0.01  # a tenth of the default: a smaller one trains that much slower

    def __init__(
        self, lr: float = 0.1, momentum: float = 0.9, damping: float = 0.1, weight_decay: float = 0.12
    ) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping, self.weight_decay = lr, momentum, damping, weight_decay
        self._blocks: dict[str, BlockState] = {}
        self._adam = Adam()
        self._plan: Plan | None = None

    def update(self, metric: Metric, df: Mapping[str, Tensor], context: StepContext) -> Increments:
        options = context.options
        now = [(b, b.version) for b in metric.blocks or []], set(df)
        plan = self._plan
        if plan is None or context.refreshed or plan.made_for != now:
            plan = self._plan = self.plan(metric, df, context.refreshed, now)
        moved: dict[str, Tensor] = {}
        told: dict[str, Any] = {}
        if plan.active:
            moved, decay, told = self._move(metric, df, options, plan, context.refreshed)
            moved = self.decayed(moved, plan, decay, metric, options)
        for n, g in df.items():
            if n not in plan.covered:
                moved[n] = self._adam.direction(n, g) * (-options[n].lr * VECTOR_SHARE)
        self.info.update({"kept_factors": 0, **told})
        return {n: d for n, d in moved.items() if n in df}

    def plan(self, metric: Metric, df: Mapping[str, Tensor], refreshed: bool, made_for: MadeFor) -> Plan:
        """Return what holds from this step to the next refresh. Collective after a refresh, where there are shards."""
        place, blocks, scale = self.strategy, metric.blocks or [], metric.gradient_scale
        known: list[Block] = [b for b in blocks if b.known]
        active = [b for b in known if any(n in df for n in b.names)]
        owned, mine = place.owned(known), place.owned(active)
        for key in {b.key for b in known} - {b.key for b in owned}:
            self._blocks.pop(key, None)  # what a checkpoint said of blocks that another rank owns
        if refreshed and scale is not None:
            for block in owned:  # of blocks without a gradient at this step too
                if (state := self._blocks.get(block.key)) is not None:
                    state.rescale(block)
        likes = place.likes(metric.parameters, mine)
        states = [self.state_of(b, likes) for b in mine]
        matrices = {b: matrices_of(b) for b in active}
        if refreshed:
            sizes = self.weight_sizes([m for each in matrices.values() for m in each], metric)
            for state, block in zip(states, mine):
                state.measure([sizes[m.name] for m in matrices[block]])
        dtype = statistics_dtype(metric.parameters.values())
        like = torch.zeros((), dtype=dtype, device=next(iter(df.values())).device)
        scales = None
        if scale is not None:
            scales = [s.rescale(b) if s.newton_scale is None else s.newton_scale for s, b in zip(states, mine)]
        return Plan(
            made_for=made_for,
            covered={n for b in known for n in b.names},
            active=active,
            owned=owned,
            mine=mine,
            idle=[b for b in owned if b not in mine and b.key in self._blocks],
            states=states,
            likes=likes,
            missing=[n for b in mine for n in b.names if n not in df],
            matrices=[(m.name, i) for i, each in enumerate(matrices.values()) for m in each if m.decays],
            sizes=DirectionSizes(mine, like),
            weights=stacked([torch.ones_like(like) if s.size is None else s.size for s in states], like),
            newton_scale=None if scales is None or scale is None else scale * stacked(scales, like),
            nat=metric.nat,
            decay=min(1.0, DECAY_LABELS / metric.labels) if metric.labels else 1.0,
        )

    def _move(
        self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options], plan: Plan, refreshed: bool
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        """Return increments of the parameters that blocks cover, `Lengths.decay` of each block, and what to tell."""
        place, blocks, states = self.strategy, plan.mine, plan.states
        whole = dict(place.to_owners(df, plan.active))
        whole.update((n, torch.zeros_like(plan.likes[n])) for n in plan.missing)
        grads = [b.pack(whole).to(s.velocity) for b, s in zip(blocks, states)]
        del whole
        asked = [*blocks, *plan.idle]
        chosen = shared_options(asked, options)
        todo = [Preconditioning(b, o.damping, g) for b, o, g in zip_longest(asked, chosen, grads)]
        directions, chosen = place.directions(todo), chosen[: len(blocks)]
        like = plan.weights
        scalars, decay = like.new_zeros(2), None
        if blocks:
            if refreshed:
                look(states, grads, directions)
            velocities = [s.velocity for s in states]
            coherence, ages = torch.stack([s.coherence for s in states]), torch.stack([s.age for s in states])
            norms = torch.stack(torch._foreach_norm(directions))
            rates, sizes = like.new_tensor([o.lr for o in chosen]), plan.sizes.of(directions, norms)
            found = lengths(
                directions,
                grads,
                velocities,
                coherence,
                ages,
                norms,
                sizes,
                rates,
                plan.weights,
                plan.newton_scale,
                plan.nat,
            )
            scalars = torch.stack([found.nats, found.at_newton * len(blocks)])
            decay = found.decay
        failures = sum(b.failures for b in plan.owned)
        totals, decay, failures = place.totals(plan.active, scalars, decay, failures)
        nats, at_newton = totals.unbind()
        if blocks:
            alpha = bound(nats, plan.nat).to(like) * found.alpha
            shares = like.new_tensor([min(1.0, o.share) for o in chosen])
            move_(directions, velocities, alpha, like.new_tensor([o.momentum for o in chosen]), ages * shares)
            for s, c, age in zip(states, found.coherence.unbind(), aged(ages, found.coherence).unbind()):
                s.coherence, s.age = c, age
        moved: dict[str, Tensor] = {}
        for block, step in zip(blocks, directions):
            for n, delta in block.named(step, plan.likes).items():
                moved[n] = moved[n] + delta if n in moved else delta  # slices of one parameter in several blocks
        told = {
            "at_newton_step": at_newton / len(plan.active),
            "predicted_nats": None if plan.nat is None else nats / plan.nat.to(nats),
            "kept_factors": failures,
        }
        return place.from_owners(moved, plan.active), decay, told

    def decayed(
        self,
        moved: Mapping[str, Tensor],
        plan: Plan,
        decay: Tensor,
        metric: Metric,
        options: Mapping[str, Options],
    ) -> dict[str, Tensor]:
        """Return increments with the weight decay. `decay`: of each block, for w = 1."""
        out = dict(moved)
        rates: dict[str, Tensor] = {}
        shares = (plan.decay * decay).unbind()
        for n, i in plan.matrices:
            if n in moved and (w := options[n].weight_decay):  # slices of one parameter: the one that moved least
                rates[n] = torch.minimum(rates[n], w * shares[i]) if n in rates else w * shares[i]
        weights = self.strategy.shards_of({n: metric.parameters[n] for n in rates})
        for n, rate in rates.items():
            out[n] = torch.addcmul(out[n], weights[n].detach(), rate.to(out[n]), value=-1)
        return out

    def weight_sizes(self, matrices: Sequence[Matrix], metric: Metric) -> dict[str, Tensor]:
        """Return rms(W) / W₀ of every matrix, by name. Collective where there are shards."""
        found = {m.name: m.natural for m in matrices}
        if not found:
            return {}
        weights = self.strategy.shards_of({n: metric.parameters[n] for n in found})
        norms = torch._foreach_norm([weights[n].detach() for n in found])
        dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
        squares = torch.stack([norm.to(dtype) for norm in norms]).square()
        squares = self.strategy.sum_over_shards(squares, list(found))
        scale = squares.new_tensor([w * self.strategy.numel(n, weights[n]) ** 0.5 for n, w in found.items()])
        return dict(zip(found, (squares.sqrt() / scale).unbind()))

    def state_of(self, block: Block, likes: Mapping[str, Tensor]) -> BlockState:
        key, zero = block.key, torch.zeros((), dtype=block.dtype, device=likes[block.names[0]].device)
        if key not in self._blocks or self._blocks[key].velocity.shape != block.shape:  # or: its layer has grown
            coordinates = block.pack({n: zero.new_empty(likes[n].shape) for n in block.names})
            self._blocks[key] = BlockState(torch.zeros_like(coordinates), zero, zero)
        state = self._blocks[key]  # in the dtype and on the device where the model is now
        state.velocity, state.coherence, state.age = (t.to(zero) for t in (state.velocity, state.coherence, state.age))
        return state

    def cosines(self) -> dict[str, Tensor]:
        found = {}
        for k, s in self._blocks.items():
            if s.seen is not None:
                along, *sizes = s.seen
                both = sizes[0].double() * sizes[1].double()
                found[k] = torch.where(both > 0, along / both, torch.zeros_like(both))
        return found

    def state_dict(self) -> dict[str, Any]:
        place, adam = self.strategy, self._adam.state_dict()
        blocks = place.union({k: s.state_dict() for k, s in self._blocks.items()})
        moments = {f: place.whole({n: m[f] for n, m in adam.items()}) for f in ("first", "second")}
        return {
            "blocks": blocks,
            "adam": {n: {"steps": m["steps"], **{f: moments[f][n] for f in moments}} for n, m in adam.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._blocks, self._plan = {k: BlockState(**s) for k, s in state["blocks"].items()}, None
        adam = state["adam"]
        parts = {f: self.strategy.shard({n: m[f] for n, m in adam.items()}) for f in ("first", "second")}
        self._adam.load_state_dict({n: {**m, **{f: parts[f][n] for f in parts}} for n, m in adam.items()})


def stacked(scalars: Sequence[Tensor], like: Tensor) -> Tensor:
    """(…,), also of none."""
    return torch.stack([s.to(like) for s in scalars]) if scalars else like.new_empty(0)
