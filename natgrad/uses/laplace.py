"""The Laplace posterior of a trained model: N(θ, (n ĝ/T + P)⁻¹), with ĝ the metric and P the precision of the prior.

The loss is read as −log p(y | f), and its second derivative as n ĝ, the generalised Gauss–Newton matrix (MacKay 1992,
Neural Computation 4(3); Ritter et al. 2018, "A scalable Laplace approximation"; Immer et al. 2021, arXiv:2008.08400,
for predictions by the linearised model). All of it is the metric with damping: with c = T/n

    Σ = c (ĝ + c P)⁻¹,    log det Σ⁻¹ = −log det(c I) + log det(ĝ + c P).
"""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from natgrad.fisher.fisher import Fisher
from natgrad.fisher.forward import isolated
from natgrad.fisher.likelihoods.multi_head import MultiHead
from natgrad.fisher.linearised import Linearised, check_metric, linearised
from natgrad.fisher.options import arguments, choose
from natgrad.metric.damping import Number, Resolved, full, per_name, resolved
from natgrad.uses.data import Batches
from natgrad.uses.log_likelihood import as_output, classes_of, constant, noise, probabilities, sum_of_losses

PROBIT = math.pi / 8  # the logistic function beside the normal's (MacKay 1992, eq. 13)
SAMPLES = 100  # draws where nothing is said
REACH = 4  # decades of the prior up and down that `tune` looks through, a half apart and then an eighth
FURTHEST = 10  # and further ones while the best is the last
ROUNDS = 100  # of `tune` by the evidence
TINY = 1e-12  # in place of zero parameters, or none that the data determine
SETTLED = 1e-6  # relative change of the prior at which it has converged

Predicted = Tensor | tuple[Tensor, Tensor]


class Posterior:
    """A normal distribution over a model's parameters around where they are. Made by `natgrad.posterior`.

    Attributes:
        prior: precision of each parameter by name, or one number; `tune` changes it.
        temperature: T.
        n: how many data the mean loss stands for; 1 for a sum.
    """

    def __init__(self, metric: Fisher, prior: Any, temperature: float) -> None:
        check_metric(metric, fitted=True)
        if isinstance(metric.likelihood, MultiHead):
            raise ValueError("a posterior is of one criterion; this metric has several heads")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive finite number, got {temperature!r}")
        self.metric, self.temperature = metric, float(temperature)
        self.prior: Resolved = resolved(prior, metric.parameters, False, "prior", " (a precision)")
        patterns = list(prior) if isinstance(prior, Mapping) else ["*"]
        own = {n: next(p for p in patterns if fnmatch.fnmatchcase(n, p)) for n in metric.parameters}
        self.groups = [
            [n for n in own if own[n] == p] for p in patterns if p in own.values()
        ]  # with one precision each
        self.n = 1 if metric.likelihood.reduction == "sum" else metric.seen
        self.mean = {n: p.detach().clone() for n, p in metric.parameters.items()}

    def __repr__(self) -> str:
        said = {k: float(v) for k, v in self.prior.items()} if isinstance(self.prior, dict) else float(self.prior)
        return f"Posterior(prior={said}, temperature={self.temperature:g}, n={self.n})"

    # its covariance ------------------------------------------------------------------------------------

    @property
    def _c(self) -> float:
        return self.temperature / self.n

    def _damping(self) -> Any:
        prior = self.prior
        return {n: self._c * d for n, d in prior.items()} if isinstance(prior, dict) else self._c * prior

    def sample(self, k: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return k draws of the parameters, a stack {name: (k, *shape)}.

        Raises:
            ValueError: k is not a whole number of at least 1.
        """
        self._check()
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        with torch.no_grad():
            draws = [self.metric.sample(self._damping(), generator) for _ in range(k)]
            root = self._c**0.5
            return {n: torch.stack([p + root * d[n] for d in draws]) for n, p in self.mean.items()}

    def variance(self, x: Any, diagonal: bool = False) -> Tensor:
        """Return the covariance of the linearised outputs J Σ Jᵀ, (data, outputs, outputs).

        Noise of the data is no part of it. Takes a backward pass for each output of a datum, but none for a last layer
        whose output is the model's; with many outputs take `diagonal`.

        Args:
            x: inputs of the model, as for `Fisher.update`.
            diagonal: return the variances alone, (data, outputs).

        Raises:
            ValueError: there are too many outputs for a backward pass each.
        """
        with self._linearised(x) as lin:
            return self._c * lin.variance(self._damping(), diagonal)

    @contextmanager
    def _linearised(self, x: Any, y: Any = None) -> Iterator[Linearised]:
        self._check()
        with linearised(self.metric, x, y, check=False) as lin:
            yield lin

    def _check(self) -> None:
        check_metric(self.metric, fitted=True)
        moved = [n for n, p in self.metric.parameters.items() if not torch.equal(p.detach(), self.mean[n].to(p))]
        if moved:
            raise RuntimeError(
                f"{len(moved)} parameters have changed since the posterior was made, {moved[0]!r} the first; fit the "
                "metric of the model as it is now and make the posterior again"
            )

    # predictions ---------------------------------------------------------------------------------------

    def predict(
        self,
        x: Any,
        how: str = "linear",
        link: str = "probit",
        samples: int = SAMPLES,
        generator: torch.Generator | None = None,
    ) -> Predicted:
        """Return what the posterior predicts: probabilities of classes, or (mean, variance) of the outputs.

        Probabilities are shaped like the output. Mean and variance too; the variance is that of the output itself,
        without the noise of data about it. With nn.GaussianNLLLoss they are those of the predicted mean.

        Args:
            x: inputs of the model, as for `Fisher.update`.
            how: "linear" takes the model linearised in its parameters; "sample" the mean over draws of parameters.
            link: from the linearised logits to probabilities: "probit" divides them by √(1 + π/8 · variance), "mc"
                draws them.
            samples: draws, for "sample" and "mc"; `generator`: of them.

        Raises:
            ValueError: an option that does not exist, or too many outputs for a backward pass each.
        """
        choose("how", how, ("linear", "sample"))
        choose("link", link, ("probit", "mc"))
        likelihood = self.metric.likelihood
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")
        if how == "sample":
            return self._by_sampling(x, samples, generator)
        with self._linearised(x) as lin, torch.no_grad():
            kind = classes_of(likelihood, lin)
            f = likelihood.outputs(lin.local)[0]
            if kind is None or link == "probit":
                with torch.enable_grad():
                    found = lin.variance(self._damping(), diagonal=True).detach()
                v = lin.like(self._c * found)[0]
                if kind is None:
                    return f, v
                return probabilities(likelihood, kind, f / (1 + PROBIT * v).sqrt())
            with torch.enable_grad():
                covariance = self._c * lin.variance(self._damping()).detach()
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors * values.clamp(min=0).sqrt()[:, None]
            z = torch.randn(samples, *root.shape[:2], 1, dtype=root.dtype, device=root.device, generator=generator)
            drawn = lin.by_datum((f,)) + (root @ z)[..., 0]  # (samples, data, entries)
            return torch.stack([probabilities(likelihood, kind, lin.like(d)[0]) for d in drawn]).mean(0)

    def _by_sampling(self, x: Any, samples: int, generator: torch.Generator | None) -> Predicted:
        with self._linearised(x) as lin:
            kind = classes_of(self.metric.likelihood, lin)
        module, likelihood = self.metric.module, self.metric.likelihood
        of_id = {id(p): n for n, p in self.metric.parameters.items()}
        names = {real: of_id[id(p)] for real, p in module.named_parameters() if id(p) in of_id}
        args, kwargs = arguments(x)
        found = []
        for _ in range(samples):
            drawn = self.sample(1, generator)
            buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
            with isolated(module, self.metric.parameters.values()), torch.no_grad():
                given = {**buffers, **{real: drawn[n][0] for real, n in names.items()}}
                f = likelihood.outputs(self.metric.output_of(torch.func.functional_call(module, given, args, kwargs)))[
                    0
                ]
            found.append(f if kind is None else probabilities(likelihood, kind, f))
        stacked = torch.stack(found)
        if kind is not None:
            return stacked.mean(0)
        return stacked.mean(0), stacked.var(0, correction=0)

    # how good the prior is -----------------------------------------------------------------------------

    def evidence(self, data: Any) -> Tensor:
        """Return log p(D) by Laplace's approximation, a scalar tensor: in nats, for all data together.

        log p(D | θ)/T + ½ log det P − ½ log det(n ĝ/T + P) − ½ θᵀPθ. Gradients go through a prior that was given as
        tensors which require them. For losses that are no likelihood, as Huber's, it is known up to a constant.

        Args:
            data: the training data, which the metric was fitted on.

        Raises:
            ValueError: their number is not that of the metric's data.
        """
        return self.log_likelihood(data) / self.temperature - self._penalty()

    def log_likelihood(self, data: Any) -> Tensor:
        """Return log p(D | θ) at the parameters as they are, a scalar tensor.

        Raises:
            ValueError: their number is not that of the metric's data.
        """
        self._check()
        metric, likelihood = self.metric, self.metric.likelihood
        count, mass, total = 0, 0.0, 0.0
        parts = []
        for x, y in Batches(data, "data"):
            with self._linearised(x, y) as lin:
                outputs = likelihood.outputs(lin.local)
                y = lin.targets
                if y is None:
                    raise ValueError("the evidence needs labels: give batches of (inputs, targets)")
                total += float(sum_of_losses(likelihood, lin.local, outputs, outputs, y))
                mass += float(likelihood.term_mass(outputs, y).sum())
                count += lin.data.count
                parts.append((outputs, y))
        if count != metric.seen:
            raise ValueError(
                f"the evidence is of the data that the metric was fitted on, {metric.seen}, but here are {count}"
            )
        share = 1.0 if likelihood.reduction == "sum" else count / mass
        lacking = sum(constant(likelihood, outputs, y, share) for outputs, y in parts)
        return torch.tensor(-share * total + lacking, dtype=torch.float64)

    def _penalty(self) -> Tensor:
        """½ log det(n ĝ/T + P) − ½ log det P + ½ θᵀPθ"""
        like = next(iter(self.mean.values()))
        prior = full(self.prior, self.mean, like.double())
        size = sum(p.numel() for p in self.mean.values())
        logdet = self.metric.logdet(self._damping()).double() - size * math.log(self._c)
        of_prior = torch.stack([d.log().sum() for d in prior.values()]).sum()
        scatter = torch.stack([(prior[n] * p.double().square()).sum() for n, p in self.mean.items()]).sum()
        return 0.5 * (logdet - of_prior + scatter)

    def tune(self, loader: Any = None) -> Posterior:
        """Choose the prior, and return this posterior with it.

        With a loader of *held-out* data the prior is multiplied by the factor at which their likelihood under `predict`
        is largest. Without, each precision is found by the evidence (MacKay 1992, eq. 31), with a warning: it is
        that of a model trained to its optimum under this prior, and misleads where it was not.

        Args:
            loader: held-out (inputs, targets); None goes by the evidence.

        Raises:
            ValueError: the likelihood has no noise to predict held-out data with.
        """
        self._check()
        if loader is None:
            warnings.warn(
                "the prior is chosen by the evidence, which assumes that the model was trained to its optimum under "
                "this very prior and without early stopping; tune(loader) takes held-out data in its place",
                stacklevel=2,
            )
            self._by_evidence()
            return self
        held, start, known = Batches(loader, "loader"), self.prior, dict[float, float]()

        def best_of(exponents: list[float]) -> float:
            for e in exponents:
                if e not in known:
                    self.prior = scaled(start, 10**e)
                    known[e] = self.held_out(held)
            return max(known, key=lambda e: known[e])

        try:
            best, reach = best_of([e / 2 for e in range(-2 * REACH, 2 * REACH + 1)]), REACH
            while abs(best) == reach and reach < FURTHEST:  # at the end of what was looked through
                reach += 1
                best = best_of([math.copysign(reach - 0.5, best), math.copysign(reach, best)])
            for step in (0.25, 0.125):
                best = best_of([best - step, best + step])
            self.prior = scaled(start, 10**best)
        except BaseException:
            self.prior = start
            raise
        return self

    def held_out(self, loader: Any) -> float:
        """Return the mean log-likelihood of held-out data under `predict`, in nats a datum.

        Raises:
            ValueError: the likelihood has no noise of its own to predict data with.
        """
        likelihood, total, count = self.metric.likelihood, 0.0, 0
        for x, y in loader if isinstance(loader, Batches) else Batches(loader, "loader"):
            with self._linearised(x, y) as lin:
                y, kind = lin.targets, classes_of(likelihood, lin)
                if y is None:
                    raise ValueError("held-out likelihood needs labels: give batches of (inputs, targets)")
                outputs = likelihood.outputs(lin.local)
                v = lin.like(self._c * lin.variance(self._damping(), diagonal=True).detach())[0]
                mass = float(likelihood.term_mass(outputs, y).sum())
                share = 1.0 if likelihood.reduction == "sum" else lin.data.count / max(mass, 1e-300)
                count += lin.data.count
                if kind is not None:
                    scale = (as_output(likelihood, kind, outputs[0] / (1 + PROBIT * v).sqrt()),)
                    total -= share * float(sum_of_losses(likelihood, lin.local, outputs, scale, y))
                    continue
                own = noise(likelihood, lin, share)
                if own is None:
                    raise ValueError(
                        f"{likelihood.name} has no noise to predict held-out data with; use nn.MSELoss, "
                        "nn.GaussianNLLLoss or ng.Likelihood with a Normal, or tune() by the evidence"
                    )
                spread = own + v
                error = (outputs[0] - y.reshape(outputs[0].shape)).square()
                total -= 0.5 * float((error / spread + (2 * math.pi * spread).log()).sum())
        return total / count

    def _by_evidence(self) -> None:
        """The fixed point of prior = γ / ‖θ‖² in each group, γ = P − prior · tr Σ its well-determined parameters."""
        start = self.prior
        sizes = [sum(self.mean[n].numel() for n in names) for names in self.groups]
        squares = [sum(float(self.mean[n].double().square().sum()) for n in names) for names in self.groups]
        values = [float(torch.as_tensor(per_name(start, names[0])).detach()) for names in self.groups]
        try:
            for _ in range(ROUNDS):
                self.prior = self._of_groups(values)
                spread = self.metric.inverse_diagonal(self._damping())
                traces = [self._c * sum(float(spread[n].double().sum()) for n in names) for names in self.groups]
                before, values = (
                    values,
                    [max(p - v * t, TINY) / max(q, TINY) for p, v, t, q in zip(sizes, values, traces, squares)],
                )
                if all(abs(new - old) <= SETTLED * old for new, old in zip(values, before)):
                    break
            else:
                warnings.warn(f"the prior has not settled after {ROUNDS} rounds", stacklevel=3)
            self.prior = self._of_groups(values)
        except BaseException:
            self.prior = start
            raise

    def _of_groups(self, values: list[float]) -> Resolved:
        found: dict[str, Number] = {n: v for v, names in zip(values, self.groups) for n in names}
        return resolved(found, self.mean, False, "prior")


def scaled(prior: Resolved, factor: float) -> Resolved:
    def times(d: Number) -> float:
        return factor * float(d.detach() if isinstance(d, Tensor) else d)

    return {n: times(d) for n, d in prior.items()} if isinstance(prior, Mapping) else times(prior)


def posterior(metric: Fisher, prior: Any = 1.0, temperature: float = 1.0) -> Posterior:
    """Return the Laplace posterior N(θ, (n ĝ/T + prior)⁻¹) of a trained model.

    n is the number of data the metric was fitted on, and 1 where the criterion is a sum, which adds already. With a
    mean a datum counts once, however many outputs or positions its loss is averaged over; take ``reduction="sum"`` to
    count each.

    Args:
        metric: fitted on the training data at the trained parameters, or loaded from a file.
        prior: the precision of a normal prior around zero, or ``{name pattern: precision}``; the first match counts.
            A weight decay of w in a mean loss, w/2 ‖θ‖², is the precision n·w.
        temperature: T, by which the data count less (Wenzel et al. 2020, arXiv:2002.02405).

    Raises:
        TypeError: the metric is none of a model.
        ValueError: a precision or temperature that is not positive, a pattern that matches nothing, or several heads.
        RuntimeError: the metric has seen no data, or an optimizer drives it.
    """
    return Posterior(metric, prior, temperature)
