"""The step rules that a metric may name as its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from natgrad.metric.metric import Metric
from natgrad.optim.line_search import GridSearch
from natgrad.optim.model_steps import LevenbergMarquardt, Spring, TrustRegion
from natgrad.optim.normalised import NormalisedStep
from natgrad.optim.rules import Grafted, KLTrustRegion
from natgrad.optim.step_rule import FixedStep, StepRule

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
