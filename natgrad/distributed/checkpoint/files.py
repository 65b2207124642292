"""Folders of torch.distributed.checkpoint that are whole or not there, and that are read without running code.

A checkpoint is written to a folder beside, ``NAME.partial``, and renamed when every rank has written its part: a
process that is killed leaves the last whole checkpoint as it was. Its ``.metadata`` is a pickle; it is read with
nothing but the classes that it consists of.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

METADATA = ".metadata"  # written last
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
        if self.target.exists():
            raise FileExistsError(
                f"there is a checkpoint {self.target} already; give each a name of its own, such as step-{{n}}, so "
                "that a whole one is there at any time"
            )
        super().__init__(self.target.with_name(self.target.name + ".partial"))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for left in Path(self.path).iterdir():  # by an attempt that was cut short; nobody writes before this returns
            left.unlink()
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)  # one rank, once all have written
        os.rename(self.path, self.target)


class Reader(FileSystemReader):
    """Reads a checkpoint that is whole, by `Writer` or by torch's own, and unpickles nothing but its description."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint says of itself.

        Raises:
            FileNotFoundError: there is no checkpoint, or one that was never finished.
            ValueError: files of it are missing or cut short; the message names them.
        """
        path = Path(self.path)
        try:
            with (path / METADATA).open("rb") as file:
                metadata = Description(file).load()
        except FileNotFoundError as error:
            partial = path.with_name(path.name + ".partial")
            if path.is_dir():
                why = f"{path} is no complete checkpoint: it has no {METADATA}, which is written last"
            elif partial.is_dir():
                why = f"there is no checkpoint {path}, only {partial}, whose writing was cut short"
            else:
                why = f"there is no checkpoint {path}"
            raise FileNotFoundError(why) from error
        except (EOFError, pickle.UnpicklingError, AttributeError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path / METADATA} is cut short or no description of a checkpoint: {error}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, Mapping):
            raise ValueError(f"{path / METADATA} is no description of a checkpoint")
        if bad := damaged(path, metadata):
            raise ValueError(f"the checkpoint {path} is incomplete: " + "; ".join(bad))
        return metadata


class Description(pickle.Unpickler):
    """An unpickler that knows the classes of a checkpoint's description and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if name in CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint consists of")


def damaged(path: Path, metadata: Metadata) -> list[str]:
    """Files of a checkpoint that are missing or too short, in words."""
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    found = []
    for name, length in sorted(needed.items()):
        file = path / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size < length:
            found.append(f"{name} has {file.stat().st_size} of {length} bytes")
    return found
