"""model.dropout: where it is, and that only training has it. Its masks follow from seed, step and rank."""

import dataclasses

import pytest
import torch
from conftest import tiny_values
from torch import nn

from models.base import get_model, load_models, model_names
from models.materialise import materialise
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.engine import activation_checkpointing
from trainer.inference.evaluation import validate
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.runs.opening import open_run
from trainer.runtime.distributed import World

load_models()
SMALL = {"vocab_size": 64, "d_model": 32, "n_layers": 2}
DROPOUT = 0.25
TOKENS = torch.arange(48).view(2, 24)  # [B, T]
# Name of the model, further fields -> how many dropouts a forward pass has: after the embedding, and one for each branch.
CASES = [
    ("transformer", {"n_heads": 4}, 1 + 2 * 2),
    ("transformer", {"n_heads": 4, "block": "parallel"}, 1 + 2),
    ("transformer", {"n_heads": 4, "block": "parallel_two_norms"}, 1 + 2),  # of the sum of both branches
    ("transformer", {"n_heads": 4, "residual": "dynamic_hyper", "norm_placement": "pre_post"}, 1 + 2 * 2),
    ("hlb", {}, 1 + 2),
    ("ngpt", {"n_heads": 4}, 2 * 2),  # a hidden state must stay on the sphere
]


def made(name, dropout, **fields):
    cls = get_model(name)
    with torch.device("meta"):
        model = cls(cls.Config(**SMALL, **fields, dropout=dropout))
    return materialise(model, torch.device("cpu"), torch.Generator().manual_seed(0))


def states(model, seed=0):
    torch.manual_seed(seed)
    return model.hidden(TOKENS).states


@pytest.mark.parametrize("name, fields, count", CASES)
def test_training_drops_parts_of_what_each_branch_adds(name, fields, count):
    model, zeros = made(name, DROPOUT, **fields), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, given, result: zeros.append((given[0], result)))
    first = states(model)
    assert len(zeros) == count
    for before, after in zeros:
        kept = after != 0
        torch.testing.assert_close(after[kept], before[kept] / (1 - DROPOUT))
        # 1,536 draws: the standard deviation of their share is 0.011.
        assert (~kept).float().mean().item() == pytest.approx(DROPOUT, abs=0.055)
    assert torch.equal(states(model), first) and not torch.equal(states(model, seed=1), first)


@pytest.mark.parametrize("name, fields, count", CASES)
def test_only_training_has_it(name, fields, count):
    """In evaluation, and with 0, the model is the one without."""
    without = states(made(name, 0.0, **fields))
    assert torch.equal(states(made(name, DROPOUT, **fields).eval()), without)
    assert not torch.equal(states(made(name, DROPOUT, **fields)), without)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_activations_have_the_same_masks(how):
    found = []
    for recomputes in (False, True):
        model = made("transformer", DROPOUT, n_heads=4)
        if recomputes:
            activation_checkpointing.apply(model, how)
        torch.manual_seed(3)
        model(TOKENS, TOKENS).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_every_model_has_the_field_and_is_without_it_by_default():
    ours = [name for name in model_names() if get_model(name).__module__.startswith("models.")]
    defaults = {
        name: [field.default for field in dataclasses.fields(get_model(name).Config) if field.name == "dropout"]
        for name in ours
    }
    assert len(ours) > 10 and defaults == dict.fromkeys(ours, [0.0])


@pytest.mark.parametrize("name", ["gpt2", "hlb", "ngpt"])
@pytest.mark.parametrize(
    "value, line",
    [(1.0, "^model.dropout: 1.0 is too large; at most 0.99"), (-0.1, "^model.dropout: -0.1 is too small; at least 0")],
)
def test_a_share_that_cannot_be_is_refused(name, value, line):
    with pytest.raises(UserError, match=line):
        resolve(build(RunConfig, {"device": "cpu", "model": {"name": name, "dropout": value}}))


def test_graphs_do_not_record_it():
    for name in ("gpt2", "hlb", "ngpt"):
        cls = get_model(name)
        assert cls.recording_refusal(cls.Config()) is None
        assert "dropout" in cls.recording_refusal(cls.Config(dropout=0.1))
    cls = get_model("gpt2")
    assert "NEFTune" in cls.recording_refusal(cls.Config(neftune_alpha=5.0))  # it draws random numbers too


def test_a_run_with_dropout_goes_on_bit_for_bit_and_is_evaluated_without(tiny_dataset, tmp_path):
    """Also if one of both evaluates and writes text in between, and the other does not."""
    common = {"model": {"name": "hlb", "dropout": 0.2}, "checkpoint__every": 2}
    run(tiny_values(tiny_dataset, tmp_path / "straight", max_steps=4, **common))
    often = {"every": 1, "max_tokens": 512}
    run(tiny_values(tiny_dataset, tmp_path / "cut", max_steps=2, evaluation=often, log__sample_tokens=4, **common))
    run({"run_dir": str(tmp_path / "cut"), "max_steps": 4})
    straight, cut = (read_rows(tmp_path / folder / "metrics.jsonl") for folder in ("straight", "cut"))
    assert [row["loss"] for row in cut] == [row["loss"] for row in straight]
    run(tiny_values(tiny_dataset, tmp_path / "without", max_steps=1, model={"name": "hlb"}, checkpoint__every=0))
    assert read_rows(tmp_path / "without" / "metrics.jsonl")[0]["loss"] != straight[0]["loss"]
    opened = open_run(str(tmp_path / "cut"), None, "cpu", "auto")
    losses = [
        validate(opened, opened.split(opened.config.data, "validation"), opened.config, World(), 4)["full"]["loss"]
        for _ in range(2)
    ]
    assert losses[0] == losses[1] == pytest.approx(cut[-1]["val_loss"], rel=1e-5)
