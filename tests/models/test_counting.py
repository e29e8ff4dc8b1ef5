"""Parameters and FLOPs are counted on the meta device; the formulas that they must equal stand here."""

from dataclasses import dataclass

import pytest
import torch
from hierarchical_flops import of_hierarchical
from recurrent_flops import of_aunet, of_blt, of_hnet, of_spacebyte, of_stack
from torch import nn

from models import base, counting
from models.aunet import AUNet
from models.base import LanguageModel, Output, cross_entropy, get_model, load_models, model_names, register
from models.blt import Blt
from models.config import check_ranges, setting
from models.hnet import HNet
from models.layers import normal_
from models.layers.attention import DifferentialHeads, LatentAttention, SoftmaxHeads
from models.layers.patches_fixed import HierarchicalStack
from models.layers.pattention import Pattention
from models.layers.residual import HyperConnection
from models.layers.stack import Stack
from models.spacebyte import SpaceByte
from trainer.planning import dial
from trainer.testing.sizes import CHECKS as SIZES
from trainer.testing.subject import Subject

load_models()
VOCAB = 257
ZOO = [name for name in model_names() if get_model(name).__module__.startswith("models.")]


def small(name, **choices):
    return get_model(name).config_for_scale(0.2, VOCAB, dial.target_parameters(0.2, VOCAB), **choices)


def by_formula(model, length):
    """6 per weight of a product, and queries, keys and values over the whole [T, T] square."""
    c = model.config
    if type(model).__name__ == "Hlb":
        weights = c.vocab_size * c.d_model + c.n_layers * (2 * c.d_qk + 3 * c.d_expand) * c.d_model
        return 6 * weights + 6 * c.n_layers * length * (c.d_qk + c.d_model)
    if type(model).__name__ == "Ngpt":
        return 6 * (c.vocab_size * c.d_model + c.n_layers * 16 * c.d_model**2) + 12 * c.n_layers * length * c.d_model
    if isinstance(model, Blt):
        return of_blt(c, length)
    if isinstance(model, HierarchicalStack):
        return of_hierarchical(model, length)
    if isinstance(model, SpaceByte):
        return of_spacebyte(c, length)
    if isinstance(model, AUNet):
        return of_aunet(c, length)
    if isinstance(model, HNet):
        return of_hnet(model, length)
    if isinstance(model, Stack):
        return of_stack(model, length)
    weights = scores = others = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weights += module.weight.numel()
        elif isinstance(module, Pattention):
            weights += module.keys.numel() + module.values.numel()
        elif isinstance(module, HyperConnection):
            n = module.n_streams
            others += 6 * module.d_model * n * (n + 1 + (n + 2) * module.dynamic)
        elif isinstance(module, DifferentialHeads):
            scores += 3 * module.d_out  # values are twice as wide in each of the two maps
        elif isinstance(module, SoftmaxHeads):
            scores += 2 * module.d_out
        elif isinstance(module, LatentAttention):
            scores += module.n_heads * (2 * module.head_dim + module.rope_dim)
    weights += ((c.n_predict if c.share_unembedding else 1) - (model.head is not None)) * c.vocab_size * c.d_model
    return 6 * (weights + scores * length) + others


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("length", [48, 200])
def test_flops_of_the_zoo_equal_the_formulas(name, length):
    model = counting.build_on_meta(get_model(name), small(name))
    assert model.flops_per_token(length) == by_formula(model, length)


@pytest.mark.parametrize(
    "choices",
    [
        {"window": 16, "window_pattern": "SL"},
        {"attention": "differential"},
        {"attention": "latent", "positions": "rotary"},
        {"n_predict": 3, "share_unembedding": False},
        {"n_predict": 2, "prediction_heads": "transformer"},
        {"residual": "dynamic_hyper", "n_streams": 2},
        {"pattention": "qkv,out,mlp"},
        {"kernels": "liger"},
        {"attention_kernel": "flash"},
        {"block": "parallel"},
    ],
    ids=str,
)
def test_flops_of_switches_equal_the_formula(choices):
    """Windows are left out of account, and kernels that this machine has not are none of the count."""
    config = get_model("transformer").Config(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4, **choices)
    plain = get_model("transformer").with_kernels(config, "auto")
    model = counting.build_on_meta(get_model("transformer"), plain)
    model.config = config
    assert model.flops_per_token(40) == by_formula(model, 40)


def test_flops_count_what_is_no_embedding_or_sum():
    assert counting.training_flops_of(Tiny, TinyConfig(VOCAB, 32, 3), 10) == 10 * 6 * (3 * 32 * 32 + VOCAB * 32)


@pytest.mark.parametrize("name", ZOO)
def test_a_model_built_on_meta_has_the_shapes_of_a_real_one(name):
    meta, real = counting.build_on_meta(get_model(name), small(name)), get_model(name)(small(name))
    assert {k: v.shape for k, v in meta.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert get_model(name).count_parameters(small(name)) == sum(p.numel() for p in real.parameters())


def test_a_count_is_remembered(monkeypatch):
    config = TinyConfig(VOCAB, 48, 2)
    count = Tiny.count_parameters(config)
    monkeypatch.setattr(counting, "build_on_meta", lambda *_: pytest.fail("it was built again"))
    assert Tiny.count_parameters(TinyConfig(VOCAB, 48, 2)) == count


@pytest.mark.parametrize("n_layers", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["hlb", "ngpt", "gpt2"])
def test_estimates_are_exact_where_layers_are_alike(name, n_layers):
    config = get_model(name).Config(vocab_size=VOCAB, n_layers=n_layers)
    assert counting.estimate_parameters(get_model(name), config) == get_model(name).count_parameters(config)


# -- a model that defines only what it must ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyConfig:
    vocab_size: int = setting(50304, "tokens", low=1)
    d_model: int = setting(64, "width", low=1)
    n_layers: int = setting(2, "depth", low=1)

    def __post_init__(self):
        check_ranges(self)


class Step(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, x):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return x + self.mix(before).tanh()


class Tiny(LanguageModel):
    """Each layer adds what the token before was. No counts, no FLOPs, no law of scale."""

    Config = TinyConfig
    decodes_incrementally = False

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Step(config.d_model) for _ in range(config.n_layers))
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, tokens, targets=None, documents=None, cache=None, reduction="mean"):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return Output(logits=logits) if targets is None else Output(loss=cross_entropy(logits, targets, reduction))

    def init_weights(self, generator=None):
        for parameter in self.parameters():
            normal_(parameter, 0.02, generator)

    def blocks(self):
        return list(self.layers)

    def parameter_groups(self):
        names = [name for name, _ in self.named_parameters()]
        ends = ("embedding.weight", "head.weight")
        return {"embedding": ends[:1], "head": ends[1:], "matrix": [name for name in names if name not in ends]}


@pytest.mark.parametrize("check", [check.name for check in SIZES if check.name != "fused matrices"])  # it has none
def test_a_model_without_sizes_of_its_own_keeps_the_contract(check):
    {check.name: check for check in SIZES}[check].run(Subject("tiny", Tiny))


def test_a_default_shape_keeps_choices():
    config = Tiny.config_for_scale(1, VOCAB, dial.target_parameters(1, VOCAB), n_layers=4)
    assert config.n_layers == 4
    assert Tiny.count_parameters(config) == pytest.approx(dial.target_parameters(1, VOCAB), rel=0.03)


@dataclass(frozen=True)
class Odd:
    vocab_size: int = setting(50304, "tokens")
    width: int = setting(64, "width")


def test_a_config_without_width_and_depth_needs_a_law_of_its_own():
    class Other(Tiny):
        Config = Odd

    with pytest.raises(
        ValueError, match="config_for_scale must be defined: the Config has no fields d_model and n_layers"
    ):
        Other.config_for_scale(1, VOCAB, 10**6)


def test_register_wants_no_sizes(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", {})
    assert register("tiny")(Tiny) is Tiny
