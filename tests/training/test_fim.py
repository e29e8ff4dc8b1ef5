"""Fill in the middle: rows are rearranged as written out in plain Python, and hold what they held but for three tokens."""

import pytest
import torch
from conftest import tiny_values

from models.base import IGNORE
from trainer.commands.train import run
from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build
from trainer.data.stream import find_dataset
from trainer.objectives import build_objective, resolve_objective
from trainer.objectives.fim import SHORTEST, draws
from trainer.planning.plan import resolve
from trainer.runs.metrics import read_rows

PRE, SUF, MID, END = 100, 101, 102, 103


def fim(**options):
    return build_objective(resolve_objective({"name": "fim", "ids": [PRE, SUF, MID, END], **options}))


def written_out(row, rate, spm_rate, numbers):
    """row: tokens of a row and its last target. numbers: four, from 0 to below 1."""
    pieces, begin = [], 0
    for place, token in enumerate([*row, END]):
        if token == END:
            pieces.append((begin, place))
            begin = place + 1
    begin, after = max(pieces, key=lambda piece: piece[1] - piece[0])
    whether, how, *cuts = numbers
    if after - begin < SHORTEST or whether >= rate:
        return row
    text = row[begin + 3 : after]
    first, second = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    new = [PRE, SUF, *suffix, MID, *prefix, *middle] if how < spm_rate else [PRE, *prefix, SUF, *suffix, MID, *middle]
    return row[:begin] + new + row[after:]


@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_rows_are_rearranged_as_written_out(spm_rate):
    stream = torch.randint(90, (300, 25), generator=torch.Generator().manual_seed(0))
    stream[torch.rand(300, 25, generator=torch.Generator().manual_seed(1)) < 0.15] = END
    objective = fim(rate=0.8, spm_rate=spm_rate)
    found = objective.rearranged({"tokens": stream[:, :-1], "targets": stream[:, 1:]})
    numbers = torch.cat(draws(stream, END, 4), 1).tolist()
    expected = [written_out(row, 0.8, spm_rate, n) for row, n in zip(stream.tolist(), numbers, strict=True)]
    assert torch.equal(found["tokens"], torch.tensor(expected)[:, :-1])
    assert torch.equal(found["targets"], torch.tensor(expected)[:, 1:])
    assert (found["tokens"] == MID).any(1).sum() > 100


def test_padding_stays_padding():
    stream = torch.randint(90, (50, 25), generator=torch.Generator().manual_seed(0))
    tokens, targets = stream[:, :-1].clone(), stream[:, 1:].clone()
    tokens[:, 15:], targets[:, 14:] = END, IGNORE
    found = fim(rate=1.0).rearranged({"tokens": tokens, "targets": targets})
    assert torch.equal(found["targets"] == IGNORE, targets == IGNORE) and (found["tokens"][:, 15:] == END).all()
    assert (found["tokens"] == PRE).sum() == 50
    assert torch.equal(found["targets"][:, :14], found["tokens"][:, 1:15])


def test_how_much_padding_follows_changes_nothing():
    stream = torch.randint(90, (50, 17), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": stream[:, :-1], "targets": stream[:, 1:].clone()}
    batch["targets"][:, -1] = IGNORE
    wider = {
        "tokens": torch.nn.functional.pad(batch["tokens"], (0, 16), value=END),
        "targets": torch.nn.functional.pad(batch["targets"], (0, 16), value=IGNORE),
    }
    one, other = (fim(rate=0.7).rearranged(each) for each in (batch, wider))
    assert all(torch.equal(one[key], other[key][:, :16]) for key in batch)


def test_the_share_of_rows_is_the_rate():
    """A binomial share of 4,000 rows is within five standard deviations of the rate."""
    stream = torch.randint(90, (4000, 17), generator=torch.Generator().manual_seed(0))
    found = fim(rate=0.3).rearranged({"tokens": stream[:, :-1], "targets": stream[:, 1:]})
    share = (found["tokens"] == PRE).any(1).double().mean().item()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5


def test_a_row_is_rearranged_in_the_same_way_wherever_it_stands():
    stream = torch.randint(90, (8, 17), generator=torch.Generator().manual_seed(0))
    whole = fim().rearranged({"tokens": stream[:, :-1], "targets": stream[:, 1:]})["tokens"]
    part = fim().rearranged({"tokens": stream[5:6, :-1], "targets": stream[5:6, 1:]})["tokens"]
    assert torch.equal(whole[5:6], part)


def test_the_plan_finds_the_ids(tiny_dataset, tmp_path):
    def ids(**options):
        config = build(RunConfig, tiny_values(tiny_dataset, tmp_path, objective={"name": "fim", **options}))
        return resolve(config, find_dataset(config.data)).config.objective["ids"]

    assert ids(prefix="\x01", suffix="\x02", middle="\x03") == [1, 2, 3, 256]
    with pytest.raises(UserError, match=r"objective.prefix: '<\|fim_prefix\|>' is not one token of tokenizer bytes"):
        ids()
    with pytest.raises(UserError, match=r"objective.middle: '<\|endoftext\|>' has another meaning in tokenizer bytes"):
        ids(prefix="\x01", suffix="\x02", middle="<|endoftext|>")
    with pytest.raises(UserError, match="objective fim: prefix, suffix and middle must be three tokens"):
        ids(prefix="\x01", suffix="\x01")
    with pytest.raises(UserError, match="objective.rate: 2.0 is too large; at most 1"):
        ids(rate=2)


@pytest.mark.slow
def test_a_run_fills_in_and_goes_on(tiny_dataset, tmp_path):
    marks = {"prefix": "\x01", "suffix": "\x02", "middle": "\x03"}
    run(tiny_values(tiny_dataset, tmp_path / "r", objective={"name": "fim", **marks}, max_steps=2))
    run({"run_dir": str(tmp_path / "r"), "max_steps": 3})
    rows = read_rows(tmp_path / "r" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["loss"] > 0 for row in rows)
