"""The tasks of an evaluation: found by name, checked before there is anything to evaluate, evaluated as often as asked."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import MachineError, UserError
from trainer.core.files import user_path
from trainer.core.text import printable
from trainer.runtime.distributed import World

TASKS = Path(__file__).parent
INSTALL = "pip install 'crescendo-lm[lm-eval]'"
SHOT_SEED = 1234  # lm-eval's own, of the examples in the prompt
BOOTSTRAPS = 1000  # samples for the standard error of a figure that is no mean, such as a perplexity
# The figure of a task that counts in the centred mean: the first of these that it has.
MAIN_METRICS = ("acc_norm", "acc", "exact_match")


def split_names(names: list[str], key: str) -> list[str]:
    """The names in a list whose entries may hold several, with commas between them; each once. UserError if entries hold none."""
    found = list(dict.fromkeys(name.strip() for entry in names for name in entry.split(",") if name.strip()))
    if names and not found:
        raise UserError(
            f"{key}: {printable(', '.join(map(repr, names)), 100)} names nothing; give names, or leave it out"
        )
    return found


class Suite:
    """Tasks that are loaded. UserError if one is unknown, its data are missing or wrong, or lm-eval is not installed.

    loaded: as lm-eval's TaskManager gives them; names: of the tasks and groups whose figures are reported, in order.
    """

    def __init__(self, names: list[str], tasks_dir: str | None, limit: int, shots: int | None) -> None:
        """tasks_dir: folder with the data, None: lm-eval fetches them; limit: documents of each task, 0: all; shots: examples in the
        prompt, None: as each task says, else none."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"tasks: lm-eval is not installed; `{INSTALL}`")
        self.limit, self.shots = limit, shots
        self.folder = None if tasks_dir is None else user_path(tasks_dir, "tasks_dir")
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"tasks_dir: {printable(self.folder)} is not a folder")
        with quiet(logging.WARNING if self.folder is None else logging.ERROR):
            self.loaded = load(names, self.folder)
        for task in self.loaded["tasks"].values():
            set_shots(task, shots)
        groups = [group for group in self.loaded["groups"].values() if group.has_aggregation]
        members = {task.task_name for group in groups for task in group.get_all_tasks()}
        self.names = [group.name for group in groups] + [name for name in self.loaded["tasks"] if name not in members]

    def check(self, tokenizer: Any, length: int) -> None:
        """Build every request. UserError if the tokenizer or the model's context, `length` tokens, does not suit a task."""
        from trainer.inference.tasks.harness import LiveModel

        model = LiveModel(None, tokenizer, length, World())
        with quiet(logging.ERROR):
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(SHOT_SEED)
                task.build_all_requests(limit=self.limit or None)
                for request in task.instances:
                    model.check(request)

    def evaluate(
        self,
        runner: Any,
        tokenizer: Any,
        length: int,
        world: World,
        at: Callable[[str], None] = lambda where: None,
    ) -> dict[str, Any]:
        """The figures of the model that `runner` holds, on all ranks the same. runner, at: as in evaluation.full; length: most tokens
        that the model reads at once.

        Returns {"tasks": {name: {metric: value, "stderr": {metric: value}, "version", "shots", "documents", "chance", "centred"}},
        "members": the same of the members of groups, "centred_mean", "seconds", "documents_per_second", "versions"}.
        """
        from lm_eval.evaluator import evaluate

        from trainer.inference.tasks.harness import LiveModel

        began = time.perf_counter()
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(SHOT_SEED)
        model = LiveModel(runner, tokenizer, length, world, at)
        with quiet(logging.ERROR):
            raw = evaluate(model, self.loaded, limit=self.limit or None, log_samples=False, bootstrap_iters=BOOTSTRAPS)
        assert raw is not None  # every rank is lm-eval's rank 0
        return self.figures(raw, time.perf_counter() - began)

    def figures(self, raw: Any, seconds: float) -> dict[str, Any]:
        """What `evaluate` returns. raw: lm-eval's results."""
        tasks, groups = self.loaded["tasks"], self.loaded["groups"]
        chances = {name: chance_of(task) for name, task in tasks.items()}
        for name, group in groups.items():
            chances[name] = mean([chances[task.task_name] for task in group.get_all_tasks()])
        found = {
            name: {
                **metrics_of(values),
                "version": raw["versions"].get(name),
                "shots": raw["n-shot"].get(name),
                "documents": values.get("sample_len"),
                "chance": chances[name],
            }
            for name, values in raw["results"].items()
            if name in tasks or name in self.names
        }
        for entry in found.values():
            entry["centred"] = centred(entry)
        reported = {name: found[name] for name in self.names}
        counted = [entry["centred"] for entry in reported.values() if entry["centred"] is not None]
        documents = sum(entry["documents"] for name, entry in found.items() if name in tasks)
        return {
            "tasks": reported,
            "members": {name: entry for name, entry in found.items() if name not in reported},
            "centred_mean": mean(counted) if len(counted) > 1 else None,
            "tasks_dir": None if self.folder is None else str(self.folder),
            "tasks_limit": self.limit,
            "seconds": seconds,
            "documents_per_second": documents / seconds,
            "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch")},
        }


def load(names: list[str], folder: Path | None) -> Any:
    """The tasks of these names: with a folder our own, over its files; without, lm-eval's, whose data come from the hub."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        manager = TaskManager(include_path=str(TASKS / "hub"))
    else:
        manager = TaskManager(
            include_path=str(TASKS / "local"), include_defaults=False, metadata={"tasks_dir": str(folder)}
        )
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            where = "there are thousands: `lm-eval ls tasks`" if folder is None else ", ".join(manager.all_tasks)
            raise UserError(
                f"tasks: there is no task {printable(repr(name), 100)}{hint} (with these settings: {where})"
            )
    try:
        loaded: Any = manager.load(names)
    except UserError:
        raise
    except Exception as error:  # of lm-eval, of `datasets`, of the hub, of the code of a task
        kind = MachineError if isinstance(error, (ConnectionError, TimeoutError)) else UserError
        raise kind(
            f"tasks: cannot load {', '.join(names)} ({type(error).__name__}: {printable(error, 300)}); without a network give "
            "tasks_dir, a folder with the data"
        ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"tasks: {name} runs code that a model wrote, or needs pictures; that is not supported")
    return loaded


def set_shots(task: Any, shots: int | None) -> None:
    """Set the number of examples in the prompt as lm-eval does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", (own or 0) if shots is None else shots)


def metrics_of(values: dict[str, Any]) -> dict[str, Any]:
    """The figures in lm-eval's results of a task, whose keys are METRIC,FILTER: METRIC or METRIC_FILTER -> value."""
    found: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = metric.removesuffix("_stderr") + ("" if filtered == "none" else f"_{filtered}")
        (errors if metric.endswith("_stderr") else found)[name] = float(value)
    return {**found, "stderr": errors}


def chance_of(task: Any) -> float:
    """The accuracy of answering without reading the question: of choices, one in so many. Where all questions have the same choices,
    such as yes and no, the share of the answer that is right most often. 0 where there is nothing to choose from."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    asked: dict[Any, list[Any]] = {}
    for request in task.instances:
        asked.setdefault(request.doc_id, []).append(request)
    blind = mean([1 / len(requests) for requests in asked.values()])
    choices = {tuple(request.args[1] for request in requests) for requests in asked.values()}
    if len(choices) > 1 or task.multiple_input:
        return blind
    right = [str(task.doc_to_target(requests[0].doc)) for requests in asked.values()]
    return max(blind, max(map(right.count, set(right))) / len(right))


def centred(entry: dict[str, Any]) -> float | None:
    """(accuracy - chance) / (1 - chance), of the first of MAIN_METRICS (arXiv 2406.11794); None if the task has none of them."""
    metric = main_metric(entry)
    if metric is None or entry["chance"] == 1:
        return None
    return (entry[metric] - entry["chance"]) / (1 - entry["chance"])


def main_metric(entry: dict[str, Any]) -> str | None:
    return next((metric for metric in MAIN_METRICS if metric in entry), None)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def bootstrap_error(figure: Callable[[list[Any]], float], values: list[Any], iters: int) -> float:
    """The standard error of a figure that is no mean, from `iters` resamples; seeded. lm-eval's own would fork this process."""
    draw = random.Random(0)
    return statistics.stdev(figure(draw.choices(values, k=len(values))) for _ in range(iters))


@contextlib.contextmanager
def quiet(level: int) -> Iterator[None]:
    """Inside, lm-eval prints no progress bars and no log below `level`, and starts no processes."""
    import datasets
    from lm_eval.api import metrics, task

    loggers = {name: logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")}
    before = {name: logger.level for name, logger in loggers.items()}
    bars = not datasets.are_progress_bars_disabled()
    replaced = {(task, "tqdm"): lambda documents, **options: documents, (metrics, "bootstrap_stderr"): bootstrap_error}
    originals = {place: getattr(*place) for place in replaced}
    loggers["lm_eval"].setLevel(level)
    loggers["huggingface_hub"].setLevel(logging.ERROR)  # its lines about retries would hide the one of the error
    datasets.disable_progress_bars()
    for place, value in replaced.items():
        setattr(*place, value)
    try:
        yield
    finally:
        for place, value in originals.items():
            setattr(*place, value)
        for name, logger in loggers.items():
            logger.setLevel(before[name])
        if bars:
            datasets.enable_progress_bars()
