"""The Fisher metric of a model: hooks on its forward passes, estimates of its blocks, and the metric itself."""
