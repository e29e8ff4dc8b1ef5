"""What is chosen so that a run fits: strategy, activation checkpointing, bf16 moments; and what cannot fit."""

# ruff: noqa: F811 (fixtures of another file)

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import pytest
from test_plan import gpu, resolved  # noqa: F401 (a fixture)

from trainer.commands.plan import PlanConfig, resolve_for
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.planning import memory
from trainer.planning import plan as p
from trainer.planning.strategy import CHECKPOINTING, StrategySelector
from trainer.runtime.device import GPUS, Target
from trainer.runtime.distributed import World

# -- strategy and activation checkpointing ----------------------------------------------------------------------------


def engine_of(plan):
    engine = plan.config.engine
    return engine.strategy, engine.activation_checkpointing, engine.offload, engine.shard_size


# 3 B parameters in bf16: 4 + 4 + 8 + 2 bytes each are 51 GiB, in 8 shards of 16 bytes each 6 GiB and what is gathered. On two
# GPUs of 40 GiB there is room for all activations where moments are bf16.
@pytest.mark.parametrize(
    "gibibytes, size, local_size, expected",
    [
        (None, 1, 1, ("single", "none", False, None)),
        (None, 4, 4, ("ddp", "none", False, None)),
        (80, 1, 1, ("single", "none", False, None)),
        (24, 1, 1, ("fsdp", "none", True, None)),  # gathered blocks and unsharded gradients alone
        (80, 8, 8, ("ddp", "none", False, None)),
        (80, 32, 8, ("ddp", "none", False, None)),
        (40, 8, 8, ("fsdp", "none", False, None)),
        (40, 32, 8, ("hsdp", "none", False, 8)),
        (40, 4, 1, ("fsdp", "none", False, None)),  # one GPU each: no shards within a machine
        (40, 2, 1, ("fsdp", "none", False, None)),
    ],
)
def test_strategy_follows_processes_and_memory(gpu, gibibytes, size, local_size, expected):
    if gibibytes:
        gpu(gibibytes)
    plan = resolved(World(0, size, 0, local_size), model_scale=148, precision="bf16")
    assert engine_of(plan) == expected
    rules = {row.key: row.rule for row in plan.entries}
    assert ("GiB" in rules["engine.strategy"]) == (gibibytes is not None)
    assert rules["engine.activation_checkpointing"]


def selector(room, strategy="fsdp", **values):
    """(StrategySelector of 8 processes of `room` GiB, their ParallelLayout) at model_scale 8."""
    config = build(RunConfig, {"precision": "bf16", **values})
    plan = resolved(model_scale=8)
    estimate = memory.MemoryEstimate(plan.model_class, plan.model_config, 1024)
    layout = memory.ParallelLayout(strategy, config.precision, 8, 8)
    return StrategySelector(
        estimate, config, World(0, 8, 0, 8), Target(int(room * memory.GIB)), wanted=1024, step=1 << 20
    ), layout


def test_means_are_the_first_that_fit():
    """The less room, the more means: what gives the same weights first, then bf16 moments with the fastest again."""
    judge, layout = selector(8)
    order = [(how, narrow) for narrow in (False, True) for how in CHECKPOINTING]
    assert judge.options == order
    chosen = []
    for hundredths in range(700, 250, -4):
        judge.memory = int(hundredths / 100 * memory.GIB)
        options, why = judge.choose_options(layout)
        chosen.append(options)
        assert not any(judge.fits(earlier, layout) for earlier in judge.options[: order.index(options)])
        assert why.startswith("the fastest that fits" if judge.fits(options, layout) else "the least there is")
    met = list(dict.fromkeys(chosen))
    # Moments of 353 M parameters in 8 shards: bf16 saves 0.2 GiB, less than either way of recomputing does.
    assert met == [("none", False), ("selective", False), ("full", False), ("full", True)]


def test_what_was_set_of_the_means_is_kept():
    kept = selector(8, engine={"activation_checkpointing": "every-2"})[0].options
    assert kept == [("every-2", False), ("every-2", True)]
    wide, narrow = (selector(8, optim={"state_precision": state})[0].options for state in ("fp32", "bf16"))
    assert wide == [(how, False) for how in CHECKPOINTING]
    assert narrow == [(how, True) for how in CHECKPOINTING]


def test_offloaded_moments_stay_as_they_are():
    """In CPU memory half as much frees nothing on the GPU."""
    judge, layout = selector(0.5)
    assert judge.choose_options(layout)[0] == ("full", True)
    assert judge.choose_options(dataclasses.replace(layout, offload=True))[0] == ("full", False)


def test_moments_of_pure_bf16_are_bf16():
    assert resolved(precision="pure_bf16").config.optim.state_precision == "bf16"
    assert resolved(precision="bf16").config.optim.state_precision == "fp32"
    with pytest.raises(UserError, match="^optim.state_precision: fp32, but with pure_bf16 the moments are bf16"):
        resolved(precision="pure_bf16", optim={"state_precision": "fp32"})


# -- what does not fit --------------------------------------------------------------------------------------------------

REFUSED = re.compile(
    r"memory: 1,024 tokens at a time are expected to need (?P<needed>[\d.]+) GiB \((?P<how>[^)]+)\), "
    r"and the GPU has (?P<has>[\d.]+); what would fit: (?P<ways>.+)"
)


def refusal(**values):
    """The parts of the line that refuses 3 B parameters in bf16 on one GPU of 20 GiB."""
    with pytest.raises(UserError) as error:
        resolved(model_scale=148, precision="bf16", **values)
    found = REFUSED.fullmatch(str(error.value))
    assert found, error.value
    return found


def test_a_refusal_says_what_is_missing(gpu):
    gpu(20)
    found = refusal(engine={"strategy": "single"})
    assert found["how"] == "single, recomputing full" and found["has"] == "20.0"
    # Moments in bf16: 12 bytes a parameter when the loss is taken, 2 of copies; 50,304 rows of 2,752 in 6 bytes.
    assert 14 * 3.022 < float(found["needed"]) * memory.GIB / 1e9 < 14 * 3.022 + 0.83 + 2


def test_the_ways_out_are_ways_out(gpu):
    """Each is a plan of its own that is not refused, and the GPU is the smallest whose plan leaves a tenth."""
    gpu(20)
    ways = refusal(engine={"strategy": "single"})["ways"].split(", ")
    assert ways[0] == "--engine.offload with fsdp"
    [size] = re.fullmatch(r"fsdp on (\d+) such GPUs", ways[1]).groups()
    [key] = re.fullmatch(r"the same on (\S+)", ways[2]).groups()
    one = {"model_scale": 148, "precision": "bf16"}
    plans = [
        resolved(engine={"strategy": "fsdp", "offload": True}, **one),
        resolved(World(0, int(size), 0, 8), engine={"strategy": "fsdp"}, **one),
        resolve_for(build(PlanConfig, {**one, "device": key, "engine": {"strategy": "single"}}))[0],
    ]
    for plan in plans:
        assert memory.expected_memory(plan)["total"] <= plan.memory
    smaller = [gpu for gpu in GPUS.values() if 20 < gpu.gibibytes < GPUS[key].gibibytes and gpu.is_ampere]
    for name in [other for other in GPUS if GPUS[other] in smaller]:
        config = build(PlanConfig, {**one, "device": name, "engine": {"strategy": "single"}})
        with contextlib.suppress(UserError):
            assert memory.expected_memory(resolve_for(config)[0])["total"] > 0.9 * GPUS[name].gibibytes * memory.GIB


def test_pure_bf16_is_a_way_out_where_it_fits(gpu):
    """3 B parameters at 12 bytes are 33.8 GiB. It is also said where the plan takes CPU memory by itself."""
    gpu(38)
    one = {"model_scale": 148, "precision": "bf16"}
    assert refusal(engine={"strategy": "single"})["ways"].startswith("--precision pure_bf16, ")
    rules = {row.key: row.rule for row in resolved(**one).entries}
    assert rules["engine.strategy"].endswith("in CPU memory (--precision pure_bf16 fits single without)")
    plan = resolved(**one | {"precision": "pure_bf16"})
    assert engine_of(plan)[0] == "single"
    assert memory.expected_memory(plan)["total"] <= 0.9 * plan.memory
    # It would change what was set.
    rules = {row.key: row.rule for row in resolved(**one, optim={"state_precision": "fp32"}).entries}
    assert rules["engine.strategy"].endswith("in CPU memory")


def test_nothing_helps_but_a_smaller_model():
    judge, layout = selector(20)
    judge.estimate = SimpleNamespace(length=1024, most_held=lambda *_: 1 << 50)
    with pytest.raises(UserError, match="to need 1048576.0 GiB .* has 20.0; what would fit: a smaller model_scale$"):
        judge.refuse_the_impossible(layout, judge.options[-1])


def test_a_cpu_is_refused_nothing():
    plan = resolved(model_scale=148, precision="fp32", engine={"strategy": "single"})
    assert memory.expected_memory(plan)["total"] > 40 * memory.GIB
    assert {row.key: row.rule for row in plan.entries}["engine.activation_checkpointing"].startswith("memory of a CPU")


def test_a_set_microbatch_is_what_must_fit(gpu):
    gpu(40)
    batch = {"tokens_per_microbatch": 131_072}
    assert resolved(model_scale=8, precision="bf16").config.engine.activation_checkpointing == "none"
    plan = resolved(model_scale=8, precision="bf16", batch=batch)
    assert plan.config.engine.activation_checkpointing == "full"


def test_what_was_set_holds(gpu):
    gpu(80)
    engine = {"strategy": "hsdp", "shard_size": 2, "activation_checkpointing": "every-3"}
    plan = resolved(World(0, 8, 0, 8), engine=engine)
    assert engine_of(plan) == ("hsdp", "every-3", False, 2)
    assert engine_of(p.resolve(plan.config, world=World(0, 8, 0, 8))) == engine_of(plan)
    assert {row.key: row.rule for row in plan.entries}["engine.activation_checkpointing"] == "set"


def test_offload_asks_for_shards(gpu):
    gpu(80)
    assert resolved(engine={"offload": True}).config.engine.strategy == "fsdp"


def test_the_plan_says_what_checkpointing_saves(gpu):
    gpu(80)
    text = p.render(resolved(engine={"activation_checkpointing": "full"}, precision="bf16"))
    line = next(line for line in text.splitlines() if line.startswith("memory, GiB"))
    held, without = re.search(
        r", activations ([\d.]+), loss [\d.]+; activations without checkpointing ([\d.]+)$", line
    ).groups()
    assert 0 < float(held) < float(without)


def test_a_deepspeed_config_names_its_stage(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    assert resolved(engine={"deepspeed_config": str(path)}).config.engine.strategy == "zero2"


@pytest.mark.parametrize(
    "engine, expected",
    [
        ({"strategy": "zero2"}, "precision: pure_bf16 with engine.strategy zero2, but DeepSpeed keeps fp32 masters"),
        ({"strategy": "single", "offload": True}, "engine.offload: single has no shards"),
        ({"strategy": "ddp", "offload": True}, "engine.offload: ddp has no shards"),
        ({"strategy": "single", "reshard_after_forward": False}, "engine.reshard_after_forward: single gathers no"),
        ({"strategy": "fsdp", "shard_size": 2}, "engine.shard_size: only hsdp"),
        ({"strategy": "fsdp", "deepspeed_config": "ds.json"}, "engine.deepspeed_config: "),
        ({"activation_checkpointing": "some"}, "engine.activation_checkpointing: 'some' is not known"),
    ],
)
def test_contradictions_in_the_engine(engine, expected):
    with pytest.raises(UserError, match=expected) as error:
        resolved(
            World(0, 2, 0, 2) if engine.get("strategy") == "ddp" else World(), precision="pure_bf16", engine=engine
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shard_size, local_size", [(3, 4), (None, 3)])
def test_groups_of_shards_come_out_even(shard_size, local_size):
    with pytest.raises(UserError, match="engine.shard_size: 3 does not divide the 8 processes"):
        resolved(World(0, 8, 0, local_size), engine={"strategy": "hsdp", "shard_size": shard_size})


def test_deepspeed_that_is_not_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine.strategy: zero1 needs DeepSpeed; `pip install"):
        resolved(engine={"strategy": "zero1"})
