"""laws.yaml: what a ladder has measured of an architecture, so that a plan can use it. `ladder` writes the file, `dial` names it.

    # crescendo-lm 0.3.0, laws format 2, digest 5f1c...    the release that wrote it, and the sha256 of all other lines
    of: ...               whose laws these are: architecture, recipe, data
    loss: ...             L(N, D) = E + A N^-alpha + B D^-beta, with draws of its bootstrap
    learning_rate: ...    lr = k N^p B^0.5, from `ladder --check lr`
    batch: ...            B = k N^q, from `ladder --check batch`

N: parameters without embeddings and head; D: training tokens; B: tokens of a step. Each law says where it was measured.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer import __version__
from trainer.core import yaml_text
from trainer.core.errors import Damaged, UserError
from trainer.core.files import read_small
from trainer.core.settings import build
from trainer.core.text import printable

LAWS = "laws.yaml"  # in the folder of a ladder, and as a copy in that of a run
FORMAT = 2
HEADER = re.compile(r"# crescendo-lm (\S+), laws format ([0-9]+), digest ([0-9a-f]{64})")
ROUNDED = 0.01  # by which a run may leave the ranges of a fit: D is whole steps, so D / N is the spec's only nearly
ONCE = 1.01  # readings of the data that still count as one
SHARE = 0.9  # of new runs that fall into the interval of a prediction
BATCH_POWER = (
    0.5  # of B in the law of the learning rate: Adam's steps of less noisy gradients may be longer (arXiv 2205.10287)
)


@dataclass(frozen=True)
class Law:
    """irreducible + sum_i scales[i] x_i^-exponents[i]. names: of the x_i, such as ("N", "D")."""

    names: tuple[str, ...]
    irreducible: float
    scales: tuple[float, ...]
    exponents: tuple[float, ...]

    def loss(self, *values: float) -> float:
        """The loss at these values, in nats a token."""
        terms = (scale * value**-power for scale, power, value in zip(self.scales, self.exponents, values, strict=True))
        return self.irreducible + sum(terms)

    @property
    def numbers(self) -> int:
        """Numbers that the fit chooses."""
        return 1 + 2 * len(self.names)

    def formula(self) -> str:
        """The law as text, such as `1.69 + 406 N^-0.34 + 411 D^-0.28`."""
        terms = (
            f"{scale:.4g} {name}^-{power:.3f}"
            for name, scale, power in zip(self.names, self.scales, self.exponents, strict=True)
        )
        return " + ".join([f"{self.irreducible:.4f}", *terms])


@dataclass(frozen=True)
class Fit:
    """law: of all points; draws: laws of the bootstrap's samples; scatter: for each draw, by which share a new run misses its law."""

    law: Law
    draws: tuple[Law, ...] = ()
    scatter: tuple[float, ...] = ()

    def predict(self, *values: float, share: float = SHARE) -> tuple[float, float, float]:
        """(loss, low, high): the middle `share` of what a new run may have: the law's uncertainty, and a run's own scatter."""
        losses = [law.loss(*values) * (1 + error) for law, error in zip(self.draws, self.scatter, strict=True)]
        return self.law.loss(*values), *middle_of(losses, share)


def middle_of(values: Sequence[float], share: float) -> tuple[float, float]:
    """Between which two numbers the middle `share` of the values lies."""
    import numpy as np

    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


@dataclass
class Subject:
    """Section `of`. model: its name and the fields that the dial leaves alone; sized: the fields that the dial chooses; validation: the
    protocol and the windows by which losses are measured; settings: what else decides a loss (expected.settings_of)."""

    model: dict[str, Any]
    sized: list[str]
    recipe: str
    optimizer: str
    objective: str
    data: str
    fingerprint: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    sequence_length: int
    validation: str
    settings: dict[str, Any]


@dataclass
class Origin:
    """Where a law comes from, and the ranges of N, D, B and D / N that it was fitted to. rates: the rule of the learning rate of its
    runs; epochs: how many times they read their data at most."""

    spec_digest: str
    command: str
    time: str
    versions: dict[str, Any]
    seeds: list[int]
    points: int
    rates: str
    N: list[float]
    D: list[float]
    B: list[float]
    tokens_per_parameter: list[float]
    epochs: float

    def beyond(self, **values: float) -> str:
        """ "" if these values of N, D and B, and D / N, are within the ranges; else by which factors they are outside."""
        ranges = {name: getattr(self, name) for name in values}
        if {"N", "D"} <= values.keys():
            values["D / N"], ranges["D / N"] = values["D"] / values["N"], self.tokens_per_parameter
        found = []
        for name, value in values.items():
            low, high = ranges[name]
            if value > high * (1 + ROUNDED):
                found.append(f"{name} is {value / high:.3g} times the largest of the fit")
            elif value < low * (1 - ROUNDED):
                found.append(f"{name} is {value / low:.3g} times the smallest of the fit")
        return f"extrapolated: {', '.join(found)}" if found else ""

    def check(self, where: str) -> None:
        """UserError for a range that no run has."""
        for name in ("N", "D", "B", "tokens_per_parameter"):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] < math.inf:
                raise UserError(f"{where}.{name}: must be the smallest and the largest value, above 0")


@dataclass
class LossLaw:
    """Section `loss`. numbers: E, A, alpha, B, beta; draws: the same of each draw of the bootstrap, and the share by which a new run
    misses it. held_out: what was predicted and then measured; empty before that."""

    unit: Literal["nats a token"]
    law: str
    numbers: list[float]
    draws: list[str]
    origin: Origin
    held_out: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fit: Fit, unit: Literal["nats a token"], origin: Origin) -> LossLaw:
        draws = [
            " ".join(f"{number:.6g}" for number in (*numbers_of(law), error))
            for law, error in zip(fit.draws, fit.scatter, strict=True)
        ]
        return cls(unit, f"L(N, D) = {fit.law.formula()}", numbers_of(fit.law), draws, origin)

    def fit(self) -> Fit:
        """The law with its draws. ValueError if a number is missing, not finite or none of a law of losses."""
        rows = [self.numbers, *([float(word) for word in line.split()] for line in self.draws)]
        finite = all(math.isfinite(number) for row in rows for number in row)
        if len(self.numbers) != 5 or len(rows) < 2 or any(len(row) != 6 for row in rows[1:]) or not finite:
            raise ValueError("loss.numbers, loss.draws: must hold five finite numbers, and six for each draw")
        if not all(map(possible, rows)):
            raise ValueError(
                "loss.numbers, loss.draws: no losses fall so; E, A and B must be 0 or more and one of them above it, alpha and beta "
                "above 0, and the loss finite"
            )
        laws = [Law(("N", "D"), e, (a, b), (alpha, beta)) for e, a, alpha, b, beta, *_ in rows]
        return Fit(laws[0], tuple(laws[1:]), tuple(row[5] for row in rows[1:]))


def possible(row: Sequence[float]) -> bool:
    """Whether E, A, alpha, B, beta, and by which share a new run misses the law, give losses that are above 0, finite, and fall. row: these
    six, or the first five."""
    e, a, alpha, b, beta, *error = row
    most = (e + a + b) * (1 + sum(error))  # at N = D = 1
    return min(e, a, b) >= 0 and min(alpha, beta) > 0 and 0 < most < math.inf


def numbers_of(law: Law) -> list[float]:
    """E, A, alpha, B, beta, or as many as the law has."""
    pairs = zip(law.scales, law.exponents, strict=True)
    return [law.irreducible, *(number for pair in pairs for number in pair)]


@dataclass
class PowerLaw:
    """Sections `learning_rate` and `batch`: constant N^power B^batch_power. measured: a line for each size, for readers."""

    law: str
    constant: float = field(metadata={"above": 0})
    power: float
    batch_power: float = field(metadata={"low": 0})
    measured: list[str]
    origin: Origin

    def value(self, size: float, batch: float = 1.0) -> float:
        """size: N; batch: tokens of a step. Infinite if it is too large for a float."""
        try:
            return self.constant * size**self.power * batch**self.batch_power
        except OverflowError:
            return math.inf


@dataclass
class Laws:
    """The content of the file. digest, file: of the file that was read, and its text."""

    of: Subject
    loss: LossLaw | None = None
    learning_rate: PowerLaw | None = None
    batch: PowerLaw | None = None
    digest: str = ""
    file: str = ""

    def text(self) -> str:
        """A file with these laws."""
        sections = {name: part for name, part in asdict(self).items() if name in ("of", *SECTIONS) and part is not None}
        body = yaml_text.dump(sections)
        digest = hashlib.sha256(body.encode()).hexdigest()
        return f"# crescendo-lm {__version__}, laws format {FORMAT}, digest {digest}\n{body}"


SECTIONS = {"loss": LossLaw, "learning_rate": PowerLaw, "batch": PowerLaw}


def read_laws(path: Path) -> Laws:
    """The laws in a file. UserError if there is none, a later release wrote it or a law is impossible, Damaged if it was changed after it was written."""
    return parse_laws(read_small(path), printable(path))


def parse_laws(content: bytes, where: str) -> Laws:
    """As `read_laws`, of the content of a file that `where` names."""
    head, _, rest = content.partition(b"\n")
    header = HEADER.fullmatch(head.decode("utf-8", "replace").strip())
    if header is None:
        raise UserError(f"{where}: is not a file of laws; `ladder` writes one, {LAWS}")
    if int(header[2]) != FORMAT:
        raise UserError(
            f"{where}: has format {int(header[2])} of crescendo-lm {header[1]}; this is {__version__}, which reads {FORMAT}"
        )
    if hashlib.sha256(rest).hexdigest() != header[3]:
        raise Damaged(
            f"{where}: its digest is not that of its content; it was changed after it was written; put it back, or delete it and run "
            "every `ladder` command of its folder again"
        )
    values = yaml_text.parse(rest, where)
    try:
        laws = Laws(build(Subject, values.pop("of"), "of."), digest=header[3], file=content.decode())
        for name, part in values.items():
            setattr(laws, name, build(SECTIONS[name], part, f"{name}."))
            getattr(laws, name).origin.check(f"{name}.origin")
        if laws.loss is not None:
            laws.loss.fit()
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: is not as `ladder` writes it: {printable(error)}") from None
    return laws
