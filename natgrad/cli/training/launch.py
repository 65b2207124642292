"""Start a command again on several processes of this machine, as ``torchrun --standalone`` does."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from natgrad.cli.tasks.task import CommandError

FAILED, INTERRUPTED = 1, 130


def launched() -> bool:
    """Whether this process is one of those that were started."""
    return dist.is_available() and dist.is_torchelastic_launched()


def check_nproc(nproc: int, batch_size: int) -> None:
    """Raise a CommandError for a number of processes that cannot share a batch evenly."""
    if nproc < 1:
        raise CommandError(f"--nproc {nproc} is no number of processes; give a whole number from 1 on")
    if not dist.is_available():
        raise CommandError("--nproc needs torch.distributed, which this build of torch lacks; leave it out")
    if batch_size % nproc:
        fits = [n for n in (2, 3, 4, 5, 6, 8, 16) if batch_size % n == 0]
        raise CommandError(
            f"--nproc {nproc} does not divide the batch of {batch_size} evenly; give one of {', '.join(map(str, fits))}"
        )


def launch(nproc: int, arguments: Sequence[str]) -> int:
    """Run ``natgrad`` with these arguments on `nproc` processes; the exit code.

    Ctrl-C reaches all of them. What went wrong on one is said in a line, and all are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it repeats what is said below
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine, whatever its name resolves to
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "natgrad", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, INTERRUPTED):  # it has said why
            return int(failure.exitcode)
        why = said_by(failure.error_file_data.get("message")) or how(failure.exitcode)
        print(f"natgrad: rank {rank} of {nproc} failed: {why}; all were stopped", file=sys.stderr)
        return FAILED
    except (SignalException, KeyboardInterrupt) as error:
        caught = getattr(error, "sigval", signal.SIGINT)
        return 128 + int(caught)
    return 0


def said_by(message: Any) -> str:
    """The first line of what a process left in its error file; empty where it left nothing."""
    text = message.get("message", "") if isinstance(message, dict) else message or ""
    return str(text).strip().splitlines()[0] if str(text).strip() else ""


def how(exitcode: int) -> str:
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"
