"""Checkpoints of many processes; see `natgrad.distributed.checkpoint.checkpoint`."""

from natgrad.distributed.checkpoint.checkpoint import async_save, latest, load, quiet, save
from natgrad.distributed.checkpoint.files import Reader, Writer
from natgrad.distributed.checkpoint.stateful import Planner, Saved

__all__ = ["Planner", "Reader", "Saved", "Writer", "async_save", "latest", "load", "quiet", "save"]
