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


def default_rule(metric: Metric) -> StepRule:
    """Return the step rule that serves a metric where the user names none.

    Raises:
        ValueError: the metric names one that does not exist.
    """
    if metric.default_step not in RULES:
        raise ValueError(
            f"{type(metric).__name__}.default_step is {metric.default_step!r}; there are {', '.join(map(repr, RULES))}"
        )
    return RULES[metric.default_step](**metric.step_options)


def rule_of(metric: Metric, step: StepRule | None) -> StepRule:
    """Return the step rule that was given, or the metric's own.

    Raises:
        TypeError: what was given is no step rule.
    """
    if step is None:
        return default_rule(metric)
    if not isinstance(step, StepRule):
        raise TypeError(f"step takes a step rule, ng.FixedStep() for instance, got {step!r}")
    return step
