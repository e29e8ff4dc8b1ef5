"""What is compared: the arms of a comparison, as its experiment.json says, or those of loose run folders, found by their configs.

An arm is what the runs of one row of the final table have in common. It is identified by (name, scale): arms are compared with
the baseline of their own scale.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.commands.report.load import Run, load_run
from trainer.core.errors import UserError
from trainer.core.files import read_json, user_path
from trainer.core.text import printable
from trainer.planning.run_config import OF_THE_DATA, changeable, is_run

EXPERIMENT = "experiment.json"
FORMAT = 1
BUDGETS = ("tokens", "parameters", "flops", "seconds")
STATES = ("waiting", "running", "finished", "diverged", "failed", "refused")
NAME_LENGTH = 60  # characters of a name that this module makes
GIVEN_LENGTH = 200  # and of one that a comparison gives; `compare` refuses longer ones
MESSAGE_LENGTH = 400
MOST_RUNS = 2000
# Keys that two runs of one arm may differ in, besides those that change nothing that is computed: the data is known by its
# fingerprint, the learning rate makes a curve.
WITHIN_AN_ARM = ("seed", "optim.lr", "data.", "log.")
NAMED_FIRST = ("model.name", "optim.name", "objective.name", "max_steps")


@dataclass
class Arm:
    """One row of the final table.

    changes: dotted key -> value, of experiment.json; parameters, flops, tokens: as planned there, None if not known
    learning_rate: the one that the test runs have; bracketed: whether the best of the tried ones has neighbours on both sides
    refused: why no run of this arm was started
    """

    name: str
    scale: float
    runs: list[Run] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    bracketed: bool | None = None
    refused: str | None = None

    @property
    def test_runs(self) -> list[Run]:
        return [run for run in self.runs if run.purpose != "tuning"]

    @property
    def by_seed(self) -> dict[int, Run]:
        """The finished test run of each seed."""
        return {run.seed: run for run in self.test_runs if run.finished}

    @property
    def example(self) -> Run | None:
        """The run that stands for the arm's config: the finished one of the lowest seed, or any with a config."""
        known = [run for run in self.test_runs + self.runs if run.values]
        return min(known, key=lambda run: (not run.finished, run.purpose != "test", run.seed), default=None)

    def curve(self) -> dict[float, list[Run]]:
        """Learning rate -> its runs, of those that the learning rate was chosen by."""
        tuning = [run for run in self.runs if run.purpose != "test"]
        rates = sorted({run.learning_rate for run in tuning if run.learning_rate is not None})
        return {rate: [run for run in tuning if run.learning_rate == rate] for rate in rates}


@dataclass(frozen=True)
class Claim:
    """words: what is claimed; source: who says so; pairs: names of two arms each, the better one first."""

    words: str
    source: str
    pairs: tuple[tuple[str, str], ...]


@dataclass
class Study:
    """Arms that are compared with each other.

    budget, rule, seeds, tuning_seed, claims, command, spec: of experiment.json; declared: whether there is one
    first_baseline: the one that the comparison declared, "" if it is the baseline; added_seeds: those that it did not begin with
    notes: what could not be read, each a line
    """

    name: str
    folder: Path | None
    arms: list[Arm]
    baseline: str
    declared: bool = False
    budget: str | None = None
    rule: str = ""
    seeds: list[int] = field(default_factory=list)
    tuning_seed: int | None = None
    claims: list[Claim] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spec: str = ""  # digest of what the comparison asks for
    first_baseline: str = ""
    added_seeds: list[int] = field(default_factory=list)

    @property
    def scales(self) -> list[float]:
        return sorted({arm.scale for arm in self.arms})

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs]

    @property
    def test_runs(self) -> list[Run]:
        """The finished test runs: those in the final table."""
        return [run for arm in self.arms for run in arm.by_seed.values()]

    def at(self, scale: float) -> list[Arm]:
        return [arm for arm in self.arms if arm.scale == scale]

    def baseline_of(self, arm: Arm) -> Arm | None:
        """The baseline of the arm's scale; None if there is none."""
        return next((one for one in self.at(arm.scale) if one.name == self.baseline), None)


def read_studies(folders: list[str], baseline: str | None) -> list[Study]:
    """A study for each comparison, and one of all loose runs together. UserError if there is nothing to report."""
    if not folders:
        raise UserError("folders: name run folders or comparisons, as in `python -m trainer report runs/one runs/two`")
    found = list(dict.fromkeys(path for given in folders for path in _find(user_path(given, "folders"))))
    comparisons = [path for path in found if (path / EXPERIMENT).is_file()]
    loose = [path for path in found if path not in comparisons]
    if len(loose) > MOST_RUNS:
        raise UserError(f"folders: hold {len(loose):,} runs; at most {MOST_RUNS:,} make one report")
    studies = [read_comparison(path) for path in comparisons]
    studies += [group([load_run(path, name) for path, name in zip(loose, _names(loose), strict=True)])] if loose else []
    for study in studies:
        chosen = _choose_baseline(study, baseline)
        study.first_baseline = study.baseline if study.baseline != chosen else ""
        study.baseline = chosen
    return studies


def _find(path: Path) -> list[Path]:
    """The run and comparison folders that `path` stands for."""

    def holds(folder: Path) -> bool:
        return (folder / EXPERIMENT).is_file() or is_run(folder)

    if not path.is_dir():
        raise UserError(f"folders: {printable(path)} is not a folder; name run folders or comparisons")
    if holds(path):
        return [path]
    found = [inner for inner in sorted(path.iterdir()) if inner.is_dir() and holds(inner)]
    if not found:
        raise UserError(
            f"folders: {printable(path)} holds no run and no comparison; name a run's folder, such as runs/NAME"
        )
    return found


def _names(folders: list[Path]) -> list[str]:
    """A name for each folder: its last part, or more parts if two folders end in the same."""
    for parts in range(1, 5):
        names = [str(PurePosixPath(*folder.absolute().parts[-parts:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder.absolute()) for folder in folders]


def _choose_baseline(study: Study, given: str | None) -> str:
    names = list(dict.fromkeys(arm.name for arm in study.arms))
    chosen = given or study.baseline or names[0]
    if chosen not in names:
        where = "baseline" if given else f"{printable(study.folder)}: baseline"
        raise UserError(f"{where}: {printable(chosen, 100)} is not an arm (arms: {printable(', '.join(names), 500)})")
    return chosen


# -- a comparison ----------------------------------------------------------------------------------------------------------


def _value(content: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    """A value of experiment.json. UserError if it is missing or of another type; true is not a number."""
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UserError(f"{where}: {key} is {printable(repr(value), 60)}, which no comparison writes")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {key} is {value}, which no comparison writes")
    return value


def _choice(content: Any, key: str, allowed: tuple[str, ...], where: str) -> str:
    value = _value(content, key, (str,), where)
    if value not in allowed:
        raise UserError(f"{where}: {key} is {printable(repr(value), 60)}; it is one of {', '.join(allowed)}")
    return value


NUMBER, NOTHING = (int, float), type(None)


def read_comparison(folder: Path) -> Study:
    """The study of a comparison's folder. UserError of one line if its experiment.json is not what `compare` writes."""
    path = folder / EXPERIMENT
    where = printable(path)
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{where}: has format {printable(repr(content.get('format')), 60)}; this release reads {FORMAT}"
        )
    arms = [_read_arm(one, where) for one in _value(content, "arms", (list,), where)]
    by_key = {(arm.name, arm.scale): arm for arm in arms}
    if not arms or len(by_key) < len(arms):
        raise UserError(f"{where}: arms must have different names or scales, and there must be one")
    runs = _value(content, "runs", (list,), where)
    if len(runs) > MOST_RUNS:
        raise UserError(f"{where}: has {len(runs):,} runs; at most {MOST_RUNS:,} make one report")
    study = Study(
        printable(_value(content, "name", (str,), where), NAME_LENGTH),
        folder,
        arms,
        printable(_value(content, "baseline", (str,), where), GIVEN_LENGTH),
        declared=True,
        budget=_choice(content, "budget", BUDGETS, where),
        rule=printable(_value(content, "rule", (str,), where), MESSAGE_LENGTH),
        seeds=[_value({"seeds": seed}, "seeds", (int,), where) for seed in _value(content, "seeds", (list,), where)],
        tuning_seed=_value(content, "tuning_seed", (int, NOTHING), where),
        claims=[_read_claim(one, by_key, where) for one in _value({"claims": []} | content, "claims", (list,), where)],
        command=[str(word) for word in _value(content, "command", (list,), where)],
        spec=_value({"spec": ""} | content, "spec", (str,), where),
    )
    for one in runs:
        run, key = _read_run(folder, one, where)
        if key not in by_key:
            raise UserError(f"{where}: a run has arm {printable(repr(key), 100)}, which is not among the arms")
        _add(by_key[key], run)
    first = _value({"first_seeds": study.seeds} | content, "first_seeds", (list,), where)
    study.added_seeds = [seed for seed in study.seeds if seed not in first]
    study.notes += [note for run in study.runs for note in run.notes]
    return study


def _read_arm(one: Any, where: str) -> Arm:
    refused = _value(one, "refused", (str, NOTHING), where)
    return Arm(
        printable(_value(one, "name", (str,), where), GIVEN_LENGTH),
        float(_value(one, "scale", NUMBER, where)),
        changes=_value(one, "changes", (dict,), where),
        learning_rate=_value(one, "learning_rate", (*NUMBER, NOTHING), where),
        bracketed=_value(one, "bracketed", (bool, NOTHING), where),
        refused=None if refused is None else printable(refused, MESSAGE_LENGTH),
    )


def _read_claim(one: Any, arms: dict[tuple[str, float], Arm], where: str) -> Claim:
    """A claim, whose arms must be there at each scale."""
    scales = {scale for _, scale in arms}
    pairs = []
    for pair in _value(one, "pairs", (list,), where):
        names = [printable(name, GIVEN_LENGTH) for name in pair] if isinstance(pair, list) else []
        if len(set(names)) != 2 or any((name, scale) not in arms for name in names for scale in scales):
            raise UserError(f"{where}: a claim's pair is {printable(repr(pair), 100)}, which are not two of the arms")
        pairs.append((names[0], names[1]))
    if not pairs:  # a claim about nothing would count as shown
        raise UserError(f"{where}: a claim names no pair of arms")
    words, source = (printable(_value(one, key, (str,), where), MESSAGE_LENGTH) for key in ("words", "source"))
    return Claim(words, source, tuple(pairs))


def _read_run(folder: Path, one: Any, where: str) -> tuple[Run, tuple[str, float]]:
    """A run of experiment.json, with what its folder says, and the (name, scale) of its arm."""
    inner = _value(one, "folder", (str,), where)
    if Path(inner).is_absolute() or ".." in Path(inner).parts or "\0" in inner:
        raise UserError(f"{where}: folder {printable(repr(inner), 100)} is not inside the comparison")
    state, name = _choice(one, "state", STATES, where), printable(Path(inner).name, GIVEN_LENGTH)
    key = (printable(_value(one, "arm", (str,), where), GIVEN_LENGTH), float(_value(one, "scale", NUMBER, where)))
    run = load_run(folder / inner, name) if is_run(folder / inner) else Run(folder / inner, name)
    run.purpose = _choice(one, "purpose", ("tuning", "test"), where)
    run.seed, run.scale = _value(one, "seed", (int,), where), key[1]
    rate = _value(one, "learning_rate", (*NUMBER, NOTHING), where)
    run.learning_rate = run.learning_rate if rate is None else float(rate)
    message = printable(_value(one, "message", (str,), where), MESSAGE_LENGTH)
    if state in ("diverged", "failed", "refused"):
        run.state, run.message, run.loss, run.bits = state, message or run.message, None, None
    elif state == "finished" and not run.finished:
        run.note(
            f"{name}: {EXPERIMENT} says that it is finished, its folder does not: {run.message or 'it has no rows'}"
        )
        run.state = "unfinished" if run.state == "waiting" else run.state
    elif not run.finished and run.state != "diverged":
        run.state, run.message = state, message or run.message
    return run, key


def _add(arm: Arm, run: Run) -> None:
    """Add a run to its arm. Of two finished runs that only their folder tells apart, the first counts."""
    same = next((one for one in arm.runs if _role(one) == _role(run) and one.finished and run.finished), None)
    if same is None:
        arm.runs.append(run)
    else:
        arm.runs[0].note(
            f"{run.name}: is the same run as {same.name} (arm, learning rate and seed); only {same.name} counts"
        )


def _role(run: Run) -> tuple[Any, ...]:
    return run.purpose, run.learning_rate, run.seed


# -- loose runs ------------------------------------------------------------------------------------------------------------


def group(runs: list[Run]) -> Study:
    """The study of loose runs. Runs are one arm if their configs differ in nothing but what WITHIN_AN_ARM and `changeable` name."""
    notes = [note for run in runs for note in run.notes]
    readable = [run for run in runs if run.values]
    if not readable:
        raise UserError("folders: " + "; ".join(notes[:3]))
    for run in runs:
        run.notes = []
    together: dict[str, list[Run]] = {}
    for run in readable:
        together.setdefault(repr(sorted(_identity(run).items())), []).append(run)
    names = _arm_names([members[0] for members in together.values()])
    arms = []
    for name, members in zip(names, together.values(), strict=True):
        arm = Arm(name, members[0].scale)
        for run in members:
            _add(arm, run)
        _choose_rate(arm)
        arms.append(arm)
    notes += [note for run in readable for note in run.notes]
    return Study("runs", None, arms, "", seeds=sorted({run.seed for run in readable}), notes=notes)


def _identity(run: Run) -> dict[str, Any]:
    """What a run computes, without seed and learning rate: dotted keys, and the fingerprint of the data."""
    free = tuple(key for key in changeable(run.get("model.name")) if key != "max_steps")
    kept = {
        key: value
        for key, value in run.values.items()
        if key in OF_THE_DATA or not key.startswith((*free, *WITHIN_AN_ARM))
    }
    return kept | {"data": str(run.data.get("fingerprint", ""))[:8]}


def _arm_names(examples: list[Run]) -> list[str]:
    """A name for each arm: the values of as few keys as tell the arms of a scale apart; else the name of the first folder."""
    identities = [_identity(run) for run in examples]
    keys = list(dict.fromkeys(key for one in identities for key in one))
    differing = [key for key in keys if len({repr(one.get(key)) for one in identities}) > 1 and key != "model_scale"]
    differing.sort(key=lambda key: NAMED_FIRST.index(key) if key in NAMED_FIRST else len(NAMED_FIRST))
    chosen = ["model_scale"]

    def distinct(among: list[str]) -> int:
        return len({tuple(repr(one.get(key)) for key in among) for one in identities})

    while distinct(chosen) < len(examples):
        best = max(differing, key=lambda key: distinct([*chosen, key]))  # the first of the best
        if distinct([*chosen, best]) == distinct(chosen):
            return [printable(run.name, NAME_LENGTH) for run in examples]
        chosen.append(best)
    chosen = chosen[1:] or ["model.name"]
    if "model.name" not in chosen and len({one.get("model.name") for one in identities}) > 1:
        chosen.insert(0, "model.name")
    names = [", ".join(_named(key, one.get(key)) for key in chosen) for one in identities]
    return [printable(run.name if len(name) > NAME_LENGTH else name) for run, name in zip(examples, names, strict=True)]


def _named(key: str, value: Any) -> str:
    return str(value) if key == "model.name" else f"{key.rpartition('.')[2]}={value}"


def _choose_rate(arm: Arm) -> None:
    """Of several learning rates: the best of those with the most finished seeds makes the table, the others only the curve. Rates without
    a result bracket nothing; one that diverged does."""
    for run in arm.runs:
        run.purpose = "both"
    curve = arm.curve()
    if not curve:  # no run names its learning rate
        for run in arm.runs:
            run.purpose = "test"
        return
    finished = {rate: [run.loss for run in runs if run.loss is not None] for rate, runs in curve.items()}
    most = max(map(len, finished.values()))
    ends = {rate: statistics.fmean(losses) if losses else math.inf for rate, losses in finished.items()}
    arm.learning_rate = best = min((rate for rate in curve if len(finished[rate]) == most), key=ends.__getitem__)
    for run in arm.runs:
        run.purpose = "tuning" if run.learning_rate != best else "both" if len(curve) > 1 else "test"
    ended = [
        best,
        *(rate for rate, runs in curve.items() if any(run.finished or run.state == "diverged" for run in runs)),
    ]
    arm.bracketed = min(ended) < best < max(ended) if len(curve) > 1 else None


def lower_rates(curve: dict[float, list[Run]], chosen: float) -> list[float]:
    """The learning rates with a lower mean loss than the chosen one, on the seeds that both have."""

    def losses(rate: float) -> dict[int, float]:
        return {run.seed: run.loss for run in curve.get(rate, []) if run.loss is not None}

    lower, ours = [], losses(chosen)
    for rate in curve:
        theirs = losses(rate)
        if sum(theirs[seed] - ours[seed] for seed in ours.keys() & theirs.keys()) < 0:
            lower.append(rate)
    return lower
