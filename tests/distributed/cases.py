"""Tiny runs for several processes, and how tests start them."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from conftest import PATIENCE, ROOT, tiny_values

FULL = bool(os.environ.get("FULL_MATRIX"))  # every combination, where the tests otherwise take a part of them


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
    words = [str(Path(__file__).parent / "matrix.py"), str(given), str(taken)]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(taken.read_text())


@dataclass
class Ended:
    """How a run ended."""

    codes: list[int]  # by rank
    said: str  # stdout and stderr of all ranks

    def lines(self, beginning: str) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith(beginning)]


class Forks:
    """Starts runs through forks.py."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self._count = 0

    def run(
        self, values: dict, ranks: int = 1, faults: list[dict] | None = None, tells: bool = True, plugins: tuple = ()
    ) -> Ended:
        return self.wait(self.start(values, ranks, faults, tells, plugins))

    def start(
        self, values: dict, ranks: int = 1, faults: list[dict] | None = None, tells: bool = True, plugins: tuple = ()
    ) -> Path:
        """Start a run with `faults` as in faults.py and with plug-ins; returns what `wait` takes. tells: see forks.py."""
        self._count += 1
        config, words = write_run(values, f"start{self._count}.yaml", faults)
        words += [word for plugin in plugins for word in ("--plugin", str(plugin))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "FAULTS": json.dumps(faults)}
        request = {
            "words": words,
            "environments": [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)],
            "log": str(config.with_suffix(".log")),
            "result": str(config.with_suffix(".json")),
            "seconds": PATIENCE,
            "tells": tells,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return config

    def wait(self, started: Path) -> Ended:
        result, deadline = started.with_suffix(".json"), time.monotonic() + PATIENCE + 60  # forks.py ends it before
        while not result.exists():
            assert time.monotonic() < deadline, "forks.py does not answer"
            time.sleep(0.02)
        return Ended(json.loads(result.read_text()), started.with_suffix(".log").read_text())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=PATIENCE)


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
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "FAULTS": json.dumps(faults),
        },
    )
    return Ended([done.returncode], done.stdout)
