"""What every rule of trainer/optim does: it keeps the contract, trains, and goes on from a checkpoint bit for bit."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import beyond

from models.base import get_model, load_models
from trainer.checkpoint import format as checkpoint
from trainer.optim import narrow_state
from trainer.optim.rule import registered_rules
from trainer.runtime.distributed import World
from trainer.testing import optimizers
from trainer.testing.strategies import engine_of, losses_of
from trainer.testing.subject import Skipped, Subject

load_models()
RULES = sorted(name for name, rule in registered_rules().items() if rule.__module__.startswith("trainer."))


@pytest.mark.parametrize("name", RULES)
def test_it_keeps_the_contract(name):
    rule = registered_rules()[name]
    for one in optimizers.CHECKS:
        try:
            one.run(optimizers.RuleSubject(name, rule))
        except Skipped:
            assert one.name in ("shards", "narrow") and rule.scope != "element"


@pytest.mark.parametrize("name", RULES)
def test_it_is_given_a_part_at_a_time_and_computes_the_same(monkeypatch, name):
    """So what it computes on the way takes no more memory than PIECE numbers, or the largest parameter if it must see it whole."""
    rule, found, given = registered_rules()[name], [], []

    def watched(self, group, parameters, *rest, update=rule.update):
        given.append([parameter.numel() for parameter in parameters])
        update(self, group, parameters, *rest)

    monkeypatch.setattr(rule, "update", watched)
    for size in (64, 2**20):
        monkeypatch.setitem(narrow_state.PIECE, "cpu", size)
        trial = optimizers.Trial(optimizers.RuleSubject(name, rule))
        for step in range(3):
            trial.step(optimizers.gradients_of(trial, step))
        found.append(trial.tensors())
        if size == 64 and not rule.in_place:
            assert all(sum(sizes) <= 64 or (rule.scope != "element" and len(sizes) == 1) for sizes in given), given
    optimizers.require_equal(*found, "the size of pieces changes the result")


@pytest.mark.parametrize("name", RULES)
def test_with_bf16_state_each_step_is_the_fp32_step_from_rounded_state(name):
    subject = optimizers.RuleSubject(name, registered_rules()[name])
    narrow, wide = optimizers.Trial(subject), optimizers.Trial(subject)
    narrow.optimizer.narrow = True
    narrow.optimizer.allocate(narrow.parameters.values())
    rounded = {key for key, value in narrow.state().items() if value.dtype == torch.bfloat16}
    assert rounded
    for step in range(3):
        for trial in (narrow, wide):
            trial.step(optimizers.gradients_of(trial, step))
        for key in rounded:
            wide.state()[key].copy_(wide.state()[key].bfloat16())
        optimizers.require_equal(
            narrow.tensors(), {k: v.to(narrow.tensors()[k].dtype) for k, v in wide.tensors().items()}, name
        )


# Several times less for rules that move every number by lr.
LR = {"lion": 3e-4, "adafactor": 1e-2}


@pytest.mark.parametrize(
    "name, model",
    beyond([(name, "gpt2") for name in RULES], itertools.product(RULES, ("gpt2", "hlb", "llama", "ngpt")), True),
)
def test_it_trains_and_goes_on_bit_for_bit(tmp_path, name, model):
    """Six steps on one batch, and three after a checkpoint of the third."""
    subject = Subject(model, get_model(model))
    optim = {"name": name, "lr": LR.get(name, 1e-3), "warmup_steps": 1}
    with engine_of(subject, "single", optim=optim, max_steps=6) as engine:
        first = losses_of(engine, subject, 0, 3)
        path = checkpoint.save(Path(tmp_path), 3, engine.tensors(), {}, World(), checkpoint.retention(1, 0))
        then = losses_of(engine, subject, 3, 3)
    assert all(map(math.isfinite, first + then)) and then[-1] < first[0], (first, then)
    with engine_of(subject, "single", optim=optim, max_steps=6, seed=1) as engine:
        engine.load(path)
        assert losses_of(engine, subject, 3, 3) == then
