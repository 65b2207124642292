"""Small versions of models that people train, in plain torch and from installed packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or into != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """torchvision's ResNet-18 with `width` channels in the first stage (64 there)."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, into = [], width
        for i in range(4):
            out = width * 2**i
            stages.append(nn.Sequential(BasicBlock(into, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)))
            into = out
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(into, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class ViT(nn.Module):
    """A vision transformer: patches, class token, learned positions, pre-norm encoder with layer scale."""

    def __init__(self, width: int = 64, depth: int = 4, patch: int = 4, size: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.gamma = nn.Parameter(torch.ones(width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.encoder(x) * self.gamma)[:, 0])


VOCABULARY = 50
Language = dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], Callable[[Any], Any]]]


def language_models(width: int = 16, layers: int = 2, vocabulary: int = VOCABULARY) -> Language:
    """{name: (model, output=, targets=)} from `transformers`; empty where it is not installed."""
    if find_spec("transformers") is None:
        return {}
    import transformers

    transformers.logging.set_verbosity_error()

    def gpt2() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=128,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
        return transformers.GPT2LMHeadModel(config)

    def bert(kind: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            config = transformers.BertConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=4 * width,
                max_position_embeddings=32,
            )
            return getattr(transformers, kind)(config)

        return build

    def t5() -> nn.Module:
        config = transformers.T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=width // 2,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=2,
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config)

    def rows(out: Any) -> Tensor:
        return out.logits.flatten(0, 1)

    def labels(given: Any) -> Tensor:
        return given["labels"].flatten()

    return {
        "gpt2": (gpt2, lambda out: out.logits[:, :-1].flatten(0, 1), lambda kw: kw["labels"][:, 1:].flatten()),
        "bert classifier": (bert("BertForSequenceClassification"), lambda out: out.logits, lambda kw: kw["labels"]),
        "bert masked": (bert("BertForMaskedLM"), rows, labels),
        "t5": (t5, rows, labels),
    }


def as_batch(name: str, data: int = 4, length: int = 7, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    ids = torch.randint(1, vocabulary, (data, length))
    if name == "bert classifier":
        return {"input_ids": ids, "labels": torch.arange(data) % 2}
    labels = ids.clone()
    labels[0, 2:] = -100
    return {"input_ids": ids, "labels": labels}


def graph_net(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """A graph net of torch_geometric on a random graph."""
    from torch_geometric import nn as pyg

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if name == "gcn":
                self.first, self.second = pyg.GCNConv(4, 5), pyg.GCNConv(5, 3)
            else:
                mlp = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
                self.first, self.second = pyg.GINConv(mlp, train_eps=True), pyg.GINConv(nn.Linear(5, 3))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(self.first(x, edges).tanh(), edges)

    return Net(), (torch.randn(7, 4), torch.randint(0, 7, (2, 16))), torch.randint(0, 3, (7,))


Experts = dict[str, Callable[[str], nn.Module]]


def expert_models(vocabulary: int = 32) -> Experts:
    """{name: experts_implementation → model} of `transformers`; empty where it is not installed or too old."""
    if find_spec("transformers") is None:
        return {}
    import transformers

    transformers.logging.set_verbosity_error()
    if not hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        return {}
    shared = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    configs = {
        "mixtral": ("MixtralForCausalLM", {"intermediate_size": 48, "num_local_experts": 4}),
        "qwen2": (
            "Qwen2MoeForCausalLM",
            {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts": 4},
        ),
        "qwen3": ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16}),
        "gpt-oss": (
            "GptOssForCausalLM",
            {"intermediate_size": 32, "num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention"] * 2},
        ),
    }

    def build(name: str) -> Callable[[str], nn.Module]:
        kind, options = configs[name]

        def make(implementation: str) -> nn.Module:
            torch.manual_seed(0)
            model_type = getattr(transformers, kind)
            model = model_type(model_type.config_class(**shared, **options))
            model.set_experts_implementation(implementation)
            made: nn.Module = model.train()
            return made

        return make

    return {name: build(name) for name in configs}


def graph_classifier(name: str, count: int = 24) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, int], Tensor]:
    """A classifier of graphs of 1 to 7 nodes by torch_geometric, in double precision, and a batch of graphs; they are
    told apart by how their nodes hang together.
    """
    from torch_geometric import nn as pyg
    from torch_geometric.data import Batch, Data

    torch.manual_seed(0)
    graphs, labels = [], []
    for n in range(count):
        size = 1 + n * 5 % 7
        label = n % 2
        order = torch.arange(size)
        ends = order.roll(1) if label else torch.zeros_like(order)  # a ring, or a star
        edges = torch.stack([torch.cat([order, ends]), torch.cat([ends, order])])
        graphs.append(Data(x=torch.randn(size, 4).double() + 0.2 * label, edge_index=edges))
        labels.append(label)
    batch = Batch.from_data_list(graphs)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if name == "gcn":
                self.first, self.second = pyg.GCNConv(4, 8), pyg.GCNConv(8, 8)
            elif name == "gin":
                mlp = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
                self.first, self.second = pyg.GINConv(mlp, train_eps=True), pyg.GINConv(nn.Linear(8, 8))
            else:
                self.first, self.second = pyg.SAGEConv(4, 8), pyg.SAGEConv(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor, edges: Tensor, owner: Tensor, size: int) -> Tensor:
            h = self.second(self.first(x, edges).tanh(), edges).tanh()
            return self.head(pyg.global_mean_pool(h, owner, size))

    return Net().double(), (batch.x, batch.edge_index, batch.batch, count), torch.tensor(labels)
