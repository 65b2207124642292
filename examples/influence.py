"""Training digits behind a wrong prediction: scikit-learn's digits, a small classifier, influence scores.

    python examples/influence.py [picture.png]

Draws three test digits that the classifier gets wrong, and beside each the training digits without which it would be
most wrong, and least.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import natgrad as ng


def data() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order]


def main(path: str = "influence.png", steps: int = 300) -> None:
    torch.manual_seed(0)
    x, y = data()
    train, test = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(train[0]), train[1]).backward()
        optimizer.step()

    guess = model(test[0]).argmax(1)
    wrong = (guess != test[1]).nonzero().flatten()[:3]
    metric = ng.Fisher(model, criterion, kind="exact", structure="ekfac").fit([train], progress=False)
    scores = ng.influence(metric, (test[0][wrong], test[1][wrong]), train)
    assert isinstance(scores, Tensor)
    for i, row in zip(wrong.tolist(), scores):
        lowest, highest = (train[1][row.argsort()[k]].tolist() for k in (slice(0, 4), slice(-4, None)))
        print(
            f"a {int(test[1][i])} taken for a {int(guess[i])}: it helped to see {highest}, and misled to see {lowest}"
        )
    draw(test[0][wrong], test[1][wrong], guess[wrong], train, scores, path)


def draw(
    images: Tensor, labels: Tensor, guess: Tensor, train: tuple[Tensor, Tensor], scores: Tensor, path: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(images), 9, figsize=(9, 1.25 * len(images) + 0.4), squeeze=False)
    for row, image, label, said, score in zip(axes, images, labels, guess, scores):
        order = score.argsort()
        shown = [(image, f"{int(label)}, said {int(said)}")]
        shown += [(train[0][i], str(int(train[1][i]))) for i in [*order[-4:].flip(0).tolist(), *order[:4].tolist()]]
        for ax, (pixels, title) in zip(row, shown):
            ax.imshow(pixels.reshape(8, 8).numpy(), cmap="gray_r")
            ax.set_title(title, fontsize=8)
            ax.axis("off")
    for at, text in ((0.17, "predicted"), (0.37, "helped most"), (0.72, "misled most")):
        figure.text(at, 0.98, text, fontsize=9, va="top", ha="center")
    figure.subplots_adjust(top=0.86, hspace=0.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
