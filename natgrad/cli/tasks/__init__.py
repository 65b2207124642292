"""The problems that the command line ships. A new task is a file with a `Task` and a line in `TASKS`."""

from __future__ import annotations

import runpy
from pathlib import Path

from natgrad.cli.tasks import digits_autoencoder, digits_classifier, mnist_autoencoder
from natgrad.cli.tasks.task import CommandError, Data, Task

TASKS = {task.name: task for task in (digits_autoencoder.TASK, digits_classifier.TASK, mnist_autoencoder.TASK)}

__all__ = ["TASKS", "CommandError", "Data", "Task", "task_in"]


def task_in(path: Path) -> Task:
    """Return the `TASK` of a Python file.

    Raises:
        CommandError: there is no such file, it fails, or it has no `TASK` of type `Task`.
    """
    if not path.is_file():
        raise CommandError(f"{path} is no file; give one with a TASK of type natgrad.cli.tasks.Task")
    try:
        found = runpy.run_path(str(path)).get("TASK")
    except Exception as error:
        raise CommandError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(found, Task):
        raise CommandError(f"{path} has no TASK of type natgrad.cli.tasks.Task, see docs/command-line.md")
    return found
