"""What a metric is good for besides a step: functions of a metric, fitted or from a file."""
