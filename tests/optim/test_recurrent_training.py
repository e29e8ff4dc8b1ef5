"""AdamW and Muon train the recurrent models and hybrids, and Muon orthogonalises their true matrices only."""

import math

import pytest
from tiny_runs import make

from models.base import load_models
from trainer.training.step import optimiser_step

load_models()
SHAPES = {
    "mamba2": {"state_size": 16, "ssm_head_dim": 16},
    "rwkv7": {"head_dim": 16},
    "gated-delta-net": {"head_dim": 16},
    "zamba2": {"state_size": 16, "ssm_head_dim": 16, "attention_head_dim": 16, "adapter_rank": 8, "mlp_ratio": 1},
    "rene": {"state_size": 16, "ssm_head_dim": 16, "attention_head_dim": 16, "window": 32, "n_layers": 3},
    "lfm2": {"attention_head_dim": 16, "attention_every": 2},
}


# The last two parts of the names that Muon orthogonalises.
MAMBA = {"in_proj.weight", "out_proj.weight"}
MATRICES = {
    "mamba2": MAMBA,
    "rwkv7": {f"{part}.weight" for part in ("receptance", "key", "value", "out")},
    "gated-delta-net": {f"{part}.weight" for part in ("qkv", "rate", "decay", "gate", "out", "up", "down")},
    "zamba2": MAMBA | {f"{part}.weight" for part in ("qkv", "out", "up", "down", "A", "B", "linear")},
    "rene": MAMBA | {f"{part}.weight" for part in ("qkv", "out", "up")},
    "lfm2": {f"{part}.weight" for part in ("qkv", "out", "up", "down")},
}


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_falls_from_that_of_guessing(tiny_dataset, tmp_path, name, rule):
    """Eight steps of 512 bytes of a text of nine words: from ln V by more than what the commonest byte alone would bring.

    What Muon updates: the projections of hidden states, and the low-rank changes of zamba2's uses, which are such projections.
    Not: decays, time steps, skips, convolutions, token shifts, RWKV-7's low-rank parts, tables, norms.
    """
    model = {"name": name, "d_model": 32, "n_layers": 2, **SHAPES[name]}
    optim = {"name": rule, "recipe": "plain", "lr": 1e-2, "warmup_steps": 2}
    one = make(tiny_dataset, tmp_path / "r", model=model, optim=optim, max_steps=8)
    losses = [optimiser_step(one).loss for _ in range(8)]
    guessing = math.log(one.model.config.vocab_size)
    assert abs(losses[0] - guessing) < 0.25 and losses[-1] < guessing - 1
    updated = {
        parameter for group in one.engine.optimizer.groups if group.rule == rule for parameter in group.parameters
    }
    if rule == "muon":
        assert {".".join(parameter.split(".")[-2:]) for parameter in updated} == MATRICES[name]
    else:
        assert updated == set(one.engine.shapes)
