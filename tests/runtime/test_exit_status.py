"""What a run tells the script that started it: where it lives before it begins, and how it ended."""

import errno
import os
import socket
import threading
import time

import pytest
import yaml
from conftest import ROOT, error_line, tiny_values
from processes import forked_trainer

from trainer.__main__ import known_errors
from trainer.core.errors import MachineError, UserError
from trainer.runs.folder import locked
from trainer.runtime.exit_status import VARIABLE, write_exit_status


def outcome_of(tmp_path, values: dict, *flags, **variables: str) -> str:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    environment = {"CRESCENDO_OUTCOME": str(tmp_path / "outcome"), **variables}
    forked_trainer("train", tmp_path / "config.yaml", *flags, env=environment)
    return (tmp_path / "outcome").read_text() if (tmp_path / "outcome").exists() else ""


def test_finished_also_when_there_is_nothing_left_to_do(tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=2)
    assert outcome_of(tmp_path, values) == "finished\n"
    assert outcome_of(tmp_path, values) == "finished\nfinished\n"


def test_refused_says_why(tiny_dataset, tmp_path):
    line = outcome_of(tmp_path, tiny_values(tiny_dataset, tmp_path / "run"), "--engine.strategy", "ddp")
    assert line.startswith("refused: engine.strategy: ddp needs several processes") and line.count("\n") == 1


def test_a_fault_of_the_machine_is_no_refusal(tiny_dataset, tmp_path):
    """Another program has the port: on another machine, or with another port, the same command works."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        assert outcome_of(tmp_path, tiny_values(tiny_dataset, tmp_path / "run"), **place) == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, folder",
    [
        (["--run_dir", "runs/mine"], "runs/mine"),
        (["--model.name", "gpt2", "--model_scale", "0.5"], "runs/gpt2-0.5"),
        (["configs/quickstart.yaml"], "runs/quickstart"),
    ],
)
def test_the_run_folder_is_told_without_a_run(words, folder):
    done = forked_trainer("train", *words, "--print_run_dir")
    assert done.stdout == f"{ROOT / folder}\n", done.stderr


def test_the_run_folder_of_a_wrong_config_is_not_told():
    assert "unknown key model_scal" in error_line(forked_trainer("train", "--model_scal", "2", "--print_run_dir"))


def test_a_folder_in_use_can_be_waited_for(tmp_path):
    """As a restarted job does for what is left of its last try."""
    taken = threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            taken.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    with locked(tmp_path, patience=30):
        pass
    holder.join()


def test_an_outcome_that_cannot_be_written_is_a_warning(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none" / "outcome"))
    write_exit_status("finished")
    assert capsys.readouterr().err.startswith("warning: CRESCENDO_OUTCOME: ")


@pytest.mark.parametrize(
    "number, kind", [(errno.ESTALE, MachineError), (errno.ENOSPC, MachineError), (errno.EACCES, UserError)]
)
def test_what_may_pass_is_told_apart(number, kind):
    """The scripts start the first again, and not the second."""
    with pytest.raises(UserError) as caught, known_errors():
        raise OSError(number, os.strerror(number), "/shared/file")
    assert type(caught.value) is kind and str(caught.value) == f"/shared/file: {os.strerror(number)}"
