"""The test cluster itself: what the tests of the launch scripts rely on."""

import contextlib
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


def test_batch_signal_and_requeue_of_one_array_element(cluster, tmp_path):
    slurm = cluster()
    me = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    warn = f"trap 'scontrol requeue {me}; sleep 60' USR1; touch {tmp_path}/{me}; while sleep 0.1; do :; done"
    job = slurm.sbatch("--array=0-1", "--wrap", f'test -n "$SLURM_RESTART_COUNT" || {{ {warn}; }}')
    for element in (f"{job}_0", f"{job}_1"):
        slurm.until((tmp_path / element).exists, element, 20)
    slurm.signal_batch(f"{job}_1", "USR1")
    assert slurm.wait(f"{job}_1", restarts=1)["JobState"] == "COMPLETED"
    assert slurm.job(f"{job}_0")["Restarts"] == "0"
    slurm.cancel(f"{job}_0")
    slurm.idle()


def test_crash_boot_cut_mend(cluster):
    """Jobs are requeued when their node crashes or is cut off, and run again when it is back."""
    slurm = cluster(node_timeout=5)
    words = ("--requeue", "--wrap", 'test -n "$SLURM_RESTART_COUNT" || srun sleep 100')
    jobs = [slurm.sbatch(f"--nodelist={node}", *words) for node in slurm.names]
    for node in slurm.names:
        slurm.until(lambda node=node: sleepers(slurm, node), f"the step on {node}", 20)
    crashed, cut = slurm.pids("node1"), sleepers(slurm, "node2")
    slurm.crash("node1")
    slurm.cut("node2")
    assert not any(Path(f"/proc/{pid}").exists() for pid in crashed)
    assert [slurm.wait(job, "PENDING", restarts=1)["Restarts"] for job in jobs] == ["1", "1"]
    assert sleepers(slurm, "node2") == cut  # nobody could tell them
    slurm.boot("node1")
    slurm.mend("node2")
    assert [slurm.wait(job)["JobState"] for job in jobs] == ["COMPLETED", "COMPLETED"]
    slurm.idle()
    assert sleepers(slurm, "node2") == []


def sleepers(slurm, node: str) -> list[int]:
    """The processes `sleep 100` of a job on the node."""
    found = []
    for pid in slurm.pids(node):
        with contextlib.suppress(OSError):  # it has just ended
            if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"/sleep\x00100\x00"):
                found.append(pid)
    return found


def test_slurmd_dies_and_job_lives_on(cluster):
    slurm = cluster(node_timeout=5)
    job = slurm.sbatch("--nodelist=node1", "--wrap", "sleep 4")
    slurm.wait(job, "RUNNING")
    slurm.kill_slurmd("node1")
    slurm.start_slurmd("node1")
    done = slurm.wait(job)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "0")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_over(cluster, tmp_path, how):
    """Ctrl-C and kill -9 of the tests in the middle of a job: all processes, links and mounts of the cluster are gone."""
    cluster()  # skips where there is none
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from slurm.cluster import Cluster
with Cluster({str(tmp_path)!r}) as slurm:
    slurm.wait(slurm.sbatch("-N2", "--wrap", "srun sleep 1000"), "RUNNING")
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
