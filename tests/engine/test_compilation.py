"""torch.compile around the blocks: the same gradients, no compiling anew as sequences grow, and eager where it cannot be."""

import contextlib
import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, beyond, tiny_values
from test_activation_checkpointing import Stack
from test_zoo import VOCAB, build, gradients
from tiny_runs import losses, same, weights
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.fx import GraphModule

from models.base import get_model
from models.layers import flex
from models.layers.linear_cross_entropy import _Form
from models.state import DecodingState
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.settings import build as build_settings
from trainer.engine import activation_checkpointing, compilation
from trainer.engine.compilation import Compiled, choose
from trainer.inference.decoding import generate
from trainer.planning.plan import resolve
from trainer.runs.opening import OpenRun
from trainer.runtime.device import GPUS, Target

# Sums in another order and fused multiply-adds: some hundred eps of the loss, and of the largest entry of each gradient, as in
# test_zoo's test_compiled_equals_eager.
CLOSE = 200 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def fresh():
    """What dynamo has compiled and counted, and what it was told, belongs to one test."""
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    with patch.dict(os.environ), torch._dynamo.config.patch(recompile_limit=limit):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many have been compiled in this test."""
    return counters["stats"]["unique_graphs"]


def batch(rows: int, length: int):
    generator = torch.Generator().manual_seed(rows * length)
    return torch.randint(VOCAB, (2, rows, length), generator=generator)  # tokens and targets


def assert_close(compiled, eager) -> None:
    (loss, found), (expected, plain) = compiled, eager
    assert (loss - expected).abs() < CLOSE * expected.abs()
    for key, gradient in found.items():
        assert (gradient - plain[key]).abs().max() < CLOSE * max(1e-2, plain[key].abs().max().item()), key


# -- when, and with what ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_programs(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize(
    "strategy, on_gpu, here, triton, chosen",
    [
        ("single", True, True, True, (True, "fewer kernels")),
        ("fsdp", True, True, True, (True, "fewer kernels")),
        ("zero2", True, True, True, (True, "fewer kernels")),
        ("zero3", True, True, True, (False, "DeepSpeed's hooks")),
        ("single", True, True, False, (False, "there is no Triton")),
        ("single", True, False, False, (True, "fewer kernels")),  # a plan for another machine
        ("single", False, True, True, (False, "on a CPU it gains little")),
    ],
)
def test_choice(monkeypatch, strategy, on_gpu, here, triton, chosen):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "a spec" if triton else None)
    compiles, why = choose(strategy, Target(2**30 if on_gpu else None, here=here))
    assert compiles is chosen[0] and chosen[1] in why


def test_a_run_that_would_gain_less_than_compiling_takes_is_not_compiled():
    target = Target(2**30, here=False)
    assert choose("single", target, 39.0) == (
        False,
        "the run takes about 39 s, so it would gain less than the 20 s of compiling",
    )
    assert choose("single", target, 41.0)[0]


def test_the_length_of_a_run_decides_whether_it_is_compiled():
    """hlb at scale 1: 1.04e16 FLOPs in 1,000 steps, 52 s at a fifth of an H100's 989 TFLOP/s."""
    for steps, compiles in ((1000, True), (500, False)):
        config = build_settings(RunConfig, {"model": {"name": "hlb"}, "max_steps": steps})
        plan = resolve(config, gpu=GPUS["h100-80gb"])
        assert plan.config.engine.compile is compiles
        assert plan.config.engine.background_compile is compiles


@pytest.mark.parametrize("given", [False, True])
def test_compiled_code_is_kept_where_the_user_says(tmp_path, given):
    """torch's own folder, which it chooses when its compiler is imported, would be emptied at boot."""
    modules = "trainer" if given else "trainer, torch._dynamo"
    code = f"import os, {modules}; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    env = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"} | {
        "HOME": str(tmp_path)
    }
    folder = tmp_path / "mine" if given else tmp_path / ".cache" / "crescendo" / "inductor"
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder)} if given else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(folder), done.stderr


# -- what cannot be compiled --------------------------------------------------------------------------------------------


class Curve(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return x + torch.tanh(super().forward(x))


def trained(model, x) -> list[torch.Tensor]:
    """Gradients of a microbatch."""
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def fails_to_compile(graph, inputs):
    raise RuntimeError("no such kernel\nand a long story")


@contextlib.contextmanager
def backend(monkeypatch, compiler):
    """torch.compile, with `compiler` in inductor's place."""
    plain = torch.compile
    with monkeypatch.context() as patched:
        patched.setattr(
            torch, "compile", lambda function, **options: plain(function, **options | {"backend": compiler})
        )
        yield


def test_a_failing_compiler_is_said_once_and_training_goes_on(monkeypatch):
    model, x, said = Stack(Curve), torch.randn(2, 4), []
    expected = trained(model, x)
    with backend(monkeypatch, fails_to_compile):
        Compiled(model, said.append)
    for _ in range(2):
        assert all(map(torch.equal, trained(model, x), expected))
    [line] = said
    assert line.startswith("engine.compile: not compiled, eager from here on: ") and "\n" not in line
    assert "no such kernel" in line


def test_a_failed_assertion_of_the_compiler_is_no_end(monkeypatch):
    """Dynamo does not wrap it. It stands for any assertion while a block is traced."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    def fail(translator):
        raise AssertionError("should not be called on root SubgraphTracer")

    model, x, said = Stack(Curve), torch.randn(2, 4), []
    expected = trained(model, x)
    Compiled(model, said.append)
    monkeypatch.setattr(InstructionTranslator, "run", fail)
    assert all(map(torch.equal, trained(model, x), expected))
    [line] = said
    assert (
        line
        == "engine.compile: not compiled, eager from here on: AssertionError: should not be called on root SubgraphTracer"
    )


class Untraceable(Curve):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_block_that_cannot_be_traced_as_a_whole_trains_as_well(monkeypatch):
    """Dynamo splits it."""
    model, x, said = Stack(Untraceable), torch.randn(2, 4), []
    expected = trained(model, x)
    with backend(monkeypatch, "eager"):
        Compiled(model, said.append)
    assert all(map(torch.equal, trained(model, x), expected))


class Refuses(Curve):
    def forward(self, x):
        if x.shape[0] == 3:
            raise ValueError("three rows are too many")
        return super().forward(x)


class Asserts(Curve):
    def forward(self, x):
        assert x.shape[0] != 3, "three rows are too many"
        return super().forward(x)


@pytest.mark.parametrize("block, error", [(Refuses, ValueError), (Asserts, AssertionError)])
def test_errors_of_the_model_stay_its_own(monkeypatch, block, error):
    model, said = Stack(block), []
    with backend(monkeypatch, "eager"):
        Compiled(model, said.append)
    for rows in (3, 2):
        with pytest.raises(error, match="three rows") if rows == 3 else contextlib.nullcontext():
            trained(model, torch.randn(rows, 4))
    assert not said and graphs() > 0


@pytest.mark.slow
def test_a_backward_pass_that_cannot_be_compiled_is_found_in_time(monkeypatch):
    """inductor itself, which makes the forward pass: neither is used."""
    from torch._inductor import compile_fx

    plain = compile_fx.fx_codegen_and_compile

    def refuse(*args, **kwargs):
        if kwargs.get("is_backward"):
            raise RuntimeError("no such kernel\nand a long story")
        return plain(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", refuse)
    model, said = Stack(Curve), []
    Compiled(model, said.append)
    x = torch.randn(2, 4)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = trained(model, x)
    [line] = said
    assert "no such kernel" in line
    again = Stack(Curve)
    again.load_state_dict(model.state_dict())
    assert all(map(torch.equal, compiled, trained(again, x)))


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_no_end(no_programs, tmp_path):
    """As where a run is gone on with on another machine: what was compiled is in its config."""
    model, x, said = Stack(Curve), torch.randn(2, 4), []
    expected = trained(model, x)
    Compiled(model, said.append)
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        patch("torch._inductor.config.cpp.cxx", (None, "g++")),
    ):
        assert all(map(torch.equal, trained(model, x), expected))
    [line] = said
    assert line.startswith("engine.compile: not compiled, eager from here on: ")


# -- real models, really compiled ---------------------------------------------------------------------------------------


@pytest.fixture(params=("hlb", "gpt2"))
def real(request):
    """A small model of three blocks or more, all of one kind."""
    name, _, mup = request.param.partition(" ")
    return build(name, scale=0.4, **({"mup": True, "mup_base_head_dim": 8} if mup else {}))


def test_evaluation_and_decoding_compile_nothing(real):
    tokens, targets = batch(2, 24)
    with torch.no_grad():
        expected = real(tokens, targets=targets)
        Compiled(real, pytest.fail)
        assert torch.equal(real(tokens, targets=targets).loss, expected.loss)
        cache = DecodingState()
        for part in tokens.split(8, dim=1):
            real(part, cache=cache)
    assert graphs() == 0


# With mup, the forward pass also multiplies by numbers that depend on the size of the model.
WAYS = [("hlb", "none"), ("gpt2 mup", "selective"), ("gpt2", "selective"), ("hlb", "selective"), ("gpt2", "none")]


@pytest.mark.slow
@pytest.mark.parametrize("real, how", beyond(WAYS[:2], WAYS, several=True), indirect=["real"])
def test_compiled_blocks_compute_what_eager_ones_do(real, how):
    """And compile nothing anew for longer sequences and other microbatches, but for those of one sequence. The CPU's code
    for sums of more than 4096 terms is another: sequences stay below its square root, 64."""
    eager = copy.deepcopy(real)
    activation_checkpointing.apply(real, how)
    Compiled(real, pytest.fail)
    for rows, length in ((2, 24), (3, 48), (5, 17), (2, 64)):
        tokens, targets = batch(rows, length)
        assert_close(gradients(real, tokens, targets=targets), gradients(eager, tokens, targets=targets))
        assert graphs() == 2, "one code of all blocks, and the loss"
    for length in (24, 48):
        tokens, targets = batch(1, length)
        assert_close(gradients(real, tokens, targets=targets), gradients(eager, tokens, targets=targets))
        assert graphs() == 3


@pytest.mark.slow
def test_resumption_is_bitwise(tiny_dataset, tmp_path, monkeypatch):
    """Compiled at the first length (16), or on resumption at a later one (32): the same bits. Each compiles for itself."""
    folders = []
    for cut in (6, 12):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"code{cut}"))
        values = tiny_values(
            tiny_dataset, tmp_path / f"run{cut}", checkpoint__every=6, engine={"compile": True},
            checkpoint__keep=3,
        )  # fmt: skip
        run(values | {"max_steps": cut})
        if cut < 12:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "later"))
            torch._dynamo.reset()
            run({"run_dir": values["run_dir"], "max_steps": 12})
        assert graphs() > 0
        folders.append(tmp_path / f"run{cut}")
    assert losses(folders[0]) == losses(folders[1])
    assert same(weights(folders[0], 12), weights(folders[1], 12))


def test_the_vocabulary_is_no_symbol_in_the_compiled_loss():
    """Only the number of rows is: else no two entries of a row could be loaded at a time."""
    sizes = []

    def look(graph, inputs):
        values = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
        sizes.append([[str(size) for size in x.shape] for x in values if isinstance(x, torch.Tensor) and x.ndim == 2])
        return graph.forward

    compiled = torch.compile(compilation._score_a_vocabulary, backend=look, dynamic=True)
    for rows in (24, 17):
        logits, facts = torch.randn(rows, 40), [torch.zeros(rows) for _ in range(2)]
        compiled(logits, torch.zeros(rows, dtype=torch.long), torch.ones(rows), *facts, _Form(None, 0.0, 40))
    ((shape,),) = sizes  # one graph, one matrix
    assert shape[0] != "24" and shape[1] == "40"


@pytest.fixture(params=["hlb", "llama"])
def flexes(request, monkeypatch):
    """A model of one block with FlexAttention, which would raise if FlexAttention were compiled by itself."""
    monkeypatch.setattr(flex, "device_refusal", lambda device: None)
    monkeypatch.setattr(flex, "compiled", pytest.fail)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)  # of a CPU
    changes = {"attention_softcap": 30.0} if request.param == "llama" else {"attention_kernel": "flex"}
    model = get_model(request.param)(replace(build(request.param).config, n_layers=1, **changes))
    model.init_weights()
    return model


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_blocks_with_flex_are_one_graph(flexes, how):
    """FlexAttention is an operator of a compiled block."""
    activation_checkpointing.apply(flexes, how)
    (block,) = flexes.blocks()
    seen = []

    def look(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
        seen.append([node.target for part in parts for node in part.graph.nodes].count(flex_operator))
        raise StopIteration("seen")  # a CPU could not compile it

    block.forward = torch.compile(block.forward, backend=look, dynamic=True, fullgraph=True)
    with pytest.raises(BackendCompilerFailed, match="seen"):
        flexes(*batch(2, 256))
    assert seen == [1]


def test_blocks_with_flex_are_compiled_once_for_all_lengths(flexes):
    (block,) = flexes.blocks()
    block.forward = torch.compile(block.forward, backend="eager", dynamic=True, fullgraph=True)
    for rows, length in ((4, 256), (2, 512), (2, 384)):
        flexes(*batch(rows, length)).loss.backward()
    assert graphs() == 1


def test_text_and_the_comparison_before_it_run_as_they_are(monkeypatch):
    """Their lengths are odd, and every one of them would be compiled."""
    calls = []

    def recording(function, **options):
        def compiled(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", recording)
    model = build("gpt2")
    Compiled(model, print)
    runner = OpenRun(Path("."), SimpleNamespace(precision="fp32"), model, None, torch.device("cpu"), 0, None)
    said = []
    assert len(generate(runner, [[1, 2, 3]], 4, VOCAB, say=said.append)[0]) == 4
    assert calls == [] and said == []
    model(*batch(1, 8)).loss.backward()
    assert calls, "training runs what is compiled"
