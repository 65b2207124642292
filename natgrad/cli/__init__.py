"""The command line: train, solve and inspect."""

from natgrad.cli.app import main

__all__ = ["main"]
