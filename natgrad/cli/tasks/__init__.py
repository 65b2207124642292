"""The problems that the command line ships. A new task is a file with a `Task` and a line in `TASKS`."""

from __future__ import annotations

from natgrad.cli.tasks import digits_autoencoder, digits_classifier, mnist_autoencoder
from natgrad.cli.tasks.task import CommandError, Data, Task

TASKS = {task.name: task for task in (digits_autoencoder.TASK, digits_classifier.TASK, mnist_autoencoder.TASK)}

__all__ = ["TASKS", "CommandError", "Data", "Task"]
