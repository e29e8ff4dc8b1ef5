"""What a plan tells its reader to think about, and what another max_steps does to the learning rates."""

from types import SimpleNamespace

import pytest

from trainer.core.config import OptimConfig, RoleConfig
from trainer.planning.advice import advice, epochs_of
from trainer.recipes import schedule_change


def plan(
    parameters=100_000_000,
    non_embedding=60_000_000,
    train_tokens=None,
    trained=None,
    steps=1000,
    init_from=None,
    **rules,
):
    rules = {"max_steps": "1e9 tokens", "batch.tokens_per_step": "its rule"} | rules
    batch = SimpleNamespace(sequence_length=128)
    return SimpleNamespace(
        entries=[SimpleNamespace(key=key, rule=rule) for key, rule in rules.items()],
        config=SimpleNamespace(max_steps=steps, init_from=init_from, batch=batch),
        parameters=parameters,
        non_embedding=non_embedding,
        train_tokens=train_tokens,
        trained=trained or parameters,
        unused_tokenizer="",
    )


def test_a_usual_run_needs_no_advice():
    assert advice(plan(train_tokens=10**9), 2 * 10**9) == []
    assert advice(plan(), 120_000_000) == [], "a tenth of 20 each"


@pytest.mark.parametrize("non_embedding", [5_000_000, 33_000_000])
def test_few_parameters_outside_embeddings_are_told(non_embedding):
    (line,) = advice(plan(non_embedding=non_embedding), 10**10)
    assert line.startswith(f"only {non_embedding // 1_000_000}% of the parameters are outside embeddings and head")
    assert advice(plan(non_embedding=34_000_000), 10**10) == []


def test_few_tokens_of_the_run_or_of_the_text_are_told():
    (line,) = advice(plan(), 119_000_000)
    assert line.startswith("119,000,000 tokens of the run for 60,000,000 parameters") and "are 2 per parameter" in line
    assert line.endswith("or more steps, reaches a lower loss")
    few, many = advice(plan(1_400_000_000, 1_300_000_000, 7_000_000), 10**9)
    assert few.startswith("7,000,000 tokens of text for 1,300,000,000 parameters") and "are 0.0054 per parameter" in few
    assert few.endswith("or more text, reaches a lower loss")
    assert many.startswith("the run reads its text 142.9 times")
    assert advice(plan(trained=10**6), 119_000_000) == [], "adapters of weights that are trained already"


def test_reading_the_text_many_times_is_told():
    assert advice(plan(train_tokens=500_000_000), 2 * 10**9) == []
    (line,) = advice(plan(train_tokens=500_000_000), 2_100_000_000)
    assert line.startswith("the run reads its text 4.2 times; beyond 4 times")
    assert epochs_of(plan(), 10) is None and epochs_of(plan(train_tokens=4), 10) == 2.5


def test_few_steps_of_a_batch_that_nobody_set_are_told():
    (line,) = advice(plan(steps=14), 2_000_000_000)
    assert line.startswith("the run has only 14 optimizer steps") and "such as 10,000,000, ends" in line  # a 200th
    assert "such as 384, ends" in advice(plan(10_000, 6_000, steps=5), 100_000)[-1]  # 500, in whole sequences
    assert "such as 128, ends" in advice(plan(10_000, 6_000, steps=5), 20_000)[-1]  # one sequence
    for silent in ({"steps": 200}, {"batch.tokens_per_step": "set"}, {"max_steps": "set"}, {"init_from": "runs/a"}):
        assert advice(plan(**{"steps": 14} | silent), 2_000_000_000) == []


def config(max_steps, recipe="plain"):
    optim = OptimConfig(recipe=recipe, lr=1e-3, warmup_steps=10, schedule="cosine", decay_steps=0)
    return SimpleNamespace(max_steps=max_steps, optim=optim)


def test_another_max_steps_shows_what_the_learning_rate_becomes():
    line = schedule_change(config(200), 100, 100)
    # At the end of the old cosine 0.1 of the peak; in the new one at 90 of 190: 0.1 + 0.45 (1 + cos(pi 90 / 190)).
    assert "the learning rate of step 101 is 0.000587, not 0.0001, and 0.0001 at step 200" in line
    assert line.startswith("max_steps: 200 instead of 100")


def test_another_max_steps_is_told_for_roles_too():
    one = config(200)
    one.optim.roles = {"head": RoleConfig(schedule="linear"), "norm": RoleConfig(lr=1e-3)}
    assert schedule_change(one, 100, 100).endswith("at step 200; the schedules of the roles head change as well")
    one.optim.name, one.optim.roles = "schedule-free", {"head": RoleConfig(name="adamw")}
    assert schedule_change(one, 100, 100).startswith("max_steps: 200 instead of 100")
    one.optim.roles = {"head": RoleConfig(lr=1e-3)}
    assert schedule_change(one, 100, 100) == ""


@pytest.mark.parametrize("before", [200, None, "many"])
def test_where_nothing_changes_nothing_is_said(before):
    assert schedule_change(config(200), before, 100) == ""
    assert schedule_change(config(200, "hlb"), 100, 100) == ""
