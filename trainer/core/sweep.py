"""Sweeps: some keys of a run with several values each, and every combination of them.

`bench --sweep KEY=V1,V2` and `launch/array.sh ... --KEY V1,V2` read their sweeps here. A comma always separates two values;
nothing quotes it. A value that holds a comma goes into a config file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, free_sections, leaf_keys, merge, unknown_key

Sweep = dict[str, list[str]]  # key -> its values


def parse_sweep(texts: list[str]) -> Sweep:
    """The sweep of `KEY=V1,V2` texts. UserError where a text has another form, or no run has that key, or a key stands twice."""
    known, sweep = leaf_keys(RunConfig), Sweep()
    free = tuple(f"{section}." for section in free_sections(RunConfig))
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"sweep: {text!r} is not KEY=V1,V2; for example --sweep engine.compile=false,true")
        if key not in known and not key.startswith(free):
            raise UserError(f"sweep: {unknown_key(key, known)}")
        if key in sweep:
            raise UserError(f"sweep: {key} stands twice; give all its values in one, {key}=V1,V2")
        sweep[key] = values.split(",")
    return sweep


def combinations(sweep: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    """Every combination, as key -> value; the last key changes fastest. One empty combination where there is no key."""
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def changed(values: Mapping[str, Any], changes: Mapping[str, str]) -> RunConfig:
    """The RunConfig of nested `values`, with a combination laid on top. Raises UserError for a bad key or value."""
    result = dict(values)
    for key, value in changes.items():
        change: Any = value
        for part in reversed(key.split(".")):
            change = {part: change}
        result = merge(result, change)
    return build(RunConfig, result)
