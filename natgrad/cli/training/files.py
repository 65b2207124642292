"""Files that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from natgrad.cli.tasks.task import CommandError


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a hidden neighbour of `path` and rename that to `path` when it is complete.

    Raises:
        CommandError: it cannot be written; what stood at `path` before still does.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise CommandError(
            f"{path} cannot be written ({error.strerror or error}); make room or rights there"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def writable_folder(path: Path) -> Path:
    """The folder, made where it is not there, once a file could be written in it.

    Raises:
        CommandError: it cannot be made or written to. Asked before training, so that no result is lost.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or str(error)
        raise CommandError(f"--out {path} cannot be written ({reason}); name a folder that can") from error
    return path
