"""Tiny runs for several processes, and how tests start them."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import yaml
from conftest import PATIENCE, ROOT, tiny_values
from processes import Ended

PATHS = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", Path(__file__).parent))
_counter = itertools.count(1)


def matrix_values(dataset: Path, folder: Path, model: str, strategy: str, **changes) -> dict:
    """A tiny run with nothing that divides evenly: 3 blocks, 323 rows of vocabulary. strategy: NAME or hsdp:SHARD_SIZE."""
    name, _, shard_size = strategy.partition(":")
    engine = {"strategy": name, "activation_checkpointing": "none"}
    if shard_size:
        engine["shard_size"] = int(shard_size)
    if name == "zero3":  # DeepSpeed leaves weights as small as these whole unless told otherwise
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "zero3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
        engine["deepspeed_config"] = str(folder / "zero3.json")
    values = tiny_values(dataset, folder, model={"name": model, "n_layers": 3, "vocab_size": 323}, engine=engine)
    if model == "gpt2":
        values["optim"] = {"clip_norm": 0.5}  # below its gradient norms: clipping shows
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return values


def train_cases(cases: list[dict], ranks: int, folder: Path) -> dict[str, dict]:
    """The cases of matrix.py in `ranks` processes; name -> its result."""
    folder.mkdir(parents=True, exist_ok=True)
    given, taken = folder / f"cases{ranks}.json", folder / f"results{ranks}.json"
    given.write_text(json.dumps(cases))
    ended = processes.run(
        Path(__file__).parent / "matrix.py", given, taken,
        ranks=ranks if ranks > 1 else None, seconds=PATIENCE + 15 * len(cases), env={"PYTHONPATH": PATHS},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(taken.read_text())


def run(values: dict, ranks: int = 1, faults: list[dict] | None = None, tells: bool = True) -> Ended:
    """A run with `faults` as in faults.py, in `ranks` processes. tells: see processes.py."""
    return processes.wait(start(values, ranks, faults, tells))


def start(
    values: dict, ranks: int = 1, faults: list[dict] | None = None, tells: bool = True, plugins: tuple = ()
) -> Path:
    _, words = write_run(values, f"start{next(_counter)}.yaml", faults)
    words += [word for plugin in plugins for word in ("--plugin", str(plugin))]
    variables = {"PYTHONPATH": PATHS, "FAULTS": json.dumps(faults)}
    return processes.start("-m", "trainer", *words, ranks=ranks, env=variables, tells=tells)


def write_run(values: dict, name: str, faults: list[dict] | None) -> tuple[Path, list[str]]:
    """(its YAML file, beside the run folder; the words of the command line after `trainer`)."""
    config = Path(values["run_dir"]).parent / name
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(values))
    return config, ["train", str(config), *(["--plugin", "faults"] if faults else [])]


def torchrun(values: dict, ranks: int, *options: str, faults: list[dict] | None = None) -> Ended:
    """The run under torchrun. codes: torchrun's own."""
    _, words = write_run(values, "torchrun.yaml", faults)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *options]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "trainer", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": PATHS,
            "FAULTS": json.dumps(faults),
        },
    )
    return Ended([done.returncode], done.stdout, "")
