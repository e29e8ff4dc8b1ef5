"""For tests of `compare`: a stub that stands for `train`, and a queue that starts it: `python compare_stub.py STUB FOLDER`."""

import sys
from pathlib import Path

from trainer.commands.compare import CompareConfig, read
from trainer.commands.compare import queue as compare_queue
from trainer.commands.compare.budget import Length
from trainer.commands.compare.experiment import Experiment, facts_of, stored_experiment
from trainer.commands.compare.spec import arms

TWO = {"small": {"model": {"name": "gpt2"}}, "other": {"model": {"name": "llama"}}}


def spec(**values) -> CompareConfig:
    return read({"variants": TWO, **values})


def experiment(folder, inferred=1e-3, **values) -> Experiment:
    """The experiment of TWO in `folder`, whose runs have 10 steps."""
    config = spec(**values)
    found = arms(config)
    facts = facts_of(config, "test", ["compare"], found)
    made = Experiment(folder, facts, found, stored_experiment(folder))
    for arm in found:
        made.lengths.setdefault(arm.key, Length(10, 5120, 10**9, 1000, 6000, inferred))
    made.write()
    return made


STUB = """
import json, math, os, re, sys, time
from pathlib import Path

# Stands for `train`: leaves what a run leaves. Its loss is lowest at a learning rate of 2e-3; above 1e-2 it diverges.
config = dict(re.findall(r"^ *([a-z_]+): (.+)$", Path(sys.argv[1]).read_text(), re.MULTILINE))
folder, steps, lr, seed = Path(config["run_dir"]), int(config["max_steps"]), float(config["lr"]), int(config["seed"])
time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
how = os.environ.get("STUB_" + config["name"].upper(), "")
if how == "refuse":
    Path(os.environ["CRESCENDO_OUTCOME"]).write_text("refused: model: cannot be\\n")
    sys.exit(2)
if how == "crash":
    print("error: lost the device")
    sys.exit(1)
checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
checkpoint.mkdir(parents=True, exist_ok=True)
diverges = lr > 1e-2
row = dict(step=steps, tokens=steps, loss=None if diverges else 1.0, grad_norm=1.0, lr=lr, val_loss=None, val_bits_per_byte=1.0,
           tokens_per_second=1.0, seconds=1.0)
if not diverges:
    row["val_loss"] = 3 + abs(math.log(lr / 2e-3)) + 0.01 * seed + len(config["name"])
    (checkpoint / "manifest.json").write_text("{}")
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(folder / "config.yaml").write_text("# crescendo-lm stub\\n")
"""


if __name__ == "__main__":
    compare_queue.TRAIN = [sys.executable, "-IS", sys.argv[1]]
    compare_queue.POLL_SECONDS = 0.02
    compare_queue.Queue(experiment(Path(sys.argv[2])), [{}, {}], [], lambda line: print(line, flush=True)).run()
