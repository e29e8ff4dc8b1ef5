"""Real processes over gloo: they meet or say who is missing, and a rank that differs or is slow is named."""

import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from conftest import PATIENCE, ROOT, tiny_values
from processes import Ended, forked_trainer

pytestmark = pytest.mark.slow

# Each strikes one rank. Host infos are found by `distributed`, before the meeting, and by `preflight`, for its table.
PLUGIN = """
import dataclasses, os, sys, time
from trainer.runtime import device
from trainer.training import preflight
from trainer.runtime import distributed
from trainer.core.errors import UserError

rank, attempt = int(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT")
trouble, hit = os.environ["TEST_TROUBLE"], int(os.environ["TEST_HIT"])
distributed.MEETING_SECONDS = 4.0

def change_host_info(**changes):
    original = distributed.find_host_info
    def changed(*words):
        own = original(*words)
        software = own.software | changes.get("software", {})
        return dataclasses.replace(own, **changes | {"software": software})
    distributed.find_host_info = preflight.find_host_info = changed

if trouble == "machines":
    change_host_info(host=f"node{rank}", peers=(rank, rank + 1))
if trouble == "machines" and rank == hit:
    matmul = preflight._matmul
    preflight._matmul = lambda *words: matmul(*words) / 10
if trouble == "torch" and rank == hit:
    change_host_info(host="node2", software={"torch": "2.0.0"})
if trouble == "no device" and rank == hit:
    def choose_device(*_):
        raise UserError("device: this GPU is broken")
    device.choose_device = choose_device
if trouble == "full" and rank == hit:
    preflight._free = lambda path: 1000
if trouble == "absent" and rank == hit:
    time.sleep(1000)
if trouble == "restart":
    if attempt == "0" and rank == 1:
        time.sleep(3)  # rank 0 has come by then
        os._exit(1)
    if attempt == "1" and rank == 0:
        time.sleep(1000)
"""


@pytest.fixture
def environment(tmp_path):
    """(trouble, rank that has it) -> variables for processes that load the plugin."""
    (tmp_path / "trouble.py").write_text(PLUGIN)

    def variables(trouble: str, hit: int) -> dict[str, str]:
        path = f"{tmp_path}{os.pathsep}{ROOT}"
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TEST_TROUBLE": trouble, "TEST_HIT": str(hit)}

    return variables


def torchrun(processes: int, env: dict, *words, options=()) -> subprocess.CompletedProcess:
    """For what torchrun does. What ranks do by themselves, `ranks` tries."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *options]
    command = [sys.executable, *launcher, "-m", "trainer", *map(str, words), "--plugin", "trouble"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)


def ranks(count: int, env: dict, *words) -> Ended:
    return forked_trainer(*words, "--plugin", "trouble", ranks=count, env=env)


def own_line(text: str) -> str:
    """The one error line of rank 0; torchrun's own traceback follows it."""
    (line,) = [line for line in text.splitlines() if line.startswith("error: ") and "[rank" not in line]
    return line


@pytest.mark.parametrize("processes", [2, 3])
def test_the_verb(environment, processes):
    done = torchrun(processes, environment("none", 0), "preflight", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    header, line = done.stdout.splitlines()
    assert header.startswith("machine") and f"{processes} (ranks 0-{processes - 1})" in line and "GFLOP/s" in line
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("preflight: ")]
    assert said.startswith(f"preflight: 1 machine x {processes} processes, equal software (torch ")
    assert re.search(r"all-reduce of 4 MiB at [\d.]+ GB/s \(slowest matmul: ", said)


def test_one_process(environment):
    command = [sys.executable, "-m", "trainer", "preflight", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "preflight: 1 machine x 1 process, torch " in done.stderr and "all-reduce" not in done.stderr


def test_three_machines_and_a_slow_one(environment):
    done = ranks(3, environment("machines", 2), "preflight", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    _, *lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["node0", "node1", "node2"]
    assert all(re.search(r"[\d.]+ GB/s, [\d.]+ GB/s$", line) for line in lines), "each has two links of the ring"
    assert "preflight: 3 machines x 1 process, equal software" in done.stderr
    # One machine's processes have one clock; a collective takes them far less than a second.
    assert re.search(r"clocks within [\d.e+]+ ms", done.stderr)
    assert "warning: preflight: rank 2 on node2: a matrix product runs at 0." in done.stderr


@pytest.mark.parametrize("hit", [0, 1])
def test_another_version_ends_the_run_with_one_line(environment, tiny_dataset, tmp_path, hit):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run")))
    done = ranks(2, environment("torch", hit), "train", tmp_path / "run.yaml")
    assert done.returncode != 0
    versions = ["2.0.0", re.escape(version("torch"))]
    odd, usual = versions if hit == 1 else reversed(versions)  # of two that differ rank 0's is taken to be right
    line = own_line(done.stderr)
    assert re.match(rf"error: preflight: torch is {odd} on \S+ \(rank 1\), {usual} elsewhere: make them equal", line), (
        line
    )
    assert not (tmp_path / "run").exists()


def test_training_says_it_in_a_line(environment, tiny_dataset, tmp_path):
    values = tiny_values(tiny_dataset, tmp_path / "run", max_steps=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    done = ranks(2, environment("none", 0), "train", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("preflight: 1 machine x 2 processes") == 1


def test_no_room_for_a_checkpoint(environment, tiny_dataset, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run")))
    done = ranks(2, environment("full", 1), "train", tmp_path / "run.yaml")
    assert done.returncode != 0
    assert re.match(r"error: run_dir: 1 kB free at .*, but a checkpoint takes \d+ kB", own_line(done.stderr))


def test_a_rank_without_a_device_is_heard_by_all(environment):
    """Before the group begins: nobody waits for it."""
    done = ranks(2, environment("no device", 1), "preflight")
    assert done.returncode != 0
    assert re.fullmatch(r"error: device: this GPU is broken \(\S+ \(rank 1\)\)", own_line(done.stderr))


def test_a_restarted_attempt_does_not_see_who_came_before(environment):
    """Rank 0 comes to the first attempt and not to the second, which rank 1 tells, since rank 0 is not there to speak."""
    done = torchrun(2, environment("restart", 0), "preflight", options=["--max-restarts", "1"])
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: \[rank 1\] process group: rank 0 \(\S+\) has not come to \S+:\d+ within 4 s", line), line


@pytest.fixture
def start(environment):
    """Starts ranks by hand, without a launcher: rank 0 holds the store."""
    started: list[subprocess.Popen] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank: int, size: int, trouble: str, hit: int) -> subprocess.Popen:
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "trainer", "preflight", "--device", "cpu", "--plugin", "trouble"]
        env = environment(trouble, hit) | {name: str(value) for name, value in place.items()}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, its one error line)."""
    _, err = process.communicate(timeout=PATIENCE)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return process.returncode, line


def test_missing_ranks_are_named_by_all_who_came(start):
    started = [start(rank, 3, "absent", 1) for rank in (0, 1, 2)]
    codes, lines = zip(end(started[0]), end(started[2]), strict=True)
    assert codes == (2, 2)
    expected = r"process group: rank 1 \(\S+\) has not come to 127\.0\.0\.1:\d+ within 4 s; read the output of the missing ranks"
    assert re.fullmatch(f"error: {expected}", lines[0]), lines[0]
    assert re.fullmatch(rf"error: \[rank 2\] {expected}", lines[1]), "not that rank 0 has left"


def test_all_are_missing_but_rank_zero(start):
    code, line = end(start(0, 4, "none", 0))
    assert code == 2
    assert re.match(r"error: process group: ranks 1-3 \(\S+\) have not come to 127\.0\.0\.1:\d+ within 4 s", line), line


def test_rank_zero_is_missing(start):
    code, line = end(start(1, 2, "none", 0))
    assert code == 2
    assert re.match(r"error: \[rank 1\] process group: nobody answers at 127\.0\.0\.1:\d+ within 4 s", line), line
