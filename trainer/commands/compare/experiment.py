"""A comparison is a folder: what was asked for, the runs that follow from it, and how far each one is.

    compare-NAME/experiment.json    arms, runs and their states; `report` reads it
                 configs/           the config of each run, for `train`
                 runs/RUN/          the run's folder
                 logs/RUN.log       what the run printed
                 speed/             benches of the arms, if their speed was asked for
                 report/            report.html, report.md and their figures

Which runs there are follows from the spec and from the losses of the runs that have ended. So the same command finds its place
again after any interruption.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import found
from trainer.commands.compare.budget import Length
from trainer.commands.compare.learning_rates import DIVERGED, RULE, Sweep, start, sweep
from trainer.commands.compare.spec import Arm, claims_of, flat_text, folder_name
from trainer.core import yaml_text
from trainer.core.errors import UserError
from trainer.core.files import DIGEST, digest_of, read_json, sealed, write_file
from trainer.core.settings import merge
from trainer.core.text import printable
from trainer.planning.run_config import is_run
from trainer.runs.folder import is_locked
from trainer.runs.metrics import last_row

FILE, SPEED = "experiment.json", "speed"
FORMAT = 1
ENDED = ("finished", "diverged", "failed", "refused")


@dataclass(frozen=True)
class Task:
    """One run of the comparison. purpose: "tuning" to choose a learning rate, "test" to be compared."""

    arm: Arm
    learning_rate: float
    seed: int
    purpose: str

    @property
    def name(self) -> str:
        return f"{folder_name(self.arm.name)}-scale{self.arm.scale:g}-lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class State:
    """How far a run is: waiting, running, or one of ENDED. loss: validation loss at the end; message: why it ended otherwise."""

    word: str
    message: str = ""
    loss: float | None = None


class Experiment:
    """The comparison in `folder`. UserError if the folder holds another one."""

    def __init__(self, folder: Path, facts: dict[str, Any], arms: list[Arm], stored: dict[str, Any] | None) -> None:
        """facts: what the spec says beside the arms (see `facts_of`); stored: experiment.json, None if there is none yet."""
        first = facts["seeds"] if stored is None else stored.get("first_seeds", stored["seeds"])
        self.folder, self.facts, self.arms = folder, facts | {"first_seeds": first}, arms
        self.lengths: dict[tuple[str, float], Length] = {}
        self.running: set[str] = set()  # names of runs that this process has started
        self._ended: dict[str, State] = {}  # runs that ended in this command
        if stored is not None:
            check_same(folder, stored, facts, arms)
            # An arm that was refused is sized again: what it lacked may be there now.
            known = [arm for arm in stored["arms"] if arm["refused"] is None]
            self.lengths = {(arm["name"], arm["scale"]): stored_length(arm) for arm in known}
        self._check_names()

    def _check_names(self) -> None:
        names = [folder_name(arm.name) for arm in self.arms if arm.scale == self.arms[0].scale]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"variants: two of them would both have the folder name {twice}; choose other names")

    # -- which runs there are ------------------------------------------------------------------------------------------

    def sweep(self, arm: Arm) -> Sweep:
        """The sweep of the arm's learning rate, as far as it is."""
        most = self._most(arm)
        first = start(arm.learning_rates, self.lengths[arm.key].learning_rate, most)
        losses: dict[float, float] = {}
        while True:
            result = sweep(first, losses, most)
            missing = [rate for rate in result.tried if rate not in losses]
            if not missing or len(result.tried) == 1:
                return result
            known = {rate: self._loss(Task(arm, rate, self.facts["tuning_seed"], "tuning")) for rate in missing}
            if any(loss is None for loss in known.values()):
                return result
            losses |= {rate: loss for rate, loss in known.items() if loss is not None}

    def _loss(self, task: Task) -> float | None:
        state = self.state(task)
        return DIVERGED if state.word == "diverged" else state.loss

    def tasks(self) -> Iterator[Task]:
        """All runs that are known so far: first those that choose learning rates, then those that are compared."""
        sweeps = {arm.key: self.sweep(arm) for arm in self.arms if not self.lengths[arm.key].refused}
        there = [arm for arm in self.arms if arm.key in sweeps]
        for arm in there:
            tried = sweeps[arm.key].tried
            if len(tried) > 1:
                yield from (Task(arm, rate, self.facts["tuning_seed"], "tuning") for rate in tried)
        for seed in self.facts["seeds"]:
            for arm in there:
                chosen = sweeps[arm.key].chosen
                if chosen is not None:
                    yield Task(arm, chosen, seed, "test")

    def waiting(self) -> list[Task]:
        """The runs that can start now. One that failed in an earlier command is tried again, once in each command."""
        going = ("running", "finished", "diverged")
        return [task for task in self.tasks() if task.name not in self._ended and self.state(task).word not in going]

    def most_runs_left(self, arm: Arm) -> int:
        """An upper bound on the runs of an arm that are still to be made: its sweep may end earlier."""
        if self.lengths[arm.key].refused:
            return 0
        result, left = self.sweep(arm), 0
        if result.chosen is None and result.bracketed is None:
            left = self._most(arm) - len(result.tried) + len(self.facts["seeds"])
        return left + sum(self.state(task).word not in ENDED for task in self.tasks() if task.arm is arm)

    def _most(self, arm: Arm) -> int:
        """The most learning rates that the arm tries."""
        return max(self.facts["most_learning_rates"], len(arm.learning_rates or ()))

    # -- how far they are ----------------------------------------------------------------------------------------------

    def run_folder(self, task: Task) -> Path:
        return self.folder / "runs" / task.name

    def state(self, task: Task) -> State:
        """The state of a run, from its folder, or as it ended in this command."""
        if task.name in self.running:
            return State("running")
        if task.name not in self._ended:
            state = state_of(self.run_folder(task), self.lengths[task.arm.key].steps)
            if state.word not in ("finished", "diverged"):
                return state
            self._ended[task.name] = state
        return self._ended[task.name]

    def end(self, task: Task, state: State) -> None:
        """Note how a run ended that is not finished: failed or refused. The next command tries it again."""
        if self.state(task).word not in ("finished", "diverged"):
            self._ended[task.name] = state
        self.write()

    # -- files ---------------------------------------------------------------------------------------------------------

    def write_config(self, task: Task) -> Path:
        """Write the config of a run."""
        path = self.folder / "configs" / f"{task.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        length = self.lengths[task.arm.key]
        own = {
            "run_dir": str(self.run_folder(task)),
            "seed": task.seed,
            "max_steps": length.steps,
            "optim": task.arm.rates(task.learning_rate, length.learning_rate),
        }
        write_file(path, yaml_text.dump(yaml_text.untyped(merge(task.arm.values, own))))
        return path

    def write(self) -> None:
        """Write experiment.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arms = [self._arm_entry(arm) for arm in self.arms]
        content = {
            "format": FORMAT,
            **self.facts,
            "arms": arms,
            "runs": [self._run_entry(task) for task in self.tasks()],
        }
        write_file(self.folder / FILE, sealed(content))

    def _arm_entry(self, arm: Arm) -> dict[str, Any]:
        length = self.lengths[arm.key]
        result = Sweep(()) if length.refused else self.sweep(arm)
        return {
            **{"name": arm.name, "scale": arm.scale, "changes": arm.changes, "values": arm.values},
            "first_learning_rates": None if arm.learning_rates is None else list(arm.learning_rates),
            **dataclasses.asdict(length),
            "refused": length.refused or None,
            "inferred_learning_rate": length.learning_rate,
            "learning_rate": result.chosen,
            "bracketed": result.bracketed,
        }

    def _run_entry(self, task: Task) -> dict[str, Any]:
        state = self.state(task)
        return {
            "folder": str(self.run_folder(task).relative_to(self.folder)),
            **{"arm": task.arm.name, "scale": task.arm.scale, "learning_rate": task.learning_rate, "seed": task.seed},
            **{"purpose": task.purpose, "state": state.word, "message": state.message},
        }


def state_of(folder: Path, steps: int) -> State:
    """The state of the run in `folder`, which trains for `steps` steps."""
    if not is_run(folder):
        return refusal(folder) or State("waiting")
    row = last_row(folder / "metrics.jsonl")
    if is_locked(folder):
        return State("running")
    if row is None:
        return refusal(folder) or State("waiting")
    if row["loss"] is None:
        return State("diverged", f"step {row['step']}: the loss or the gradient was not finite")
    if (
        row["step"] < steps
        or row["val_loss"] is None
        or steps not in (step for step, _ in found(folder / "checkpoints"))
    ):
        return State("waiting")
    if not math.isfinite(row["val_loss"]):
        return State("diverged", "the validation loss at the end is not finite")
    return State("finished", loss=row["val_loss"])


def refusal(folder: Path) -> State | None:
    """The state of a run that its last try under Slurm refused: launch/multinode.sh keeps the outcome of each try."""
    outcomes = sorted(folder.glob("logs/*/try-*/outcome"), key=lambda path: path.stat().st_mtime)
    text = outcomes[-1].read_text(encoding="utf-8", errors="replace") if outcomes else ""
    return (
        State("refused", printable(text.removeprefix("refused: ").strip(), 500)) if text.startswith("refused") else None
    )


def stored_experiment(folder: Path) -> dict[str, Any] | None:
    """experiment.json of a folder; None if there is none. Damaged if it was changed, UserError if a later release wrote it."""
    path = folder / FILE
    if not path.exists():
        if folder.exists() and {entry.name for entry in folder.iterdir()} - {".lock", SPEED}:
            raise UserError(f"compare_dir: {printable(folder)} holds something else; choose another --compare_dir")
        return None
    content = read_json(path)
    if DIGEST not in content:
        raise UserError(
            f"{printable(path)}: has no digest, so `compare` did not write it; choose another --compare_dir"
        )
    if content.get("format") != FORMAT:
        raise UserError(f"{printable(path)}: has format {content.get('format')!r}; this release reads {FORMAT}")
    return content


def stored_length(arm: dict[str, Any]) -> Length:
    fields = {field.name: arm[field.name] for field in dataclasses.fields(Length)}
    return Length(**{**fields, "learning_rate": arm["inferred_learning_rate"], "refused": ""})


def facts_of(config: Any, name: str, command: list[str], arms: list[Arm]) -> dict[str, Any]:
    """What experiment.json says beside arms and runs. config: a CompareConfig; arms: its arms, the baseline first."""
    asked = {
        "budget": config.budget,
        "baseline": arms[0].name,
        "seeds": list(config.seeds),
        "tuning_seed": config.tuning_seed,
        "most_learning_rates": config.most_learning_rates,
        "claims": claims_of(config),
    }
    rule = RULE.format(most=config.most_learning_rates)
    return {"name": name, "command": command, "rule": rule, "spec": spec_digest(asked, arms), **asked}


def spec_digest(asked: dict[str, Any], arms: list[Arm]) -> str:
    """sha256 of what a spec asks for. Where its data are is not part of it: their fingerprint tells data apart."""
    settings = [
        (
            arm.name,
            arm.scale,
            arm.learning_rates,
            {
                key: value
                for key, value in flat_text(arm.values).items()
                if not key.startswith(("data.path", "data.source"))
            },
        )
        for arm in arms
    ]
    return digest_of({**asked, "arms": settings})


def check_same(folder: Path, stored: dict[str, Any], facts: dict[str, Any], arms: list[Arm]) -> None:
    """UserError if the spec is not the one that the folder was begun with. Seeds and variants may have been added, nothing
    else: a result that is left out later is one that nobody sees."""

    def refuse(what: str) -> None:
        raise UserError(
            f"compare_dir: {printable(folder)} was begun with {what}; put it back, or choose another --compare_dir"
        )

    for key in ("budget", "baseline", "tuning_seed", "most_learning_rates"):
        if stored[key] != facts[key]:
            refuse(f"{key} {stored[key]}, now it is {facts[key]}")
    gone = [seed for seed in stored["seeds"] if seed not in facts["seeds"]]
    if gone:
        refuse(f"seed {gone[0]}, which the spec no longer names")
    dropped = [claim["words"] for claim in stored.get("claims", []) if claim not in facts.get("claims", [])]
    if dropped:
        refuse(f"the claim {printable(repr(dropped[0]))}, which the spec no longer has in these words")
    now = {arm.key: arm for arm in arms}
    for entry in stored["arms"]:
        arm = now.get((entry["name"], entry["scale"]))
        if arm is None:
            refuse(f"variant {printable(entry['name'])} at scale {entry['scale']:g}, which the spec no longer has")
        elif (arm.values, list(arm.learning_rates or ())) != (entry["values"], entry["first_learning_rates"] or []):
            refuse(f"other settings of variant {printable(entry['name'])}")
