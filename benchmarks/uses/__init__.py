"""What a metric is good for besides a step, each beside its rivals in the same run."""
