"""What an evaluation measures besides the validation loss: lm-eval's tasks, and the metrics of plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trainer.checkpoint.format import together
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.data.dataset import DatasetInfo
from trainer.data.stream import local_folder
from trainer.data.tokenizers import Tokenizer
from trainer.inference.metrics import Measured, check_metrics, measure
from trainer.inference.tasks.suite import Suite, split_names
from trainer.runtime.distributed import World


class Evaluated(NamedTuple):
    """The results of an evaluation: see Run.validate, Suite.evaluate, metrics.measure."""

    validation: dict[str, dict[str, Any]]
    tasks: dict[str, Any] | None = None
    metrics: dict[str, float] = {}


class Measuring:
    """The tasks and metrics of a run. They are loaded before the model is built; then a wrong name or missing data cost no training.

    UserError on all ranks if something is missing on one of them.
    """

    def __init__(self, config: RunConfig, dataset: DatasetInfo, world: World) -> None:
        asked = config.evaluation
        self.config, self.world = asked, world
        self.metrics = split_names(asked.metrics, "evaluation.metrics")
        check_metrics(self.metrics, "evaluation.metrics")
        self.suite: Suite | None = None
        names = split_names(asked.tasks, "evaluation.tasks")
        if names:
            together(lambda: self._load(names, config, dataset), world)

    def _load(self, names: list[str], config: RunConfig, dataset: DatasetInfo) -> None:
        self.suite = suite = Suite(names, self.config.tasks_dir, self.config.tasks_limit, None)
        if self.world.leader:  # the other ranks would find the same
            info, length = dataset.tokenizer, self.config.sequence_length
            file = local_folder(config.data, dataset) / "tokenizer.json"
            assert length is not None  # resolved
            suite.check(Tokenizer.from_file(file, info.name, info.eot_id), length)

    def due(self, step: int, max_steps: int) -> bool:
        """Whether tasks are to be answered after a step; metrics are measured at every evaluation."""
        every = self.config.tasks_every
        return self.suite is not None and (step == max_steps or (every > 0 and step % every == 0))

    def answer(self, engine: Any, tokenizer: Any, at: Callable[[str], None]) -> dict[str, Any]:
        """The figures of the tasks: see Suite.evaluate."""
        assert self.suite is not None and self.config.sequence_length is not None
        return self.suite.evaluate(engine, tokenizer, self.config.sequence_length, self.world, at)

    def measure(self, engine: Any, tokenizer: Any, step: int, say: Callable[[str], None]) -> dict[str, float]:
        """The numbers of the metrics. One that fails is left out with a line: its author's mistake should not end the run."""
        found: dict[str, float] = {}
        for name in self.metrics:
            try:
                found |= measure(name, Measured(engine, tokenizer, step, self.world, say))
            except UserError as error:
                say(f"warning: step {step:,}: {error}; it is left out")
        return found
