"""Signals to a run in real processes: before training begins they end it, then they are noted; a second request ends at once."""

import os
import signal
import sys
import threading
import time

import processes
import pytest
from conftest import tiny_values

from trainer.__main__ import interrupted_line
from trainer.checkpoint import format as checkpoint
from trainer.checkpoint import saver as checkpoint_saver
from trainer.commands import train as train_command
from trainer.core.errors import Stopped
from trainer.runtime import signals
from trainer.runtime.distributed import World
from trainer.runtime.signals import StopSignals, exit_code, not_begun_line, stopped_line, will_stop_line


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
        assert ended.stderr == f"{name} once more: ends at once, without another checkpoint\n"


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
    strike(train_command, "Run")
    with pytest.raises(Stopped) as caught:
        train_command.run(tiny_values(tiny_dataset, tmp_path / "run"))
    assert interrupted_line(caught.value) == "stopped by SIGINT before training began; nothing was saved"


def test_control_c_while_a_run_saves(tiny_dataset, tmp_path, strike, capsys):
    """The save is finished; another follows after the next step."""
    strike(checkpoint_saver, "save")
    with pytest.raises(SystemExit) as caught:
        train_command.run(tiny_values(tiny_dataset, tmp_path / "run", max_steps=8))
    assert caught.value.code == 130
    said = capsys.readouterr().err
    steps = [step for step, _ in checkpoint.found(tmp_path / "run" / "checkpoints")]
    assert steps[0] == 4 and steps[-1] in (5, 6)
    assert stopped_line(signal.SIGINT, steps[-1]) in said and will_stop_line(signal.SIGINT) in said
    strike(train_command, "Run")
    with pytest.raises(Stopped, match=f"goes on from the checkpoint of step {steps[-1]}"):
        train_command.run(tiny_values(tiny_dataset, tmp_path / "run", max_steps=8))
