"""Kill one of four ranks with ``kill -9`` and see the run end as if nothing had happened.

    python -m tests.distributed.kill --times 20

Each time ``torchrun --max-restarts`` starts four ranks that train a small model and save every few steps; one rank, at
random, is killed at a random step. What it is compared with is a run that nobody disturbs: the losses of every step
must be the same, bit for bit, and so must the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import natgrad as ng
from natgrad import checkpoint

ROOT = Path(__file__).parents[2]
RANKS, STEPS, EVERY = 4, 60, 7
PATIENCE = 240.0  # seconds for one run
BREATH = 0.01  # seconds between steps, so that a kill hits a step and not the end


def worker(folder: Path) -> None:
    """What torchrun starts on each rank."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    train(folder, os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.destroy_process_group()


def train(folder: Path, launch: str) -> None:
    """Train from the latest checkpoint to the end, and leave a log and a digest of the weights in the folder."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    # else the wrapper rebuilds its buckets after the first step, and gloo then adds up in another order
    model = DistributedDataParallel(net, find_unused_parameters=True)
    criterion = nn.CrossEntropyLoss()
    opt = ng.NaturalGradient(ng.Fisher(model, criterion), refresh=5)
    step = 0
    if (newest := checkpoint.latest(folder / "checkpoints")) is not None:
        step = checkpoint.load({"model": model, "opt": opt}, newest)["step"]
    (folder / f"pid-{launch}-{rank}").write_text(str(os.getpid()))
    with (folder / f"losses-{launch}-{rank}").open("w") as log:
        while step < STEPS:
            generator = torch.Generator().manual_seed(1000 * step + rank)
            x = torch.randn(16, 6, generator=generator)
            opt.zero_grad()
            loss = criterion(model(x), (x[:, :3] + x[:, 3:]).argmax(1))
            loss.backward()
            opt.step()
            log.write(json.dumps([step, loss.item()]) + "\n")
            log.flush()
            step += 1
            if step % EVERY == 0:
                checkpoint.save({"model": model, "opt": opt, "step": step}, folder / "checkpoints" / f"step-{step}")
            time.sleep(BREATH)
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    (folder / f"end-{rank}").write_text(hashlib.sha256(weights).hexdigest())


def losses(path: Path) -> dict[int, float]:
    """A line that the kill cut short does not count."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            step, loss = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[step] = loss
    return found


def run(folder: Path, victim: int | None = None, at: int = 0) -> None:
    """One training run in `folder`; with a victim, it is killed once it has done `at` steps.

    Raises:
        RuntimeError: the run failed, or took too long.
    """
    (folder / "checkpoints").mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["--max-restarts", "2", "--monitor-interval", "0.1", "-m", "tests.distributed.kill", "--worker"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else ranks find the addresses of those before the restart
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [*command, str(folder)], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until:
            if victim is not None and len(losses(folder / f"losses-0-{victim}")) >= at:
                os.kill(int((folder / f"pid-0-{victim}").read_text()), signal.SIGKILL)
                victim = None
            time.sleep(0.002 if victim is not None else 0.1)
        if process.poll() is None:
            process.terminate()
            process.wait()
            raise RuntimeError(f"the run took more than {PATIENCE:g} s; its output is in {folder}/output")
    if process.returncode or victim is not None:
        raise RuntimeError(f"the run failed:\n{(folder / 'output').read_text()[-3000:]}")


def compare(folder: Path, straight: Path) -> str:
    """How the disturbed run went, in words.

    Raises:
        AssertionError: it did not end as the other one did.
    """
    ends = {(f / f"end-{r}").read_text() for f in (folder, straight) for r in range(RANKS)}
    assert len(ends) == 1, f"the weights at the end differ: {ends}"
    again = losses(folder / "losses-1-0")
    begin = min(again)
    for rank in range(RANKS):
        reference, mine = losses(straight / f"losses-0-{rank}"), losses(folder / f"losses-1-{rank}")
        assert len(reference) == STEPS
        assert list(mine) == list(range(begin, STEPS)), f"rank {rank} went through the steps {list(mine)}"
        for step, loss in mine.items():
            assert loss == reference[step], f"rank {rank}, step {step}: {loss} and not {reference[step]}"
    assert begin % EVERY == 0
    reached = max(max(losses(folder / f"losses-0-{r}")) for r in range(RANKS))
    assert reached + 1 - begin <= EVERY + 1, f"reached step {reached} and went on from {begin}"
    return f"had reached step {reached}, went on from {begin}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.worker)
        return
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder) / "straight"
        run(straight)
        for number in range(1, options.times + 1):
            victim, at = chance.randrange(RANKS), chance.randrange(1, STEPS - 1)
            disturbed = Path(folder) / str(number)
            run(disturbed, victim, at)
            print(f"{number:>3}  rank {victim} killed after step {at:>2}: {compare(disturbed, straight)}", flush=True)
    print(f"{options.times} of {options.times} runs ended with the losses and weights of the undisturbed one")


if __name__ == "__main__":
    main()
