"""natgrad as it comes in the Hugging Face Trainer, beside AdamW at the best of three rates, at equal CPU time:
``python -m benchmarks.trainer [--seconds 60] [--seeds 2]``.

A GPT-2 of two layers learns characters of tiny Shakespeare. natgrad is passed to ``optimizers=`` and keeps the linear
decay that Trainer attaches unasked; AdamW is Trainer's own, with a cosine. Each run has as many steps as fit into the
CPU time, by a first run of a few steps, so that schedules end where training does. One line a run: steps, CPU seconds
of training, held-out loss.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import natgrad as ng
from benchmarks.workloads import DATA
from natgrad import huggingface

CONTEXT, WIDTH, BATCH = 64, 96, 16
RATES = (1e-3, 3e-3, 1e-2)
PROBE = 40  # steps that say how long one takes: with as large a share of refreshes as later, or more
HELD_OUT = 200  # windows


def windows() -> tuple[list[dict[str, torch.Tensor]], torch.Tensor, int]:
    """Return training windows, held-out windows (HELD_OUT, CONTEXT), and the size of the alphabet."""
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([symbols[c] for c in text])
    cut = len(codes) * 9 // 10
    seen, held_out = (part[: len(part) // CONTEXT * CONTEXT].view(-1, CONTEXT) for part in (codes[:cut], codes[cut:]))
    chosen = held_out[torch.linspace(0, len(held_out) - 1, HELD_OUT).long()]
    return [{"input_ids": w, "labels": w} for w in seen], chosen, len(symbols)


def run(rate: float | None, steps: int, seed: int, folder: str) -> tuple[float, float]:
    """Return CPU seconds of training, and the held-out loss. `rate`: AdamW's; None for natgrad."""
    data, held_out, symbols = windows()
    set_seed(seed)
    config = GPT2Config(
        vocab_size=symbols, n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
    }
    if rate is None:
        opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), **huggingface.CAUSAL_LM))
        trainer = Trainer(model, TrainingArguments(folder, **arguments), train_dataset=data, optimizers=(opt, None))
    else:
        arguments |= {"learning_rate": rate, "lr_scheduler_type": "cosine", "optim": "adamw_torch"}
        trainer = Trainer(model, TrainingArguments(folder, **arguments), train_dataset=data)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        loss = float(model(input_ids=held_out, labels=held_out).loss)
    return seconds, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time of a run")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    means: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rate in (None, *RATES):
            name = "natgrad" if rate is None else f"AdamW at {rate:g}"
            run(rate, 3, 0, folder)  # what PyTorch loads on first use
            each = run(rate, PROBE, 0, folder)[0] / PROBE
            losses = []
            for seed in range(args.seeds):
                steps = max(1, round(args.seconds / each))
                seconds, loss = run(rate, steps, seed, folder)
                losses.append(loss)
                print(f"{name:16s} seed {seed}: {steps} steps, {seconds:.0f} s, held out {loss:.3f}", flush=True)
            means[name] = statistics.mean(losses)
    rival = min((n for n in means if n != "natgrad"), key=means.__getitem__)
    print(f"natgrad {means['natgrad']:.3f}, {rival} {means[rival]:.3f}")


if __name__ == "__main__":
    main()
