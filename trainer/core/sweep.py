"""Sweeps: several values for some keys of a run, and all combinations of them.

`bench --sweep KEY=V1,V2` and `launch/array.sh ... --KEY V1,V2` use this module. A comma always separates two values and
cannot be quoted. Put a value that contains a comma in a config file.
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
    """The sweep of `KEY=V1,V2` texts. UserError if a text has another form, a key is unknown, or a key occurs twice."""
    sweep = Sweep()
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"sweep: {text!r} is not KEY=V1,V2; write for example --sweep engine.compile=false,true")
        check_key(key, "sweep")
        if key in sweep:
            raise UserError(f"sweep: {key} occurs twice; give all its values at once, as {key}=V1,V2")
        sweep[key] = values.split(",")
    return sweep


def check_key(key: str, where: str) -> None:
    """UserError, which begins with `where`, if a run has no such dotted key."""
    known = leaf_keys(RunConfig)
    if key not in known and not key.startswith(tuple(f"{section}." for section in free_sections(RunConfig))):
        raise UserError(f"{where}: {unknown_key(key, known)}")


def combinations(sweep: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    """Every combination, as key -> value. The last key changes fastest. Without keys there is one empty combination."""
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def changed(values: Mapping[str, Any], changes: Mapping[str, str]) -> RunConfig:
    """The RunConfig of nested `values`, overridden by one combination. Raises UserError for a bad key or value."""
    return build(RunConfig, with_changes(values, changes))


def with_changes(values: Mapping[str, Any], changes: Mapping[str, str]) -> dict[str, Any]:
    """Nested `values`, overridden by dotted key -> value."""
    result = dict(values)
    for key, value in changes.items():
        change: Any = value
        for part in reversed(key.split(".")):
            change = {part: change}
        result = merge(result, change)
    return result


def label(changes: Mapping[str, str]) -> str:
    """A name such as `compile=true microbatch=4096`: the last part of each key, or the whole key if two last parts are equal."""
    leaves = [key.rsplit(".", 1)[-1] for key in changes]
    return " ".join(
        f"{leaf if leaves.count(leaf) == 1 else key}={value}"
        for (key, value), leaf in zip(changes.items(), leaves, strict=True)
    )
