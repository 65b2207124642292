"""Folders of torch.distributed.checkpoint that are whole or not there, and that are read without running code.

A checkpoint is written to a folder beside, ``NAME.partial``, and renamed when every rank has written its part: a
process that is killed leaves the last whole checkpoint as it was. Its ``.metadata`` is a pickle; it is read with
nothing but the classes that it consists of.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from natgrad.state.files import inside, write_whole

METADATA = ".metadata"
CHECKSUM = ".metadata.crc32"  # written last
PORTION = 2**22  # bytes read at once for a checksum
CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "collections": ("OrderedDict",),
}


class Writer(FileSystemWriter):
    """Writes a checkpoint beside `path` and renames it when it is complete.

    Raises:
        FileExistsError: there is something at `path`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = Path(path)
        if os.path.lexists(self.target):
            raise FileExistsError(
                f"there is a checkpoint {self.target} already; give each a name of its own, such as step-{{n}}, so "
                "that a whole one is there at any time"
            )
        super().__init__(self.target.with_name(self.target.name + ".partial"))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        partial = Path(self.path)
        if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
            raise OSError(f"{partial} is no folder that natgrad has made, but a link or a file; remove it")
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for left in Path(self.path).iterdir():  # by an attempt that was cut short; nobody writes before this returns
            left.unlink()  # of a link the link itself
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        try:
            done = super().write_data(plan, planner)
        except RuntimeError as error:  # what torch makes of a disk that is full, and of Ctrl-C
            if error.__context__ is not None and not isinstance(error.__context__, Exception):
                raise error.__context__ from None
            raise OSError(f"{self.path} cannot be written: {error.__context__ or error}") from error
        for result in done.wait():  # the description will have it, as it has where each tensor lies
            result.storage_data.checksum = checksum_at(Path(self.path), result.storage_data)
        return done

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)  # one rank, once all have written
        folder = Path(self.path)
        write_whole(folder / CHECKSUM, b"%08x\n" % zlib.crc32((folder / METADATA).read_bytes()))
        os.rename(folder, self.target)


class Reader(FileSystemReader):
    """Reads a checkpoint that is whole, by `Writer` or by torch's own, and unpickles nothing but its description.

    What `Writer` wrote has checksums: of the description, which is looked at before it is read, and in it one of each
    tensor, which is looked at before that is. torch's own writer has none.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint says of itself.

        Raises:
            FileNotFoundError: there is no checkpoint, or one that was never finished.
            ValueError: files of it are missing, damaged or cut short; the message names them.
        """
        path = Path(self.path)
        try:
            data = inside(path, METADATA).read_bytes()
            check_description(path, data)
            metadata = Description(io.BytesIO(data)).load()
        except FileNotFoundError as error:
            partial = path.with_name(path.name + ".partial")
            if path.is_dir():
                why = f"{path} is no complete checkpoint: it has no {METADATA}, which is written last"
            elif partial.is_dir():
                why = f"there is no checkpoint {path}, only {partial}, whose writing was cut short"
            else:
                why = f"there is no checkpoint {path}"
            raise FileNotFoundError(why) from error
        except ValueError:
            raise
        except Exception as error:  # a pickle that is none fails in many ways
            raise ValueError(f"{path / METADATA} is cut short or no description of a checkpoint: {error}") from error
        try:
            bad = damaged(path, metadata)
        except (AttributeError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path / METADATA} is no description of a checkpoint: {error}") from error
        if bad:
            raise ValueError(f"the checkpoint {path} is incomplete: " + "; ".join(bad))
        return metadata

    def read_data(self, plan: LoadPlan, planner: Any) -> Future[None]:
        """Raises a ValueError that names a tensor whose checksum differs."""
        for item in plan.items:
            about = self.storage_data[item.storage_index]
            there = getattr(about, "checksum", None)
            if there is not None and there != checksum_at(Path(self.path), about):
                raise ValueError(
                    f"{item.storage_index.fqn!r} in {about.relative_path} is not as it was saved: its checksum differs"
                )
        return super().read_data(plan, planner)


def checksum_at(folder: Path, about: Any) -> int:
    """Return the CRC-32 of what one tensor takes of a file; see `natgrad.state.seal`."""
    found = 0
    with inside(folder, about.relative_path).open("rb") as file:
        file.seek(about.offset)
        left = about.length
        while left > 0 and (data := file.read(min(left, PORTION))):
            found, left = zlib.crc32(data, found), left - len(data)
    return found


def check_description(folder: Path, data: bytes) -> None:
    """Raise a ValueError if a description is not the one that was written beside its checksum."""
    path = inside(folder, CHECKSUM)
    if path.is_file() and path.read_bytes().strip() != b"%08x" % zlib.crc32(data):
        raise ValueError(f"{folder / METADATA} is not as it was saved: it or its checksum in {CHECKSUM} is damaged")


class Description(pickle.Unpickler):
    """An unpickler that knows the classes of a checkpoint's description and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint consists of")


def damaged(folder: Path, metadata: Any) -> list[str]:
    """Files of a checkpoint that are missing or too short, and tensors that no file can hold, in words.

    Raises:
        ValueError: it is no description of a checkpoint, or names a file outside the folder.
        AttributeError, TypeError: likewise.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
        raise ValueError(f"{folder / METADATA} is no description of a checkpoint")
    needed: dict[str, int] = {}
    held: dict[str, int] = {}  # bytes of each tensor
    for index, info in metadata.storage_data.items():
        if type(info.offset) is not int or type(info.length) is not int or info.offset < 0 or info.length < 0:
            raise ValueError(f"{folder / METADATA} places {index.fqn!r} at {info.offset!r}, length {info.length!r}")
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        held[index.fqn] = held.get(index.fqn, 0) + info.length
    found = []
    for name, length in sorted(needed.items()):
        file = inside(folder, name)
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size < length:
            found.append(f"{name} has {file.stat().st_size} of {length} bytes")
    for name, about in metadata.state_dict_metadata.items():
        # before memory is taken for it
        if isinstance(about, TensorStorageMetadata) and (size := bytes_of(about)) > held.get(name, 0):
            found.append(f"{name} is said to have {size} bytes, and its file holds {held.get(name, 0)}")
    return found


def bytes_of(about: TensorStorageMetadata) -> int:
    """Return the bytes of a tensor.

    Raises:
        ValueError: its size is none.
    """
    if any(type(n) is not int or n < 0 for n in about.size):
        raise ValueError(f"a tensor in {METADATA} has the size {about.size}")
    return math.prod(about.size) * torch.empty((), dtype=about.properties.dtype).element_size()
