"""Interrupt training and saving at random times, and see the process clean and every file whole.

    python -m tests.interrupts --times 50

One process trains a model and saves a metric file, an optimizer's state and a checkpoint folder now and then. A
thread of it sends SIGINT at a random time. What was being watched must have been left, every file must load, and the
training goes on.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # so that watched forward passes set its stance
from torch import Tensor, nn

import natgrad as ng
from natgrad import checkpoint
from natgrad.state.files import write_whole
from natgrad.state.interrupts import uninterrupted

EVERY = 20  # steps between saves, which take as long as these
AGAIN = 2.0  # seconds after which a signal without effect is sent again
LONGEST = 0.25  # seconds until a signal: some ten steps


class Wordy(nn.Module):
    """A model that spends as long in Python as in torch, so that signals hit both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + sum(range(2000)) * 0.0
        return self.last(x)


def build() -> tuple[nn.Module, ng.NaturalGradient]:
    model = Wordy()
    return model, ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss()), refresh=2)


def left_behind() -> list[str]:
    """What an interrupted pass may leave in the process, in words."""
    found = []
    if torch._C._len_torch_function_stack():
        found.append("a function mode is on the stack")
    if torch._C._len_torch_dispatch_stack():
        found.append("a dispatch mode is on the stack")
    if torch._dynamo.eval_frame._stance.stance != "default":
        found.append(f"the compiler's stance is {torch._dynamo.eval_frame._stance.stance}")
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        found.append("Ctrl-C has another handler")
    if not torch.is_grad_enabled():
        found.append("gradients are off")
    return found


def train(model: nn.Module, opt: ng.NaturalGradient, folder: Path, number: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for step in range(steps):
        x = torch.randn(16, 6, generator=generator)
        opt.zero_grad()
        opt.metric.criterion(model(x), x[:, :3].argmax(1)).backward()  # type: ignore[attr-defined]
        opt.step()
        if step % EVERY:
            continue
        opt.metric.save(folder / "metric.safetensors")  # type: ignore[attr-defined]
        checkpoint.save({"model": model, "opt": opt}, folder / f"run-{number}-step-{step}")
        with uninterrupted():  # torch.save makes another error of it
            torch.save(opt.state_dict(), folder / "beside")
        write_whole(folder / "optimizer.pt", (folder / "beside").read_bytes())


def loads(folder: Path) -> None:
    """Every file that stands under its own name loads."""
    model, opt = build()
    if (folder / "metric.safetensors").exists():
        opt.metric.load(folder / "metric.safetensors")  # type: ignore[attr-defined]
    if (folder / "optimizer.pt").exists():
        opt.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    for path in folder.glob("run-*"):
        if path.suffix != ".partial":
            checkpoint.load({"model": model, "opt": opt}, path)


def interrupted(times: int, seed: int) -> Counter[str]:
    """Return where the signals came: in which function of natgrad or of the loop.

    Raises:
        AssertionError: something was left behind, or a file is not whole.
    """
    chance = random.Random(seed)
    places: Counter[str] = Counter()
    model, opt = build()
    with tempfile.TemporaryDirectory() as name:
        train(model, opt, Path(name), -1, 1)  # what is imported late is there
    for number in range(times):
        with tempfile.TemporaryDirectory() as name:
            folder, wait = Path(name), chance.uniform(0, LONGEST)
            model, opt = build()

            done = threading.Event()

            def signalled(done: threading.Event = done, wait: float = wait) -> None:
                time.sleep(wait)
                while not done.is_set():  # Python drops what comes while it deletes an object: one presses again
                    os.kill(os.getpid(), signal.SIGINT)
                    done.wait(AGAIN)

            sender = threading.Thread(target=signalled)
            try:
                sender.start()
                train(model, opt, folder, number, 10_000)
            except KeyboardInterrupt as error:
                trace, place = error.__traceback__, ""
                while trace is not None:
                    if "natgrad" in trace.tb_frame.f_code.co_filename or trace.tb_frame.f_code.co_name == "forward":
                        place = trace.tb_frame.f_code.co_name
                    trace = trace.tb_next
                places[place or "the loop"] += 1
            finally:
                done.set()
            sender.join()
            assert left_behind() == [], left_behind()
            loads(folder)
            train(model, opt, folder, times + number, 2)
            assert left_behind() == [], left_behind()
    return places


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    places = interrupted(options.times, options.seed)
    print(f"{sum(places.values())} interrupts: nothing left behind, every file loads, training goes on")
    print("they came in " + ", ".join(f"{place} {count}" for place, count in places.most_common()))


if __name__ == "__main__":
    main()
