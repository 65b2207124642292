"""Small float64 models, one or more an op; each with inputs, the criteria it is tested under, and its groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N = 4  # data
C = 3  # outputs


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    x: Callable[[], Any]
    groups: dict[str, str] = field(default_factory=dict)  # blocks that are not "one a module"
    exact: bool = False  # whether K-FAC and EKFAC equal the block


class Act(nn.Module):
    """A module from a function of (module, x)."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Any) -> Any:
        return self.run(self, *x)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / max(shape[-1] if shape else 1, 1) ** 0.5)


def r(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


def ids(*shape: int, high: int = 6) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, high, shape)


def conv(layer: Callable[[], nn.Module], flat: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer(), nn.Tanh(), nn.Flatten(), nn.Linear(flat, C))


def spread(width: int) -> Callable[[nn.Module], nn.Module]:
    """A layer, tanh, and a linear head on the flattened rest."""
    return lambda layer: nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, C))


def scale_by(
    shape: tuple[int, ...], act: Callable[[Any, Tensor], Tensor], into: int, out: int
) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(into, into), Act(act, s=p(*shape)), nn.Tanh(), nn.Flatten(), nn.Linear(out, C)
    )


CASES = [
    Case("linear", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), r(N, 4)),
    Case("linear deep", lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, C)), r(N, 4)),
    Case("linear positions", lambda: spread(15)(nn.Linear(4, 5)), r(N, 3, 4)),
    Case(
        "bilinear",
        lambda: nn.Sequential(Act(lambda m, x: m.b(x, x.cos()), b=nn.Bilinear(3, 3, 4)), nn.Tanh(), nn.Linear(4, C)),
        r(N, 3),
        {"0.b.weight": "b", "0.b.bias": "b"},
    ),
    Case("matmul", lambda: nn.Sequential(Act(lambda m, x: x @ m.w, w=p(4, 5)), nn.Tanh(), nn.Linear(5, C)), r(N, 4)),
    Case(
        "matmul transposed",
        lambda: nn.Sequential(Act(lambda m, x: x @ m.w.T, w=p(5, 4)), nn.Tanh(), nn.Linear(5, C)),
        r(N, 4),
    ),
    Case("matmul left", lambda: spread(10)(Act(lambda m, x: m.w @ x, w=p(5, 3))), r(N, 3, 2)),
    Case(
        "bmm groups",
        lambda: spread(15)(Act(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=p(3, 4, 5))),
        r(N, 3, 4),
    ),
    Case(
        "addmm",
        lambda: nn.Sequential(
            Act(lambda m, x: torch.addmm(m.b, x, m.w), w=p(4, 5), b=p(5)), nn.Tanh(), nn.Linear(5, C)
        ),
        r(N, 4),
        {"0.w": "a", "0.b": "a"},
    ),
    Case("einsum", lambda: spread(10)(Act(lambda m, x: torch.einsum("nti,oi->nto", x, m.w), w=p(5, 3))), r(N, 2, 3)),
    Case(
        "einsum heads",
        lambda: spread(12)(Act(lambda m, x: torch.einsum("bthd,hde->bthe", x, m.w), w=p(2, 3, 2))),
        r(N, 3, 2, 3),
    ),
    Case(
        "einsum ellipsis",
        lambda: spread(10)(Act(lambda m, x: torch.einsum("...i,io->...o", x, m.w), w=p(3, 5))),
        r(N, 2, 3),
    ),
    Case("conv1d", conv(lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), 9), r(N, 2, 5)),
    Case("conv2d", conv(lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), stride=(2, 1)), 24), r(N, 2, 4, 5)),
    Case("conv3d", conv(lambda: nn.Conv3d(2, 2, 2), 8), r(N, 2, 3, 3, 2)),
    Case("conv grouped dilated", conv(lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2), 16), r(N, 4, 4, 4)),
    Case("conv same", conv(lambda: nn.Conv2d(2, 2, (1, 3), padding="same"), 18), r(N, 2, 3, 3)),
    Case("conv circular", conv(lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), 8), r(N, 2, 4)),
    Case("conv reflect", conv(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), 18), r(N, 2, 3, 3)),
    Case("conv depthwise", conv(lambda: nn.Conv2d(3, 6, 2, groups=3), 24), r(N, 3, 3, 3)),
    Case(
        "conv transpose1d",
        conv(lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), 18),
        r(N, 2, 3),
    ),
    Case(
        "conv transpose2d grouped",
        conv(lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2, dilation=2), 50),
        r(N, 4, 2, 2),
    ),
    Case("conv transpose3d", conv(lambda: nn.ConvTranspose3d(2, 1, 2), 12), r(N, 2, 1, 1, 2)),
    Case(
        "embedding",
        lambda: nn.Sequential(nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(9, C)),
        ids(N, 3),
    ),
    Case(
        "embedding bag sum",
        lambda: nn.Sequential(nn.EmbeddingBag(6, 3, mode="sum"), nn.Tanh(), nn.Linear(3, C)),
        ids(N, 4),
    ),
    Case(
        "embedding bag mean",
        lambda: nn.Sequential(nn.EmbeddingBag(6, 3, mode="mean", padding_idx=0), nn.Tanh(), nn.Linear(3, C)),
        ids(N, 4),
    ),
    Case("layer norm", lambda: spread(10)(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))), r(N, 2, 4)),
    Case("layer norm 2d", lambda: spread(10)(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm((2, 5)))), r(N, 2, 4)),
    Case("rms norm", lambda: spread(10)(nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5))), r(N, 2, 4)),
    Case("group norm", lambda: spread(24)(nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4))), r(N, 2, 8)),
    Case(
        "instance norm",
        lambda: spread(24)(nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True))),
        r(N, 2, 8),
    ),
    Case(
        "batch norm eval",
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, C)).eval(),
        r(N, 2, 4),
    ),
    Case("scale", scale_by((4,), lambda m, x: x * m.s, 4, 8), r(N, 2, 4)),
    Case("scale scalar", scale_by((), lambda m, x: m.s * x, 4, 4), r(N, 4)),
    Case("scale channels", scale_by((2, 1), lambda m, x: m.s * x, 4, 8), r(N, 2, 4)),
    Case("scale in place", scale_by((4,), lambda m, x: x.clone().mul_(m.s), 4, 4), r(N, 4)),
    Case("offset", scale_by((3, 4), lambda m, x: x + m.s, 4, 12), r(N, 3, 4)),
    Case("offset sliced", scale_by((1, 5, 4), lambda m, x: x + m.s[:, :3], 4, 12), r(N, 3, 4)),
    Case("offset subtracted", scale_by((4,), lambda m, x: x - m.s, 4, 4), r(N, 4)),
    Case(
        "class token",
        scale_by((1, 1, 4), lambda m, x: torch.cat([m.s.expand(len(x), -1, -1), x], 1), 4, 12),
        r(N, 2, 4),
    ),
    Case("prelu", lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, C)), r(N, 4)),
    Case(
        "attention",
        lambda: spread(12)(Act(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True))),
        r(N, 3, 4),
        {"0.a.in_proj_weight": "in", "0.a.in_proj_bias": "in"},
    ),
    Case(
        "lstm",
        lambda: nn.Sequential(
            Act(lambda m, x: m.l(x)[0], l=nn.LSTM(3, 2, batch_first=True)), nn.Flatten(), nn.Linear(4, C)
        ),
        r(N, 2, 3),
        {f"0.l.{k}_{w}_l0": w for k in ("weight", "bias") for w in ("ih", "hh")},
    ),
    Case(
        "gru",
        lambda: nn.Sequential(
            Act(lambda m, x: m.l(x)[0], l=nn.GRU(3, 2, batch_first=True)), nn.Flatten(), nn.Linear(4, C)
        ),
        r(N, 2, 3),
        {f"0.l.{k}_{w}_l0": w for k in ("weight", "bias") for w in ("ih", "hh")},
    ),
    Case(
        "rnn cell",
        lambda: nn.Sequential(Act(lambda m, x: m.l(x, m.l(x)), l=nn.RNNCell(3, 2)), nn.Linear(2, C)),
        r(N, 3),
        {f"0.l.{k}_{w}": w for k in ("weight", "bias") for w in ("ih", "hh")},
    ),
    Case(
        "functional",
        lambda: nn.Sequential(
            Act(lambda m, x: F.linear(x, m.l.weight, m.l.bias).tanh(), l=nn.Linear(4, 5)), nn.Linear(5, C)
        ),
        r(N, 4),
        {"0.l.weight": "l", "0.l.bias": "l"},
    ),
]


def criteria() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "cross-entropy": (nn.CrossEntropyLoss(), torch.tensor([0, 2, 1, 2])),
        "squared sum": (nn.MSELoss(reduction="sum"), torch.randn(N, C, dtype=torch.float64)),
        "bce": (nn.BCEWithLogitsLoss(), torch.rand(N, C, dtype=torch.float64).round()),
        "poisson": (nn.PoissonNLLLoss(), torch.ones(N, C, dtype=torch.float64)),
    }
