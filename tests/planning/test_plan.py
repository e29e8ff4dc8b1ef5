"""Resolution: what is inferred, from what, and that nothing is left open."""

import contextlib
import dataclasses
import json
import pickle
import re
import time

import pytest
import torch
import yaml
from conftest import ROOT, beyond, tiny_values

from models.hlb import Hlb
from models.presets import Gpt2, with_defaults
from trainer.__main__ import dispatch, known_errors
from trainer.commands.plan import PlanConfig, resolve_for
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, load_yaml, to_yaml
from trainer.data.stream import find_dataset
from trainer.planning import memory
from trainer.planning import plan as p
from trainer.planning import resolver as rules
from trainer.planning.model import written_out
from trainer.planning.run_config import flat, merge_run, read_run
from trainer.planning.time import expected_time
from trainer.runtime.device import GPUS
from trainer.runtime.distributed import World

MAY_STAY_OPEN = {
    "branch_from",
    "init_from",
    "dial",
    "data.path",
    "data.max_documents",
    "data.token_dtype",
    "data.source",
    "data.cache",
    "data.validation_source",
}
MAY_STAY_OPEN |= {"data.document_start", "data.end_of_text"}
MAY_STAY_OPEN |= {"engine.shard_size", "engine.deepspeed_config"}  # where hsdp and DeepSpeed are not in play
MAY_STAY_OPEN |= {
    "parameters",
    "tokens",
    "tokens_per_parameter",
    "epochs",
    "max_seconds",
}  # other ways to say a size and a length
MAY_STAY_OPEN |= {"evaluation.tasks_dir"}  # where lm-eval fetches the data
MAY_STAY_OPEN |= {"optim.rest_lr"}  # where one rule updates every parameter


def resolved(world=None, **values):
    return p.resolve(build(RunConfig, {"device": "cpu", **values}), world=world)


@pytest.fixture
def registered(monkeypatch):
    """Registers a model under a name for one test."""
    from models import base

    return lambda name, model: monkeypatch.setitem(base._REGISTRY, name, model)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(80): the device is a GPU of 80 GiB."""

    def pretend(gibibytes):
        monkeypatch.setattr("trainer.runtime.device.memory_bytes", lambda device: int(gibibytes * memory.GIB))

    return pretend


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
    assert (optim.recipe, optim.warmup_steps, optim.weight_decay, optim.clip_norm) == ("plain", 40, 0.1, 1.0)
    assert plan.config.batch.tokens_per_step % 1024 == 0
    assert plan.sequence_lengths == [1024]


@pytest.mark.parametrize("name", ["hlb", "gpt2"])
def test_nothing_is_left_open(name):
    values = flat(resolved(model={"name": name}).config)
    assert {key for key, value in values.items() if value is None} == MAY_STAY_OPEN
    undecided = {key for key, value in values.items() if value == "auto"}
    assert (
        undecided == {"log.console", "model.attention_kernel", "model.kernels", "model.residual_dtype"} & values.keys()
    )


def test_what_zero_stands_for_is_said():
    rows = {
        row.key: row for row in resolved(model={"name": "llama", "d_model": 64, "n_layers": 1, "n_heads": 2}).entries
    }
    assert rows["model.d_hidden"].value == 0  # so that another width finds its own
    assert rows["model.d_hidden"].rule.endswith("; here 256") and rows["model.head_dim"].rule.endswith("; here 32")
    assert "here" not in rows["model.kv_rank"].rule  # of latent attention


def test_resolving_again_changes_nothing():
    once = resolved(model_scale=0.5).config
    assert p.resolve(once).config == once


def test_every_row_has_a_rule_and_says_what_was_set():
    plan = resolved(optim={"lr": 1.0}, model={"name": "hlb", "d_model": 128})
    rules = {row.key: row.rule for row in plan.entries}
    assert all(rules.values())
    assert rules["optim.lr"] == "set"
    assert rules["model.d_model"] == "set"
    assert "ln N" in {row.key: row.rule for row in resolved().entries}["optim.lr"]


def test_the_batch_does_not_depend_on_the_device():
    small = resolved(batch={"device_token_capacity": 20_000})
    large = resolved(batch={"device_token_capacity": 400_000})
    assert small.config.batch.tokens_per_step == large.config.batch.tokens_per_step == 57_236
    assert small.config.batch.tokens_per_microbatch < large.config.batch.tokens_per_microbatch


@pytest.mark.parametrize("gibibytes", [16, 40, 80, 141])
@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize("how", ["none", "full"])
def test_microbatches_fit_the_gpu(gpu, gibibytes, scale, how):
    """On a GPU of this size the expected memory of a whole microbatch stays within it, with a tenth to spare."""
    gpu(gibibytes)
    engine = {"activation_checkpointing": how}
    plan = resolved(model_scale=scale, precision="bf16", batch={"tokens_per_step": 1 << 20}, engine=engine)
    assert p.summary(plan)["memory_bytes"]["total"] < 0.9 * gibibytes * memory.GIB
    assert plan.config.batch.tokens_per_microbatch >= 1024


KERNELS_OF_A_GPU = [
    {"name": "hlb", "attention_kernel": "flex"},
    {"name": "gpt2", "attention_kernel": "flash"},
    {"name": "llama", "attention_kernel": "flex", "attention_softcap": 50.0, "kernels": "liger"},
]


@pytest.mark.parametrize("values", KERNELS_OF_A_GPU, ids=lambda values: values["name"])
def test_kernels_of_a_gpu_are_planned_without_one(values):
    heads = {"n_heads": 2} if values["name"] != "hlb" else {}
    model = values | heads | {"d_model": 128, "n_layers": 2}
    plan, _ = resolve_for(build(PlanConfig, {"device": "h100-80gb", "world_size": 1, "model": model}))
    assert plan.model_config.attention_kernel == values["attention_kernel"]  # the run's stays what was asked for
    assert memory.expected_memory(plan)["activations"] > 0


@pytest.mark.parametrize(
    "model",
    [
        *KERNELS_OF_A_GPU,
        {"name": "llama", "kernels": "liger"},
        {"name": "llama", "attention_kernel": "sdpa", "positions": "alibi"},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_kernels_that_cannot_train_here_are_refused(model):
    """sdpa takes ALiBi in fp32 only."""
    with pytest.raises(UserError, match=f"^model {model['name']}: [a-z_]*kernels? [a-z]+ cannot be used: .*; use auto"):
        resolved(model=model, precision="bf16")
    if model.get("attention_kernel") == "sdpa":
        assert resolved(model=model, precision="fp32").config.model["attention_kernel"] == "sdpa"


def test_kernels_are_asked_of_the_gpu_at_hand(gpu, monkeypatch):
    gpu(80)
    monkeypatch.setattr("trainer.runtime.device.choose_device", lambda wanted: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("models.layers.attend._flash_version", lambda: (2, 8))
    model = {"name": "llama", "attention_kernel": "flash"}
    assert resolved(model=model, precision="bf16").config.model["attention_kernel"] == "flash"
    with pytest.raises(UserError, match="flash cannot be used: it computes in fp16 and bf16, not float32"):
        resolved(model=model, precision="fp32")


def test_a_wrong_count_of_parameters_is_refused(monkeypatch):
    count = Hlb.count_parameters
    monkeypatch.setattr(Hlb, "count_parameters", lambda config: count(config) - 7)
    with pytest.raises(UserError, match="model hlb: has 46,009,736 parameters, .* count_parameters says 46,009,729"):
        resolved()


def test_expected_memory_is_of_the_largest_step():
    """hlb's law may double the one microbatch of a step: there its gradients stay while the second is taken."""
    batch = {"tokens_per_step": 2048, "tokens_per_microbatch": 2048}
    alone, twice = (memory.expected_memory(resolved(precision="fp32", batch={**batch, "n_max": n})) for n in (1.0, 1.5))
    assert twice["total"] - alone["total"] == alone["gradients"]


def test_microbatches_are_as_even_as_the_loop_cuts_them():
    """5 sequences where 4 fit are 3 and 2."""
    model = {"name": "gpt2", "d_model": 64, "n_layers": 1, "n_heads": 1, "max_context": 64}
    values = {"model": model, "data": {"tokenizer": "bytes", "sample_length": 64}}
    held = [
        memory.expected_memory(resolved(**values, batch={"tokens_per_step": 64 * step, "tokens_per_microbatch": 256}))
        for step in (5, 3)
    ]
    assert held[0]["activations"] == held[1]["activations"]


def test_laws_are_shown():
    facts = p.summary(resolved(evaluation={"protocol": "hlb"}))
    assert facts["laws"]["decay base b"] == pytest.approx(7.22228, rel=1e-6)
    assert facts["laws"]["grad-norm exponent p"] == pytest.approx(-0.381301, rel=1e-5)
    assert facts["laws"]["lr of the head"] == pytest.approx(5.05174e-3, rel=1e-5)
    assert facts["laws"]["hlb validation"] == "3 x 50"
    assert "hlb validation" not in p.summary(resolved(evaluation={"protocol": "full"}))["laws"]


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
        ({"model": {"name": "gpt2", "unpadded_vocab": 500}}, "unpadded_vocab: 500 is smaller than the tokenizer's"),
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


@pytest.mark.parametrize("given, std", [
    ({"d_model": 192}, 0.04), ({"d_model": 768}, 0.02), ({"d_model": 192, "init_std": 0.02}, 0.02),
    ({"d_model": 192, "mup": True}, 0.0346), ({"d_model": 1536, "mup": True}, 0.0346), ({"d_model": 256}, 0.0346),
    ({"d_model": 192, "mup": True, "mup_base_width": 768}, 0.02),
])  # fmt: skip
def test_narrow_decoders_begin_with_larger_weights(given, std):
    """With mup the base's width decides, so that the base is the standard model of its size."""
    plan = resolved(model={"name": "llama", "n_layers": 2, "n_heads": 4, **given})
    assert plan.model_config.init_std == plan.config.model["init_std"] == std


def test_the_dial_sizes_a_decoder_with_mup_and_learned_mixing():
    plan = resolved(model={"name": "modded", "mup": True}, model_scale=0.5)
    said = {entry.key: entry.value for entry in p.recipe_entries(plan)}
    assert said["mup base"] == f"256 x {plan.model_config.n_layers}"


@pytest.mark.parametrize("name", ["gated-delta-net", "lfm2", "aunet", "blt", "hourglass", "ftp", "spacebyte"])
def test_only_models_that_gain_by_it_begin_with_larger_weights(name):
    """A gated delta net of width 128 lost 0.44 nats by the decoders' rule, a BLT 0.6 bits/byte; an Hourglass gained 0.4."""
    patching = {"patching": "space"} if name == "blt" else {}
    gains = name in ("hourglass", "ftp", "spacebyte")
    plan = resolved(model={"name": name, **patching}, model_scale=0.3)
    assert plan.model_config.d_model < 768 and (plan.model_config.init_std > 0.02) == gains


def test_a_rule_leaves_its_draft_alone():
    """The batch needs only the model and the recipe; the optimiser needs the batch as well."""
    draft = rules.Draft(build(RunConfig, {"model": {"name": "gpt2"}, "optim": {"recipe": "plain"}, "max_steps": 100}))
    before = dataclasses.asdict(draft)
    model = rules.ModelFacts.of("gpt2", Gpt2, Gpt2.Config(vocab_size=320, d_model=64, n_layers=1, n_heads=2))
    batch = rules.choose_batch(draft, model, 1024)
    between = dataclasses.asdict(batch)
    assert len(rules.choose_optimiser(batch, model).entries) > 8
    assert dataclasses.asdict(draft) == before and dataclasses.asdict(batch) == between


def test_a_plan_can_be_sent_to_another_process(registered):
    """Also that of a plug-in whose classes were made in a function, which pickle does not find."""
    config = with_defaults("MadeHere", Gpt2.Config, norm_eps=1e-6)
    registered("mine", type("Mine", (Gpt2,), {"Config": config}))
    plan = resolved(model={"name": "mine", "d_model": 64, "n_layers": 1, "n_heads": 2})
    sent = pickle.loads(pickle.dumps(plan))  # noqa: S301 (our own)
    assert sent == plan and type(sent.model_config) is config
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.parameters = 1


def test_resolve_leaves_its_argument_alone():
    config = RunConfig()
    before = dataclasses.asdict(config)
    p.resolve(config)
    assert dataclasses.asdict(config) == before


def combined_values(given, size=1):
    """(what a command of `size` processes asks for, on top of its run's folder; that run)."""
    stored = read_run(given, lambda line: None)
    return merge_run(given, stored, size), stored


@pytest.fixture
def old_run(tmp_path):
    """A run folder of two processes that trained by fsdp with full activation checkpointing."""
    config = resolved(
        World(0, 2, 0, 2),
        run_dir=str(tmp_path),
        engine={"strategy": "fsdp", "activation_checkpointing": "full", "compile": True},
    ).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "environment.jsonl").write_text('{"processes": 1}\n{"processes": 2}\n')
    return tmp_path


@pytest.mark.parametrize(
    "size, given, expected",
    [
        (2, {}, ("fsdp", "full", True)),
        (3, {}, ("ddp", "none", True)),
        (1, {}, ("single", "none", True)),
        (1, {"strategy": "fsdp"}, ("fsdp", "none", True)),
        (2, {"strategy": "auto"}, ("ddp", "none", True)),
    ],
)
def test_another_number_of_processes_decides_the_engine_anew(old_run, monkeypatch, size, given, expected):
    for key, value in {"RANK": 0, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(key, str(value))
    values, resuming = combined_values({"run_dir": str(old_run), "engine": given}, size)
    engine = p.resolve(build(RunConfig, values)).config.engine
    assert resuming and (engine.strategy, engine.activation_checkpointing, engine.compile) == expected


def test_a_run_that_does_not_say_its_processes_decides_anew(old_run):
    (old_run / "environment.jsonl").write_text('{"host": "a"}\n')
    assert "strategy" not in combined_values({"run_dir": str(old_run)})[0]["engine"]


def test_a_run_stays_what_it_was_when_its_preset_gets_a_field(old_run, monkeypatch, registered):
    """A key that stands in config.yaml holds; one that does not means what changes nothing, not what the preset says today."""

    class Today(Gpt2):
        Config = with_defaults("TodayConfig", Gpt2.Config, z_loss=1e-4, norm_eps=1e-6)

    registered("today", Today)
    stored = yaml.safe_load((old_run / "config.yaml").read_text())
    stored["model"] = dataclasses.asdict(Gpt2.Config(vocab_size=320, d_model=64, n_heads=2, n_layers=1)) | {
        "name": "today"
    }
    del stored["model"]["z_loss"]
    (old_run / "config.yaml").write_text(yaml.safe_dump(stored))
    model = combined_values({"run_dir": str(old_run)})[0]["model"]
    assert (model["z_loss"], float(model["norm_eps"])) == (0.0, 1e-5)


def test_a_plugin_that_is_not_named_is_told(old_run, tmp_path, monkeypatch):
    """By the last start of the run, and without an import: there is no such module. Whatever needs it: a name, or an activation."""
    command = ["-m", "train", "c.yaml", "--plugin", "my.first", "--model.name", "gpt2", "--plugin=far/second.py"]
    with (old_run / "environment.jsonl").open("a") as file:
        file.write(json.dumps({"processes": 1, "command": command}) + "\n")
    (tmp_path / "second.py").write_text("")
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--run_dir", str(old_run), "--data.tokenizer", "bytes", "--device", "cpu"]
    for wrong in (["--model.name", "mine"], ["--optim.name", "mine"], ["--model.name", "gpt2", "--model.mlp", "mine"]):
        with pytest.raises(
            UserError, match=r"mine.* \(.* was started with --plugin my.first --plugin far/second.py: add it\)$"
        ):
            dispatch([*words, *wrong])
        with pytest.raises(UserError, match=r" was started with --plugin my.first: add it\)$"):
            dispatch([*words, *wrong, "--plugin", "second.py"])
    (old_run / "environment.jsonl").unlink()
    with pytest.raises(UserError, match="--plugin FILE.py for one of your own") as caught:
        dispatch([*words, "--model.name", "mine"])
    assert "was started" not in str(caught.value)


def test_another_strategy_takes_nothing_of_the_old_ones(old_run, monkeypatch):
    """An hsdp run with a deepspeed.json lying about goes on under ddp: sizes of shards and the like are not the user's wish."""
    config = yaml.safe_load((old_run / "config.yaml").read_text())
    config["engine"] |= {"strategy": "hsdp", "shard_size": 2, "offload": True, "deepspeed_config": "x.json"}
    (old_run / "config.yaml").write_text(yaml.safe_dump(config))
    for key, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    same = combined_values({"run_dir": str(old_run), "engine": {"strategy": "hsdp"}}, 2)[0]["engine"]
    other = combined_values({"run_dir": str(old_run), "engine": {"strategy": "ddp"}}, 2)[0]["engine"]
    assert same["shard_size"] == "2" and same["offload"] == "true"
    assert other["strategy"] == "ddp" and not {"shard_size", "offload", "deepspeed_config"} & other.keys()


# 3 B parameters: 45 GiB of weights, gradients and moments in fp32, and a sequence.
PLANNED = (
    ("gpt2", "t4-16gb", 1, "fsdp"),
    ("hlb", "l4-24gb", 1, "fsdp"),
    ("hlb", "a100-40gb", 1, "fsdp"),
    ("gpt2", "a100-80gb", 1, "single"),
    ("hlb", "h200-141gb", 1, "single"),
    ("gpt2", "a100-40gb", 8, "fsdp"),
)


@pytest.mark.parametrize("name, device, processes, strategy", beyond((PLANNED[0], *PLANNED[4:]), PLANNED, several=True))
def test_a_device_that_is_not_here(name, device, processes, strategy):
    """The dial's far end plans on each; where one process must shard, the rest is in CPU memory."""
    config = build(PlanConfig, {"model_scale": 148, "model": {"name": name}, "device": device, "world_size": processes})
    plan, found = resolve_for(config)
    precision = "bf16" if GPUS[device].is_ampere else "fp32"
    assert (plan.config.engine.strategy, plan.config.precision, plan.processes) == (strategy, precision, processes)
    assert plan.config.engine.offload == (strategy == "fsdp" and processes == 1)
    there = memory.expected_memory(plan).get("in CPU memory", 0)  # weights, gradients and moments in fp32
    assert there == 16 * plan.parameters * plan.config.engine.offload
    assert (f"; in CPU memory {there / memory.GIB:.2f}" in p.render(plan)) == plan.config.engine.offload
    assert memory.expected_memory(plan)["total"] < plan.memory == int(GPUS[device].gibibytes * memory.GIB)
    assert found == GPUS[device].name


def test_the_original_fits_the_device_it_was_made_for():
    """3 B parameters in pure bf16: 2 + 6 + 4 bytes each are 33.8 GiB in the update."""
    plan, _ = resolve_for(
        build(PlanConfig, {"model_scale": 148, "device": "a100-40gb", "world_size": 1, "precision": "pure_bf16"})
    )
    assert plan.config.engine.strategy == "single"
    total = memory.expected_memory(plan)["total"] / memory.GIB
    assert 12 * plan.parameters / memory.GIB <= total < 0.9 * 39.4


def test_an_old_gpu_has_no_bf16():
    assert resolve_for(build(PlanConfig, {"device": "t4-16gb"}))[0].config.precision == "fp32"


def test_fp8_is_planned_for_gpus_that_have_it():
    assert resolve_for(build(PlanConfig, {"device": "l4-24gb", "float8": True}))[0].config.float8
    with pytest.raises(UserError, match="^float8: NVIDIA A100-SXM4-40GB has no units for fp8; leave it out$"):
        resolve_for(build(PlanConfig, {"device": "a100-40gb", "float8": True}))


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match="device: 'a100' is not known .*a100-40gb"):
        resolve_for(build(PlanConfig, {"device": "a100"}))


def test_hours_come_from_the_newest_bench_of_the_model(tmp_path, monkeypatch):
    """And from the row of it that is most like the run: here compiled, as is usual on a GPU."""
    monkeypatch.chdir(tmp_path)
    device = "NVIDIA A100-SXM4-40GB"
    values = {"model_scale": 0.1, "device": "a100-40gb", "world_size": 2, "engine": {"compile": True}}
    plan, _ = resolve_for(build(PlanConfig, values))
    unknown = expected_time(plan, device, 3.6)
    assert (unknown.hours, unknown.tokens_per_second, unknown.cost) == (None, None, None)
    flops = memory.build_meta(plan.model_class, plan.model_config).flops_per_token(plan.config.batch.sequence_length)
    at_peak = p.minimum_tokens(plan) * flops / 312e12 / 2 / 3600
    assert unknown.hours_range == pytest.approx((at_peak / 0.5, at_peak / 0.2))
    assert unknown.entry().value == f"{at_peak / 0.5:.3g} to {at_peak / 0.2:.3g}"
    assert "50% to 20% of 312 TFLOP/s" in unknown.rule and "no bench of this model" in unknown.rule
    assert f"{at_peak / 0.5 * 7.2:,.2f} to {at_peak / 0.2 * 7.2:,.2f} at 3.6 an hour and device" in unknown.rule
    assert expected_time(plan, "CPU", 3.6).entry().value == "unknown"

    def row(rate, **changes):
        config = dataclasses.asdict(plan.config)
        for key, value in changes.items():
            section, _, leaf = key.partition("__")
            (config[section] if leaf else config)[leaf or section] = value
        return {"name": f"at {rate}", "kind": "trainer", "config": config, "tokens_per_second": {"median": rate}}

    benches = {
        "1": (device, [row(5.0)]),
        "2": (device, [row(9.0, engine__compile=False), row(1000.0)]),
        "3": ("CPU", [row(1.0)]),
        "4": (device, [row(2.0, float8=True), row(3.0, precision="fp32"), row(4.0, batch__sequence_length=512)]),
    }
    for date, (name, rows) in benches.items():
        (tmp_path / "runs" / f"bench-{date}").mkdir(parents=True)
        report = {"kind": "train", "device": name, "processes": 1, "rows": rows}
        (tmp_path / "runs" / f"bench-{date}" / "bench.json").write_text(json.dumps(report))
    wanted = expected_time(plan, device, price=3.6, mfu=0.4)
    assert wanted.hours == pytest.approx(at_peak / 0.4) and wanted.cost == pytest.approx(at_peak / 0.4 * 7.2)
    assert wanted.tokens_per_second == pytest.approx(0.4 * 312e12 * 2 / flops)
    assert wanted.rule.startswith("at 40% of 312 TFLOP/s") and wanted.rule.endswith("mfu is set")
    found = expected_time(plan, device, price=3.6)
    hours = p.minimum_tokens(plan) / 2000 / 3600
    assert found.hours == pytest.approx(hours, abs=5e-4) and found.tokens_per_second == 2000
    assert found.cost == pytest.approx(hours * 3.6 * 2)
    assert f"{hours * 3.6 * 2:,.2f} at 3.6 an hour and device" in found.rule and "if speed grows" in found.rule
    assert found.rule.startswith("at least: with a multiplier of one; at 2,000 tokens/s, by at 1000.0 of runs/bench-2/")


@pytest.mark.parametrize(
    ("name", "near"), [("GPT2", "gpt2"), ("gpt-2", "gpt2"), ("Llama", "llama"), ("Transformer_++", "transformer++")]
)
def test_names_of_models_are_near_whatever_their_case_and_punctuation(name, near):
    line = rf"^model.name: '{re.escape(name)}' is not known \(allowed: .*\); did you mean {re.escape(near)}\?$"
    with pytest.raises(UserError, match=line):
        p.resolve(build(RunConfig, {"model": {"name": name}}))


class Staring(Gpt2):
    """Its forward pass reads a number."""

    def forward(self, tokens, *args, **kwargs):
        if tokens.float().mean().item() > 3:
            tokens = tokens + 0
        return super().forward(tokens, *args, **kwargs)


class Counting(Gpt2):
    """Its constructor reads a number."""

    def __init__(self, config):
        super().__init__(config)
        self.start = self.embedding.weight.sum().item()


@dataclasses.dataclass(frozen=True)
class Wide(Gpt2.Config):
    own_width: int = dataclasses.field(default=3, metadata={"help": "a number without a range"})


@dataclasses.dataclass(frozen=True)
class Needing:
    vocab_size: int
    width: int


def test_a_model_that_is_not_written_out_cannot_be_opened(registered):
    registered("mine", type("Mine", (Gpt2,), {"Config": Needing}))
    config = build(RunConfig, {"model": {"name": "mine", "vocab_size": "320"}})
    with pytest.raises(UserError, match="^model.width: the config of the run does not set it"):
        written_out(config)
    config.model["width"] = "64"  # text, as flags and YAML give it
    assert written_out(config)[1] == Needing(320, 64)


class Ranging(Gpt2):
    Config = Wide


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            Staring,
            r"model mine: its forward pass under the objective next_token does not run on tensors without values, .*: DataDependent.* \(test_plan.py, line",
        ),
        (Counting, r"model mine: it cannot be built on the meta device: RuntimeError: .* \(test_plan.py, line \d+\)$"),
    ],
)
def test_a_model_that_cannot_be_planned_is_told_in_one_line(registered, model, line):
    registered("mine", model)
    with pytest.raises(UserError, match=f"^{line}") as error:
        p.resolve(build(RunConfig, {"model_scale": 0.05, "model": {"name": "mine"}, "data": {"tokenizer": "bytes"}}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [2**40, -(2**40)])
def test_a_number_far_out_is_refused_before_a_shape_is_looked_for(registered, value, monkeypatch):
    registered("mine", Ranging)
    monkeypatch.setattr(Ranging, "config_for_scale", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(UserError, match="^model mine: own_width must be at "):
        p.resolve(build(RunConfig, {"model": {"name": "mine", "own_width": value}}))


def test_more_parameters_than_any_machine_holds_are_refused_before_the_model_is_built():
    shape = {"name": "llama", "d_model": 10**6, "n_layers": 1, "n_heads": 1}
    with pytest.raises(UserError, match="^model llama: [0-9,]+ parameters are beyond any machine$"):
        p.resolve(build(RunConfig, {"model": shape}))


def test_a_plan_says_what_to_think_about(tiny_dataset, tmp_path):
    """60 kB of text for 50,000 parameters and more."""
    plan = p.resolve(
        build(RunConfig, tiny_values(tiny_dataset, tmp_path, model={"name": "llama"}, max_steps=1000)),
        find_dataset(build(RunConfig, tiny_values(tiny_dataset, tmp_path)).data),
    )
    text, facts = p.render(plan), p.summary(plan)
    assert facts["epochs_at_least"] == pytest.approx(p.minimum_tokens(plan) / plan.train_tokens)
    assert [f"note: {line}" for line in facts["advice"]] == text.splitlines()[-len(facts["advice"]) :]
    assert any(line.startswith("the run reads its text ") for line in facts["advice"])
    assert any(line.startswith("epochs ") for line in text.splitlines())
    train = find_dataset(build(RunConfig, tiny_values(tiny_dataset, tmp_path)).data).splits["train"]
    assert facts["flops_per_byte"] == round(facts["flops_per_token"] * train.tokens / train.bytes)
    assert any(line.startswith("FLOPs per byte ") for line in text.splitlines())
    assert p.summary(dataclasses.replace(plan, bytes_per_token=None))["flops_per_byte"] is None


@pytest.mark.parametrize(
    "words",
    [
        f"--data.sample_length {2**24}",
        f"--batch.tokens_per_step {2**62} --batch.tokens_per_microbatch {2**62} --max_steps 1e9 --batch.n_max 1e308",
        f"--data.sample_length {2**62}",
        f"--model.vocab_size {2**62}",
        f"--data.tokenizer train-bpe:{2**62}",
        "--data.tokenizer train-bpe:\u00b2",
        f"--evaluation.sequence_length {2**62}",
    ],
)
def test_extreme_numbers_are_planned_or_refused_at_once(words, capsys):
    begin = time.process_time()
    with contextlib.suppress(UserError), known_errors():
        dispatch(["plan", "--model.name", "llama", "--model_scale", "0.01", "--device", "cpu", *words.split()])
    assert time.process_time() - begin < 60, "it takes a second, or for ever"


def test_a_tokenizer_that_is_not_that_of_the_data_is_told(tiny_dataset, tmp_path):
    """By what the config names: nothing, the data's own under several names, another."""
    (tmp_path / "same.json").write_bytes((tiny_dataset / "tokenizer.json").read_bytes())

    def plan(**data):
        values = tiny_values(tiny_dataset, tmp_path)
        config = build(RunConfig, {**values, "data": values["data"] | data})
        return p.resolve(config, find_dataset(config.data))

    for same in ({}, {"tokenizer": "bytes"}, {"tokenizer": str(tmp_path / "same.json")}):
        made = plan(**same)
        assert not made.unused_tokenizer and "was prepared with" not in p.render(made)
    assert plan().config.data.tokenizer == "bytes", "the data say it"
    line = f"note: data.tokenizer: chars, but {tiny_dataset} was prepared with bytes, which the run reads; "
    assert line in p.render(plan(tokenizer="chars"))
