"""The step rules that a metric may name as its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from natgrad.metric.metric import Metric
from natgrad.optim.fixed import FixedStep
from natgrad.optim.grafted import Grafted
from natgrad.optim.kl_trust_region import KLTrustRegion
from natgrad.optim.levenberg_marquardt import LevenbergMarquardt
from natgrad.optim.line_search import GridSearch
from natgrad.optim.normalised import NormalisedStep
from natgrad.optim.spring import Spring
from natgrad.optim.step_rule import StepRule
from natgrad.optim.trust_region import TrustRegion

RULES: Mapping[str, Callable[..., StepRule]] = {
    "normalised": NormalisedStep,
    "fixed": FixedStep,
    "grid search": GridSearch,
    "trust region": TrustRegion,
    "kl trust region": KLTrustRegion,
    "grafted": Grafted,
    "levenberg marquardt": LevenbergMarquardt,
    "spring": Spring,
}


def rule_of(metric: Metric, step: StepRule | None = None) -> StepRule:
    """Return the step rule that was given, or the metric's own.

    Raises:
        TypeError: what was given is no step rule.
        ValueError: the metric names one that does not exist.
    """
    if step is None:
        name = metric.default_step
        if name not in RULES:
            there = ", ".join(map(repr, RULES))
            raise ValueError(f"{type(metric).__name__}.default_step is {name!r}; there are {there}")
        return RULES[name](**metric.step_options)
    if not isinstance(step, StepRule):
        raise TypeError(f"step takes a step rule, ng.FixedStep() for instance, got {step!r}")
    return step
