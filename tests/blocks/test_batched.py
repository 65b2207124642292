"""Small layers of one shape together: the same directions as one by one, and as a dense matrix gives them."""

import copy
import itertools

import pytest
import torch
from torch import nn

import natgrad as ng
from natgrad.blocks import batching as batched
from natgrad.linalg.inverse import KroneckerInverse
from natgrad.linalg.kronecker import FactorisationError
from natgrad.optim import block_state

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()


def deep(widths: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def fisher(model: nn.Module) -> ng.Fisher:
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact")
    metric.update(X)
    return metric


def asked(metric: ng.Fisher, grads: list[torch.Tensor], dampings: list[float]) -> list[batched.Preconditioning]:
    return [batched.Preconditioning(*each) for each in zip(metric.blocks, dampings, grads)]


def gradients(metric: ng.Fisher) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b.shape, generator=generator).double() for b in metric.blocks]


def dense(matrix: torch.Tensor, damping: float, biased: bool = False) -> torch.Tensor:
    """(M/t + √λ T)⁻¹ with t the mean eigenvalue; T is I, or with a bias as the last column the two means, over t."""
    mean = matrix.diagonal().mean()
    scales = torch.ones(len(matrix)).double()
    if biased:
        scales = torch.cat([matrix.diagonal()[:-1].mean().expand(len(matrix) - 1), matrix.diagonal()[-1:]]) / mean
    return torch.linalg.inv(matrix / mean + damping**0.5 * torch.diag(scales))


def test_directions_and_inverses_are_those_of_dense_matrices(close):
    metric = fisher(deep([6, 6, 6, 6, 3]))
    assert all(make is not None for make in batched.made_together(metric.blocks, [0.1] * 4))
    grads = gradients(metric)
    found = batched.Products().directions(asked(metric, grads, [0.1] * 4))
    for block, g, d in zip(metric.blocks, grads, found):
        expected = dense(block.u[0], 0.1) @ g[0] @ dense(block.v[0], 0.1, biased=True)
        close(d[0], expected, 1e-12)
        close(block.relative_inverse(0.1).apply(g)[0], expected, 1e-12)


def test_what_goes_together_is_kept_once_and_stacked_once_for_the_same_inverses(monkeypatch):
    metric = fisher(deep([6, 6, 6, 6, 3]))
    grads = gradients(metric)
    products = batched.Products()
    first = products.directions(asked(metric, grads, [0.1] * 4))
    places = {b.last_inverse.u.untyped_storage().data_ptr() for b in metric.blocks[:3]}
    assert len(places) == 1
    monkeypatch.setattr(products, "_stack", lambda _: pytest.fail("stacked again"))
    again = products.directions(asked(metric, grads, [0.1] * 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    monkeypatch.undo()
    changed = products.directions(asked(metric, grads, [0.1, 1.0, 0.1, 0.1]))
    assert not torch.allclose(changed[1], first[1])
    torch.testing.assert_close(changed[0], first[0])


def test_dampings_are_not_mixed(close):
    metric = fisher(deep([6, 6, 6, 6, 3]))
    dampings = [0.1, 1.0, 0.1, 1.0]
    for block, make, damping, g in zip(
        metric.blocks, batched.made_together(metric.blocks, dampings), dampings, gradients(metric)
    ):
        found = (block.relative_inverse(damping) if make is None else make()).apply(g)
        close(found[0], dense(block.u[0], damping) @ g[0] @ dense(block.v[0], damping, biased=True), 1e-12)


def test_one_factor_that_holds_nan_does_not_harm_the_others():
    metric = fisher(deep([6, 6, 6, 6, 3]))
    bad = metric.blocks[1]
    for total in bad.statistics["U"].sums.values():
        total[..., 0, 0] = torch.nan
    bad.forget()
    makes = batched.made_together(metric.blocks, [0.1] * 4)
    for i, (block, make) in enumerate(zip(metric.blocks, makes)):
        made = [lambda b=block: b.relative_inverse(0.1)] if make is None else [make]
        if i == 1:
            with pytest.raises(FactorisationError):
                made[0]()
        else:
            assert torch.isfinite(made[0]().apply(gradients(metric)[i])).all()


def test_diagonals_and_other_structures_go_alone():
    assert batched.stackable(KroneckerInverse(torch.eye(3)[None], torch.eye(3)[None])) is not None
    diagonal = KroneckerInverse(torch.ones(1, 1, 5), torch.eye(3)[None])
    assert batched.stackable(diagonal) is None
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    metric = ng.Fisher(model, nn.MSELoss(), kind="exact", structure="diagonal")
    metric.update(X)
    assert batched.made_together(metric.blocks, [0.1, 0.1]) == [None, None]


class Twins(nn.Module):
    """Two layers that meet the same gradients, of a width at which one and several come out in other bits elsewhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor, rest: bool = True) -> torch.Tensor:
        return self.head(torch.tanh(self.a(x) + self.b(x) if rest else self.a(x)))


def steps(model: Twins, opt: ng.NaturalGradient, start: int, stop: int, lone: tuple[int, ...] = ()) -> None:
    for i in range(start, stop):
        opt.zero_grad()
        opt.metric.criterion(model(X.to(model.a.weight), i not in lone), X[:, :2].to(model.a.weight)).backward()
        opt.step()


@pytest.mark.parametrize(("width", "dtype"), [(33, torch.float32), (7, torch.float64), (140, torch.float32)])
@pytest.mark.parametrize("lone", [(), (3,)])  # a refresh at which one of them has no gradient
def test_a_run_goes_on_bit_for_bit(width: int, dtype: torch.dtype, lone: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, again = Twins(width).to(dtype), Twins(width).to(dtype)
    opts = [ng.NaturalGradient(ng.Fisher(m, nn.MSELoss()), lr=30.0, weight_decay=0.0) for m in (model, again)]
    steps(model, opts[0], 0, 5, lone)
    again.load_state_dict(model.state_dict())
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    for m, opt in zip((model, again), opts):
        steps(m, opt, 5, 9)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_scales_follow_a_refresh_at_which_a_layer_has_no_gradient(monkeypatch):
    taken = []
    rescale = block_state.BlockState.rescale
    monkeypatch.setattr(
        block_state.BlockState, "rescale", lambda self, block: taken.append(block.names[0]) or rescale(self, block)
    )
    model = Twins(7)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.MSELoss()))
    steps(model, opt, 0, 5, lone=(3,))
    assert taken == 3 * ["a.weight", "b.weight", "head.weight"]


def test_training_is_the_same_with_batches_and_without(monkeypatch, close):
    ends = []
    for together in (True, False):
        torch.manual_seed(0)
        model = deep([6, 8, 8, 8, 2])
        if not together:
            monkeypatch.setattr(batched, "alike", lambda keys: [])
        calls: list[list] = []
        made = batched.made_together

        def noted(*given, made=made, calls=calls):
            calls.append(made(*given))
            return calls[-1]

        monkeypatch.setattr(batched, "made_together", noted)
        opt = ng.NaturalGradient(ng.Fisher(model, criterion := nn.MSELoss(), kind="exact"))
        for _ in range(12):
            opt.zero_grad()
            criterion(model(X), X[:, :2]).backward()
            opt.step()
        monkeypatch.undo()
        assert any(make is not None for found in calls for make in found) == together
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(ends[0], ends[1], 1e-10)
