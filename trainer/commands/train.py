"""`train`: starts a run, or continues one from its newest good checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.commands import Values, Verb, run_folder
from trainer.core.config import RunConfig
from trainer.core.settings import build, setting
from trainer.runtime.launcher import find_rank_info


@dataclass
class TrainConfig(RunConfig):
    """`train`: the settings of a run, and how it goes on. What is added here is of one start, and not a part of the run."""

    from_step: int | None = setting(
        None,
        "an existing run goes on from this older checkpoint; newer ones, rows and samples are kept under other names",
        low=0,
    )


def run(given: Values, as_json: bool = False) -> None:
    """Run the verb. given: values of the YAML file and the flags, by the keys of TrainConfig."""
    from trainer.training.start import start

    start(of_the_run(given), as_json, build(TrainConfig, given).from_step)


def of_the_run(given: Values) -> Values:
    """The values of the run itself, by the keys of RunConfig."""
    return {key: value for key, value in given.items() if key != "from_step"}


def config_or_run(word: str, flags: Values) -> Values:
    """The word is a config file, a run's folder, or the config.yaml in it. A run continues where its folder is now, even if moved."""
    from trainer.planning.run_config import CONFIG, is_run

    folder = Path(word).parent
    if "run_dir" not in flags and Path(word).name == CONFIG and is_run(folder):
        return {"run_dir": str(folder)}
    return run_folder(word, flags)


def checked(values: Values) -> Values:
    """Return the values unchanged: `start` puts them over those stored in the run's folder. Raises UserError for a wrong key or value."""
    build(TrainConfig, values)
    return values


def resolved(given: Values) -> Any:
    """The config with all values inferred, for --print_config."""
    from trainer.data.stream import find_dataset
    from trainer.planning.parent import with_origin
    from trainer.planning.plan import resolve
    from trainer.planning.run_config import merged_config, read_run

    def say(line: str) -> None:
        pass

    given = of_the_run(given)
    stored, processes = read_run(given, say), find_rank_info(os.environ).size
    config = merged_config(with_origin(given, stored, processes, say), stored, processes)
    return resolve(config, find_dataset(config.data)).config


VERB = Verb(
    name="train",
    help="train; in an existing run folder: continue from its newest good checkpoint",
    config=TrainConfig,
    run=run,
    json=True,
    positional=config_or_run,
    read=checked,
    resolved=resolved,
    interrupted="interrupted before training began",
)
