"""Refreshes on few data of a batch: the same numbers as a metric of those data, and only where that is so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import F64, distance, weights

import natgrad as ng
from natgrad import curvature, small_pass

DATA, TIME, WORDS = 32, 16, 7
ROWS = 8 * TIME  # eight data have them


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "TRAINING_ROWS", ROWS)
    monkeypatch.setattr(small_pass, "ROWS_OF_DIAGONALS", 8)


class Language(nn.Module):
    """Words and positions, a mean over the past, a layer, a head: logits (data, time, words)."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, 6), nn.Parameter(torch.randn(TIME, 6))
        self.layer, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, WORDS)
        self.between = between or nn.Identity()
        self.calls = 0
        self.seen: list[int] = []
        self.last: deque[int] = deque(maxlen=3)
        self.steps = torch.zeros(())
        self.register_buffer("total", torch.zeros(()))
        self.double()

    def features(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places
        past = h.cumsum(1) / torch.arange(1, TIME + 1, dtype=h.dtype)[:, None]
        return self.between(self.norm(self.layer(past).tanh()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.last.append(len(x))
        self.steps += 1
        self.total = self.total + 1
        self.hidden = self.features(x)
        return self.head(self.hidden)


Loss = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]


def flat(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(x).view(-1, WORDS), y.flatten())


def turned(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(x).transpose(1, 2), y)


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (DATA, TIME + 1), generator=g)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def step(opt: ng.NaturalGradient, loss: Loss, x: Tensor, y: Tensor) -> float:
    opt.zero_grad()
    value = loss(opt.metric.criterion, opt.metric.model, x, y)  # type: ignore[attr-defined]
    value.backward()
    opt.step()
    return float(value.detach())


def optimizer(model: nn.Module, criterion: nn.Module | None = None, **options: Any) -> ng.NaturalGradient:
    return ng.NaturalGradient(ng.Fisher(model, criterion or nn.CrossEntropyLoss(), **options))


@pytest.mark.parametrize("loss", [flat, turned])
@pytest.mark.parametrize("masked", [False, True])
def test_the_metric_is_that_of_the_data_that_were_drawn(loss: Loss, masked: bool) -> None:
    """The factors of a step are those that `update` finds on the same eight data with the same labels drawn."""
    model, (x, y) = Language(), batch()
    criterion = nn.CrossEntropyLoss(ignore_index=3 if masked else -100, weight=torch.rand(WORDS, dtype=F64) + 0.5)
    opt = optimizer(model, criterion, seed=5)
    chosen = torch.randperm(DATA, generator=torch.Generator().manual_seed(5))[:8]

    def output(z: Tensor) -> Tensor:
        return z.view(-1, WORDS) if loss is flat else z.transpose(1, 2)

    alone = ng.Fisher(model, criterion, seed=5, output=output)
    alone.update(x[chosen], y[chosen].flatten() if loss is flat else y[chosen])
    step(opt, loss, x, y)
    assert opt.info["small_passes"] == 1
    assert opt.info["data_seen"] == DATA
    assert "1 times few data of a batch" in str(opt.metric.coverage())  # type: ignore[attr-defined]
    for name in ("layer.weight", "head.weight", "words.weight", "places"):
        for mine, theirs in zip(opt.metric.factors(name), alone.factors(name)):  # type: ignore[attr-defined]
            assert float((mine - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max()), name


def test_gradients_and_the_model_are_left_as_they_are() -> None:
    model, plain, (x, y) = Language(), Language(), batch()
    opt = optimizer(model)
    random = torch.get_rng_state()
    flat(nn.CrossEntropyLoss(), plain, x, y).backward()
    flat(opt.metric.criterion, model, x, y).backward()  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), random)
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert (model.calls, model.seen, float(model.total)) == (1, [DATA], 1.0)
    assert (list(model.last), float(model.steps)) == ([DATA], 1.0)
    assert len(model.hidden) == DATA
    opt.step()
    assert opt.info["small_passes"] == 1


class Mixed(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class OneSize(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        assert len(h) == DATA
        return h


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h.transpose(1, 2)).transpose(1, 2)


def time_first(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(x).transpose(0, 1).transpose(1, 2), y.T)


def doubled(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion((model(x) * 2).view(-1, WORDS), y.flatten())


def shortened(criterion: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return criterion(model(x)[:, 1:].reshape(-1, WORDS), y[:, 1:].flatten())


REFUSED: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "data that mix": (lambda: Language(Mixed()), flat),
    "a model of one size": (lambda: Language(OneSize()), flat),
    "dropout": (lambda: Language(nn.Dropout(0.3)), flat),
    "batch statistics": (lambda: Language(Normed()), flat),
    "another computation before the loss": (lambda: Language(), doubled),
    "some of the output": (lambda: Language(), shortened),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_same_is_taken_of_the_whole_batch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, loss = REFUSED[case]
    passes = []
    forward = Language.forward

    def counted(self: Language, x: Tensor) -> Tensor:
        passes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Language, "forward", counted)
    opt = optimizer(make())
    torch.manual_seed(3)
    losses = [step(opt, loss, *batch(i)) for i in range(8)]
    assert opt.info["small_passes"] == 0
    assert opt.info["refreshes"] == 4
    assert passes.count(8) == (case != "batch statistics"), "one trial, and no other; none where it is known"
    monkeypatch.setattr(small_pass, "few_enough", lambda *_: None)
    other = optimizer(make())
    torch.manual_seed(3)
    assert [step(other, loss, *batch(i)) for i in range(8)] == losses


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "exact"},
        {"kind": "empirical"},
        {"fraction": 0.5},
        {"max_positions": 64},
        {"structure": "ekfac"},
        {"structure": {"head.*": "diagonal"}},
        {"sharing": "reduce"},
    ],
    ids=str,
)
def test_options_that_ask_for_all_the_data_have_them(options: dict[str, Any]) -> None:
    opt = optimizer(Language(), **options)
    step(opt, flat, *batch())
    assert opt.info["refreshes"] == 1
    assert opt.info["small_passes"] == 0


class Indexed(Language):
    """Takes from its hidden states by indices into the batch, or multiplies them by a sparse matrix."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        super().forward(x)
        mixed = self.hidden.flatten(1)
        mixed = mixed[index] if index.layout == torch.strided else index @ mixed
        return self.head(mixed.view(len(mixed), TIME, -1))


INDICES = {"indices": lambda: torch.arange(2 * DATA) % DATA, "sparse": lambda: torch.eye(DATA, dtype=F64).to_sparse()}


@pytest.mark.parametrize("index", INDICES)
def test_inputs_that_may_be_indices_into_the_batch_are_not_cut(index: str) -> None:
    model, (x, y) = Indexed(), batch()
    opt = optimizer(model)
    logits = model(x, INDICES[index]())
    labels = y.repeat(len(logits) // DATA, 1)
    opt.metric.criterion(logits.view(-1, WORDS), labels.flatten()).backward()  # type: ignore[attr-defined]
    opt.step()
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (1, 0)
    assert model.seen == [DATA]


def test_a_loss_that_takes_time_first_is_not_cut_along_time() -> None:
    opt = optimizer(Language())
    x, y = batch()
    step(opt, time_first, x[:TIME], y[:TIME])  # as many data as steps
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (1, 0)


def test_one_row_a_datum_is_not_enough() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    opt = optimizer(model, nn.MSELoss())
    step(opt, lambda c, m, x, y: c(m(x), y), torch.randn(999, 3, dtype=F64), torch.randn(999, 4, dtype=F64))
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (1, 0)


def test_what_is_picked_of_a_batch_of_one_size_is_taken_whole() -> None:
    opt = optimizer(Language(), output=lambda z: z.view(DATA * TIME, WORDS), targets=lambda x: x.flatten())
    x, y = batch()
    nn.functional.cross_entropy(opt.metric.model(x).flatten(0, 1), y.flatten()).backward()  # type: ignore[attr-defined]
    opt.step()
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (1, 0)


def test_sums_and_small_batches_are_taken_whole() -> None:
    summed = optimizer(Language(), nn.CrossEntropyLoss(reduction="sum"))
    step(summed, flat, *batch())
    small = optimizer(Language())
    x, y = batch()
    step(small, flat, x[:15], y[:15])  # eight are more than half of them
    assert [o.info["small_passes"] for o in (summed, small)] == [0, 0]


def test_time_first_inputs_are_not_cut_along_time() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.head = nn.RNN(3, 5), nn.Linear(5, WORDS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x)[0])

    opt = optimizer(TimeFirst())
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(DATA, TIME, 3, generator=g), torch.randint(0, WORDS, (DATA, TIME), generator=g)
    step(opt, flat, x, y)  # DATA steps of TIME sequences
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (1, 0)


def test_losses_computed_by_the_model_and_functional_ones() -> None:
    """No criterion module is called: the draw is at the output, with what `output=` and `targets=` pick out."""

    class WithLoss(Language):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            logits = super().forward(x)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    model, (x, y) = WithLoss(), batch()
    picks = {"output": lambda r: r["logits"].flatten(0, 1), "targets": lambda given: given["labels"].flatten()}
    opt = optimizer(model, seed=5, **picks)
    model(x=x, labels=y)["loss"].backward()
    opt.step()
    assert opt.info["small_passes"] == 1
    chosen = torch.randperm(DATA, generator=torch.Generator().manual_seed(5))[:8]
    fresh = WithLoss()
    alone = ng.Fisher(fresh, nn.CrossEntropyLoss(), seed=5, output=picks["output"])
    alone.update({"x": x[chosen], "labels": y[chosen]}, y[chosen].flatten())
    for mine, theirs in zip(opt.metric.factors("head.weight"), alone.factors("head.weight")):  # type: ignore[attr-defined]
        assert float((mine - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


def test_two_heads() -> None:
    class Two(Language):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            z = super().forward(x)
            return {"words": z, "size": self.hidden[..., :2]}

    criteria = {"words": nn.CrossEntropyLoss(), "size": nn.MSELoss()}
    opt = ng.NaturalGradient(ng.Fisher(Two(), criteria))
    x, y = batch()
    out = opt.metric.model(x)  # type: ignore[attr-defined]
    loss = criteria["words"](out["words"].flatten(0, 1), y.flatten()) + criteria["size"](
        out["size"], torch.zeros(DATA, TIME, 2, dtype=F64)
    )
    loss.backward()
    opt.step()
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (1, 0)  # a slice of a hidden layer is no output


def test_autocast() -> None:
    model = Language().float()
    opt = optimizer(model)
    for i in range(4):
        x, y = batch(i)
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        seen = logits.float() if i == 3 else logits
        opt.metric.criterion(seen.view(-1, WORDS), y.flatten()).backward()  # type: ignore[attr-defined]
        opt.step()
    assert (opt.info["refreshes"], opt.info["small_passes"]) == (3, 2)  # what was cast is not what the model returned


@pytest.mark.parametrize("odd", [None, 3], ids=["taken", "refused once"])
def test_resume_continues_bit_for_bit(tmp_path: Path, odd: int | None) -> None:
    model, opt = (m := Language()), optimizer(m)
    for i in range(6):
        step(opt, shortened if i == odd else flat, *batch(i))
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "state.pt")
    straight = [step(opt, flat, *batch(i)) for i in range(6, 30)]
    again, other = (m := Language()), optimizer(m)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert [step(other, flat, *batch(i)) for i in range(6, 30)] == straight
    assert distance(weights(model), weights(again)) == 0
    assert opt.info["small_passes"] == other.info["small_passes"] == (2 if odd else opt.info["refreshes"])
