"""The trainers people use, untouched: each trains, checkpoints, and resumes as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training_cases import batches, classifier, distance, weights

import natgrad as ng
from natgrad import huggingface

# what the trainers' own code and their dependencies warn of
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*TensorBoard support"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
]


def loader() -> DataLoader[Any]:
    data = list(batches(16, size=8, dtype=torch.float32))
    return DataLoader(TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])), batch_size=8)


# Lightning -------------------------------------------------------------------------------------------------------


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = classifier(torch.float32), nn.CrossEntropyLoss()
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            loss = self.criterion(self.model(x), y)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            opt = ng.NaturalGradient(ng.Fisher(self.model, self.criterion), average=0.9)
            return {"optimizer": opt, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8)}

    return Module()


def lightning_trainer(folder: Path, epochs: int, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **options,
    )


def test_lightning_trains_checkpoints_and_resumes(tmp_path: Path) -> None:
    straight = lightning_module()
    lightning_trainer(tmp_path / "a", 4, enable_checkpointing=False).fit(straight, loader())
    assert sum(straight.losses[-5:]) < 0.5 * sum(straight.losses[:5])
    first = lightning_module()
    trainer = lightning_trainer(tmp_path / "b", 2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    second = lightning_module()
    lightning_trainer(tmp_path / "b", 4).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.losses + second.losses == straight.losses
    assert distance(weights(straight.model), weights(second.model)) == 0


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 4}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}],
    ids=["accumulation", "clipping", "bf16"],
)
def test_lightning_with_its_options(tmp_path: Path, options: dict[str, Any]) -> None:
    module = lightning_module()
    trainer = lightning_trainer(tmp_path, 8, enable_checkpointing=False, **options)
    trainer.fit(module, loader())
    opt = trainer.optimizers[0]
    assert opt.steps == 128 // options.get("accumulate_grad_batches", 1)
    assert opt.metric.info["data_seen"] == 8 * options.get("accumulate_grad_batches", 1) * opt.refreshes
    assert sum(module.losses[-16:]) < 0.7 * sum(module.losses[:16])


class Manual:
    """Mixed into a module: the step written out, as manual optimization wants it."""

    def training_step(self: Any, batch: Any, index: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        loss = super().training_step(batch, index)  # type: ignore[misc]
        self.manual_backward(loss)
        opt.step()
        self.lr_schedulers().step()


def test_lightning_with_manual_optimization(tmp_path: Path) -> None:
    automatic = lightning_module()
    lightning_trainer(tmp_path, 4, enable_checkpointing=False).fit(automatic, loader())
    module = lightning_module()
    module.__class__ = type("Module", (Manual, type(module)), {})
    module.automatic_optimization = False
    trainer = lightning_trainer(tmp_path, 4, enable_checkpointing=False)
    trainer.fit(module, loader())
    assert trainer.optimizers[0].steps == 64
    assert sum(module.losses[-5:]) < 0.5 * sum(module.losses[:5])


def pinn(way: str) -> Any:
    """u = sin x from values and the equation c u″ + u = 0, c a loose parameter that is 1."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
            self.c = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
            terms = {"pde": lambda u, x: self.c * ng.operators.laplacian(u, x) + u(x), "data": lambda u, x, y: u(x) - y}
            self.metric = ng.GaussNewton(self.net, terms, params={"c": self.c})
            self.automatic_optimization = way in ("automatic", "a loss of its own")
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            if way == "a loss of its own":
                return (self.net(batch["data"][0])[:, 0] - batch["data"][1]).square().mean()
            if way == "batch":
                self.losses.append(float(self.optimizers(use_pl_optimizer=False).step(batch)))
                return None
            if way == "closure":
                self.optimizers().step(lambda: self.losses.append(float(self.metric.observe(batch))))
                return None
            loss = self.metric.training_loss(batch)
            self.losses.append(float(loss.detach()))
            if way == "manual":
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def configure_optimizers(self) -> Any:
            return ng.NaturalGradient(self.metric)

    return Module()


def pinn_loader(batches: int = 1) -> DataLoader[Any]:
    x = torch.linspace(-1, 1, 12 * batches, dtype=torch.float64)[:, None]
    parts = [{"pde": x[i::batches], "data": (x[i::batches], x[i::batches, 0].sin())} for i in range(batches)]
    return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["automatic", "manual", "closure", "batch"])
def test_a_pinn_in_lightning_takes_the_steps_of_a_loop(tmp_path: Path, way: str) -> None:
    module, alone = pinn(way), pinn(way)
    lightning_trainer(tmp_path, 12, enable_checkpointing=False).fit(module, pinn_loader(2))
    opt = ng.NaturalGradient(alone.metric)
    straight = [float(opt.step(batch)) for _ in range(12) for batch in pinn_loader(2)]
    assert module.losses == straight
    assert torch.equal(module.c, alone.c)
    assert abs(float(module.c.detach()) - 1) < 1e-3


def test_a_pinn_in_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight, first, second = pinn("automatic"), pinn("automatic"), pinn("automatic")
    lightning_trainer(tmp_path / "a", 6, enable_checkpointing=False).fit(straight, pinn_loader())
    trainer = lightning_trainer(tmp_path / "b", 3)
    trainer.fit(first, pinn_loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = lightning_trainer(tmp_path / "b", 6)
    again.fit(second, pinn_loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.losses + second.losses == straight.losses
    assert torch.equal(second.c, straight.c)


@pytest.mark.parametrize(
    ("way", "options", "words"),
    [
        ("a loss of its own", {}, r"GaussNewton makes its own gradient from a batch.*metric.training_loss\(batch\)"),
        ("automatic", {"gradient_clip_val": 1e-6}, "they were clipped or scaled"),
        ("automatic", {"accumulate_grad_batches": 2}, "accumulated over several batches"),
    ],
)
def test_a_pinn_in_lightning_says_what_to_write(tmp_path: Path, way: str, options: Any, words: str) -> None:
    module = pinn(way)
    with pytest.raises(RuntimeError, match=words):
        lightning_trainer(tmp_path, 1, enable_checkpointing=False, **options).fit(module, pinn_loader(2))


# Hugging Face ------------------------------------------------------------------------------------------------------

VOCABULARY, LENGTH = 24, 10


def gpt2(tied: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(classes: bool) -> list[dict[str, Tensor]]:
    """Counting sequences of unequal length, padded; the class is the first token's remainder."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(96):
        start, size = (int(torch.randint(n, (1,), generator=g)) for n in (VOCABULARY, 5))
        tokens = (torch.arange(LENGTH) + start) % VOCABULARY
        kept = torch.arange(LENGTH) < LENGTH - size
        label = torch.tensor(start % 3) if classes else torch.where(kept, tokens, -100)
        found.append({"input_ids": tokens, "attention_mask": kept.long(), "labels": label})
    return found


CASES: dict[str, Any] = {
    "gpt2": (gpt2, huggingface.CAUSAL_LM, False),
    "bert": (bert, huggingface.CLASSIFICATION, True),
}


def hf_trainer(case: str, folder: Path, steps: int, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    build, readout, classes = CASES[case]
    model = build()
    opt = ng.NaturalGradient(ng.Fisher(model, nn.CrossEntropyLoss(), **readout))
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=steps, save_steps=10, logging_steps=5, report_to=[],
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=texts(classes), optimizers=(opt, None))


def unwrapped(trainer: Any) -> ng.NaturalGradient:
    opt = trainer.optimizer
    return getattr(opt, "optimizer", opt)


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_trains_checkpoints_and_resumes(case: str, tmp_path: Path) -> None:
    straight = hf_trainer(case, tmp_path / "a", 30)
    straight.train()
    logged = [row["loss"] for row in straight.state.log_history if "loss" in row]
    assert float(logged[-1]) < 0.9 * float(logged[0])
    opt = unwrapped(straight)
    assert opt.steps == 30
    assert opt.refreshes >= 5
    assert opt.metric.coverage()["classifier.weight" if case == "bert" else "transformer.wte.weight"].block == "kfac"
    hf_trainer(case, tmp_path / "b", 10).train()
    again = hf_trainer(case, tmp_path / "b", 30)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-10"))
    assert [r["loss"] for r in again.state.log_history if "loss" in r] == logged
    assert distance(weights(straight.model), weights(again.model)) == 0


def test_hugging_face_accumulates_clips_and_autocasts(tmp_path: Path) -> None:
    trainer = hf_trainer("bert", tmp_path, 12, gradient_accumulation_steps=3, max_grad_norm=0.5, bf16=True)
    trainer.train()
    opt = unwrapped(trainer)
    assert opt.steps == 12
    assert opt.metric.info["data_seen"] == 24 * opt.refreshes


def test_the_metric_of_a_causal_model_is_that_of_its_own_loss() -> None:
    """Shifted labels and −100 included: the head's block against the formula, from the model's own hidden states."""
    model = gpt2(tied=False).double().eval()
    metric = ng.Fisher(
        model, nn.CrossEntropyLoss(), kind="exact", structure="dense", params="lm_head.weight", **huggingface.CAUSAL_LM
    )
    batch = {k: torch.stack([t[k] for t in texts(False)[:6]]) for k in ("input_ids", "attention_mask", "labels")}
    metric.update(batch)
    out = model(**batch, output_hidden_states=True)
    h = out.hidden_states[-1][:, :-1][batch["labels"][:, 1:] != -100].detach()
    p = (h @ model.lm_head.weight.detach().T).softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nij,nk,nl->ikjl", curvature, h, h).reshape(p.shape[1] * h.shape[1], -1) / len(h)
    assert float((metric.dense() - expected).norm() / expected.norm()) < 1e-9


def test_labels_cannot_be_told_apart_in_positional_arguments() -> None:
    with pytest.raises(TypeError, match="call it with keywords"):
        huggingface.labels_of(((torch.ones(1), torch.ones(1)), {}))


# Accelerate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(True)


def test_accelerate_trains_checkpoints_and_resumes(tmp_path: Path, accelerator: Any) -> None:
    def prepared() -> tuple[Any, ...]:
        model, criterion = classifier(torch.float32), nn.CrossEntropyLoss()
        opt = ng.NaturalGradient(ng.Fisher(model, criterion))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 40)
        return criterion, *accelerator.prepare(model, opt, loader(), scheduler)

    def epoch(criterion: Any, model: Any, opt: Any, data: Any, scheduler: Any) -> list[float]:
        losses = []
        for x, y in data:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
                opt.step()
                scheduler.step()
                opt.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    one = prepared()
    for _ in range(3):
        epoch(*one)
    accelerator.save_state(str(tmp_path / "state"))
    straight = epoch(*one)
    assert one[2].optimizer.steps == 32
    accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders = [], [], [], []
    two = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert epoch(*two) == straight
    assert distance(weights(one[1]), weights(two[1])) == 0


# TensorBoard -------------------------------------------------------------------------------------------------------


def test_info_goes_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    from training_cases import natural, train

    model = classifier()
    opt = natural(model)
    with SummaryWriter(str(tmp_path)) as writer:
        for step, batch in enumerate(batches(5)):
            train(model, opt, [batch])
            for name, value in opt.info.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(f"natgrad/{name}", value, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"natgrad/damping", "natgrad/step_length", "natgrad/skipped"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("natgrad/step_length")) == 5


@pytest.mark.parametrize("name", ["lightning_trainer", "lightning_pinn", "huggingface_trainer", "accelerate_loop"])
def test_the_examples_run(name: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    pytest.importorskip(
        "lightning" if "lightning" in name else {"huggingface_trainer": "transformers"}.get(name, "accelerate")
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(root / "examples" / f"{name}.py"), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=150,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, last = json.loads(run.stdout.splitlines()[-1])["loss"]
    assert last < 0.6 * first
