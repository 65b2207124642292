"""Files that are whole or not there, and are what they seem to be."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file beside `path`, then rename it: a reader finds the old file or the new one.

    A link at `path` is replaced, and what it points to stays as it is. So is one that waits for the file beside it.

    Raises:
        OSError: it cannot be written; the file that was there stays.
    """
    target = Path(path)
    beside = target.with_name(target.name + ".partial")
    beside.unlink(missing_ok=True)  # of a process that was killed
    # EXCL: fails where something else has put a file or a link there by now
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a machine that fails may keep the new name and not the bytes
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def inside(folder: Path, name: str) -> Path:
    """Return the file of that name in a folder.

    Raises:
        ValueError: the name, or a link there, leads out of the folder.
    """
    path = folder / name
    if Path(name).name != name or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of the folder {folder}")
    return path
