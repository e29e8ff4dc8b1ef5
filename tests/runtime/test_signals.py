"""Signals to a run in real processes: before training begins they end it, then they are noted; a second request ends at once."""

import itertools
import os
import signal
import sys
import threading
import time

import processes
import pytest
import torch
from conftest import tiny_values

from trainer.__main__ import interrupted_line
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint import saver as checkpoint_saver
from trainer.checkpoint.manifest import amend
from trainer.core.errors import Damaged, Stopped
from trainer.core.files import read_json
from trainer.inference import evaluation as evaluate
from trainer.runs.metrics import read_rows
from trainer.runs.report import Report
from trainer.runtime import signals
from trainer.runtime.distributed import World
from trainer.runtime.listener import listener
from trainer.runtime.signals import StopSignals, exit_code, not_begun_line, stopped_line, will_stop_line
from trainer.training import loop, start
from trainer.training.run import Run


def begun(world: World | None = None) -> tuple[StopSignals, list[str]]:
    """Signals of a run that trains, and what its console says."""
    said: list[str] = []
    stop = StopSignals(world or World())
    stop.begin(said.append)
    return stop, said


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_is_noted_and_told(number):
    stop, said = begun()
    with stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number
    assert said == [will_stop_line(number)]


@pytest.mark.parametrize("number", signals.STOPPING)
def test_before_training_begins_it_ends_the_run(number):
    with pytest.raises(Stopped) as caught, StopSignals(World()) as stop:
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert caught.value.number == stop.asked == number


def test_a_signal_that_a_destructor_swallowed_is_not_lost():
    class Deaf:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with StopSignals(World()) as stop:
        sys.unraisablehook, hook = (lambda *_: None), sys.unraisablehook
        try:
            Deaf()
        finally:
            sys.unraisablehook = hook
        with pytest.raises(Stopped):
            stop.begin(lambda line: None)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_other_signals_override_sigusr1_and_not_the_reverse(first):
    for order in ((first, signal.SIGUSR1), (signal.SIGUSR1, first)):
        stop, said = begun()
        with stop:
            for number in order:
                os.kill(os.getpid(), number)
            assert stop.asked == first
        assert len(said) == 1


def test_handlers_are_restored_after_an_error_too():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with pytest.raises(ValueError), StopSignals(World()):
        assert [signal.getsignal(number) for number in signals.STOPPING] != before
        raise ValueError
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


def test_a_signal_after_the_run_is_none_of_its_business(monkeypatch):
    """A process may go on, as a notebook does: a Ctrl-C then is no second request to a run that has stopped."""
    monkeypatch.setattr(signals, "SAME_KEY_SECONDS", -1.0)
    stop, _ = begun()
    ended = []
    stop._end = ended.append
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    listener().drain()
    assert ended == []


def test_what_was_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(World()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def work():
        with StopSignals(World()):
            seen.append([signal.getsignal(number) for number in signals.STOPPING])

    before = [signal.getsignal(number) for number in signals.STOPPING]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_request_delivered_twice_is_one():
    """As by `timeout`: were the second taken for a new request, it would end this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        stop, said = begun()
        with stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stop.asked == number
        assert len(said) == 1


def test_a_forked_process_can_be_ended():
    """It would else note the signal, and its parent hear of it."""
    stop, said = begun()
    with stop:
        pid = os.fork()
        if pid == 0:
            time.sleep(10)
            os._exit(0)
        time.sleep(0.05)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert stop.asked is None and said == []


SECOND = """
import ctypes, os, signal, sys, threading
from trainer.runtime import signals
from trainer.runtime.distributed import World

signals.SAME_REQUEST_SECONDS = signals.SAME_KEY_SECONDS = 0.05
number = getattr(signal, sys.argv[1])

def ask():
    os.kill(os.getpid(), number)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

stop = signals.StopSignals(World())
stop.begin(print)
with stop:
    threading.Timer(0.1, ask).start()
    for part in range(4):
        ctypes.CDLL(None).usleep(900_000)  # native code, which goes on after a signal
print("not reached")
"""


def test_a_second_request_ends_at_once_in_native_code_too(tmp_path):
    (tmp_path / "script.py").write_text(SECOND)
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    runs = [processes.start(tmp_path / "script.py", name) for name in names]
    for started, name, code in zip(runs, names, (130, 143, 129), strict=True):
        ended = processes.wait(started)
        assert ended.codes == [code]
        assert ended.stderr == f"{name} again: ends at once, without another checkpoint\n"


def test_exit_codes_and_last_lines():
    assert [exit_code(number) for number in signals.STOPPING] == [143, 130, 129, 138]
    assert stopped_line(signal.SIGTERM, 1200) == (
        "stopped by SIGTERM at step 1,200; checkpoint written; the same command goes on from it"
    )
    assert not_begun_line(signal.SIGINT, None) == "stopped by SIGINT before training began; nothing was saved"
    assert not_begun_line(signal.SIGINT, 1200) == (
        "stopped by SIGINT before training began; the same command goes on from the checkpoint of step 1,200"
    )


@pytest.mark.parametrize(
    "verb, line", [("train", "interrupted before training began"), ("generate", "interrupted")]
)  # fmt: skip
def test_an_interrupt_elsewhere_promises_nothing(monkeypatch, verb, line):
    monkeypatch.setattr(sys, "argv", ["trainer", verb])
    assert interrupted_line(KeyboardInterrupt()) == line


@pytest.fixture
def strike(monkeypatch):
    """(module, name of a function) -> a Ctrl-C comes when it is called for the first time."""

    def at(module, name):
        original = getattr(module, name)

        def struck(*words):
            monkeypatch.setattr(module, name, original)
            os.kill(os.getpid(), signal.SIGINT)
            return original(*words)

        monkeypatch.setattr(module, name, struck)

    return at


def test_control_c_while_a_run_is_built(tiny_dataset, tmp_path, strike):
    strike(start, "Run")
    with pytest.raises(Stopped) as caught:
        start.start(tiny_values(tiny_dataset, tmp_path / "run"))
    assert interrupted_line(caught.value) == "stopped by SIGINT before training began; nothing was saved"


def test_control_c_while_a_run_saves(tiny_dataset, tmp_path, strike, capsys):
    """The save is finished; another follows after the next step."""
    strike(checkpoint_saver, "save")
    with pytest.raises(SystemExit) as caught:
        start.start(tiny_values(tiny_dataset, tmp_path / "run", max_steps=8))
    assert caught.value.code == 130
    said = capsys.readouterr().err
    steps = [step for step, _ in checkpoint.found(tmp_path / "run" / "checkpoints")]
    assert steps[0] == 4 and steps[-1] in (5, 6)
    assert stopped_line(signal.SIGINT, steps[-1]) in said and will_stop_line(signal.SIGINT) in said
    strike(start, "Run")
    with pytest.raises(Stopped, match=f"goes on from the checkpoint of step {steps[-1]}"):
        start.start(tiny_values(tiny_dataset, tmp_path / "run", max_steps=8))


# -- while a run evaluates ---------------------------------------------------------------------------------------------


class Pair(World):
    """Of two ranks the one that is here; the other has the same flags and seconds."""

    def sum(self, tensor):
        return tensor * 2


def test_ranks_ask_each_other_more_seldom_where_turns_are_short(monkeypatch):
    now, asked, questions = [0.0], torch.zeros(len(signals.STOPPING) + 1), []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    check = signals.StopCheck(lambda: questions.append(now[0]) or asked, Pair(size=2, local_size=2))
    for _ in range(100):
        assert check.heard() is None
        now[0] += 0.125
    gaps = [later - sooner for sooner, later in itertools.pairwise(questions)]
    assert gaps[:2] == [0.125, 0.125] and gaps == sorted(gaps)
    assert 1.0 <= gaps[-1] <= 4.0
    asked = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    turns = next(turn for turn in range(1000) if check.heard() is not None)
    assert turns * 0.125 <= 2 * gaps[-1]
    assert signals.first_of(asked.tolist()) == signal.SIGINT


def test_a_long_turn_is_the_last_but_one(monkeypatch):
    now, flags = [0.0], [torch.zeros(5)]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    check = signals.StopCheck(lambda: flags[0], World())
    for _ in range(5):
        assert check.heard() is None
        now[0] += 60
    flags[0] = torch.tensor([1.0, 0, 0, 0, 0])
    assert [check.heard(), check.heard()] == [None, signal.SIGTERM]


STEPS_EVALUATED = (4, 8, 10)


@pytest.fixture(scope="module")
def evaluated(tiny_dataset):
    """evaluated(folder, step, stage) -> exit code of a run of six steps; a SIGTERM comes in this step or at the second window of
    its evaluation."""
    score, validate, step_done = evaluate.score, Run.validate, loop.optimiser_step
    windows: list[int] = []  # the step of the evaluation, for each
    here = {"step": 0, "at": None}

    def strike(*place):
        if place == here["at"]:
            os.kill(os.getpid(), signal.SIGTERM)

    def optimiser_step(run):
        strike(run.state.step + 1, "step")
        return step_done(run)

    def validated(run):
        windows.clear()
        here["step"] = run.state.step
        return validate(run)

    def scored(*words):
        windows.append(here["step"])
        strike(here["step"], f"window {len(windows)}")
        return score(*words)

    def run(folder, *at):
        here["at"] = at
        values = {"evaluation__every": 3, "max_steps": 6, "evaluation__protocol": "full", "log__sample_tokens": 4}
        try:
            start.start(tiny_values(tiny_dataset, folder, **values))
        except SystemExit as end:
            assert at[1] == "step" or len(windows) <= 4, "the evaluation goes on"
            return end.code
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "rows_at_once", lambda *_: 1)
        patch.setattr(evaluate, "score", scored)
        patch.setattr(Run, "validate", validated)
        patch.setattr(loop, "optimiser_step", optimiser_step)
        patch.setattr(Report, "draw_curves", lambda report: None)
        yield run


@pytest.fixture(scope="module")
def calm(evaluated, tmp_path_factory):
    """Folder of such a run that no signal came to."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    assert evaluated(folder) == 0
    return folder


def rows_of(folder):
    """Without what a clock and the process say."""
    rows = read_rows(folder / "metrics.jsonl")
    measured = (
        "seconds",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
    )  # of the process, which is another one later
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def test_a_signal_breaks_evaluations_off_and_the_run_makes_up_for_them(evaluated, calm, tmp_path, capsys):
    folder = tmp_path / "run"
    for at in (3, 3, 6, 6):  # also the one that makes up for it
        assert evaluated(folder, at, "window 2") == 143
        assert stopped_line(signal.SIGTERM, at) in capsys.readouterr().err
        assert rows_of(folder) == rows_of(calm)[: at - 1]
        assert [step for step, _ in checkpoint.found(folder / "checkpoints")][-1] == at
    assert evaluated(folder) == 0
    assert rows_of(folder) == rows_of(calm) and rows_of(calm)[2]["val_loss"] != rows_of(calm)[5]["val_loss"]
    assert (folder / "samples.txt").read_text() == (calm / "samples.txt").read_text()
    assert evaluated(folder) == 0
    said = capsys.readouterr().err
    assert "is finished (6 steps)" in said and "warning" not in said


def test_an_evaluation_is_left_to_the_next_process_where_all_have_heard_before_it(evaluated, calm, tmp_path):
    folder = tmp_path / "run"
    assert evaluated(folder, 2, "step") == 143
    assert rows_of(folder) == rows_of(calm)[:2]
    [(step, path)] = checkpoint.found(folder / "checkpoints")
    manifest = read_json(path / checkpoint.MANIFEST)
    assert step == 3 and manifest["row"].keys() >= rows_of(calm)[2].keys()
    for row in ({"step": 3}, manifest["row"] | {"step": 4}, 7):
        amend(path, {"row": row})
        with pytest.raises(Damaged, match="is not a row of step 3"):
            evaluated(folder)
    amend(path, {"row": manifest["row"]})
    assert evaluated(folder) == 0
    assert rows_of(folder) == rows_of(calm)
