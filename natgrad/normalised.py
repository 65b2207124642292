"""The default step rule of Fisher metrics: each block's natural direction at a set length at most, averaged over steps.

With G̃, Ã the damped inverses of a block's factors, g the gradient, β the momentum, t the number of steps before,

    Δ = −exp(κ c̄) min(η / (rms(d) √(fan_in + 1)), ν / s) d,   d = G̃ g Ã,   c̄ ← ρ c̄ − (1 − ρ) ⟨d, v⟩ / ‖d‖‖v‖,
    v ← v + β Δ,   θ ← θ + (1 − β) Δ + c v,   v ← (1 − c) v,   c = k / (k + t).

The metric gives the direction and η the length, which needs no tuning from model to model. Where the data can be fitted
to the last point, steps of a set length cannot end: there the Newton step d / s of the block is the shorter one and
ends by itself (s, `Block.excess`, undoes the scaling of the factors). From one refresh to the next s falls to 0.97 of
itself at most: the Fisher matrix of a classifier that is sure of all labels vanishes within a few refreshes, and a
limit that followed it would let the first label that is wrong throw the weights off. As blocks do not know of each
other and would remove the same residual several times over, the share ν of the Newton step is taken. It is of the
scale of the criterion: of a loss that is a fraction of it, or of a gradient that is clipped, it is too short. The
length η does not change. The empirical kind has no Newton step, and η alone.

The coherence c̄ of a block is the mean cosine between its new direction and where it has been going: steps that agree
may be longer (the first of a training run, where c̄ may reach 0.7 and steps eight times the length), steps that turn
back should be shorter. That lengths follow the sign of such products goes back to Jacobs 1988 (Neural Networks 1(4),
295–307). The velocity v = z − θ carries the average of Defazio et al. 2024 (arXiv:2405.15682, with c for 1/t): z takes
the steps, x is the mean of z over about the last 1/k of them, and θ = (1 − β) z + β x is where gradients are taken and
models evaluated. Noise is averaged over a growing number of steps, so that no schedule and no horizon is needed.
Damping is relative to the mean eigenvalue of each factor. Parameters without curvature follow Adam at a matching rate
(`natgrad.adam`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from natgrad.adam import Adam
from natgrad.batched import Products, made_together
from natgrad.blocks import Block, Inverse, JointBlock
from natgrad.kronecker import FactorisationError
from natgrad.metric import Metric
from natgrad.ownership import Stale, shared_directions, shared_inverses, way_of
from natgrad.step_arithmetic import averaging, dot, step_
from natgrad.steps import Increments, Options, StepRule, one_value

if TYPE_CHECKING:
    from natgrad.distributed import Ranks

SCALE_MEMORY = 0.97  # share of itself that s falls to at most
VECTOR_SHARE = 0.12  # update size of biases, norms and parameters without curvature, as a share of η
MAX_FAILURES = 5  # factorisations of a block that may fail in a row


@dataclass
class BlockState:
    """What the rule remembers of one block, in the block's coordinates."""

    velocity: Tensor  # v
    coherence: Tensor  # c̄, a scalar
    steps: int = 0  # t
    # ⟨g, d⟩, ‖g‖, ‖d‖ at the last refresh: for `cosines`, not to continue from
    seen: tuple[Tensor, Tensor, Tensor] | None = None
    inverse: Inverse | None = None
    inverse_of: tuple[int, float] = (-1, 0.0)  # (version of the statistics, damping) that `inverse` belongs to
    failures: int = 0  # factorisations in a row that failed
    excess: Tensor | None = None  # s, a scalar

    def rescale(self, block: Block) -> Tensor:
        """s for new statistics, a scalar: from these, which all ranks have, and not from the inverse, which may be
        older. An excess that is not finite counts as 0, which sets no limit.
        """
        now = block.excess().nan_to_num(0, 0)
        self.excess = now if self.excess is None else torch.maximum(now, SCALE_MEMORY * self.excess.to(now))
        return self.excess

    def is_stale(self, block: Block, damping: float) -> bool:
        return self.inverse is None or self.inverse_of != (block.version, damping)

    def state_dict(self) -> dict[str, Any]:
        """Without the inverse, which the statistics give again, unless an older one is in force."""
        state: dict[str, Any] = {"velocity": self.velocity, "coherence": self.coherence, "steps": self.steps}
        if self.excess is not None:
            state["excess"] = self.excess
        if self.failures and self.inverse is not None:
            fields = vars(self.inverse).items()
            alone = {
                k: t.clone() if isinstance(t, Tensor) else t for k, t in fields
            }  # not with the stack it is part of
            kept = {"type": type(self.inverse).__name__, "damping": self.inverse_of[1], "tensors": alone}
            state.update(failures=self.failures, kept=kept)
        return state

    @classmethod
    def restored(cls, state: dict[str, Any]) -> BlockState:
        state = dict(state)
        kept = state.pop("kept", None)
        if kept is not None:
            types = {c.__name__: c for c in Inverse.__subclasses__()}
            state["inverse"] = types[kept["type"]](**kept["tensors"])
            state["inverse_of"] = (0, kept["damping"])  # restored statistics have version 0
        return cls(**state)

    def refresh(self, block: Block, damping: float, make: Callable[[], Inverse] | None = None) -> Inverse:
        """The inverse for the block's present statistics; the last good one where it cannot be had.

        `make`: gives it, where ranks share the work.

        Raises:
            FactorisationError: it failed several times in a row, or there is no earlier one.
        """
        if self.is_stale(block, damping):
            try:
                self.inverse, self.failures = block.relative_inverse(damping) if make is None else make(), 0
            except FactorisationError as error:
                self.failures += 1
                if self.inverse is None or self.failures >= MAX_FAILURES:
                    raise FactorisationError(
                        f"block of {block.names}: {error} ({self.failures} times in a row)"
                    ) from error
                if self.failures == 1:
                    warnings.warn(
                        f"block of {block.names}: {error}; the last good factor is kept. Repeats are counted in "
                        "opt.info['kept_factors']",
                        stacklevel=2,
                    )
            self.inverse_of = (block.version, damping)
        assert self.inverse is not None
        return self.inverse


@dataclass
class Slopes:
    """Slopes along the velocity: of the batch it was made from, and of the next; scalar tensors."""

    taken: Tensor | None = None  # ⟨g_t, v_t⟩, until the next batch is there
    ratio: Tensor | None = None  # ⟨g_{t+1}, v_t⟩ / ⟨g_t, v_t⟩

    def meet(self, fresh: Tensor) -> None:
        if self.taken is not None and self.taken.device == fresh.device:
            self.ratio = torch.where(self.taken != 0, fresh / self.taken, torch.zeros_like(fresh))
        self.taken = None


class NormalisedStep(StepRule):
    """See the module docstring.

    Args:
        lr: η, the root mean square of an update times √(fan_in + 1), where steps neither agree nor turn back; at most.
        momentum: β, from 0 (plain steps, no average) to below 1.
        damping: λ, relative: √λ of the mean eigenvalue is added to each Kronecker factor.
    """

    damping_meaning = (
        "relative and factored: (U/t_U + √λI)⁻¹ ⊗ (V/t_V + √λI)⁻¹ with t the mean eigenvalue; λ times the mean "
        "eigenvalue "
        "in structures that do not factor"
    )
    on_shards = True

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, damping: float = 0.1) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping = lr, momentum, damping
        self._blocks: dict[str, BlockState] = {}
        self._adam = Adam()
        self.slopes = Slopes()
        self._products = Products()
        self._ranks: Ranks | None = None  # that share the work, where there are several
        self._at_newton: Tensor | None = None  # the share of blocks whose Newton step was the shorter one
        self._shared_at: list[tuple[list[str], int, float]] = []  # what the owners' inverses belong to

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Increments:
        if metric.shards is not None:
            from natgrad.sharded_step import update_on_shards  # which is built from the pieces below

            return update_on_shards(self, metric, df, options)
        blocks: list[Block] = [b for b in getattr(metric, "blocks", []) if b.statistics]
        active = [b for b in blocks if any(n in df for n in b.names)]
        self._ranks = getattr(metric, "ranks", None)
        self.rescale(blocks, metric.gradient_share)
        if active:
            grads = packed_gradients(active, df, metric.parameters)
            states = [self.state_of(b, g) for b, g in zip(active, grads)]
            deltas = self._deltas(active, states, grads, blocks, options, metric.gradient_share)
        moved: dict[str, Tensor] = {}
        for i, block in enumerate(active):
            for n, delta in block.named(deltas[i], metric.parameters).items():
                moved[n] = moved[n] + delta if n in moved else delta  # slices of one parameter in several blocks
        out: Increments = dict(moved)
        covered = {n for b in blocks for n in b.names}
        for n, g in df.items():
            if n not in covered:
                out[n] = self._adam.direction(n, g) * (-options[n].lr * VECTOR_SHARE)
        self._tell(options)
        return {n: d for n, d in out.items() if n in df}

    def rescale(self, blocks: Sequence[Block], share: float | None) -> None:
        """Let the scales of the Newton steps follow new statistics, of blocks without a gradient at this step too."""
        for block in blocks if self.refreshed and share is not None else ():
            if (state := self._blocks.get(key_of(block))) is not None:
                state.rescale(block)

    def state_of(self, block: Block, g: Tensor) -> BlockState:
        key = key_of(block)
        if key not in self._blocks or self._blocks[key].velocity.shape != g.shape:  # or: its layer has grown
            self._blocks[key] = BlockState(torch.zeros_like(g), g.new_zeros(()))
        state = self._blocks[key]
        if state.velocity.dtype != g.dtype or state.velocity.device != g.device:  # the model was moved or cast
            state.velocity, state.coherence = state.velocity.to(g), state.coherence.to(g)
        return state

    def drop(self, block: Block) -> None:
        """Forget a block that another rank owns."""
        self._blocks.pop(key_of(block), None)

    def _deltas(
        self,
        blocks: Sequence[Block],
        states: Sequence[BlockState],
        grads: list[Tensor],
        known: Sequence[Block],
        options: Mapping[str, Options],
        share: float | None,
    ) -> list[Tensor]:
        """Increments in the coordinates of each block. `known`: with those blocks that have no gradient at this step;
        `share`: `Metric.gradient_share`.
        """
        mine = [shared_options(b, options) for b in blocks]
        if self.slopes.taken is not None:
            self.slopes.meet(slope_along(states, grads))
        if self._ranks is None:
            if any(s.is_stale(b, o.damping) for s, b, o in zip(states, blocks, mine)):
                self._make_inverses(known, options)
            inverses = [s.refresh(b, o.damping) for s, b, o in zip(states, blocks, mine)]
            directions = self._products.apply(inverses, grads)
        else:
            directions = self._shared(self._ranks, blocks, states, [o.damping for o in mine], grads)
        if self.refreshed:  # what is only to be looked at is measured then, and not at every step
            look(states, grads, directions)
        increments = self.stretch(blocks, states, mine, directions, share)
        if self.refreshed:
            self.slopes.taken = slope_along(states, grads)
        return increments

    def _make_inverses(self, blocks: Sequence[Block], options: Mapping[str, Options]) -> None:
        """Make those that are missing, also of blocks that have no gradient at this step but had one before: in a batch
        the last bits depend on its members, and a run that goes on from a checkpoint makes all of them at once.
        """
        self._products = Products()  # lets go of the old inverses one by one, as new ones take their place
        found = [(self._blocks[key], b) for b in blocks if (key := key_of(b)) in self._blocks]
        stale = [(s, b, d) for s, b in found if s.is_stale(b, d := shared_options(b, options).damping)]
        makes = made_together([b for _, b, _ in stale], [d for _, _, d in stale])
        for (state, block, damping), make in zip(stale, makes):
            state.refresh(block, damping, make)

    def stretch(
        self,
        blocks: Sequence[Block],
        states: Sequence[BlockState],
        options: Sequence[Options],
        directions: list[Tensor],
        share: float | None,
    ) -> list[Tensor]:
        """Directions → Δ → increments. Writes over `directions`."""
        alike: dict[tuple[float, int], list[int]] = {}
        for i, (s, o) in enumerate(zip(states, options)):
            alike.setdefault((o.momentum, s.steps), []).append(i)
            s.steps += 1
        like = directions[0]
        scales = None
        if share is not None:
            known = [s.rescale(b) if s.excess is None else s.excess for s, b in zip(states, blocks)]
            scales = share * torch.stack([k.to(like) for k in known])
        done = step_(
            directions,
            [s.velocity for s in states],
            [s.coherence for s in states],
            like.new_tensor([o.lr for o in options]),
            units_of(blocks, directions),
            scales,
            [(momentum, averaging(steps), members) for (momentum, steps), members in alike.items()],
        )
        for s, c in zip(states, done.coherence):
            s.coherence = c
        self._at_newton = done.at_newton
        return directions

    def _shared(
        self,
        ranks: Ranks,
        blocks: Sequence[Block],
        states: Sequence[BlockState],
        dampings: Sequence[float],
        grads: Sequence[Tensor],
    ) -> list[Tensor]:
        """Directions with the inverses shared out among the ranks."""
        if way_of(ranks, blocks) == "directions":
            now = [(b.names, b.version, damping) for b, damping in zip(blocks, dampings)]
            fresh, self._shared_at = now != self._shared_at, now
            return shared_directions(
                ranks, blocks, lambda i: states[i].refresh(blocks[i], dampings[i]).apply(grads[i]), grads, fresh
            )
        stale = [i for i, (s, b) in enumerate(zip(states, blocks)) if s.is_stale(b, dampings[i])]
        made = shared_inverses(
            ranks, [Stale(blocks[i], dampings[i], blocks[i].relative_jobs(dampings[i])) for i in stale]
        )
        for i, make in zip(stale, made):
            states[i].refresh(blocks[i], dampings[i], make)
        return [s.refresh(b, damping).apply(g) for s, b, damping, g in zip(states, blocks, dampings, grads)]

    def _tell(self, options: Mapping[str, Options]) -> None:
        ratio = self.slopes.ratio
        first = next(iter(options.values()))
        self.info = {
            "damping": first.damping,
            "step_length": first.lr,
            "at_newton_step": self._at_newton,
            "reduction_ratio": None if ratio is None else (1 + ratio) / 2,
            "kept_factors": sum(s.failures for s in self._blocks.values()),
        }

    def cosines(self) -> dict[str, Tensor]:
        found = {}
        for k, s in self._blocks.items():
            if s.seen is not None:
                along, *sizes = s.seen
                both = sizes[0].double() * sizes[1].double()
                found[k] = torch.where(both > 0, along / both, torch.zeros_like(both))
        return found

    def state_dict(self) -> dict[str, Any]:
        blocks = {k: s.state_dict() for k, s in self._blocks.items()}
        adam = self._adam.state_dict()
        if self.shards is not None:
            blocks = self.shards.union(blocks)
            moments = {f: self.shards.whole({n: m[f] for n, m in adam.items()}) for f in ("first", "second")}
            adam = {n: {"steps": m["steps"], **{f: moments[f][n] for f in moments}} for n, m in adam.items()}
        return {"blocks": blocks, "adam": adam, "slopes": dict(vars(self.slopes))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._blocks = {k: BlockState.restored(s) for k, s in state["blocks"].items()}
        adam = state["adam"]
        if self.shards is not None:
            adam = {n: {**m, **self.shards.named(n, m)} for n, m in adam.items()}
        self._adam.load_state_dict(adam)
        self.slopes = Slopes(**state["slopes"])


def packed_gradient(block: Block, df: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """The gradient in the block's coordinates and dtype; zero for parameters that have none, or that are frozen."""
    held = {n: df[n] if n in df else torch.zeros_like(parameters[n]) for n in block.names}
    return block.pack(held).to(block.dtype)


def packed_gradients(
    blocks: Sequence[Block], df: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> list[Tensor]:
    """`packed_gradient` of each block, with one call for all copies."""
    found, parts, sources = [], [], []
    for block in blocks:
        windows = block.windows
        if windows is None or any(n not in df for n in windows):
            found.append(packed_gradient(block, df, parameters))
            continue
        g = df[block.names[0]].new_empty(block.layers[0].matrix_shape, dtype=block.dtype)
        found.append(g)
        for n, (size, strides, at) in windows.items():
            parts.append(g.as_strided(size, strides, at))
            sources.append(df[n])
    if parts:
        torch._foreach_copy_(parts, sources)
    return found


def key_of(block: Block) -> str:
    return str(block.layers[0].key)


def shared_options(block: Block, options: Mapping[str, Options]) -> Options:
    """The options of a block's parameters, which must be one.

    Raises:
        ValueError: they lie in groups that differ.
    """
    mine = [options[n] for n in block.names if n in options]
    if all(o is mine[0] for o in mine):
        return mine[0]
    where = f"step for the block of {block.names}"
    return Options(
        one_value({o.lr for o in mine}, f"lr in one {where}"),
        one_value({o.momentum for o in mine}, f"momentum in one {where}"),
        one_value({o.damping for o in mine}, f"damping in one {where}"),
    )


def units_of(blocks: Sequence[Block], directions: Sequence[Tensor]) -> Tensor:
    """(blocks,): what each norm ‖d‖ is to be multiplied with to be the size that η is measured against, rms(d)
    √(fan_in + 1) over all layers of a block.
    """
    units = [unit(b.layers[0]) / d.numel() ** 0.5 for b, d in zip(blocks, directions)]
    out = directions[0].new_tensor(units)
    for i, (b, d) in enumerate(zip(blocks, directions)):
        if len(b.layers) > 1:
            out[i] = (joint_size(b, d) / torch.linalg.vector_norm(d)).nan_to_num(0, 0, 0)
    return out


def joint_size(block: Block, d: Tensor) -> Tensor:
    assert isinstance(block, JointBlock)
    squares = [part.square().sum() * unit(layer) ** 2 for part, layer in zip(d.split(block.widths), block.layers)]
    return (torch.stack(squares).sum() / d.numel()).sqrt()


def look(states: Sequence[BlockState], grads: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
    """Keep what `NormalisedStep.cosines` are made of."""
    sizes = zip(torch._foreach_norm(list(grads)), torch._foreach_norm(list(directions)))
    for s, g, d, (size_g, size_d) in zip(states, grads, directions, sizes):
        s.seen = (dot(g, d), size_g, size_d)


def slope_along(states: Sequence[BlockState], grads: Sequence[Tensor]) -> Tensor:
    """Σ ⟨g, v⟩ over blocks, a scalar tensor."""
    return torch.stack([dot(g, s.velocity) for s, g in zip(states, grads)]).sum()


def unit(layer: Any) -> float:
    """An update of rms η / unit is a natural size for this layer."""
    if layer.weight is None or layer.layout.elementwise:
        return 1 / VECTOR_SHARE
    return (layer.fan_in + 1) ** 0.5
