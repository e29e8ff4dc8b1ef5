"""GPT-2 against its specification and against Hugging Face's model."""

import math

import pytest
import torch
from conftest import text_only_transformers

from models.hugging_face import gpt2_config, load_openai_weights
from models.layers.positions import positions_in_documents
from models.presets import Gpt2
from trainer.planning import dial

Gpt2Config = Gpt2.Config


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (Gpt2Config(), 124_475_904),
        (Gpt2Config(vocab_size=50257, mlp="gelu_tanh"), 124_439_808),  # OpenAI's
        (
            Gpt2Config(vocab_size=50257, mlp="gelu_tanh", d_model=1600, n_layers=48, n_heads=25),
            1_557_611_200,
        ),  # GPT-2 XL
    ],
)
def test_parameter_counts(config, count):
    assert Gpt2.count_parameters(config) == count
    with torch.device("meta"):
        assert sum(p.numel() for p in Gpt2(config).parameters()) == count


@torch.no_grad()
def test_initial_weights_and_loss():
    model = Gpt2(Gpt2Config(n_layers=2))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(4) if ".out." in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.01), name
    tokens, targets = torch.randint(50304, (2, 8, 64), generator=torch.Generator().manual_seed(1))
    assert 10.9 < model(tokens, targets).loss < 11.0


def test_state_dict_holds_parameters_only():
    model = Gpt2(Gpt2Config(vocab_size=50, d_model=32, n_layers=2, n_heads=2, max_context=8))
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def tiny_pair(monkeypatch, **changes):
    """Hugging Face's model with random weights, and ours of the same shape."""
    transformers = text_only_transformers(monkeypatch)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, which Hugging Face leaves at 0 and 1
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    shape = {"vocab_size": 97, "d_model": 48, "n_layers": 3, "n_heads": 4, "max_context": 32, "mlp": "gelu_tanh"}
    return theirs, Gpt2(Gpt2Config(**(shape | changes)))


@torch.no_grad()
def test_logits_equal_those_of_hugging_face(monkeypatch):
    theirs, ours = tiny_pair(monkeypatch)
    load_openai_weights(ours, theirs.state_dict())
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert (ours(tokens).logits - expected).abs().max() < 1e-4
    assert expected.std() > 0.5, "logits this small would agree by themselves"
    assert theirs.config.activation_function == "gelu_new"


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"activation_function": "gelu", "n_inner": 64, "layer_norm_epsilon": 1e-2}])
def test_a_config_of_hugging_face_gives_its_logits(monkeypatch, changes):
    theirs, _ = tiny_pair(monkeypatch)
    theirs = type(theirs)(type(theirs.config)(**{**theirs.config.to_dict(), **changes})).eval()
    ours = Gpt2(gpt2_config(theirs.config))
    load_openai_weights(ours, theirs.state_dict())
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(1))
    assert (ours(tokens).logits - theirs(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
    ],
)
def test_a_config_of_what_we_do_not_compute_is_refused_by_name(monkeypatch, name, value):
    theirs, _ = tiny_pair(monkeypatch)
    setattr(theirs.config, name, value)
    with pytest.raises(ValueError, match=rf"^{name} {value!r} .*not implemented") as error:
        gpt2_config(theirs.config)
    assert "\n" not in str(error.value)


def test_weights_of_another_shape_are_refused(monkeypatch):
    theirs, ours = tiny_pair(monkeypatch, max_context=16)
    with pytest.raises(RuntimeError, match=r"transformer.wpe.weight is \(32, 48\), not \(16, 48\)"):
        load_openai_weights(ours, theirs.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # 12 weights of a layer.
        ({"n_layers": 2}, r"^the model has no place for transformer.h.2.attn.c_attn.bias, .*ln_1.bias and 7 more$"),
        ({"bias": False}, r"no place for transformer.h.0.attn.c_attn.bias, "),
    ],
)
def test_weights_without_a_place_are_refused(monkeypatch, changes, message):
    theirs, ours = tiny_pair(monkeypatch, **changes)
    with pytest.raises(RuntimeError, match=message):
        load_openai_weights(ours, theirs.state_dict())


def test_attention_masks_and_the_tied_head_need_no_place(monkeypatch):
    """The files that OpenAI's weights are in hold the causal mask of each layer; a head of its own is a weight."""
    theirs, ours = tiny_pair(monkeypatch)
    weights = theirs.state_dict()
    for layer in range(3):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    load_openai_weights(ours, weights)
    assert torch.equal(ours.embedding.weight, weights["transformer.wte.weight"])
    with pytest.raises(RuntimeError, match=r"no place for lm_head.weight$"):
        load_openai_weights(ours, weights | {"lm_head.weight": weights["lm_head.weight"] + 1})


def test_positions_restart_with_every_document():
    documents = torch.tensor([[4, 4, 4, 7, 7, 1], [0, 1, 1, 1, 1, 1]])
    assert positions_in_documents(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("vocab", [8192, 50304])
@pytest.mark.parametrize("scale", [0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 16, 32, 64, 100, 148])
def test_shape_at_every_scale(scale, vocab):
    target = dial.target_parameters(scale, vocab)
    config = Gpt2.config_for_scale(scale, vocab, target)
    assert Gpt2.count_parameters(config) == pytest.approx(target, rel=0.03)
    assert config.d_model % 64 == 0 and config.d_model == 64 * config.n_heads
    assert 1 / 2 <= config.d_model / (64 * config.n_layers) <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 7}, "n_heads must divide d_model"),
        ({"mlp": "relu"}, "mlp must be one of gelu, gelu_tanh"),
        ({"max_context": 0}, "max_context must be set with learned positions"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        Gpt2Config(**changes)
