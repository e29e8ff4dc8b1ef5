"""The scripts of launch/ as far as they go without Slurm: torchrun.sh on two machines, sweeps, what each says when something
is missing. tests/slurm has the rest."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE, ROOT, tiny_values

from trainer.runs.metrics import read_rows


def environment(**changes: str) -> dict[str, str]:
    """Without what a cluster or a launcher may have set around us, nor a GPU."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "NPROC", "NNODES"))}
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return mine | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", **changes}


def start(script: str, *words, cwd: Path = ROOT, **changes: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / script), *map(str, words)],
        cwd=cwd, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def failure(script: str, *words, cwd: Path = ROOT, **changes: str) -> str:
    """The one line that a script which cannot start gives."""
    process = start(script, *words, cwd=cwd, **changes)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and out == ""
    assert err.count("\n") == 1
    return err.strip()


JOB = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_CPUS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "1"}


@pytest.mark.parametrize(
    "script, words, variables, line",
    [
        ("multinode.sh", ["x.yaml"], {}, "error: SLURM_JOB_ID: not set; start this script with sbatch"),
        ("multinode.sh", [], JOB, "error: no config; sbatch ... launch/multinode.sh CONFIG.yaml [--key value ...]"),
        (
            "multinode.sh",
            ["x.yaml"],
            JOB | {"SLURM_SUBMIT_DIR": "/"},
            "error: SLURM_SUBMIT_DIR: there is no launch/node.sh in /; submit from the project's folder or export CRESCENDO_HOME",
        ),
        ("multinode.sh", ["x.yaml"], JOB | {"SITE_ENV": "/no"}, "error: SITE_ENV: there is no file /no"),
        (
            "multinode.sh",
            ["x.yaml"],
            JOB | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"},
            "error: SLURM_ARRAY_TASK_ID: all elements of this array would train the same run; use launch/array.sh",
        ),
        (
            "multinode.sh",
            ["--elements", "/no"],
            JOB | {"SLURM_ARRAY_TASK_ID": "1"},
            "error: --elements: there is no /no/1",
        ),
        (
            "multinode.sh",
            ["x.yaml"],
            JOB,
            "error: NPROC_PER_NODE: not set; ask for GPUs with --gpus-per-node, or export NPROC_PER_NODE, the processes per node",
        ),
        ("torchrun.sh", [], {}, "error: no config; launch/torchrun.sh CONFIG.yaml [--key value ...]"),
        (
            "torchrun.sh",
            ["x.yaml"],
            {"NNODES": "2"},
            "error: NODE_RANK: not set; 0 on the first of the 2 machines, 1 on the next",
        ),
        (
            "torchrun.sh",
            ["x.yaml"],
            {"NNODES": "2", "NODE_RANK": "1"},
            "error: MASTER_ADDR: not set; the name of the machine with NODE_RANK 0",
        ),
        ("torchrun.sh", ["no.yaml"], {"NPROC_PER_NODE": "1"}, "error: no.yaml: no such config file"),
        ("node.sh", ["x.yaml"], {}, "error: NNODES: not set; start launch/multinode.sh or launch/torchrun.sh"),
        (
            "array.sh",
            ["--nodes=2"],
            {},
            "error: no name; launch/array.sh NAME [sbatch options] -- CONFIG.yaml [--key value[,value ...] ...]",
        ),
        (
            "array.sh",
            ["a", "x.yaml"],
            {},
            "error: no config; write -- and then CONFIG.yaml [--key value[,value ...] ...]",
        ),
        ("array.sh", ["a", "--", "compare"], {}, "error: no spec; write -- compare SPEC.yaml [--key value ...]"),
    ],
)
def test_what_is_missing_is_named(script, words, variables, line):
    assert failure(script, *words, **variables) == line


def test_processes_per_machine_are_not_guessed(tmp_path):
    """bash, env and what else torchrun.sh calls, but no nvidia-smi."""
    for program in ("bash", "wc", "dirname", "date"):
        (tmp_path / program).symlink_to(shutil.which(program))
    line = failure("torchrun.sh", "x.yaml", PATH=str(tmp_path))
    assert (
        line
        == "error: NPROC_PER_NODE: not set, and nvidia-smi lists no GPU; export the number of processes per machine"
    )


def test_each_process_has_its_share_of_the_cpus(tmp_path):
    """torchrun by itself would give each one thread."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS"\n')
    python.chmod(0o755)

    def threads(processes: int, given: str) -> str:
        changes = {"PYTHON": str(python), "NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": given}
        out, err = start("torchrun.sh", "x.yaml", cwd=tmp_path, **changes).communicate(timeout=PATIENCE)
        assert err == ""
        return out.strip()

    cpus = len(os.sched_getaffinity(0))
    assert (threads(1, ""), threads(cpus, ""), threads(4 * cpus, "")) == (str(cpus), "1", "1")
    assert threads(1, "3") == "3"


def test_an_unknown_launcher_is_named():
    names = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "RENDEZVOUS", "PYTHON", "LOG_DIR")
    line = failure("node.sh", "x.yaml", LAUNCHER="mpirun", **dict.fromkeys(names, "1"))
    assert line == "error: LAUNCHER: mpirun is not one of torchrun, accelerate, deepspeed"


def sweep(folder: Path, *words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "sweep.py"), str(folder), *map(str, words)],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
    )  # fmt: skip


def test_sweep_is_every_combination(tmp_path):
    words = ["configs/hlb.yaml,configs/gpt2-124m.yaml", "--plugin", "mine", "--seed=0,1", "--optim.lr", "1e-3"]
    done = sweep(tmp_path / "s", *words)
    assert done.returncode == 0, done.stderr
    elements = [(tmp_path / "s" / "elements" / str(number)).read_text().splitlines() for number in range(4)]
    assert [element[0] for element in elements] == ["configs/hlb.yaml"] * 2 + ["configs/gpt2-124m.yaml"] * 2
    common = ["--optim.lr", "1e-3", "--run_dir"]
    assert elements[1][1:] == ["--plugin", "mine", "--seed=1", *common, str(tmp_path / "s" / "hlb-seed=1")]
    assert len({element[-1] for element in elements}) == 4
    assert len(list((tmp_path / "s" / "elements").iterdir())) == 4
    assert sweep(tmp_path / "s", *words).stdout == done.stdout  # the same again: to go on
    assert "holds another sweep; choose another name" in sweep(tmp_path / "s", *words, "--model_scale", "2").stderr


@pytest.mark.parametrize(
    "words, line",
    [
        (["configs/hlb.yaml", "--modl_scale", "1,2"], "unknown key modl_scale; did you mean model_scale?"),
        (["configs/hlb.yaml", "--model_scale", "1,large"], "model_scale"),
        (["configs/hlb.yaml", "--seed", "1,,2"], "sweep: 'seed=1,,2' is not KEY=V1,V2"),
        (["configs/hlb.yaml", "--seed", "0", "--seed=1,2"], "sweep: seed occurs twice"),
        (["configs/hlb.yaml", "--run_dir", "x"], "run_dir: each element has its own"),
        (["configs/hlb.yaml,configs/hlb.yaml"], "run_dir: two elements would train in"),
        (["configs/hlb.yaml", "--log.sample_prompt", "a\nb"], "a word holds a line break"),
        (["--seed", "1,2"], "no config; CONFIG.yaml comes first"),
        (["configs/no.yaml"], "configs/no.yaml"),
    ],
)
def test_sweep_is_checked_before_anything_is_submitted(tmp_path, words, line):
    done = sweep(tmp_path / "s", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and line in done.stderr
    assert not (tmp_path / "s").exists()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.slow
def test_torchrun_on_two_machines(tiny_dataset, tmp_path):
    """Two hosts by hand, which are both this one. The rest of the launchers are in tests/distributed."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_values(tiny_dataset, tmp_path / "run", max_steps=3)))
    common = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "NPROC_PER_NODE": "1"}
    parts = [start("torchrun.sh", tmp_path / "run.yaml", NODE_RANK=str(rank), **common) for rank in (0, 1)]
    errors = [part.communicate(timeout=PATIENCE)[1] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], errors
    assert "engine: ddp on 2 x CPU" in errors[0]
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert len(list((tmp_path / "run" / "logs").glob("*/node-*/*/attempt_0/0/stderr.log"))) == 2


def test_an_array_of_a_comparison_submits_what_can_start_and_a_job_for_what_follows(tmp_path):
    """With an sbatch that only writes down its words, and a trainer that first has two runs to start and then none."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    python, sbatch = tmp_path / "python", tmp_path / "sbatch"
    python.write_text(
        """#!/bin/sh
echo "$@" >> called
[ "$3" = compare ] && [ ! -d elements ] && mkdir elements && touch elements/0 elements/1 && echo elements
exit 0
"""
    )
    sbatch.write_text(
        """#!/bin/sh
echo "COMPARE_ELEMENTS=$COMPARE_ELEMENTS $*" >> submitted
echo Submitted batch job 41
"""
    )
    python.chmod(0o755), sbatch.chmod(0o755)
    words = ["names", "--time=5", "--", "compare", "my spec.yaml", "--seeds", "1"]
    variables = {"PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):
        out, err = start("array.sh", *words, cwd=tmp_path, **variables).communicate(timeout=PATIENCE)
    array, following = (tmp_path / "submitted").read_text().splitlines()
    assert array == (
        "COMPARE_ELEMENTS= --job-name=names --array=0-1 --output=runs/names/%A_%a.out --time=5 "
        "launch/multinode.sh --elements elements"
    )
    assert following.startswith("COMPARE_ELEMENTS=new --job-name=names-next --dependency=afterany:41 ")
    assert following.endswith(r"--wrap=bash launch/array.sh names --time=5 -- compare my\ spec.yaml --seeds 1 ")
    asked = "-m trainer compare my spec.yaml --seeds 1 --compare_dir runs/names --elements all"
    assert (tmp_path / "called").read_text().splitlines() == [asked, asked, "-m trainer report runs/names"]
