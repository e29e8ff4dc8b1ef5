"""What only a GPU can show. Skipped, with the reason, where there is none.

`tests/gpu.sh` runs these and all other tests marked `gpu`. Most of their time is compiling: cases share models, sizes and lengths,
so that code in the compiler's cache on disk serves several, and what only repeats another case is for --nightly.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from conftest import ROOT, beyond, error_line, tiny_values, trainer, words_text

from trainer.checkpoint.format import step_name
from trainer.commands.train import run
from trainer.core.config import PrepareConfig, RunConfig
from trainer.core.settings import build
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopSignals
from trainer.runtime.watchdog import Watchdog
from trainer.training.run import Run
from trainer.training.step import optimiser_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS, PRECISIONS = ("hlb", "gpt2"), ("fp32", "bf16", "pure_bf16")
# (model, precision, whether it is compiled): eager all, compiled each model and each precision.
NEAR = [(model, precision, False) for model in MODELS for precision in PRECISIONS]
NEAR += [("hlb", "fp32", True), ("hlb", "bf16", True), ("gpt2", "pure_bf16", True)]


def losses_of(folder) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


def built(values: dict) -> Run:
    """The run of these settings, before its first step."""
    config = build(RunConfig, values)
    info = find_dataset(config.data)
    return Run(resolve(config, info), World(), info, Watchdog(World(), 60), StopSignals(World()))


@pytest.mark.gpu("training")
@pytest.mark.parametrize(
    "model, precision, compiles",
    beyond(NEAR, [(m, p, c) for c in (False, True) for m in MODELS for p in PRECISIONS], several=True),
)
def test_training_on_a_gpu_is_close_to_the_cpu(tiny_dataset, tmp_path, model, precision, compiles):
    how = {"precision": precision, "model": {"name": model}, "max_steps": 4}
    run(tiny_values(tiny_dataset, tmp_path / "cpu", **how))
    run(tiny_values(tiny_dataset, tmp_path / "cuda", device="cuda", engine={"compile": compiles}, **how))
    # TF32 keeps 10 bits, bf16 7: relative errors of 2^-10 and 2^-7 per product, carried on for four steps.
    allowed = 0.01 if precision == "fp32" else 0.05
    assert losses_of(tmp_path / "cuda") == pytest.approx(losses_of(tmp_path / "cpu"), rel=allowed)


@pytest.mark.gpu("training")
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tiny_dataset, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(tiny_values(tiny_dataset, whole, device="cuda"))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / step_name(12))
    run({"run_dir": str(halves)})
    assert len(losses_of(halves)) == 12
    # Only the order of additions on a GPU may differ. Moments of zero would change the ninth update by its own size.
    assert losses_of(halves) == pytest.approx(losses_of(whole), rel=1e-3)


@pytest.fixture(scope="module")
def long_dataset(tmp_path_factory):
    """Samples of 256 tokens, enough for FlexAttention."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "words.txt").write_text("".join(words_text(i, 500) for i in range(40)))
    wanted = PrepareConfig(
        source=str(folder), tokenizer="bytes", sample_length=256, out=str(folder / "data"), workers=1
    )
    prepare(wanted, lambda line: None)
    return folder / "data"


LONG = {"sequence_start": 128, "sequence_length": 256, "tokens_per_step": 1024, "tokens_per_microbatch": 512}
# Models whose attention is FlexAttention's on a GPU.
FLEX = {
    "hlb": {"name": "hlb", "attention_kernel": "flex"},
    "softcap": {"name": "llama", "attention_softcap": 30.0},
    "forget": {"name": "llama", "forget_gate": True},
}


@pytest.mark.gpu("waiting")
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("how", ["plain", "flex", "float8", "narrow moments", "graphs", "flex graphs"])
def test_no_host_sync_in_the_step(tiny_dataset, long_dataset, tmp_path, how, compiles):
    """hlb's batch law included: what it reads of the step before was told to copy itself when that step was launched."""
    dataset = long_dataset if "flex" in how else tiny_dataset
    engine = {"compile": compiles, "cuda_graphs": "graphs" in how}
    values = tiny_values(dataset, tmp_path / "r", device="cuda", precision="bf16", engine=engine)
    if "flex" in how:
        values["batch"] |= LONG
        values["data"]["separate_documents"] = True
    if how == "float8":
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs fp8")
        values["float8"] = True
    elif how == "narrow moments":
        values["optim"] = {"state_precision": "bf16"}
    one = built(values)
    for _ in range(11):  # past sequence growth, so that kernels are built and shapes seen
        optimiser_step(one)
    assert one.config.batch.dynamic and one.plan.sequence_length(11) == (256 if "flex" in how else 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):  # more than the interval at which the batch law looks at a norm
            optimiser_step(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Each attention compiled; recomputed of fused and of FlexAttention's. `full` keeps nothing of a block, whatever its attention is.
RECOMPUTED = [
    *((model, "none") for model in ("gpt2", *FLEX)),
    ("gpt2", "selective"),
    ("hlb", "selective"),
    ("hlb", "full"),
]


@pytest.mark.slow
@pytest.mark.gpu("compiled")
@pytest.mark.parametrize(
    "model, recompute",
    beyond(
        RECOMPUTED,
        [(model, how) for how in ("none", "selective", "full") for model in ("gpt2", *FLEX)],
        several=True,
    ),
)
def test_compiled_blocks_compute_what_eager_ones_do_on_a_gpu(long_dataset, tmp_path, model, recompute):
    """Gradients of one step in bf16. Compiled code keeps in fp32 what eager rounds to bf16 between operators: each rounding is
    2^-9 of an entry, some twenty follow on each other in three blocks forth and back, each of its own sign: sqrt(20) 2^-9 = 1 %
    of a gradient's norm, thrice that allowed. Against fp32 both are that far off."""
    gradients, losses = {}, {}
    for compiles in (False, True):
        engine = {"compile": compiles, "activation_checkpointing": recompute}
        shape = FLEX.get(model, {"name": model}) | {"n_layers": 3}
        values = tiny_values(long_dataset, tmp_path / "r", device="cuda", precision="bf16", model=shape, engine=engine)
        values["batch"] |= LONG | {"sequence_start": 256}
        one = built(values)
        assert ("flex" in one.model.describe_kernels()) == (model in FLEX)
        found = gradients[compiles] = {}
        one.engine.update = lambda one=one, found=found: found.update(
            {name: parameter.grad.float().clone() for name, parameter in one.model.named_parameters()}
        )
        losses[compiles] = optimiser_step(one).loss
    assert losses[True] == pytest.approx(losses[False], rel=2**-8)
    for name, eager in gradients[False].items():
        assert (gradients[True][name] - eager).norm() <= 0.03 * eager.norm(), name


# Each model eager; compiled code is replayed alike, whatever it computes.
REPLAYED = [*((model, False) for model in ("gpt2", "ngpt", *FLEX)), ("gpt2", True), ("hlb", True)]


@pytest.mark.gpu("compiled")
@pytest.mark.parametrize(
    "model, compiles",
    beyond(REPLAYED, [(model, how) for how in (False, True) for model in ("gpt2", "ngpt", *FLEX)], several=True),
)
def test_replayed_microbatches_train_as_those_that_run(long_dataset, tmp_path, model, compiles):
    """Lengths that grow, documents apart (of hlb not: its masks are then made once and kept), evaluations between. The same kernels run, whose additions have no order: rounding of
    bf16, 2^-9, carried on for twelve steps."""
    losses = {}
    for graphs in (False, True):
        folder, engine = tmp_path / str(graphs), {"compile": compiles, "cuda_graphs": graphs}
        values = tiny_values(long_dataset, folder, device="cuda", precision="bf16", max_steps=12, engine=engine)
        values["model"] = FLEX.get(model, {"name": model})
        values["batch"] |= LONG
        values["data"]["separate_documents"] = model != "hlb"
        values["evaluation"]["every"] = 5
        run(values)
        losses[graphs] = [(row["loss"], row["grad_norm"]) for row in read_rows(folder / "metrics.jsonl")]
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=0.02, atol=0)


# -- processes of their own ------------------------------------------------------------------------------------------------

WAITS = """from models.transformer import Transformer
forward = Transformer.forward
Transformer.forward = lambda self, tokens, **how: forward(self, tokens + 0 * tokens.sum().item(), **how)
"""
SHARDING = ("fsdp", "zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("fsdp", "zero3")


def launching(test):
    """Marks a test of runs that are processes of their own (a process group is made once): one process of pytest starts them."""
    return pytest.mark.gpu("launching")(pytest.mark.xdist_group("launching")(test))


@pytest.fixture(scope="module")
def launched(tiny_dataset, tmp_path_factory):
    """Function: name -> (folder, how the run ended). All runs begin at once, since most of their time is imports and compiling.

    A strategy names four steps of hlb; "offload STRATEGY" eight steps of a model with buffers (rotary positions); "waits" a
    model that waits for the device in each microbatch, and is to be recorded.
    """
    folder = tmp_path_factory.mktemp("launched")
    (folder / "waits.py").write_text(WAITS)
    wanted = {name: {"max_steps": 4, "engine": {"strategy": name}} for name in ("single", *SHARDING)}
    for name in OFFLOADED:
        wanted[f"offload {name}"] = {
            "model": {"name": "llama"},
            "max_steps": 8,
            "optim": {"lr": 0.01, "warmup_steps": 1},
            "engine": {"strategy": name, "offload": True},
        }
    wanted["waits"] = {"model": {"name": "gpt2"}, "engine": {"cuda_graphs": True}}

    def start(name):
        values = tiny_values(tiny_dataset, folder / name, device="cuda", precision="bf16", **wanted[name])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        plugin = ("--plugin", "waits") if name == "waits" else ()
        return trainer("train", folder / f"{name}.yaml", *plugin, env={"PYTHONPATH": f"{ROOT}:{folder}"})

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        ends = {name: pool.submit(start, name) for name in wanted}
        yield lambda name: (folder / name, ends[name].result())


def trained(launched, name):
    """The folder of a run that ended well."""
    folder, done = launched(name)
    assert done.returncode == 0, done.stderr
    return folder


@launching
@pytest.mark.parametrize("strategy", SHARDING)
def test_sharding_engines_on_one_gpu(launched, strategy):
    folders = trained(launched, strategy), trained(launched, "single")
    assert losses_of(folders[0]) == pytest.approx(losses_of(folders[1]), rel=0.05)  # bf16, as above


@launching
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_an_offloaded_run_goes_on_as_if_it_had_not_stopped(launched, strategy, tmp_path):
    """Moments are in CPU memory, and must come back there."""
    whole = trained(launched, f"offload {strategy}")
    halves = shutil.copytree(whole, tmp_path / "halves")
    shutil.rmtree(halves / "checkpoints" / step_name(8))
    done = trainer("train", "--run_dir", halves)
    assert "going on from" in done.stderr, done.stderr
    # Only the order of additions on a GPU may differ. Moments of zero would change the fifth update by its own size.
    assert len(losses_of(halves)) == 8 and losses_of(halves) == pytest.approx(losses_of(whole), rel=1e-3)


@launching
def test_a_microbatch_that_waits_for_the_device_cannot_be_recorded(launched):
    _, done = launched("waits")
    assert "engine.cuda_graphs: a microbatch of this model cannot be recorded (" in error_line(done)


# -- the dear ones -----------------------------------------------------------------------------------------------------------


def costly(test):
    """Marks a test that needs much of a GPU: one process of pytest runs them one after the other."""
    return pytest.mark.slow(pytest.mark.gpu("costly")(pytest.mark.xdist_group("costly")(test)))


@costly
@pytest.mark.parametrize("model", ["gpt2", "hlb"])
def test_a_bench_of_a_gpu(long_dataset, tmp_path, model):
    """Compiled and eager in turns beside the bare loop: times by CUDA's events, and the memory that the plan expected, within 10 %."""
    config = tmp_path / "config.yaml"
    values = tiny_values(long_dataset, tmp_path / "r", device="cuda", precision="bf16", model_scale=1)
    values["model"] = {"name": model, "vocab_size": 50304}
    values["batch"] = {"sequence_length": 256, "tokens_per_step": 8192, "tokens_per_microbatch": 8192}
    config.write_text(yaml.safe_dump(values))
    words = [
        "--baselines",
        "bare",
        "--sweep",
        "engine.compile=true,false",
        "--rounds",
        "3",
        "--steps_per_round",
        "2",
        "--json",
    ]
    done = trainer("bench", config, *words, "--bench_dir", tmp_path / "bench", timeout=500)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["device"] == torch.cuda.get_device_name()
    assert [row["name"] for row in body["rows"]] == ["compile=true", "compile=false", "bare loop"]
    for row in body["rows"]:
        assert row["recompilations"] == 0 and row["tokens_per_second"]["median"] > 0
        assert all(row["phases_ms"][phase] > 0 for phase in ("data", "forward", "backward", "optimiser", "step"))
        assert (row["mfu"] is None) == (row["peak_flops"] is None) and (row["mfu"] or 0) < 1
        if row["kind"] == "trainer":
            assert row["expected_memory_bytes"]["total"] == pytest.approx(row["peak_memory_bytes"], rel=0.1)


@costly
def test_three_billion_parameters_in_40_gigabytes(tiny_dataset, tmp_path):
    """One step of scale 148 with everything offloaded but the block at work, under a cap of 40 GB."""
    values = tiny_values(tiny_dataset, tmp_path / "r", model_scale=148, max_steps=1, device="cuda", precision="bf16")
    values["engine"] = {"strategy": "fsdp", "offload": True, "activation_checkpointing": "full"}
    values["checkpoint"] = {"every": 0}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    code = (
        "import sys, torch; total = torch.cuda.get_device_properties(0).total_memory; "
        "torch.cuda.set_per_process_memory_fraction(40e9 / total); "
        "from trainer.core.settings import load_yaml; from trainer.commands.train import run; run(load_yaml(sys.argv[1])); "
        "print(torch.cuda.max_memory_allocated() / 1e9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)],
        env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},  # the CPU updates the weights
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 40
