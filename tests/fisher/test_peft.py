"""Adapters of peft: LoRA and the prompts that are tuned before the text, whose logits are longer than the labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import finite

import natgrad as ng
from natgrad import huggingface

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of both libraries, about themselves

VOCABULARY, LENGTH, VIRTUAL = 16, 8, 3


def pretrained() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_positions": 24, "n_embd": 8, "n_layer": 1, "n_head": 2, "attn_implementation": "eager"}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, **sizes, **dropout)
    return transformers.GPT2LMHeadModel(config).double()


def texts() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    start, stride = torch.randint(15, (12, 1), generator=g), torch.randint(1, 4, (12, 1), generator=g)
    ids = (start + stride * torch.arange(LENGTH)) % 15 + 1
    y = ids.clone()
    y[::3, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": y}


def test_the_metric_of_a_tuned_prompt_is_that_of_the_models_own_loss() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    model, batch = peft.get_peft_model(pretrained(), config).double(), texts()
    name, p = next((n, p) for n, p in model.named_parameters() if "prompt_encoder" in n)

    def logits(value: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: value}, (), batch)["logits"]

    jacobian = torch.func.jacrev(logits)(p.detach()).flatten(-2)  # (N, V + T, C, P)
    f = logits(p.detach()).detach()
    y = torch.cat([torch.full((len(f), VIRTUAL), -100), batch["labels"]], dim=1)
    f, jacobian, y = f[:, :-1], jacobian[:, :-1], y[:, 1:]
    q = f.softmax(-1)[y != -100]
    j = jacobian[y != -100]
    curvature = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    expected = torch.einsum("rcp,rcd,rdk->pk", j, curvature, j) / len(q)
    metric = ng.Fisher(
        model, nn.CrossEntropyLoss(), kind="exact", structure="dense", params=name, **huggingface.CAUSAL_LM
    )
    metric.update(batch)
    assert float((metric.dense() - expected).norm() / expected.norm()) < 1e-9

    total = torch.zeros_like(expected)
    for n in range(len(f)):
        one = {k: t[n : n + 1] for k, t in batch.items()}
        (g,) = torch.autograd.grad(model(**one).loss, p)
        total += torch.outer(g.flatten(), g.flatten()) / len(f)
    metric = ng.Fisher(
        model, nn.CrossEntropyLoss(), kind="empirical", structure="dense", params=name, **huggingface.CAUSAL_LM
    )
    metric.update(batch)
    assert float((metric.dense() - total).norm() / total.norm()) < 1e-6  # the model's loss is in float32


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_forty_steps_come_below_adamw(adapter: str) -> None:
    batch = texts()

    def run(make: Any) -> float:
        base = pretrained()
        model = peft.get_peft_model(base, ADAPTERS[adapter]())
        opt = make(model)
        for _ in range(40):
            opt.zero_grad()
            model(**batch).loss.backward()
            opt.step()
        assert finite(model)
        return float(model(**batch).loss.detach())

    def natural(kind: str, structure: str) -> Any:
        return lambda m: ng.NaturalGradient(
            ng.Fisher(m, nn.CrossEntropyLoss(), kind=kind, structure=structure, **huggingface.CAUSAL_LM)
        )

    best = min(
        run(lambda m, lr=lr: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr))
        for lr in (1e-3, 3e-3, 1e-2)
    )
    for kind in ("sampled", "empirical"):
        for structure in ("kfac", "ekfac", "diagonal"):
            assert run(natural(kind, structure)) < best, (kind, structure)


def test_labels_of_another_length_are_a_clear_error_in_training_too() -> None:
    model = pretrained()
    readout = {**huggingface.CAUSAL_LM, "targets": lambda inputs: inputs["labels"][:, 2:].flatten()}
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), kind="empirical", **readout))
    loss = model(**texts()).loss
    with pytest.raises(ValueError, match=r"CrossEntropyLoss cannot take a tensor of shape .* with targets a tensor"):
        loss.backward()
    assert opt.steps == 0
