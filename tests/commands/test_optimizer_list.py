"""`optimizers`: what optim.name takes, each in a line."""

import json

import pytest

from trainer.__main__ import dispatch
from trainer.core.errors import UserError
from trainer.optim.rule import registered_rules


def test_every_optimizer_has_a_line_that_says_what_it_is(capsys):
    dispatch(["optimizers", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    ours = {name for name, rule in registered_rules().items() if rule.__module__.startswith("trainer.")}
    assert ours and ours <= rows.keys()
    assert not [row for name, row in rows.items() if name in ours and not 20 < len(row["what"]) < 160]
    assert rows["adamw"]["state_bytes"] == 8 and rows["muon"]["state_bytes"] == 4 and rows["muon"]["scope"] == "matrix"
    dispatch(["optimizers"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(rows) + 1]] == sorted(rows)


def test_the_fields_of_one(capsys):
    dispatch(["optimizers", "muon"])
    told = capsys.readouterr().out
    assert told.startswith("muon: Muon (arXiv 2502.16982)") and "--momentum <number> [0.95]" in told
    dispatch(["optimizers", "torch:NAdam"])
    assert "--momentum_decay" in capsys.readouterr().out
    with pytest.raises(UserError, match="'moun' is not known"):
        dispatch(["optimizers", "moun"])
