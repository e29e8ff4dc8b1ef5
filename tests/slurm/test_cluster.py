"""The test cluster itself: what the tests of the launch scripts rely on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_nodes_are_machines(cluster):
    """A job of two nodes finds two host names that give two addresses, and the claimed GPUs."""
    slurm = cluster()
    script = 'echo "$(hostname) $(getent hosts "$(hostname)" | cut -d" " -f1) $(hostname -I) $CUDA_VISIBLE_DEVICES"'
    job = slurm.sbatch("-N2", "--gpus-per-node=2", "--wrap", f"srun bash -c '{script}'")
    done = slurm.wait(job)
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("COMPLETED", "0:0", "0")
    lines = sorted(line.split() for line in Path(done["StdOut"]).read_text().splitlines())
    assert [line[0] for line in lines] == ["node1", "node2"]
    assert all(named == own for _, named, own, _ in lines) and lines[0][1] != lines[1][1]
    assert [line[3] for line in lines] == ["0,1", "0,1"]
    assert not set(slurm.pids("node1")) & set(slurm.pids("node2"))


def test_two_clusters_at_once_do_not_meet(cluster, tmp_path):
    """Another test run on the same machine has its own cluster; a failing job says why in the error of `wait`."""
    first = cluster()
    with type(first)(tmp_path, nodes=1) as second:
        job = second.sbatch("--wrap", "echo no such luck; exit 3")
        with pytest.raises(TimeoutError, match="job 1 is FAILED") as error:
            second.wait(job, "COMPLETED")
        assert "no such luck" in str(error.value) and "ExitCode=3:0" in str(error.value)
        assert first.is_idle()


@pytest.mark.parametrize("track, reached", [("linuxproc", True), ("pgid", False)])
def test_tracking_decides_whom_a_signal_reaches(cluster, tmp_path, track, reached):
    """A worker that its launcher has put into a session of its own gets the signals of a step with linuxproc only."""
    slurm = cluster(track=track)
    worker = f"trap 'touch {tmp_path}/got' USR1; touch {tmp_path}/ready; while kill -0 $PPID; do sleep 0.1; done"
    (tmp_path / "worker").write_text(worker)
    (tmp_path / "launcher").write_text(f"trap : USR1; setsid bash {tmp_path}/worker & while :; do sleep 0.1; done")
    job = slurm.sbatch("--wrap", f"srun bash {tmp_path}/launcher")
    slurm.until((tmp_path / "ready").exists, "the worker", 20)
    slurm.cancel(job, "--signal=USR1")
    if reached:
        slurm.until((tmp_path / "got").exists, "the signal", 10)
    else:
        time.sleep(2)  # the other case takes some 0.2 s
        assert not (tmp_path / "got").exists()
    slurm.cancel(job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_over(cluster, tmp_path, how):
    """Ctrl-C and kill -9 of the tests in the middle of a job: all processes, links and mounts of the cluster are gone."""
    cluster()  # skips where there is none
    script = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and so inherited, where the tests are a shell's background job
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from slurm.cluster import Cluster
with Cluster({str(tmp_path)!r}) as slurm:
    marks = {str(tmp_path)!r} + "/started."
    slurm.sbatch("-N2", "--wrap", f"srun bash -c 'touch {{marks}}$SLURM_PROCID; exec sleep 1000'")
    # A job is RUNNING before its processes are there.
    slurm.until(lambda: all(map(os.path.exists, (marks + "0", marks + "1"))), "both tasks", 30)
    print(slurm.link, *(pid for node in slurm.names for pid in slurm.pids(node)), flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    link, *pids = process.stdout.readline().split()
    assert Path("/sys/class/net", link).exists() and len(pids) > 6
    process.send_signal(how)
    process.wait(20)

    def left() -> list[str]:
        found = [entry.name for entry in Path("/proc").glob("[0-9]*") if belongs(entry)]
        return found + [link] * Path("/sys/class/net", link).exists()

    def belongs(entry: Path) -> bool:
        """Whether a process is one of the cluster. Zombies have no command line, and wait for a parent beyond our reach."""
        try:
            return str(tmp_path).encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
        except OSError:
            return False

    deadline = time.monotonic() + 5
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
