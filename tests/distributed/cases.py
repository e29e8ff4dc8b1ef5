"""Tiny runs for several processes, and how tests start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, tiny_values

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


def train_cases(cases: list[dict], ranks: int, folder: Path, timeout: float = 500) -> dict[str, dict]:
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
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(taken.read_text())
