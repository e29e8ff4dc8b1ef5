"""laws.yaml of a ladder: whose laws it holds, where each comes from, and how a later check adds its law to the file."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.commands.ladder import LadderConfig
from trainer.commands.ladder.rates import Optimum, power_law
from trainer.commands.ladder.spec import Rung, whose
from trainer.core.errors import UserError
from trainer.core.files import digest_of, write_file
from trainer.core.text import printable
from trainer.data.dataset import DatasetInfo
from trainer.data.mixture import fingerprint
from trainer.planning import dial
from trainer.planning.expected import settings_of, validation_of
from trainer.planning.laws import BATCH_POWER, LAWS, Laws, Origin, PowerLaw, Subject, parse_laws, read_laws
from trainer.planning.model import read_model
from trainer.runtime.environment import environment

FAR = 32.0  # a scale at which the dial chooses another shape than at those of any ladder
OTHERS = "another for each size"
OF_THE_COMMAND = ("ladder_dir", "jobs", "price", "estimate", "check")  # what decides no result


def laws_of(folder: Path, rungs: Sequence[Rung], dataset: DatasetInfo) -> Laws:
    """The laws that the folder has so far. UserError if they are of something else than these rungs."""
    path, empty = folder / LAWS, Laws(subject_of(rungs, dataset))
    if not path.exists():
        return empty
    before = read_laws(path)
    then, now = (facts_of(laws.of) for laws in (before, parse_laws(empty.text().encode(), LAWS)))
    differing = [key for key in {**now, **then} if then.get(key) != now.get(key) and key not in ("sized", "data")]
    if differing:
        raise UserError(
            f"ladder_dir: {printable(path)} holds laws with another {differing[0]} ({printable(then.get(differing[0]), 200)}, now "
            f"{printable(now.get(differing[0]), 200)}); choose another --ladder_dir"
        )
    return before


def facts_of(subject: Subject) -> dict[str, Any]:
    """What the laws are of, each setting and field of the model alone."""
    facts = dataclasses.asdict(subject)
    settings, model = facts.pop("settings"), facts.pop("model")
    return facts | {f"model.{field}": value for field, value in model.items()} | settings


def subject_of(rungs: Sequence[Rung], dataset: DatasetInfo) -> Subject:
    """What the laws of these rungs, of several scales, are of."""
    config, tokenizer = rungs[0].plan.config, dataset.tokenizer
    shapes = [dataclasses.asdict(one.plan.model_config) for one in rungs] + far_shape(rungs[0])
    sized = [key for key in shapes[0] if any(shape.get(key) != shapes[0][key] for shape in shapes)]
    kept = {key: value for key, value in shapes[0].items() if key not in (*sized, "vocab_size")}
    settings = [settings_of(one.plan.config, one.plan.entries, sized) for one in rungs]
    same = {
        key: value if all(other.get(key) == value for other in settings) else OTHERS
        for key, value in settings[0].items()
    }
    return Subject(
        model={"name": config.model["name"], **kept},
        sized=sized,
        recipe=config.optim.recipe,
        optimizer=config.optim.name,
        objective=config.objective["name"],
        data=str(config.data.path),
        fingerprint=fingerprint(config.data, dataset),
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.batch.sequence_length,
        validation=validation_of(config),
        settings=same,
    )


def far_shape(one: Rung) -> list[dict[str, Any]]:
    """The fields of the model far up the dial: what differs from there is the dial's choice. Empty if the fields that the spec sets
    allow no such size."""
    _, model_class, given = read_model(one.arm.config())
    vocab = one.plan.model_config.vocab_size
    target = dial.target_parameters(FAR, vocab)
    try:
        far = model_class.config_for_scale(FAR, target_parameters=target, **{**given, "vocab_size": vocab})
    except ValueError:
        return []
    return [dataclasses.asdict(far)]


def origin(config: LadderConfig, rungs: Sequence[Rung], points: int) -> Origin:
    """Where a law comes from that was fitted to `points` runs of these rungs."""
    asked = {key: value for key, value in dataclasses.asdict(config).items() if key not in OF_THE_COMMAND}
    start = environment()
    return Origin(
        spec_digest=digest_of(asked),
        command=command(),
        time=start["time"],
        versions=start["versions"],
        seeds=list(config.seeds),
        points=points,
        rates=next(entry.rule for entry in rungs[0].plan.entries if entry.key == "optim.lr"),
        N=ends(one.size for one in rungs),
        D=ends(one.length.tokens for one in rungs),
        B=ends(one.plan.config.batch.tokens_per_step for one in rungs),
        tokens_per_parameter=ends(one.length.tokens / one.size for one in rungs),
        epochs=max(one.epochs for one in rungs),
    )


def command() -> str:
    """The command that is at work, as one types it."""
    return shlex.join(["python", "-m", "trainer", *sys.argv[1:]])


def about(subject: Subject) -> str:
    """A line for a page: what its runs are, and the command that made it."""
    data = f"{subject.data}, fingerprint {subject.fingerprint[:12]}, tokenizer {subject.tokenizer}"
    return (
        f"runs: {subject.model['name']}, recipe {subject.recipe}, optimizer {subject.optimizer}; {data}; `{command()}`"
    )


def ends(values: Iterable[float]) -> list[float]:
    listed = [float(value) for value in values]
    return [min(listed), max(listed)]


def law_of_rates(config: LadderConfig, rungs: Sequence[Rung], found: Sequence[Optimum]) -> PowerLaw | None:
    """lr = k N^p B^0.5 through the optima that have worse neighbours; None if fewer than two sizes have one."""
    pairs = [(one, best) for one, best in zip(rungs, found, strict=True) if best.bracketed]
    if len(pairs) < 2:
        return None
    noisy = [
        dataclasses.replace(best, best=best.best / one.plan.config.batch.tokens_per_step**BATCH_POWER)
        for one, best in pairs
    ]
    constant, power = power_law(noisy)
    return PowerLaw(
        f"lr = {constant:.4g} N^{power:.3f} B^{BATCH_POWER:g}",
        *(constant, power, BATCH_POWER),
        [
            f"{told(one)}, B {one.plan.config.batch.tokens_per_step:,}: lr {best.best:.4g}, {whose(one, 'optim.lr')} {best.own:.4g}"
            for one, best in pairs
        ],
        origin(config, [one for one, _ in pairs], len(pairs)),
    )


def law_of_batches(config: LadderConfig, rungs: Sequence[Rung], found: Sequence[Optimum]) -> PowerLaw | None:
    """B = k N^q through the optima that have worse neighbours; None if fewer than two sizes have one."""
    pairs = [(one, best) for one, best in zip(rungs, found, strict=True) if best.bracketed]
    if len(pairs) < 2:
        return None
    constant, power = power_law([best for _, best in pairs])
    where = origin(config, [one for one, _ in pairs], len(pairs))
    return PowerLaw(
        f"B = {constant:.4g} N^{power:.3f}",
        *(constant, power, 0.0),
        [
            f"{told(one)}: B {best.best:,.0f}, {whose(one, 'batch.tokens_per_step')} {best.own:,.0f}"
            for one, best in pairs
        ],
        dataclasses.replace(where, B=ends(best.best for _, best in pairs)),
    )


def told(one: Rung) -> str:
    return f"N {one.size:,}, D {one.length.tokens:,}"


def keep(folder: Path, laws: Laws) -> None:
    """Write the file."""
    write_file(folder / LAWS, laws.text())
