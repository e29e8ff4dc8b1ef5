"""`dial`: the laws of a ladder in a plan. They replace the recipe's rules of learning rate and batch, and say which loss to expect.

A run keeps the path of the file with its digest, and a copy in its folder, so that it goes on without the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.config import kernel_fields_of, with_later_fields
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.files import user_path
from trainer.core.settings import LARGEST, ROOT
from trainer.core.text import printable
from trainer.data.mixture import fingerprint
from trainer.optim import DEFAULT_RULE
from trainer.planning.laws import LAWS, ONCE, SHARE, Laws, LossLaw, read_laws
from trainer.planning.length import tokens_at_lengths
from trainer.planning.resolver import Draft
from trainer.planning.run_config import CONFIG, LENGTHS, OF_THE_DATA, flat, folder_of
from trainer.recipes import PlanEntry
from trainer.recipes.recipe import Default

PINNED = re.compile(r"(.+)@([0-9a-f]{64})")
BY_RULE = "by its rule"
LADDERS = ROOT / "configs" / "record" / "ladders"
MOST_NAMED = 6  # settings that are not as in the ladder
# Keys that `settings_of` leaves out: the size and length of a run, where it runs and what it writes, and what a Subject holds besides.
ELSEWHERE = (
    *("run_dir", "seed", "device", "profile", "dial", "deterministic", "model", "parameters", "max_steps", *LENGTHS),
    *("init_from", "init_weights", "branch_from", "objective.name", "data.", "engine.", "evaluation.", "checkpoint."),
    *("log.", "batch.tokens_per_", "batch.device_token_capacity", "batch.sequence_length"),
    *("optim.recipe", "optim.name", "optim.non_finite", "optim.max_skips"),
)
# What rules choose for N, D or B.
OF_THE_SIZE = ("optim.lr", "optim.rest_lr", "optim.warmup_steps", "optim.decay_steps", "batch.ramp_start")


@dataclass(frozen=True)
class DialFile:
    """The laws of a plan. path: of the file, absolute; differing: what of the run is not as in the ladder, for readers; decided: whether
    the run has already taken its values from them."""

    laws: Laws
    path: Path
    differing: tuple[str, ...]
    decided: bool

    def learning_rate(self, size: int, batch: int, tokens: int) -> Default | None:
        """optim.lr; None without a law of it. size: N; batch: tokens of a step; tokens: of the run."""
        law = self.laws.learning_rate
        if law is None:
            return None
        rule = "; ".join(filter(None, (law.law, self.path.name, law.origin.beyond(N=size, D=tokens, B=batch))))
        return Default(float(f"{law.value(size, batch):.6g}"), rule)

    def tokens_per_step(self, size: int, length: int, steps: int | None) -> Default | None:
        """batch.tokens_per_step in whole sequences of `length` tokens; None without a law of it. size: N; steps: of the run, if that is
        known. UserError if the law gives a batch that no run can have."""
        law = self.laws.batch
        if law is None:
            return None
        tokens = law.value(size)
        if not 1 <= tokens <= LARGEST:
            raise self.unusable("batch.tokens_per_step", tokens, size)
        value = max(1, round(tokens / length)) * length
        known = {"N": size} if steps is None else {"N": size, "D": steps * value}
        rule = "; ".join(filter(None, (law.law, f"{self.path.name}, in whole sequences", law.origin.beyond(**known))))
        return Default(value, rule)

    def unusable(self, key: str, value: float, size: int) -> UserError:
        """Of a value that the key cannot have. size: N."""
        return UserError(
            f"dial: {printable(self.path)} gives {key} {value:.4g} at N {size:,}, which no run can have; set {key}, or leave dial out"
        )


@dataclass(frozen=True)
class Expected:
    """The validation loss that a run should end with, in nats a token, and between which two SHARE of new runs lie. rule: where it comes
    from, or, if the loss is None, why it is not known."""

    rule: str
    loss: float | None = None
    low: float = 0.0
    high: float = 0.0

    def entry(self) -> PlanEntry:
        """Its row of the plan."""
        if self.loss is None:
            return PlanEntry("expected loss", "unknown", self.rule)
        return PlanEntry(
            "expected loss", f"{self.loss:.4f}", f"{SHARE:.0%} between {self.low:.4f} and {self.high:.4f}; {self.rule}"
        )

    def columns(self) -> dict[str, float]:
        """What the last row of metrics.jsonl says of it."""
        if self.loss is None:
            return {}
        return {"expected_val_loss": self.loss, "expected_low": self.low, "expected_high": self.high}


def outcome(row: dict[str, Any]) -> dict[str, Any]:
    """How far the last row of a run is from what its plan expected, in nats; empty if that expected nothing."""
    keys = ("val_loss", "expected_val_loss", "expected_low", "expected_high")
    if not all(type(row.get(key)) in (int, float) and math.isfinite(row[key]) for key in keys):
        return {}
    measured, loss, low, high = (row[key] for key in keys)
    return {"off_expected": measured - loss, "inside_interval": low <= measured <= high}


def verdict(row: dict[str, Any]) -> str:
    """`outcome` as a line; "" if nothing was expected."""
    found = outcome(row)
    if not found:
        return ""
    place = "inside" if found["inside_interval"] else "outside"
    return (
        f"expected loss {row['expected_val_loss']:.4f}, {SHARE:.0%} between {row['expected_low']:.4f} and {row['expected_high']:.4f}: "
        f"measured {row['val_loss']:.4f}, {found['off_expected']:+.4f} nats, {place} the interval"
    )


def choose_dial(draft: Draft, model: Any, dataset: Any) -> tuple[Draft, DialFile | str | None]:
    """The laws that the config names, with the digest of their file in the draft; None without `dial`, where the plan names the file of
    this project for the model, if there is one. model: ModelFacts.

    A run that goes on reads its own copy. Where that is gone or damaged, the reason comes instead of laws: its values are decided. A new
    run with the config of another one is a new run: its laws are checked.
    UserError if the file cannot be read, holds no law, or holds laws of something else.
    """
    config = draft.config
    if config.dial is None:
        known = LADDERS / f"{config.model['name']}.yaml"
        return (
            draft.note("dial", "none", f"{known} has laws of this model: --dial takes it") if known.exists() else draft
        ), None
    if config.init_from is not None:
        raise UserError(
            "dial: laws are of runs that begin with new weights, not with those of init_from; leave one of them out"
        )
    pinned = PINNED.fullmatch(config.dial)
    path = user_path(pinned[1] if pinned else config.dial, "dial").absolute()
    copy = folder_of(config) / LAWS
    goes_on = pinned is not None and (copy.exists() or (folder_of(config) / CONFIG).exists())
    try:
        laws = read_laws(copy if pinned and copy.exists() else path)
        if pinned and laws.digest != pinned[2]:
            raise UserError(f"{printable(path)}: is not the file that the run began with (another digest)")
        if not have(laws):
            raise UserError(
                f"{printable(path)}: holds no law, as after a --check without optima; run `ladder` in its folder, or leave dial out"
            )
    except UserError as error:
        if goes_on and config.optim.lr is not None and config.batch.tokens_per_step is not None:
            return draft.note("dial", config.dial, f"not read: {error}"), str(error)
        raise type(error)(f"dial: {error}") from None
    check_subject(laws, path, config, dataset)
    found = DialFile(laws, path, differing(laws, config, dataset), goes_on)
    draft = draft.set("", "dial", f"{path}@{laws.digest}")
    return draft.note("dial", path.name, told(found)), found


def told(dial: DialFile) -> str:
    """Which laws a file has, and what of the run is not as in its ladder."""
    of = dial.laws.of
    other = f"; not as in the ladder: {'; '.join(dial.differing)}" if dial.differing else ""
    return f"laws of {of.model['name']}: {have(dial.laws)}; {dial.path}, digest {dial.laws.digest[:12]}{other}"


def have(laws: Laws) -> str:
    """The laws of a file, and how many runs or, of a sweep, sizes each is fitted to; "" if there is none."""
    named = {"loss, {} runs": laws.loss, "learning rate, {} sizes": laws.learning_rate, "batch, {} sizes": laws.batch}
    return "; ".join(text.format(law.origin.points) for text, law in named.items() if law is not None)


def check_subject(laws: Laws, path: Path, config: Any, dataset: Any) -> None:
    """UserError if the laws are of another architecture, recipe, optimizer, objective or, for a law of losses, tokenizer. config:
    with a recipe and every field of the model."""
    of, name = laws.of, printable(path)
    for key, theirs, ours in (
        ("model.name", of.model.get("name"), config.model["name"]),
        ("optim.recipe", of.recipe, config.optim.recipe),
        ("optim.name", of.optimizer, config.optim.name or DEFAULT_RULE),
        ("objective.name", of.objective, config.objective["name"]),
        *((f"model.{key}", *values) for key, values in fields(of, config.model).items()),
    ):
        if theirs != ours:
            raise UserError(
                f"dial: {name} holds laws of {key} {printable(theirs)}, this run has {printable(ours)}; leave dial out"
            )
    if laws.loss is not None and dataset is not None and dataset.tokenizer.sha256 != of.tokenizer_sha256:
        raise UserError(
            f"dial: {name} predicts losses over the {of.vocab_size:,} ids of tokenizer {of.tokenizer}, the data have {dataset.tokenizer.vocab_size:,} "
            f"of {dataset.tokenizer.name}; leave dial out, or fit a ladder on data with this tokenizer"
        )


def fields(of: Any, model: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By field of the model that the dial leaves alone: (value in the ladder, value in the run). of: Subject."""
    free = {*of.sized, *kernel_fields_of(of.model.get("name")), "name", "vocab_size"}
    before = with_later_fields(of.model)

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        key: (plain(before.get(key, "without it")), plain(value)) for key, value in model.items() if key not in free
    }


def settings_of(config: Any, entries: Iterable[PlanEntry], sized: Iterable[str]) -> dict[str, Any]:
    """What decides a run's loss besides N, D, B and what a Subject holds: key -> its value, or BY_RULE where a rule follows the size.

    config: resolved; entries: of its plan; sized: fields of the model that the dial chooses.
    """
    rules = {entry.key: entry.rule for entry in entries}
    follow = {*OF_THE_SIZE, *(f"model.{field}" for field in sized)}
    found = {
        key: BY_RULE if key in follow and not rules.get(key, "").startswith("set") else value
        for key, value in flat(config).items()
        if key in follow or key.startswith(OF_THE_DATA) or not key.startswith(ELSEWHERE)
    }
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def other_settings(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Where `ours` is not as in the ladder, for readers. A key that the ladder's release did not know had its default."""
    unset = flat(RunConfig())
    pairs = {key: (theirs.get(key, unset.get(key)), value) for key, value in ours.items()}
    found = [
        f"{key} {told_value(own)} (in the ladder {told_value(his)})" for key, (his, own) in pairs.items() if his != own
    ]
    more = len(found) - MOST_NAMED
    return found if more <= 0 else [*found[:MOST_NAMED], f"{more} more settings"]


def told_value(value: Any) -> str:
    return "unset" if value is None else printable(value, 60)


def differing(laws: Laws, config: Any, dataset: Any) -> tuple[str, ...]:
    """What of the run is not as in the ladder and does not rule its laws out, as far as its config says; dataset: the main one."""
    given = {
        key: value
        for key, value in flat(config).items()
        if value not in (None, "auto") and laws.of.settings.get(key, BY_RULE) != BY_RULE
    }
    found = other_settings(laws.of.settings, given)
    if dataset is None:
        return (*found, "data that are not prepared yet cannot be compared")
    here, there = fingerprint(config.data, dataset), laws.of.fingerprint
    if here != there:
        found.insert(0, f"data {laws.of.data} there (fingerprint {there[:12]}), {here[:12]} here")
    found += other_vocabulary(laws, config.model["vocab_size"])
    return tuple(found)


def other_vocabulary(laws: Laws, ours: int) -> list[str]:
    """What a model of other ids than those of the ladder's tokenizer is told: the file holds no vocab_size of the ladder's models."""
    from models.base import pad_vocab  # imports torch

    theirs = pad_vocab(laws.of.vocab_size)
    return [] if ours == theirs else [f"model.vocab_size {ours} (padded for the tokenizer of the ladder: {theirs})"]


def expect(dial: DialFile | str | None, draft: Draft, size: int, epoch: Any) -> Expected | None:
    """The loss at the end of the run; None without a law of losses. size: N; epoch: of the training split, None if it is not known."""
    if isinstance(dial, str):
        return Expected(dial)
    if dial is None or dial.laws.loss is None:
        return None
    config, law, of = draft.config, dial.laws.loss, dial.laws.of
    if config.batch.dynamic:
        return Expected("batch.dynamic: the tokens of the run follow the gradient norm")
    if epoch is None:
        return Expected("the data are not prepared yet, so their tokenizer is not known to be that of the ladder")
    tokens = sum(tokens_at_lengths(config.batch, config.max_steps).values())
    loss, low, high = law.fit().predict(size, tokens)
    notes = [law.law, f"{law.origin.points} runs of {of.data}", str(dial.path)]
    notes.append(law.origin.beyond(N=size, D=tokens, B=config.batch.tokens_per_step))
    times = tokens / epoch.tokens
    if max(times, law.origin.epochs) > ONCE:
        of_law = f"read up to {law.origin.epochs:.3g} times" if law.origin.epochs > ONCE else "new"
        notes.append(f"the data are read {times:.3g} times, and the law is of tokens that were {of_law}")
    notes.extend(dial.differing)
    notes.extend(unlike(law, of, draft, dial.decided))
    return Expected("; ".join(dict.fromkeys(filter(None, notes))), loss, low, high)


def unlike(law: LossLaw, of: Any, draft: Draft, decided: bool) -> list[str]:
    """Settings of the run that move the loss, and are not those of the ladder's runs. decided: the rule of its learning rate is not
    known any more."""
    config = draft.config
    settings = (
        ("sequences of", of.sequence_length, config.batch.sequence_length),
        ("validation by", of.validation, validation_of(config)),
    )
    found = [f"{name} {ours} (in the ladder {theirs})" for name, theirs, ours in settings if theirs != ours]
    ours = settings_of(config, draft.entries, of.sized)
    if decided:  # every value is set
        ours = {key: value for key, value in ours.items() if of.settings.get(key) != BY_RULE}
    found += other_settings(of.settings, ours)
    rule = next(entry.rule for entry in draft.entries if entry.key == "optim.lr")
    if not decided and without_range(rule) != without_range(law.origin.rates):
        found.append(f"the learning rate of the ladder's runs had another rule ({law.origin.rates})")
    return found


def without_range(rule: str) -> str:
    """The rule of a learning rate without what `Origin.beyond` says of the run's own size."""
    return rule.partition("; extrapolated: ")[0]


def validation_of(config: Any) -> str:
    """By which protocol and windows a run measures its last validation loss. config: resolved."""
    return f"protocol {config.evaluation.protocol}, windows of {config.evaluation.sequence_length}"
