"""Mamba-2 gives the logits of transformers' Mamba2ForCausalLM with the same weights; how it starts; what its documents see."""

import pytest
import torch
from conftest import text_only_transformers

from models.base import get_model, load_models
from models.hugging_face_mamba import mamba2_config, mamba2_weights
from models.layers.mamba import Mamba2Mixer
from models.mamba2 import Mamba2, Mamba2Config

load_models()

SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "state_size": 16, "ssm_head_dim": 16}


def model_of(**changes):
    model = Mamba2(Mamba2Config(**{**SIZES, **changes}))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("length", [5, 150])
def test_logits_are_those_of_transformers(monkeypatch, length):
    text_only_transformers(monkeypatch)
    from transformers import Mamba2Config as Theirs
    from transformers import Mamba2ForCausalLM

    theirs = Mamba2ForCausalLM(
        Theirs(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=16, head_dim=16, num_heads=4, expand=2,
            n_groups=1, conv_kernel=4, tie_word_embeddings=True, use_conv_bias=True, chunk_size=64,
        )
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = Mamba2(mamba2_config(theirs.config))
    ours.load_state_dict(dict(mamba2_weights(ours, theirs.state_dict())))
    tokens = torch.randint(64, (3, length))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_initial_time_steps_and_decays_are_those_of_the_paper():
    model = model_of(d_model=512)
    for layer in model.layers:
        dt = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert dt.min() >= 0.9e-3 and dt.max() <= 0.11
        assert 1 <= layer.mixer.A_log.exp().min() and layer.mixer.A_log.exp().max() <= 16
    assert not {name for name in model.parameter_groups()["matrix"] if "A_log" in name or "dt_bias" in name}


def test_permuting_the_batch_permutes_the_output():
    """BlaGPT's Zamba2 scanned over the batch."""
    model, tokens = model_of(), torch.randint(64, (4, 20))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(tokens[order]).logits, model(tokens).logits[order])


def test_the_state_of_decoding_does_not_grow():
    model = model_of().eval()
    state = model.new_state(2, None, torch.device("cpu"), torch.float32)
    sizes = []
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(64, (2, 50)), cache=state)
            sizes.append(state.nbytes)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("before", [False, True])
def test_the_gate_comes_where_the_model_wants_it(before):
    """Zamba2 and Mamba-2: RMS(y silu(z)); Rene: RMS(y) silu(z). Over each group."""
    config = Mamba2Config(**SIZES, n_groups=2)
    mixer = Mamba2Mixer(config, 0, norm_before_gate=before)
    torch.nn.init.uniform_(mixer.norm.weight)
    y, z = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(2, 3, 64, dtype=torch.float64)
    gate, found = z / (1 + torch.exp(-z)), mixer.double().gated_norm(y, z)
    normed = (y if before else y * gate).view(2, 3, 2, 32)
    normed = (normed / (normed.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * mixer.norm.weight
    torch.testing.assert_close(found, normed * gate if before else normed)


@pytest.mark.parametrize("name", ["mamba2", "rwkv7", "gated-delta-net"])
def test_the_recurrent_state_of_a_model_in_bf16_is_fp32(name):
    """BlaGPT's RWKV-7 and Zamba2 kept it in bf16."""
    cls = get_model(name)
    shape = {"head_dim": 16} if name != "mamba2" else {}
    model = cls(
        cls.Config(**{**(SIZES if name == "mamba2" else {"vocab_size": 64, "d_model": 32, "n_layers": 1}), **shape})
    )
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.bfloat16().eval()
    state = model.new_state(1, None, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        for part in torch.arange(20).view(1, 20).split([19, 1], dim=1):
            model(part, cache=state)
    held = {key: value.dtype for key, value in state._recurrent.items() if key[1] in ("state space", "delta rule")}
    assert held and set(held.values()) == {torch.float32}
