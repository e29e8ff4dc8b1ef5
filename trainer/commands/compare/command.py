"""What the verb does, in order: read the spec, size the arms, train what is missing, report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.commands.compare import CompareConfig
from trainer.commands.compare.budget import Length, lengths
from trainer.commands.compare.estimate import Estimate, Speeds, estimate
from trainer.commands.compare.experiment import SPEED, Experiment, facts_of, stored_experiment
from trainer.commands.compare.queue import Queue, device_slots
from trainer.commands.compare.spec import arms, compare_folder
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.text import printable, printable_lines
from trainer.data.obtain import obtain_dataset
from trainer.data.stream import find_dataset
from trainer.planning.run_config import plugins_in
from trainer.runs.folder import locked
from trainer.runtime.distributed import World


def say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Work:
    """A comparison whose folder is locked, and whose arms have lengths. slots: the environment of each device."""

    experiment: Experiment
    speeds: Speeds
    slots: list[dict[str, str]]
    plugins: list[str]

    def estimate(self, price: float | None) -> Estimate:
        return estimate(self.experiment, price, self.speeds, len(self.slots))

    def left_out(self) -> list[str]:
        """The variants that were refused, or of which a run was refused or failed."""
        made = self.experiment
        refused = [arm.name for arm in made.arms if made.lengths[arm.key].refused]
        failed = [task.arm.name for task in made.tasks() if made.state(task).word in ("failed", "refused")]
        return list(dict.fromkeys([*refused, *failed]))

    def train(self) -> None:
        """Train what is missing, and write the report."""
        self.experiment.write()
        Queue(self.experiment, self.slots, self.plugins, say).run()
        publish(self.experiment)


@contextlib.contextmanager
def opened(config: CompareConfig, known: dict[tuple[str, float], Length] | None = None) -> Iterator[Work]:
    """The comparison of a spec. known: lengths of its arms that an earlier opening found.

    UserError for a spec that makes no sense, or a folder that holds something else; Absent if the baseline has no data.
    """
    words = sys.argv[1:]
    plugins = plugins_in(words)
    folder, found = compare_folder(config), arms(config)
    name = folder.name.removeprefix("compare-")
    facts = facts_of(config, name, ["python", "-m", "trainer", *words], found)
    slots = device_slots(config.jobs, found[0].config().device)
    with locked(folder, key="compare_dir", doing="at work on"):
        experiment = Experiment(folder, facts, found, stored_experiment(folder))
        experiment.lengths = {**(known or {}), **experiment.lengths}
        speeds = Speeds(folder / SPEED, slots[0], plugins, say)
        size_arms(experiment, config, speeds)
        yield Work(experiment, speeds, slots, plugins)


def compare(config: CompareConfig) -> None:
    """Train what is missing of the comparison, and report it. UserError at the end if variants were left out."""
    with opened(config) as work:
        if config.estimate:
            sys.stdout.write(printable_lines(work.estimate(config.price).text) + "\n")
        elif config.elements != "none":
            work.experiment.write()
            write_elements(work.experiment, work.plugins, config.elements == "new")
        else:
            work.train()
            if left_out := work.left_out():
                raise UserError(
                    f"left out: {printable(', '.join(left_out))}; {printable(work.experiment.folder / 'report' / 'report.md')} says why; "
                    "the other variants are done"
                )


def size_arms(experiment: Experiment, config: CompareConfig, speeds: Speeds) -> None:
    """Set the length of every arm; prepares their data where they are missing. Lengths of an earlier command stay, whatever the code would say today."""
    new = [arm for arm in experiment.arms if arm.key not in experiment.lengths]
    baselines = [arm for arm in experiment.arms if arm.name == experiment.arms[0].name]
    scales = {arm.scale for arm in new}
    sized = [arm for arm in experiment.arms if arm in new or (arm in baselines and arm.scale in scales)]
    found = lengths(sized, config.budget, preparing_finder(), speeds.tokens_per_second)
    experiment.lengths = {**found, **experiment.lengths}
    for arm in new:
        if found[arm.key].refused:
            say(f"refused: {arm.name} at scale {arm.scale:g}: {found[arm.key].refused}")


def dataset_finder() -> Callable[[Any], Any]:
    """`find_dataset`, which reads each dataset once."""
    read: dict[Any, Any] = {}

    def find(data: Any) -> Any:
        if data.path not in read:
            read[data.path] = find_dataset(data)
        return read[data.path]

    return find


def preparing_finder() -> Callable[[Any], Any]:
    """`dataset_finder`, which prepares what is missing. UserError if it cannot."""
    find = dataset_finder()

    def prepared(data: Any) -> Any:
        obtain_dataset(RunConfig(data=data), World())
        return find(data)

    return prepared


def write_elements(experiment: Experiment, plugins: list[str], only_new: bool) -> None:
    """Write the runs that can start now as elements for launch/array.sh, and print their folder; print nothing if none can.

    only_new: leave out runs that were elements before, so that one that fails again and again is not submitted without end.
    """
    stages = list((experiment.folder / "elements").glob("[0-9]*"))
    before = {path.read_text() for stage in stages for path in stage.iterdir()} if only_new else set()
    flags = [word for plugin in plugins for word in ("--plugin", plugin)]
    texts = ["\n".join([str(experiment.write_config(task)), *flags]) + "\n" for task in experiment.waiting()]
    texts = [text for text in texts if text not in before]
    if not texts:
        return
    number = 1 + max((int(stage.name) for stage in stages), default=0)
    folder = (
        experiment.folder / "elements" / str(number)
    )  # an element that is requeued reads the folder of its own stage
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / str(number)).write_text(text)
    print(folder)


def publish(experiment: Experiment) -> None:
    """Write the report."""
    from trainer.commands.report import ReportConfig, run

    run(ReportConfig(folders=[str(experiment.folder)]), as_json=False)
