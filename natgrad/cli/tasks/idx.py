"""MNIST's IDX file format: two zero bytes, a type, the number of dimensions, big-endian sizes, the data."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from natgrad.cli.tasks.task import CommandError

UNSIGNED_BYTE = 0x08  # the only element type that MNIST uses


def find(directory: Path, stem: str) -> Path | None:
    """The file `stem`, raw or gzipped, in a directory or in one of its direct subfolders."""
    for folder in (
        directory,
        directory / "MNIST" / "raw",
        *sorted(p for p in directory.iterdir() if p.is_dir()),
    ):
        for name in (stem, f"{stem}.gz"):
            if (folder / name).is_file():
                return folder / name
    return None


def read(path: Path) -> Tensor:
    """The array in an IDX file of unsigned bytes.

    Raises:
        CommandError: the file is damaged, or is no IDX file of unsigned bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{path} cannot be read ({error}); download the file again") from error
    if len(raw) < 4 or raw[:3] != bytes([0, 0, UNSIGNED_BYTE]) or len(raw) < 4 + 4 * raw[3]:
        raise CommandError(f"{path} is no IDX file of unsigned bytes; MNIST's own files are, raw or gzipped")
    dimensions = raw[3]
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    data = raw[4 + 4 * dimensions :]
    if len(data) != math.prod(shape):
        promised = math.prod(shape)
        raise CommandError(f"{path} is truncated ({len(data)} bytes of {promised}); download the file again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)
