"""What launch/multinode.sh makes of how a try ended, with stand-ins for Slurm's commands. tests/slurm has the real ones."""

import os
import subprocess

import pytest
from conftest import PATIENCE, ROOT

# Each notes its words. A command named in FAILS, such as "sinfo sinfo", fails that often first, as while slurmctld is busy.
STAND_IN = """#!/bin/bash
name=$(basename "$0")
echo "$name $*" >> "$STAGE/calls"
if [[ " $FAILS " = *" $name "* ]] && [ "$(grep -c "^$name " "$STAGE/calls")" -le "$(grep -o "$name" <<< "$FAILS" | wc -l)" ]; then
  exit 1
fi
case "$name $*" in
  python*) echo "$STAGE/run" ;;
  "scontrol show hostnames"*) echo node1 ;;
  *"show job"*) echo "JobId=7 JobState=$STATE Requeue=1 Restarts=$RESTARTS BatchFlag=1" ;;
  srun*)
    [ -z "$OUTCOME" ] || echo "$OUTCOME" > "$CRESCENDO_OUTCOME"
    [ -z "$STEP" ] || { mkdir -p "$STAGE/run/checkpoints/$STEP"; touch "$STAGE/run/checkpoints/$STEP/manifest.json"; }
    exit 1 ;;
  sinfo*) echo "node1 $NODE" ;;
esac
"""


@pytest.fixture
def attempt(tmp_path):
    """attempt(**what happens) -> (exit code, whether the job was requeued, the last line it printed)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "site.env").touch()
    for name in ("python", "scontrol", "srun", "sinfo", "scancel", "sleep"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**changes: str) -> tuple[int, bool, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment |= {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "STAGE": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT), "SITE_ENV": str(tmp_path / "site.env"),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_CPUS_PER_NODE": "16,8(x2)",
            "SLURM_GPUS_ON_NODE": "8", "PYTHON": "python", "LAUNCHER": "torchrun",
            "FAILS": "", "RESTARTS": "0", "OUTCOME": "", "STEP": "", "STATE": "RUNNING", "NODE": "allocated",
        }  # fmt: skip
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "multinode.sh"), "x.yaml"],
            env=environment | changes, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
        )  # fmt: skip
        calls = (tmp_path / "calls").read_text()
        text = done.stdout.strip().rpartition("\n")[2]
        return done.returncode, "scontrol requeue 7" in calls, text.partition(": ")[2] + done.stderr

    return run


@pytest.mark.parametrize(
    "what, code, requeued, line",
    [
        ({"OUTCOME": "finished"}, 0, False, "finished"),
        ({"OUTCOME": "refused: seed: no"}, 2, False, "refused: seed: no; not started again"),
        (
            {"OUTCOME": "stopped by SIGTERM", "STEP": "step-00000005"},
            1,
            True,
            "stopped by SIGTERM; newest checkpoint step-00000005; starting again",
        ),
        ({"STEP": "step-00000005"}, 1, True, "the run made progress; starting again"),
        ({"NODE": "down*"}, 1, True, "not answering: node1 ; starting again"),
        ({}, 1, True, "once more; starting again"),
        ({"RESTARTS": "50"}, 1, False, "once more; not started again: MAX_REQUEUES is 50"),
        # Slurm ends the job itself: a scancel whose signal the script has not seen yet.
        ({"STATE": "COMPLETING"}, 143, False, "once more; ended by Slurm"),
        ({"OUTCOME": "stopped by SIGTERM", "STATE": ""}, 143, False, "stopped by SIGTERM; no new checkpoint; ended by Slurm"),
        # slurmctld is busy or restarting
        ({"FAILS": "scontrol scontrol"}, 1, True, "once more; starting again"),
        ({"FAILS": " ".join(["sinfo"] * 9)}, 1, True, "once more; starting again"),
    ],
)  # fmt: skip
def test_what_becomes_of_a_job(attempt, what, code, requeued, line):
    assert attempt(**what) == (code, requeued, line)


def test_warned_for_the_fifth_time_in_a_row(attempt, tmp_path):
    """A time limit that leaves no time for a step. (The script's own process is the parent of srun's.)"""
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\nkill -USR1 $PPID; /bin/sleep 0.5; exit 1\n")
    lines = [attempt(RESTARTS=str(number))[2] for number in range(5)]
    late = "not all processes stopped within 150 s; "  # the stand-in for sleep takes no time
    assert lines[:4] == [f"{late}no new checkpoint; starting again"] * 4
    assert lines[4].startswith("warned 5 times in a row before a new checkpoint: not started again")


def test_twice_in_a_row_before_a_new_checkpoint_is_the_end(attempt):
    assert attempt()[1]
    code, requeued, line = attempt(RESTARTS="1")
    assert (code, requeued) == (1, False) and line.startswith(
        "failed 2 times in a row before a new checkpoint: not started again"
    )


def test_progress_between_two_failures_counts(attempt):
    assert attempt()[1]
    assert attempt(RESTARTS="1", OUTCOME="stopped by SIGTERM", STEP="step-00000005")[1]
    assert attempt(RESTARTS="2") == (1, True, "once more; starting again")


def test_a_lost_machine_is_no_failure_of_the_run(attempt):
    assert attempt()[1]
    assert attempt(RESTARTS="1", NODE="idle*")[1]


def test_the_smallest_machine_counts(attempt, tmp_path):
    """srun can give no machine more CPUs than it has."""
    attempt()
    assert " --cpus-per-task=8 " in (tmp_path / "calls").read_text()


def test_another_jobs_number_of_restarts_does_not_count(attempt):
    """A job that a requeued job submits gets its environment."""
    assert attempt(SLURM_RESTART_COUNT="50")[1]


def test_the_site_file_may_end_in_a_failing_command(attempt, tmp_path):
    (tmp_path / "site.env").write_text('MAX_REQUEUES=0\n[ -n "$NOT_SET" ] && echo set\n')
    assert attempt()[2] == "once more; not started again: MAX_REQUEUES is 0"


def test_job_txt_tells_no_secret(attempt, tmp_path):
    """Whatever a secret's variable is called."""
    names = (
        "SLURM_JWT",
        "WANDB_API_KEY",
        "TORCH_HUB_PAT",
        "PYTHON_INDEX_URL",
        "SLURM_JOB_COMMENT",
        "PATHOLOGY",
        "MY_PATH",
    )
    attempt(**dict.fromkeys(names, "hidden"), NCCL_DEBUG="INFO")
    text = (tmp_path / "run" / "logs" / "7" / "try-0" / "job.txt").read_text()
    assert "hidden" not in text
    assert {"SLURM_JOB_ID=7", "NCCL_DEBUG=INFO", "SLURM_GPUS_ON_NODE=8", "PYTHON=python"} <= set(text.splitlines())


def test_nothing_starts_once_it_shall_stop(tmp_path):
    """The signal came before this node's launcher did."""
    (tmp_path / "stop").touch()
    names = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RENDEZVOUS", "LAUNCHER", "PYTHON")
    environment = os.environ | dict.fromkeys(names, "1") | {"LOG_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(ROOT / "launch" / "node.sh")], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
