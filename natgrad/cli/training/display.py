"""What the user sees while a comparison runs: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from natgrad.cli.training.runs import Run


class Display(Protocol):
    """The two displays answer the same calls."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, run: Run) -> None:
        """A run starts."""

    def show(self, run: Run, used: float) -> None:
        """Where it stands: `used` is the fraction of the budget that is spent."""

    def end(self, run: Run) -> None:
        """It is over."""


def status(run: Run) -> str:
    """The last evaluation in words."""
    p = run.last
    return f"step {p.step:<5d} {p.cpu_seconds:4.1f} s  loss {p.train:<6.4g}"


class Bars:
    """A bar for each run, drawn only when told to: a thread of its own would run on the training's clock."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[status]}"),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._bars: dict[int, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, run: Run) -> None:
        self._bars[id(run)] = self._progress.add_task(run.label, total=1.0, status="")
        self._progress.refresh()

    def show(self, run: Run, used: float) -> None:
        text = f"{status(run)} rate {run.last.rate:.2g}"
        self._progress.update(self._bars[id(run)], completed=used, status=text, refresh=True)

    def end(self, run: Run) -> None:
        self.show(run, 1.0)


class Lines:
    """One line when a run ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def begin(self, run: Run) -> None:
        pass

    def show(self, run: Run, used: float) -> None:
        pass

    def end(self, run: Run) -> None:
        self._console.print(f"{run.label:<14} {status(run)} test {run.last.test:.4g}", highlight=False)
