"""``python -m natgrad``: the command line, also on each process that ``--nproc`` starts."""

from __future__ import annotations

import sys

from natgrad.cli import main
from natgrad.cli.training.launch import launched

if __name__ == "__main__":
    if launched():
        from torch.distributed.elastic.multiprocessing.errors import record

        sys.exit(record(main)())  # hands what it raises to the process that started it
    sys.exit(main())
