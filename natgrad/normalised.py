"""The default step rule of Fisher metrics: each block's natural direction, rescaled to a set update size.

With G̃, Ã the damped inverses of a block's factors, g the gradient, β the momentum and t the number of steps,

    m ← β m + (1 − β) g,   m̂ = m / (1 − βᵗ),   u = β m̂ + (1 − β) g,
    d = G̃ u Ã,             Δ = −η s d / (rms(d) √(fan_in + 1)).

The metric gives the direction and η the length, which needs no tuning from model to model. s is one number for all
blocks and follows the slope h = ⟨g_{t+1}, Δ_t⟩ that a *fresh* batch finds along the last step,

    s ← s · exp(−κ clip(h / √EMA(h²), ±2)):

while it points down s grows, once it points up s shrinks (the sign of the learning-rate derivative of Baydin et al.
2018, arXiv:1703.04782, normalised). Damping is relative to the mean eigenvalue of each factor. Parameters without
curvature follow Adam (Kingma & Ba 2015, arXiv:1412.6980) at a matching rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from natgrad.blocks import Block, Inverse, JointBlock
from natgrad.metric import Metric, Vector
from natgrad.steps import Options, StepRule, one_value

ADAPT = 0.03  # κ; the constants here were chosen on six workloads, see docs/decisions.md
SLOPE_CLIP = 2.0
SLOPE_DECAY = 0.95
SCALE_RANGE = (0.01, 4.0)  # of s
VECTOR_SHARE = 0.12  # update size of biases, norms and parameters without curvature, as a share of η
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@dataclass
class BlockState:
    """What the rule remembers of one block, in the block's coordinates."""

    momentum: Tensor  # m
    steps: int = 0  # t
    direction: Tensor | None = None  # d of the last step
    length: Tensor | None = None  # −Δ/d of the last step, a scalar tensor
    inverse: Inverse | None = None
    inverse_of: tuple[int, float] = (
        -1,
        0.0,
    )  # (version of the statistics, damping) that `inverse` belongs to

    def refresh(self, block: Block, damping: float) -> Inverse:
        if self.inverse is None or self.inverse_of != (block.version, damping):
            self.inverse, self.inverse_of = block.relative_inverse(damping), (block.version, damping)
        return self.inverse


@dataclass
class AdamState:
    first: Tensor
    second: Tensor
    steps: int = 0


@dataclass
class Slope:
    """s, and the moving average of h² that it is judged by; scalar tensors, so that no step waits for the device."""

    scale: Tensor
    square: Tensor
    weight: float = 0.0
    ratio: Tensor | None = None  # fresh slope over the slope the step was taken at
    taken: Tensor | None = None  # ⟨g_t, Δ_t⟩

    def learn(self, h: Tensor) -> None:
        self.square = SLOPE_DECAY * self.square + (1 - SLOPE_DECAY) * h.square()
        self.weight = SLOPE_DECAY * self.weight + 1 - SLOPE_DECAY
        size = (self.square / self.weight).sqrt()
        normal = torch.where(size > 0, h / size, torch.zeros_like(h)).clamp(-SLOPE_CLIP, SLOPE_CLIP)
        self.scale = (self.scale * torch.exp(-ADAPT * normal)).clamp(*SCALE_RANGE)
        if self.taken is not None:
            self.ratio = torch.where(self.taken != 0, h / self.taken, torch.zeros_like(h))


class NormalisedStep(StepRule):
    """See the module docstring.

    Args:
        lr: η, the root mean square of an update times √(fan_in + 1).
        momentum: β.
        damping: λ, relative: √λ of the mean eigenvalue is added to each Kronecker factor.
        adapt: whether s adapts; False keeps it at 1, for use with a learning-rate schedule of fixed horizon.
    """

    damping_meaning = (
        "relative and factored: (U/t_U + √λI)⁻¹ ⊗ (V/t_V + √λI)⁻¹ with t the mean eigenvalue; λ times the mean "
        "eigenvalue "
        "in structures that do not factor"
    )

    def __init__(self, lr: float = 0.05, momentum: float = 0.9, damping: float = 0.1, adapt: bool = True) -> None:
        super().__init__()
        self.lr, self.momentum, self.damping, self.adapt = lr, momentum, damping, adapt
        self._blocks: dict[str, BlockState] = {}
        self._adam: dict[str, AdamState] = {}
        self._slope: Slope | None = None

    def update(self, metric: Metric, df: Mapping[str, Tensor], options: Mapping[str, Options]) -> Vector:
        blocks: list[Block] = [b for b in getattr(metric, "blocks", []) if b.statistics]
        active = [b for b in blocks if any(n in df for n in b.names)]
        grads = {
            key_of(b): b.pack({n: df[n] if n in df else torch.zeros_like(metric.parameters[n]) for n in b.names})
            for b in active
        }
        slope = self._slope_from(grads)
        deltas = {n: torch.empty_like(metric.parameters[n]) for b in active for n in b.names}
        taken = torch.zeros_like(slope.scale)
        for block in active:
            key = key_of(block)
            option = shared_options(block, options)
            state = self._blocks.setdefault(key, BlockState(torch.zeros_like(grads[key])))
            delta, along = self._block_step(block, state, grads[key], option, slope.scale)
            taken = taken + along
            block.unpack(delta, deltas)
        slope.taken = taken
        covered = {n for b in blocks for n in b.names}
        for n, g in df.items():
            if n not in covered:
                deltas[n] = self._adam_step(n, g, options[n], slope.scale)
        self.info = {
            "step_length": slope.scale * next(iter(options.values())).lr,
            "reduction_ratio": None if slope.ratio is None else (1 + slope.ratio) / 2,
            "damping": next(iter(options.values())).damping,
        }
        return {n: d for n, d in deltas.items() if n in df}

    def _slope_from(self, grads: Mapping[str, Tensor]) -> Slope:
        """s after the slope of this batch along the last step."""
        if self._slope is None:
            like = next(iter(grads.values())) if grads else torch.zeros(())
            self._slope = Slope(like.new_ones(()), like.new_zeros(()))
            return self._slope
        parts = [
            -(s.length * (g * s.direction).sum())
            for key, g in grads.items()
            if (s := self._blocks.get(key)) is not None and s.direction is not None and s.length is not None
        ]
        if self.adapt and parts:
            self._slope.learn(torch.stack(parts).sum())
        return self._slope

    def _block_step(
        self, block: Block, state: BlockState, g: Tensor, option: Options, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Δ, ⟨g, Δ⟩) in the block's coordinates."""
        beta = option.momentum
        state.steps += 1
        state.momentum.lerp_(g, 1 - beta)
        u = torch.add(g * (1 - beta), state.momentum, alpha=beta / (1 - beta**state.steps)) if beta else g
        d = state.refresh(block, option.damping).apply(u)
        size = update_size(block, d)
        state.direction = d
        state.length = torch.where(size > 0, option.lr * scale / size, torch.zeros_like(size))
        return d * -state.length, -state.length * (g * d).sum()

    def _adam_step(self, name: str, g: Tensor, option: Options, scale: Tensor) -> Tensor:
        b1, b2 = ADAM_BETAS
        state = self._adam.setdefault(name, AdamState(torch.zeros_like(g), torch.zeros_like(g)))
        state.steps += 1
        state.first.lerp_(g, 1 - b1)
        state.second.mul_(b2).addcmul_(g, g, value=1 - b2)
        denominator = (state.second / (1 - b2**state.steps)).sqrt_().add_(ADAM_EPS)
        return state.first / denominator * (-option.lr * VECTOR_SHARE / (1 - b1**state.steps)) * scale

    def state_dict(self) -> dict[str, Any]:
        blocks = {
            k: {"momentum": s.momentum, "steps": s.steps, "direction": s.direction, "length": s.length}
            for k, s in self._blocks.items()
        }
        adam = {n: {"first": s.first, "second": s.second, "steps": s.steps} for n, s in self._adam.items()}
        return {
            "blocks": blocks,
            "adam": adam,
            "slope": None if self._slope is None else dict(vars(self._slope)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._blocks = {k: BlockState(**s) for k, s in state["blocks"].items()}
        self._adam = {n: AdamState(**s) for n, s in state["adam"].items()}
        self._slope = None if state["slope"] is None else Slope(**state["slope"])


def key_of(block: Block) -> str:
    return str(block.layers[0].key)


def shared_options(block: Block, options: Mapping[str, Options]) -> Options:
    """The options of a block's parameters, which must be one.

    Raises:
        ValueError: they lie in groups that differ.
    """
    mine = [options[n] for n in block.names if n in options]
    where = f"step for the block of {block.names}"
    return Options(
        one_value({o.lr for o in mine}, f"lr in one {where}"),
        one_value({o.momentum for o in mine}, f"momentum in one {where}"),
        one_value({o.damping for o in mine}, f"damping in one {where}"),
    )


def update_size(block: Block, d: Tensor) -> Tensor:
    """The size that η is measured against: rms(d) √(fan_in + 1), over all layers of the block together."""
    parts = d.split(block.widths) if isinstance(block, JointBlock) else [d]
    squares = [part.square().sum() * unit(layer) ** 2 for part, layer in zip(parts, block.layers)]
    return (torch.stack(squares).sum() / d.numel()).sqrt()


def unit(layer: Any) -> float:
    """An update of rms η / unit is a natural size for this layer."""
    if layer.weight is None or layer.view.elementwise:
        return 1 / VECTOR_SHARE
    return (layer.matrix_shape[-1] - len(layer.biases) + 1) ** 0.5
