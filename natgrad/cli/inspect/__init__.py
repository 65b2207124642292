"""The page about a metric."""
