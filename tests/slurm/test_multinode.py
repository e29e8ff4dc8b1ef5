"""launch/multinode.sh on a real Slurm of two nodes: whatever happens to a job, it ends with the weights of the run nobody
touched, or in the state it should have.

Where signals reach a launcher alone, as on most clusters; with --nightly also where they reach every process, and both
settings of the preemption's signal.

A try costs some 15 CPU-seconds, nearly all of them imports. So one run lives through many events, one per try, and each test
looks at its own."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, beyond, tiny_values
from test_kill import assert_same_run

from slurm.cluster import Cluster

pytestmark = pytest.mark.slow

SETTINGS = list(itertools.product(("pgid", "linuxproc"), (False, True)))
everywhere = pytest.mark.parametrize(
    "slurm",
    beyond(SETTINGS[:1], SETTINGS),
    indirect=True,
    ids=[f"{track}-{'USR1' if preempt_signal else 'TERM'}" for track, preempt_signal in SETTINGS],
    scope="module",
)
WAVE = 600  # seconds until a job must have ended, with all others of its wave on two cores


@dataclass
class Job:
    """A submitted run."""

    slurm: Cluster
    number: str
    run: Path
    output: Path

    def ended(self) -> tuple[str, str, str]:
        """Wait for the end: (state, exit code, restarts)."""
        facts = self.slurm.wait(self.number, timeout=WAVE)
        return facts["JobState"], facts["ExitCode"], facts["Restarts"]

    @property
    def text(self) -> str:
        return self.output.read_text()

    def newest_checkpoint(self) -> str:
        """Its name; empty if there is none."""
        return max((path.parent.name for path in self.run.glob("checkpoints/step-*/manifest.json")), default="")

    def wait_for_checkpoint(self, after: str = "") -> None:
        """Wait for one that is newer than this one."""
        self.slurm.until(lambda: self.newest_checkpoint() > after, "a checkpoint", 120)

    def said(self, attempt: int) -> str:
        """The lines of the batch script in one try."""
        return "\n".join(line for line in self.text.splitlines() if f" job {self.number}, try {attempt}: " in line)

    def outcome(self, attempt: int) -> str:
        """What the run itself reported of a try."""
        return (self.run / f"logs/{self.number}/try-{attempt}/outcome").read_text()

    def process_logs(self, attempt: int) -> list[Path]:
        """What the processes wrote to stderr, whatever their launcher calls the files."""
        paths = self.run.glob(f"logs/{self.number}/try-{attempt}/**/*")
        return [path for path in paths if "rank" in path.name or "stderr" in path.name]

    def log(self, node: int, attempt: int) -> str:
        """What the process on one of the nodes wrote to stderr."""
        (path,) = self.run.glob(f"logs/{self.number}/try-{attempt}/node-{node}/*/attempt_0/0/stderr.log")
        return path.read_text()


@pytest.fixture(scope="module")
def slurm(request, cluster) -> Cluster:
    track, preempt_signal = request.param
    return cluster(track=track, preempt_signal=preempt_signal)


@pytest.fixture(scope="module")
def folder(slurm, tmp_path_factory) -> Path:
    """Where jobs of a cluster are submitted, run and print: the project's folder as far as the scripts can tell."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


def variables(faults: list, **changes: str) -> dict[str, str]:
    """The environment to submit in: one process per node on a CPU."""
    return {
        "FAULTS": json.dumps(faults),
        "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'distributed'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **changes,
    }


@pytest.fixture(scope="module")
def write_config(folder, tiny_dataset):
    def write(name: str) -> Path:
        values = tiny_values(tiny_dataset, folder / name, max_steps=32, checkpoint__every=8)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return folder / f"{name}.yaml"

    return write


@pytest.fixture(scope="module")
def submit(slurm, folder, write_config):
    """submit(name, ...) -> Job on two nodes, with a process each."""

    def start(name: str, faults=(), options=(), environment=(), flags=(), gpus=2) -> Job:
        words = ["--nodes=2", "--time=10", f"--output={name}.out", *options]
        words += [f"--gpus-per-node={gpus}"] if gpus else []
        words += ["launch/multinode.sh", write_config(name), "--plugin", "faults", *flags]
        number = slurm.sbatch(*words, env=variables(list(faults), **dict(environment)), cwd=folder)
        return Job(slurm, number, folder / name, folder / f"{name}.out")

    return start


def fault(do: str, step: int | None = None, **place) -> dict:
    return {"do": do, "moment": "update", **({} if step is None else {"step": step}), **place}


SLOW = {"do": "slow", "moment": "forward"}  # for what happens at a time and not at a step
# Try by try, what happens to one run; the tests below tell what each shows. Warnings come in the first step of their try, so that
# it does not matter how many steps a slowed run still makes until it stops.
KILLED, HANGING, WARNED, STUCK, DEEPSPEED, FINISHED = range(6)
STRUCK = [
    fault("SIGKILL", 3, rank=1, **{"try": KILLED}),
    fault("sleep", 5, rank=1, **{"try": HANGING}),
    fault("Slurm warning", rank=0, **{"try": WARNED}),
    fault("Slurm warning", rank=0, **{"try": STUCK}),
    fault("sleep", rank=1, **{"try": STUCK}),
    fault("Slurm warning", rank=1, **{"try": DEEPSPEED}),
    *(4 * [{**SLOW, "try": WARNED}, {**SLOW, "try": DEEPSPEED}]),
]
SITE_OF_STRUCK = f"""case ${{SLURM_RESTART_COUNT:-0}} in
{STUCK}) STOP_SECONDS=5 ;;
{DEEPSPEED} | {FINISHED}) LAUNCHER=deepspeed ;;
esac
"""
# name -> faults, options, what else
RUNS = {
    "calm": {},
    "struck": {
        "faults": STRUCK,
        # The hanging process is noticed after 18 seconds; the stuck one not before its job gives up.
        "flags": ["--checkpoint.every", "2", "--engine.step_timeout_minutes", "0.3"],
        "environment": {"SITE_ENV": "struck.env"},
    },
    "cancelled": {"faults": [fault("Slurm cancel", 12, rank=0)]},
    "time limit": {
        "faults": 10 * [{**SLOW, "try": 0}],  # 2 seconds in each of 68 microbatches: more than the limit
        "options": ["--time=2", "--signal=B:USR1@30"],  # the last of an option counts
    },
    "failing": {"faults": [fault("crash", 5, rank=1)], "environment": {"SITE_ENV": "failing.env"}},
    "refused": {"flags": ["--engine.strategy", "single"]},
    "misspelt": {"flags": ["--model_scal", "2"]},
    "no processes": {"gpus": 0, "environment": {"NPROC_PER_NODE": ""}},
}


@pytest.fixture(scope="module")
def jobs(slurm, submit, submit_array, folder) -> dict[str, Job]:
    """All at once, as most of a job's time is waiting."""
    (folder / "container").write_text(f'echo "$@" >> {folder}/contained\nexec "$@"\n')
    (folder / "failing.env").write_text(f'CONTAINER="bash {folder}/container"\n')
    (folder / "struck.env").write_text(SITE_OF_STRUCK)
    return {name: submit(name.replace(" ", "-"), **what) for name, what in RUNS.items()} | submit_array()


@pytest.fixture(scope="module")
def submit_array(slurm, folder, write_config):
    """The elements of a sweep over two seeds, under accelerate."""

    def start() -> dict[str, Job]:
        config, runs = write_config("swept"), folder / "runs" / "seeds"
        config.write_text(config.read_text().replace(f"run_dir: {folder}/swept\n", ""))
        words = ["launch/array.sh", "seeds", "--nodes=2", "--gpus-per-node=2", "--time=10", "--"]
        words += [str(config), "--plugin", "faults", "--seed", "5,0"]
        environment = variables(
            [fault("Slurm warning", 12, rank=0, element=1, **{"try": 0})],
            LAUNCHER="accelerate",
            ACCELERATE_CONFIG="launch/accelerate/ddp.yaml",
        )
        done = subprocess.run(
            words, cwd=folder, env=slurm.env | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.split()[-1]
        return {
            f"element {n}": Job(slurm, f"{number}_{n}", runs / f"swept-seed={seed}", runs / f"{number}_{n}.out")
            for n, seed in enumerate((5, 0))
        }

    return start


@pytest.fixture(scope="module")
def calm(jobs) -> Path:
    assert jobs["calm"].ended() == ("COMPLETED", "0:0", "0"), jobs["calm"].text
    return jobs["calm"].run


@pytest.fixture
def job(jobs, request) -> Job:
    """The one that the test is named after."""
    return jobs[request.node.name.removeprefix("test_").partition("[")[0].replace("_", " ")]


@everywhere
def test_calm(job, calm):
    assert "torchrun on 2 x 1 processes" in job.text
    assert "preflight: 2 machines x 1 process, equal software" in job.log(0, 0)
    assert job.text.rstrip().endswith("finished")
    assert "SLURM_JOB_NUM_NODES=2" in (job.run / f"logs/{job.number}/try-0/job.txt").read_text()
    assert "engine: ddp on 2 x CPU" in job.log(0, 0)


@pytest.fixture
def struck(jobs, calm) -> Job:
    assert jobs["struck"].ended() == ("COMPLETED", "0:0", str(FINISHED)), jobs["struck"].text
    assert_same_run(jobs["struck"].run, calm)
    return jobs["struck"]


@everywhere
def test_killed(struck):
    """Alone of its node's processes; the other node ends too, and both go on from the newest checkpoint."""
    assert "failed (srun: " in struck.said(KILLED) and "the run made progress; starting again" in struck.said(KILLED)
    assert "going on from" in struck.log(0, KILLED + 1)


@everywhere
def test_hanging(struck):
    assert "failed (srun: " in struck.said(HANGING) and "rank 1 is behind" in struck.text
    for node in (0, 1):
        assert 'File "' in struck.log(node, HANGING) and "train.py" in struck.log(node, HANGING), (
            "every rank's stack is in its log"
        )


@everywhere
@pytest.mark.parametrize("attempt", [WARNED, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_warned(struck, attempt):
    """Several times in one run, also under another launcher than it began with."""
    said = struck.said(attempt)
    assert f"{'deepspeed' if attempt == DEEPSPEED else 'torchrun'} on 2 x 1 processes" in said
    assert "SIGUSR1: asking the processes to write a checkpoint" in said
    assert "newest checkpoint step-" in said and "; starting again" in said
    assert "not all processes stopped" not in said
    assert struck.outcome(attempt) == "stopped by SIGTERM\n"
    assert len(struck.process_logs(attempt)) == 2


@everywhere
def test_stuck(struck):
    """Told to stop, one process cannot; the job starts again before the time limit ends it for good."""
    assert "no new checkpoint; starting again" in struck.said(STUCK)
    assert struck.said(STUCK).count("SIGUSR1: asking the processes to write a checkpoint") == 1


@everywhere
def test_cancelled(job):
    """A user's scancel stays one; the processes have KillWait's 30 seconds for a checkpoint."""
    state, _, restarts = job.ended()
    assert (state, restarts) == ("CANCELLED", "0"), job.text
    assert "starting again" not in job.text
    assert job.outcome(0) == "stopped by SIGTERM\n"


@everywhere
def test_time_limit(job, calm):
    """The real one. Slurm looks every half minute, so that on a busy machine a try may end before its first step."""
    state, code, restarts = job.ended()
    assert (state, code) == ("COMPLETED", "0:0") and int(restarts) >= 1, job.text
    assert job.text.count("SIGUSR1: asking the processes to write a checkpoint") >= int(restarts)
    assert_same_run(job.run, calm)


@everywhere
def test_failing(job):
    """The second failure in a row without a new checkpoint is the last."""
    assert job.ended() == ("FAILED", "1:0", "1"), job.text
    assert job.text.count("failed (srun: ") == 2
    assert "failed 2 times in a row before a new checkpoint: not started again" in job.text


@everywhere
def test_contained(jobs, folder):
    """A site's container goes round every command of both tries: where the run is, and what each node starts."""
    jobs["failing"].ended()
    assert "settings of the site: failing.env" in jobs["failing"].text
    commands = (folder / "contained").read_text().splitlines()
    where = [words for words in commands if words.startswith("python -m trainer train ")]
    assert len(where) == 2 and all(words.endswith(" --print_run_dir") for words in where)
    starts = [words for words in commands if "launch/node.sh" in words]
    assert len(starts) == 4 and len(commands) == 6


@everywhere
def test_refused(job):
    """An error that only the run finds out about."""
    assert job.ended() == ("FAILED", "2:0", "0"), job.text
    assert "refused: engine.strategy: single, but 2 processes were started" in job.text


@everywhere
def test_misspelt(job):
    assert job.ended() == ("FAILED", "2:0", "0"), job.text
    assert "error: unknown key model_scal; did you mean model_scale?" in job.text


@everywhere
def test_no_processes(job):
    assert job.ended() == ("FAILED", "2:0", "0"), job.text
    assert job.text == (
        "error: NPROC_PER_NODE: not set; ask for GPUs with --gpus-per-node, or export NPROC_PER_NODE, the processes per node\n"
    )


@pytest.fixture
def alone(slurm, jobs) -> None:
    """For tests that take the nodes away: no other job may be on them."""
    slurm.idle(WAVE)


@everywhere
def test_nodes_taken_away(slurm, alone, submit, calm):
    """From one run: by a preemption, a lost node, and a lost network. Slurm starts the job again once the nodes are back.

    The preemption's signal reaches the batch script or the processes, as the cluster is set."""
    # What remains on node1 ends itself after 18 seconds.
    flags = ["--checkpoint.every", "4", "--engine.step_timeout_minutes", "0.3"]
    job = submit("taken", 2 * [SLOW], flags=flags)
    job.wait_for_checkpoint()
    slurm.sbatch("--partition=high", "--nodes=2", "--gpus-per-node=8", "--time=1", "--wrap", "srun sleep 1")
    slurm.wait(job.number, "PENDING", timeout=60)

    reached = job.newest_checkpoint()
    slurm.wait(job.number, "RUNNING", restarts=1, timeout=WAVE)
    job.wait_for_checkpoint(after=reached)
    slurm.crash("node2")
    slurm.wait(job.number, "PENDING", restarts=2, timeout=120)
    slurm.boot("node2")

    reached = job.newest_checkpoint()
    slurm.wait(job.number, "RUNNING", restarts=2, timeout=WAVE)
    job.wait_for_checkpoint(after=reached)
    slurm.cut("node2")
    slurm.wait(job.number, "PENDING", restarts=3, timeout=120)
    slurm.mend("node2")
    slurm.kill_slurmd("node2")  # a new one registers at once; the old one may take a minute to be asked again
    slurm.start_slurmd("node2")

    state, code, restarts = job.ended()
    assert (state, code) == ("COMPLETED", "0:0") and int(restarts) >= 3, job.text
    assert ("SIGUSR1" in job.said(0)) == slurm.preempt_signal
    assert job.outcome(0) == "stopped by SIGTERM\n"
    assert_same_run(job.run, calm)


@everywhere
def test_array(jobs, calm):
    """A sweep, under accelerate. A warning starts its own element again and no other, here the last, whose job has the array's
    number."""
    for element, restarts in enumerate("01"):
        job = jobs[f"element {element}"]
        assert job.ended() == ("COMPLETED", "0:0", restarts), job.text
        assert "accelerate on 2 x 1 processes" in job.said(0) and len(job.process_logs(0)) == 2
    assert_same_run(job.run, calm)


@pytest.mark.nightly
@pytest.mark.parametrize("slurm", SETTINGS[:1], indirect=True, ids=["pgid-TERM"])
def test_a_comparison_submits_its_stages_until_the_report_is_written(slurm, folder, tiny_dataset):
    """A sweep that has to go on beyond its first two learning rates, then two seeds: at least three arrays, submitted by jobs."""
    values = tiny_values(tiny_dataset, "", max_steps=8, batch__dynamic=False, optim={"recipe": "plain"})
    del values["run_dir"], values["model"], values["device"]
    rates = [1e-6, 2e-6]  # so low that a higher one is better
    spec = {"common": values, "seeds": [1, 2], "learning_rates": rates, "most_learning_rates": 3}
    spec["variants"] = {name: {"model": {"name": name}} for name in ("gpt2", "llama")}
    (folder / "pair.yaml").write_text(yaml.safe_dump(spec))
    words = ["launch/array.sh", "pair", "--nodes=1", "--gpus-per-node=1", "--time=10", "--", "compare", "pair.yaml"]
    environment = slurm.env | variables([])
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = folder / "runs" / "pair" / "report" / "report.html"
    slurm.until(report.exists, "the report", WAVE)
    experiment = json.loads((folder / "runs" / "pair" / "experiment.json").read_text())
    assert {run["state"] for run in experiment["runs"]} == {"finished"}
    assert len(experiment["runs"]) == 2 * (3 + 2)
    assert [arm["bracketed"] for arm in experiment["arms"]] == [False, False]
    stages = sorted(path.name for path in (folder / "runs" / "pair" / "elements").iterdir())
    assert stages == ["1", "2", "3"]
