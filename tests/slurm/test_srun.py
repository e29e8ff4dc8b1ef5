"""`srun python -m trainer`, a task per process and no other launcher, on one node and on two."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE, ROOT, tiny_values
from test_kill import final

pytestmark = pytest.mark.slow


@pytest.fixture
def run(cluster, tiny_dataset, tmp_path):
    """run(*options of srun, name=...) -> (what it printed, the run's folder): two tasks where the options do not say otherwise."""

    def start(*options, name: str = "run") -> tuple[str, Path]:
        values = tiny_values(tiny_dataset, tmp_path / name, max_steps=6)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        words = ["srun", "--ntasks=2", "--time=5", "--kill-on-bad-exit=1", *options]
        words += [sys.executable, "-m", "trainer", "train", str(tmp_path / f"{name}.yaml")]
        environment = cluster().env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr, tmp_path / name

    return start


def test_tasks_of_one_node_and_of_two(run):
    (one, together), (two, apart) = (run(f"--nodes={nodes}", name=f"on{nodes}") for nodes in (1, 2))
    for text, machines in ((one, "1 machine x 2 processes"), (two, "2 machines x 1 process")):
        assert "engine: ddp on 2 x CPU" in text and machines in text
        assert text.count("optimiser groups") == 1, "rank 0 alone speaks"
    assert final(together)[1] == final(apart)[1]


def test_a_single_task_is_one_process(run):
    assert "engine: single on 1 x CPU" in run("--ntasks=1")[0]


def test_a_batch_script_is_one_process(cluster, tiny_dataset, tmp_path):
    slurm = cluster()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run", max_steps=2)))
    words = f"cd {ROOT} && {sys.executable} -m trainer train {tmp_path / 'run.yaml'}"
    job = slurm.sbatch("--ntasks=2", "--time=5", f"--output={tmp_path / 'out'}", "--wrap", words)
    assert slurm.wait(job, timeout=PATIENCE)["JobState"] == "COMPLETED"
    text = (tmp_path / "out").read_text()
    assert "Slurm gave this job 2 tasks and this is one process" in text
    assert "engine: single on 1 x CPU" in text
