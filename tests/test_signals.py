"""SIGTERM and SIGUSR1 in a real process: noted, told once, and a second SIGTERM ends it."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import PATIENCE

from trainer.engine import signals
from trainer.engine.distributed import World
from trainer.engine.signals import StopSignals, exit_code, stopped_line


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_is_noted_and_told(number, capfd):
    with StopSignals(World()) as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number
    assert capfd.readouterr().err == f"{number.name}: will stop with a checkpoint once all processes have heard\n"


def test_other_ranks_are_silent(capfd):
    with StopSignals(World(rank=1, size=2)) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_sigterm_overrides_sigusr1_and_not_the_reverse(capfd):
    for order in ((signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGTERM)):
        with StopSignals(World()) as stop:
            for number in order:
                os.kill(os.getpid(), number)
            assert stop.asked == signal.SIGTERM
        assert capfd.readouterr().err.count("\n") == 1


def test_handlers_are_restored_after_an_error_too():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with pytest.raises(ValueError), StopSignals(World()):
        assert [signal.getsignal(number) for number in signals.STOPPING] != before
        raise ValueError
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


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


def test_one_request_delivered_twice_is_one(capfd):
    """As by `timeout`: were the second taken for a new request, it would end this process."""
    with StopSignals(World()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
    assert capfd.readouterr().err.count("\n") == 1


def test_a_later_sigterm_ends_at_once():
    script = (
        "import os, signal, time\n"
        "from trainer.engine import signals\n"
        "from trainer.engine.distributed import World\n"
        "signals.SAME_REQUEST_SECONDS = 0.05\n"
        "with signals.StopSignals(World()):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('alive', flush=True)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "alive\n"), done.stderr


def test_exit_codes_and_last_line():
    assert [exit_code(number) for number in signals.STOPPING] == [143, 138]
    assert stopped_line(signal.SIGTERM, 1200) == (
        "stopped by SIGTERM at step 1,200; checkpoint written; the same command goes on from it"
    )
