"""Resolution: what is inferred, from what, and that nothing is left open."""

import dataclasses
import json

import pytest
from conftest import ROOT, tiny_values

from trainer import memory
from trainer import plan as p
from trainer.config import RunConfig
from trainer.data.stream import find_dataset
from trainer.errors import UserError
from trainer.run_folder import flat
from trainer.settings import build, load_yaml

MAY_STAY_OPEN = {"data.path", "data.source", "data.cache", "data.validation_source", "data.document_start"}


def resolved(**values):
    return p.resolve(build(RunConfig, {"device": "cpu", **values}))


def test_headline_run():
    plan = resolved()
    config = plan.config
    assert plan.parameters == 46_009_736
    assert plan.non_embedding == 7_376_264
    assert config.optim.lr == pytest.approx(2.52587e-3, rel=1e-6)
    assert config.batch.tokens_per_step == 57_236
    assert (config.optim.recipe, config.optim.clip_norm, config.batch.dynamic) == ("hlb", 0.0, True)
    assert p.minimum_tokens(plan) == 56_638_336
    assert plan.sequence_lengths == [32, 64, 128, 256, 512, 1024]


def test_plain_recipe():
    plan = resolved(model={"name": "gpt2", "d_model": 768, "n_layers": 12, "n_heads": 12}, max_steps=1000)
    optim = plan.config.optim
    assert plan.parameters == 124_475_904
    assert (optim.recipe, optim.warmup_steps, optim.weight_decay, optim.clip_norm) == ("plain", 30, 0.1, 1.0)
    assert plan.config.batch.tokens_per_step % 1024 == 0
    assert plan.sequence_lengths == [1024]


@pytest.mark.parametrize("name", ["hlb", "gpt2"])
def test_nothing_is_left_open(name):
    values = flat(resolved(model={"name": name}).config)
    assert {key for key, value in values.items() if value is None} == MAY_STAY_OPEN
    undecided = {key for key, value in values.items() if value == "auto"}
    assert undecided == {"log.console", "engine.strategy", "model.attention_kernel"} & values.keys()


def test_resolving_again_changes_nothing():
    once = resolved(model_scale=0.5).config
    assert p.resolve(once).config == once


def test_every_row_has_a_rule_and_says_what_was_set():
    plan = resolved(optim={"lr": 1.0}, model={"name": "hlb", "d_model": 128})
    rules = {row.key: row.rule for row in plan.rows}
    assert all(rules.values())
    assert rules["optim.lr"] == "set"
    assert rules["model.d_model"] == "set"
    assert "ln N" in {row.key: row.rule for row in resolved().rows}["optim.lr"]


def test_the_batch_does_not_depend_on_the_device():
    small = resolved(batch={"device_token_capacity": 20_000})
    large = resolved(batch={"device_token_capacity": 400_000})
    assert small.config.batch.tokens_per_step == large.config.batch.tokens_per_step == 57_236
    assert small.config.batch.tokens_per_microbatch < large.config.batch.tokens_per_microbatch


@pytest.mark.parametrize("gibibytes", [16, 40, 80, 141])
@pytest.mark.parametrize("scale", [1, 8])
def test_microbatches_fit_the_gpu(monkeypatch, gibibytes, scale):
    """On a GPU of this size the expected memory of a whole microbatch stays within it, with a tenth to spare."""
    monkeypatch.setattr("trainer.device.memory_bytes", lambda device: gibibytes * memory.GIB)
    plan = resolved(model_scale=scale, precision="bf16", batch={"tokens_per_step": 1 << 20})
    assert (
        memory.expected_memory(plan.model_class, plan.model_config, plan.config)["total"] < 0.9 * gibibytes * memory.GIB
    )
    assert plan.config.batch.tokens_per_microbatch >= 1024


def test_laws_are_shown():
    facts = p.summary(resolved())
    assert facts["laws"]["decay base b"] == pytest.approx(7.22228, rel=1e-6)
    assert facts["laws"]["grad-norm exponent p"] == pytest.approx(-0.381301, rel=1e-5)
    assert facts["laws"]["lr of the head"] == pytest.approx(5.05174e-3, rel=1e-5)
    assert facts["laws"]["hlb validation"] == "3 x 50"


def test_token_count_is_that_of_the_loop():
    for values in ({"max_steps": 50}, {"max_steps": 1000}, {"max_steps": 85, "batch": {"sequence_double_every": 7}}):
        plan = resolved(**values)
        steps = range(plan.config.max_steps)
        counted = [
            plan.config.batch.tokens_per_step // plan.sequence_length(s) * plan.sequence_length(s) for s in steps
        ]
        assert p.minimum_tokens(plan) == sum(counted)


def test_three_billion_plan_without_memory():
    facts = p.summary(resolved(model_scale=148))
    assert facts["params"] == 3_022_430_842
    assert facts["memory_bytes"]["weights"] == 4 * 3_022_430_842
    json.dumps(facts)


def test_activation_measure_grows_with_length_and_halves_in_bf16():
    plan = resolved(model_scale=0.2, data={"tokenizer": "bytes"})
    meta = lambda: memory.build_meta(plan.model_class, plan.model_config)  # noqa: E731
    short, long = memory.activation_bytes(meta(), 128, False), memory.activation_bytes(meta(), 256, False)
    assert 2 <= long / short < 4
    assert memory.activation_bytes(meta(), 128, True) < 0.8 * short  # statistics and logits stay fp32


def test_vocabulary_comes_from_the_data(tiny_dataset, tmp_path):
    config = build(RunConfig, tiny_values(tiny_dataset, tmp_path))
    plan = p.resolve(config, find_dataset(config.data))
    assert (plan.vocab_size, plan.model_config.vocab_size) == (257, 320)
    with pytest.raises(UserError, match="model.vocab_size: 256 is smaller than the tokenizer's 257"):
        config.model["vocab_size"] = 256
        p.resolve(config, find_dataset(config.data))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"model": {"name": "gpt2", "d_model": 100, "n_heads": 3}}, "model gpt2: "),
        ({"model": {"name": "gpt2"}, "optim": {"embedding_frequency": "global"}}, "ties head and embedding"),
        ({"batch": {"tokens_per_step": 100}}, "batch.tokens_per_step: 100 is less than one sequence"),
        ({"batch": {"tokens_per_microbatch": 100}}, "batch.tokens_per_microbatch: 100 is less than one sequence"),
        ({"batch": {"sequence_start": 48}}, "batch.sequence_length: 48 does not divide"),
        ({"model": {"name": "gpt2"}, "evaluation": {"sequence_length": 4096}}, "more than the model's context of 1024"),
    ],
)
def test_impossible_plans(values, expected):
    with pytest.raises(UserError, match=expected):
        resolved(**values)


def test_configs_say_what_the_readme_says():
    quick = p.resolve(build(RunConfig, load_yaml(ROOT / "configs" / "quickstart.yaml")))
    assert 1e6 < quick.parameters < 10e6
    gpt2 = p.resolve(build(RunConfig, load_yaml(ROOT / "configs" / "gpt2-124m.yaml")))
    assert gpt2.parameters == 124_475_904
    hlb = p.resolve(build(RunConfig, load_yaml(ROOT / "configs" / "hlb.yaml")))
    assert (hlb.parameters, hlb.config.max_steps) == (46_009_736, 1000)


def test_resolve_leaves_its_argument_alone():
    config = RunConfig()
    before = dataclasses.asdict(config)
    p.resolve(config)
    assert dataclasses.asdict(config) == before
