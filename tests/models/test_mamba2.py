"""Mamba-2 gives the logits of transformers' Mamba2ForCausalLM with the same weights; how it starts; what its documents see."""

import pytest
import torch
from conftest import text_only_transformers

from models.hugging_face_mamba import mamba2_config, mamba2_weights
from models.mamba2 import Mamba2, Mamba2Config

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
