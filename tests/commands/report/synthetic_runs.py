"""Run folders and comparisons as `train` and `compare` write them, without training: the losses are formulas."""

import dataclasses
import json
import math
import random
from pathlib import Path

from models.base import get_model, load_models, model_names
from trainer.core.config import RunConfig
from trainer.core.files import sealed
from trainer.core.settings import build, merge
from trainer.planning.run_config import write_config

MODEL = {"name": "gpt2", "vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_context": 32}
TOKENIZER = {"name": "bytes", "sha256": "a" * 64, "vocab_size": 64, "eot_id": 63}
SPLITS = {
    "train": {"tokens": 900_000, "documents": 90, "bytes": 910_000, "words": 9, "samples": 1},
    "validation": {"tokens": 90_000, "documents": 9, "bytes": 91_000, "words": 9, "samples": 1},
}
START = {
    "time": "2026-01-02T03:04:05+0000",
    "command": ["trainer/__main__.py", "train", "one.yaml", "--seed", "1"],
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "numpy": "2.1.3", "crescendo-lm": "0.3.0"},
    "host": "machine",
    "cpus": 2,
    "processes": 1,
    "git": {"sha": "0123456789abcdef", "dirty": False},
}
VALUES = {
    "model_scale": 0.05,
    "model": MODEL,
    "max_steps": 40,
    "precision": "fp32",
    "device": "cpu",
    "data": {"path": "data"},
    "batch": {
        **{"tokens_per_step": 512, "tokens_per_microbatch": 256, "device_token_capacity": 4096, "dynamic": False},
        **{"sequence_length": 32, "sequence_start": 32, "sequence_double_every": 0},
    },
    "optim": {
        "recipe": "plain",
        "lr": 0.002,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "loss_driven_decay": False,
        "clip_norm": 1.0,
    },
    "engine": {"strategy": "single", "compile": False, "background_compile": False, "activation_checkpointing": "none"},
    "evaluation": {"every": 10, "sequence_length": 32},
    "checkpoint": {"every": 0},
}


def nested(changes: dict) -> dict:
    """Dotted keys as sections."""
    values: dict = {}
    for key, value in changes.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def completed(model: dict) -> dict:
    """The model section with all fields, as a run writes it; of a model that is not registered as it is."""
    load_models()
    if model["name"] not in model_names():
        return model
    config = get_model(model["name"]).Config(**{key: value for key, value in model.items() if key != "name"})
    return {"name": model["name"], **dataclasses.asdict(config)}


def rows(config: RunConfig, end: float, steps: int, **more) -> list[dict]:
    """Rows that fall from 6 towards `end`, reached exactly at the last step of the schedule. more: further keys of each row."""
    draw = random.Random(config.seed)
    found = []
    for step in range(1, steps + 1):
        left = 1 - step / config.max_steps
        loss = end + (6 - end) * left * math.exp(-4 * step / config.max_steps)
        evaluated = step == config.max_steps or (config.evaluation.every and step % config.evaluation.every == 0)
        found.append(
            {
                **{"step": step, "tokens": step * config.batch.tokens_per_step, "loss": loss + draw.gauss(0, 0.02)},
                **{"grad_norm": 1.0, "lr": config.optim.lr, "tokens_per_second": 1000.0 + draw.random(), "mfu": None},
                **{
                    "val_loss": loss if evaluated else None,
                    "val_bits_per_byte": loss / math.log(2) if evaluated else None,
                },
                **{"sequence_length": config.batch.sequence_length, "batch_multiplier": 1, "epoch": 0.01 * step},
                **{"seconds": 0.5 * step, "compile_seconds": 0.0, "peak_memory_bytes": 1 << 20},
                **more,
            }
        )
    return found


def write_run(
    folder: Path,
    end: float = 3.0,
    *,
    seed: int = 1,
    steps: int | None = None,
    start: dict | None = None,
    data: dict | None = None,
    row: dict | None = None,
    sample: str = "",
    **changes,
) -> Path:
    """A run of `steps` (all) that ends with the loss `end`. `a__b=1` changes key a.b; start, data, row: changes of the environment,
    of dataset.json, of each row."""
    folder.mkdir(parents=True)
    changed = nested({key.replace("__", "."): value for key, value in changes.items()})
    config = build(RunConfig, merge(merge(VALUES, {"seed": seed, "run_dir": str(folder)}), changed))
    config.model = completed(config.model)
    write_config(folder, config)
    written = rows(config, end, config.max_steps if steps is None else steps, **(row or {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in written))
    dataset = {
        "tokenizer": TOKENIZER,
        "splits": SPLITS,
        "fingerprint": "f" * 64,
        "source": "text",
        "indexes": {"validation": "1"},
    }
    (folder / "dataset.json").write_text(sealed(dataset | (data or {})))
    (folder / "environment.jsonl").write_text(json.dumps(START | (start or {})) + "\n")
    (folder / "plan.txt").write_text("optim.lr            0.002  a rule\nbatch.tokens_per_step  512  set\nnote: one\n")
    if sample:
        (folder / "samples.txt").write_text(f"=== step 10\nearlier\n\n=== step 40, final\n{sample}\n\n")
    return folder


@dataclasses.dataclass
class Experiment:
    """experiment.json of a comparison, to be changed before `write`. Runs are written when they are added."""

    folder: Path
    content: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = {
            **{"format": 1, "name": "demo", "command": ["python", "-m", "trainer", "compare", "demo.yaml"]},
            **{
                "budget": "tokens",
                "baseline": "gpt2",
                "rule": "the best of three on one seed",
                "seeds": [1, 2, 3],
                "tuning_seed": 0,
            },
            **{"arms": [], "runs": []},
        }

    def arm(self, name: str, scale: float = 0.05, **more) -> None:
        self.content["arms"].append(
            {
                **{
                    "name": name,
                    "scale": scale,
                    "changes": {"model.name": name},
                    "parameters": 1,
                    "flops_per_token": 1.0,
                },
                **{
                    "steps": 40,
                    "tokens": 20480,
                    "flops": 1.0,
                    "learning_rate": 0.002,
                    "bracketed": True,
                    "refused": None,
                },
                **more,
            }
        )

    def run(self, arm: str, end: float | None, seed: int = 1, scale: float = 0.05, rate: float = 0.002, **more) -> Path:
        """Add a run; end: None for one that has no folder. more: keys of experiment.json, or of `write_run`."""
        keys = {key: more.pop(key) for key in ("purpose", "state", "message") if key in more}
        inner = f"runs/{len(self.content['runs'])}-lr{rate:g}-seed{seed}"
        self.content["runs"].append(
            {
                **{"folder": inner, "arm": arm, "scale": scale, "learning_rate": rate, "seed": seed},
                **{"purpose": "test", "state": "finished", "message": ""},
                **keys,
            }
        )
        if end is not None:
            write_run(self.folder / inner, end, seed=seed, model_scale=scale, optim__lr=rate, **more)
        return self.folder / inner

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "experiment.json").write_text(json.dumps(self.content))
        return self.folder


def sweep(experiment: Experiment, arm: str, end: float, scale: float = 0.05, **more) -> None:
    """Tuning runs at three learning rates, best at 0.002."""
    for rate in (0.001, 0.002, 0.004):
        loss = end + 0.1 * math.log2(rate / 0.002) ** 2
        experiment.run(arm, loss, seed=0, rate=rate, scale=scale, purpose="tuning", **more)


def simple_comparison(folder: Path, better_by: float = 0.1, seeds: int = 3) -> Experiment:
    """gpt2 and llama, tuned, three seeds of each; llama is better by about `better_by`. Not written yet."""
    experiment, draw = Experiment(folder), random.Random(0)
    experiment.content["seeds"] = list(range(1, seeds + 1))
    for name, gain in (("gpt2", 0.0), ("llama", better_by)):
        experiment.arm(name)
        sweep(experiment, name, 3.0 - gain, model__name=name)
        for seed in range(1, seeds + 1):
            end = 3.0 - gain + 0.01 * seed + draw.gauss(0, 0.002)
            experiment.run(name, end, seed, model__name=name, sample=f"once <b>upon</b> a {name}")
    return experiment
