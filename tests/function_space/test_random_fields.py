"""Random programs of what jets know: broadcasts, reductions, joins and products, against reverse mode at one point."""

import random

import numpy as np
import pytest
import torch
from torch.func import jacrev, vmap
from torch.nn import functional as F

from natgrad.operators import gradient, laplacian

torch.set_num_threads(1)
D = torch.float64
POINTS = torch.tensor([[0.3, -0.7, 0.2], [-0.4, 0.9, 1.1]], dtype=D)
UNARY = [
    *(torch.sin, torch.tanh, torch.sigmoid, torch.square, torch.atan, torch.neg, F.silu, F.gelu, F.softplus),
    *(lambda t: t**3, lambda t: 1 / (2 + t * t), lambda t: (t * t + 1).sqrt(), lambda t: 2.0 ** torch.tanh(t)),
    *(lambda t: 3 - t, lambda t: t / (t.square() + 1), lambda t: t.detach() * t),
]
BINARY = [
    *(torch.add, torch.mul, lambda a, b: torch.sub(a, b, alpha=0.5), lambda a, b: a / (b * b + 1)),
    *(lambda a, b: torch.where(a > 0, a, b), lambda a, b: b - a, lambda a, b: a * b.cos()),
]
ALONG = [
    *(lambda a, d: a.sum(d, keepdim=True), lambda a, d: a.mean(d), lambda a, d: a.cumsum(d), lambda a, d: a.flip(d)),
    *(torch.softmax, torch.logsumexp, lambda a, d: a.transpose(d, 0), lambda a, d: a.unsqueeze(d)),
    *(lambda a, d: torch.stack([a, a.sin()], d), lambda a, d: torch.cat([a, a * a], d), lambda a, d: a.amax(d)),
]
MATRICES = [
    lambda f, x, c: f @ c.expand(len(f)),
    lambda f, x, c: torch.einsum("i,j->ij", f[:3], x) @ x,
    lambda f, x, c: torch.outer(f, f)[:2],
    lambda f, x, c: torch.cat([f, x, c.reshape(-1)[:2]])[[0, -1, 1]],
    lambda f, x, c: f[:, None] * x + c.reshape(-1)[0],
]


def program(seed):
    """A field x ↦ …, drawn by the seed."""

    def run(x):
        draw, values = random.Random(seed), [x, x[0], x[:2].unsqueeze(-1)]
        for _ in range(draw.randint(4, 10)):
            a, kind = draw.choice(values), draw.randrange(4)
            shape = draw.choice([(), (3,), (2, 1), (1,)])
            constant = torch.as_tensor(np.random.RandomState(draw.randrange(10**6)).randn(*shape), dtype=D)
            if kind == 0:
                out = draw.choice(UNARY)(a)
            elif kind == 1:
                b = draw.choice([*values, constant])
                fits = all(1 in pair or len({*pair}) == 1 for pair in zip(a.shape[::-1], b.shape[::-1]))
                out = draw.choice(BINARY)(a, b if fits else b.sum())
            elif kind == 2 and a.ndim:
                out = draw.choice(ALONG)(a, draw.randrange(-a.ndim, a.ndim))
            else:
                out = draw.choice(MATRICES)(a.reshape(-1), x, constant.reshape(-1)[:1])
            values.append(out if out.numel() <= 60 else out.reshape(-1)[:7])
        return values[-1] + 0.1 * values[-2].sum()

    return run


@pytest.mark.parametrize("seed", range(80))
def test_random_fields(seed):
    u = program(seed)
    slope = torch.stack([jacrev(u)(x) for x in POINTS]).movedim(-1, 1)
    bend = torch.stack([jacrev(jacrev(u))(x) for x in POINTS])
    second = bend.diagonal(dim1=-2, dim2=-1).sum(-1)
    for got, expected, size in (
        (vmap(lambda x: laplacian(u, x))(POINTS), second, bend),
        (torch.stack([laplacian(u, x) for x in POINTS]), second, bend),
        (vmap(lambda x: gradient(u, x))(POINTS), slope, slope),
    ):
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 1e-9 * max(1.0, float(size.abs().max()))
