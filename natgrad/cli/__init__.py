"""The command line: train, solve and inspect. It needs packages that the library does without: ``natgrad[cli]``."""

from __future__ import annotations

import sys

PACKAGES = ("rich", "typer", "matplotlib", "sklearn")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. `arguments`: those of the process where there are none."""
    try:
        from natgrad.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print(f"natgrad: the command line needs {error.name}; pip install 'natgrad[cli]'", file=sys.stderr)
        return 2
    return run(arguments)
