"""Natural gradient in the Hugging Face Trainer, through ``optimizers=``; a tiny GPT-2 that learns to count.

    python examples/huggingface_trainer.py --out runs/huggingface

The model computes its own loss, so the metric is told which logits and labels that loss is of:
``huggingface.CAUSAL_LM``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import natgrad as ng
from natgrad import huggingface

VOCABULARY, LENGTH = 32, 16


def build(out: Path, steps: int) -> Trainer:
    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), **huggingface.CAUSAL_LM))
    texts = [(torch.arange(LENGTH) + start) % VOCABULARY for start in range(VOCABULARY)] * 8
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=16,
        save_steps=20,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": text, "labels": text} for text in texts]
    return Trainer(model, arguments, train_dataset=data, optimizers=(opt, None))  # None: Trainer's own schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface"))
    out = parser.parse_args().out
    build(out, steps=20).train()
    resumed = build(out, steps=60)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-20"))
    losses = [float(row["loss"]) for row in resumed.state.log_history if "loss" in row]
    print(json.dumps({"loss": [losses[0], losses[-1]]}))


if __name__ == "__main__":
    main()
