"""Benchmarks: run from the root of a clone."""
