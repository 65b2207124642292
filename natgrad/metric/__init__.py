"""What a metric is: `Metric`, `Euclidean`, sums of metrics, and what an optimizer asks of them."""

from natgrad.metric.euclidean import Euclidean
from natgrad.metric.metric import Metric, Sum, named
from natgrad.metric.protocols import Driver, OwnGradient, Trained, Vector

__all__ = ["Driver", "Euclidean", "Metric", "OwnGradient", "Sum", "Trained", "Vector", "named"]
