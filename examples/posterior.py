"""A regression with a band: what a posterior says where there are no data.

python examples/posterior.py [picture.png]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import natgrad as ng

NOISE = 0.15


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(40, 1, generator=g) * 2 - 3, torch.rand(40, 1, generator=g) * 2 + 1])
    return x, x.sin() + NOISE * torch.randn(x.shape, generator=g)


def main(path: str = "posterior.png", steps: int = 1500) -> None:
    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    criterion = ng.Likelihood(lambda f: Normal(f, NOISE), reduction="sum")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (criterion(model(x), y) + 0.5 * sum(p.square().sum() for p in model.parameters())).backward()
        optimizer.step()

    metric = ng.Fisher(model, criterion, kind="exact", structure="dense").fit([(x, y)], progress=False)
    post = ng.posterior(metric, prior=1.0)  # the prior that the penalty above is
    grid = torch.linspace(-5, 5, 200)[:, None]
    mean, variance = post.predict(grid)
    inside, outside = (variance[(grid.abs() > 1) & (grid.abs() < 3)], variance[grid.abs() > 4])
    print(
        f"standard deviation {float(inside.mean().sqrt()):.3f} among the data, {float(outside.mean().sqrt()):.3f} away"
    )
    draw(x, y, grid, mean, (variance + NOISE**2).sqrt(), path)


def draw(x: Tensor, y: Tensor, grid: Tensor, mean: Tensor, spread: Tensor, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3))
    a, b, g, m, s = (t.detach().flatten().numpy() for t in (x, y, grid, mean, spread))
    ax.fill_between(g, m - 2 * s, m + 2 * s, color="#c6dbef", label="two standard deviations")
    ax.plot(g, m, color="#2171b5", lw=1.5, label="model")
    ax.plot(g, grid.sin().flatten().numpy(), color="0.5", lw=1, ls=":", label="sine")
    ax.plot(a, b, ".", color="black", ms=4, label="data")
    ax.set_ylim(-3, 3)
    ax.legend(fontsize=8, ncol=2, loc="upper center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
