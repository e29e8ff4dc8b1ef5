"""engine.background_compile: a second process fills the compiler's cache, while eager steps train."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, tiny_values
from tiny_runs import losses, make
from torch._dynamo.utils import counters

from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.engine import background_compile, base
from trainer.engine.background_compile import BackgroundCompiler, start_background
from trainer.objectives import build_objective
from trainer.planning.plan import resolve
from trainer.planning.strategy import background_refusal
from trainer.runs.metrics import read_rows
from trainer.runtime.device import GPUS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def wait_for(background) -> tuple[bool, str]:
    begun = time.monotonic()
    while not background.finished():
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.05)
    return background.result()


@pytest.fixture
def planned(tiny_dataset, tmp_path):
    return make(tiny_dataset, tmp_path / "planned", engine={"compile": False})


# -- the second process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["hlb", "gpt2"])
def test_the_run_compiles_what_was_traced(tiny_dataset, tmp_path, monkeypatch, model):
    """The same graphs, from which the compiler makes the keys of its cache; and no others at any sequence length."""
    traced, compiled = [], []

    def record(graphs):
        def backend(graph, inputs):
            graphs.append(graph.code)
            return graph.forward

        return backend

    values = {"model": {"name": model}, "engine": {"compile": True, "background_compile": False}, "precision": "bf16"}
    one = make(tiny_dataset, tmp_path / "p", **values)
    plain = torch.compile

    def compile(graphs):
        options = {"dynamic": True, "backend": record(graphs)}
        return lambda function, **given: plain(function, **given | options)

    monkeypatch.setattr(torch, "compile", compile(traced))
    background_compile.trace(one.plan, one.engine.objective, CPU, pytest.fail)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile(compiled))
    run(tiny_values(tiny_dataset, tmp_path / "r", **values))
    assert compiled and set(compiled) <= set(traced)


@pytest.mark.nightly
def test_the_run_finds_all_code_in_the_cache(tiny_dataset, tmp_path):
    """The next run of the same shape starts no second process: its first step finds the code."""
    values = tiny_values(tiny_dataset, tmp_path / "r", max_steps=1, engine={"compile": True})
    values["engine"]["background_compile"] = False
    one = make(tiny_dataset, tmp_path / "p", engine={"compile": True})
    background = start_background(one.plan, one.engine.objective, CPU)
    usable, phrase = wait_for(background)
    assert usable and phrase.startswith("compiled in the background in "), phrase
    counters.clear()
    run(values)
    kinds = counters["inductor"]
    assert kinds["fxgraph_cache_hit"] > 0 and kinds["fxgraph_cache_miss"] == 0, kinds
    assert start_background(one.plan, one.engine.objective, CPU) is None


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_is_compiled_by_the_run(planned, tmp_path):
    broken = build_objective({"name": "next_token"})
    broken.forward = None  # not callable
    background = BackgroundCompiler(planned.plan, broken, CPU, tmp_path / "marker")
    usable, phrase = wait_for(background)
    assert usable and phrase.startswith("the second process cannot trace this model (TypeError: ")
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_the_second_process_ends_with_the_first(planned, tmp_path):
    background = BackgroundCompiler(planned.plan, planned.engine.objective, CPU, tmp_path / "marker")
    background._process.stdin.close()  # as if the first process were gone
    assert background._process.wait(PATIENCE) == 1
    background._process.stdin = None
    assert background.result() == (False, "the second process ended with exit status 1")


def sleeper(code="import time; time.sleep(1000)", session=False) -> BackgroundCompiler:
    """One whose process runs `code`."""
    background = object.__new__(BackgroundCompiler)
    background._begun = time.monotonic()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    background._process = subprocess.Popen([sys.executable, "-c", code], **pipes, start_new_session=session)
    return background


def test_a_process_that_was_killed_leaves_eager_code():
    """The run may be about to end, so it does not begin to compile."""
    background = sleeper()
    os.kill(background._process.pid, signal.SIGKILL)
    assert wait_for(background) == (False, "the second process ended with exit status -9")


def alive(pid: int) -> bool:
    """Not ended; one that has ended may wait for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_answer_does_not_wait_for_what_the_process_has_started():
    code = "import subprocess; print(subprocess.Popen(['sleep', '1000']).pid, end='')"
    usable, pid = wait_for(sleeper(code, session=True))
    assert usable
    begun = time.monotonic()
    while alive(int(pid)):
        assert time.monotonic() - begun < PATIENCE


def test_a_process_that_takes_too_long_is_ended(monkeypatch):
    background = sleeper()
    assert not background.finished()
    monkeypatch.setattr(background_compile, "MOST_SECONDS", 0.0)
    usable, phrase = wait_for(background)
    assert not usable and phrase.startswith("the second process did not finish in ")
    assert background._process.returncode == -signal.SIGKILL


# -- the run ----------------------------------------------------------------------------------------------------------------


class Stub:
    """A second process that is finished after a number of questions."""

    closed = False

    def __init__(self, after: int, answer: tuple[bool, str]) -> None:
        self.after, self.answer = after, answer

    def finished(self) -> bool:
        self.after -= 1
        return self.after < 0

    def result(self):
        return self.answer

    def close(self) -> None:
        self.closed = True


def trained(tiny_dataset, folder, monkeypatch, stub, **engine):
    """(losses, numbers of compiled calls after each step) of a run whose compiler changes nothing."""
    calls = []

    def compile(function, **options):
        def call(*args, **kwargs):
            calls.append(len(read_rows(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").exists() else 0)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", compile)
        patched.setattr(base, "start_background", lambda *arguments: stub)
        run(
            tiny_values(
                tiny_dataset, folder, log__every=1, engine={"compile": True, "background_compile": True} | engine
            )
        )
    return losses(folder), calls


def test_compiled_code_takes_over_once_it_is_ready(tiny_dataset, tmp_path, monkeypatch, capsys):
    never = Stub(1000, (True, ""))
    eager, calls = trained(tiny_dataset, tmp_path / "eager", monkeypatch, never)
    assert calls == [] and never.closed
    found, calls = trained(
        tiny_dataset, tmp_path / "r", monkeypatch, Stub(5, (True, "compiled in the background in 3 s"))
    )
    assert found[:6] == eager[:6] and found != eager  # the compiled loss adds in another order
    assert calls and min(calls) >= 5  # the rows of six steps are written before the seventh computes, or five
    assert "engine.compile: compiled in the background in 3 s: compiled code from step 7 on" in capsys.readouterr().err


def test_eager_code_stays_if_the_second_process_was_ended(tiny_dataset, tmp_path, monkeypatch, capsys):
    stub = Stub(2, (False, "the second process ended with exit status -9"))
    _, calls = trained(tiny_dataset, tmp_path / "r", monkeypatch, stub)
    assert calls == []
    assert "exit status -9: eager code from step 4 on" in capsys.readouterr().err


def test_seconds_of_compiling_are_in_the_metrics(tiny_dataset, tmp_path, monkeypatch, capsys):
    seconds = iter(range(1000))
    monkeypatch.setattr("trainer.runs.report.compile_seconds", lambda: float(next(seconds)))
    run(tiny_values(tiny_dataset, tmp_path / "r", max_steps=3))
    assert [row["compile_seconds"] for row in read_rows(tmp_path / "r" / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    said = capsys.readouterr()
    text = said.out + said.err
    assert "s, 1.0 s of it compiling" in text and "s of training (3.0 s of them compiling)" in text


# -- the choice -------------------------------------------------------------------------------------------------------------


def planned_config(dataset, folder, changes):
    config = build(RunConfig, tiny_values(dataset, folder / "r", **changes))
    return resolve(config, find_dataset(config.data)).config


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"engine": {"compile": False}}, "nothing is compiled"),
        ({"engine": {"compile": True, "strategy": "fsdp"}}, "the ranks of fsdp compile at the first step"),
        ({"engine": {"compile": True}, "deterministic": True}, "in a deterministic run"),
    ],
)
def test_what_forbids_it(tiny_dataset, tmp_path, changes, why):
    config = planned_config(tiny_dataset, tmp_path, changes)
    assert config.engine.background_compile is False and why in background_refusal(config)
    changes = {**changes, "engine": {**changes["engine"], "background_compile": True}}
    assert planned_config(tiny_dataset, tmp_path, changes).engine.background_compile is False


def test_a_gpu_that_cannot_hold_the_eager_steps_compiles_at_the_first_step():
    """The same microbatch on GPUs of other sizes."""
    batch = {"tokens_per_microbatch": 92 * 1024, "tokens_per_step": 92 * 1024}
    chosen = {}
    for name in ("h100-80gb", "t4-16gb"):
        engine = {"compile": True, "activation_checkpointing": "none"}
        values = {"model": {"name": "hlb"}, "engine": engine, "batch": batch, "precision": "bf16"}
        plan = resolve(build(RunConfig, values), gpu=GPUS[name])
        entry = next(entry for entry in plan.entries if entry.key == "engine.background_compile")
        chosen[name] = plan.config.engine.background_compile, entry.rule
    assert chosen["h100-80gb"] == (True, "no step waits for the compiler")
    assert chosen["t4-16gb"] == (
        False,
        "eager steps and the second process would need more memory than this device has",
    )
