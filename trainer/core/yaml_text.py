"""Reads YAML as mappings, lists, and scalars that stay text. The type of the key decides later what a scalar means.

Ordinary YAML reads `no` as false, `010` as eight and `1:30` as ninety, but a flag keeps the text as it is written. Here a
value means the same in a file and in a flag. Aliases are expanded. Size and depth are limited, so that no file takes more
than a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from trainer.core.errors import UserError
from trainer.core.text import printable

MOST_BYTES = 1 << 20
MOST_VALUES = 10_000  # scalars, lists and mappings, with aliases expanded; a run has about a hundred keys
DEEPEST = 32
NULLS = ("", "~", "null", "Null", "NULL")
TEXT, MERGE = "tag:yaml.org,2002:str", "<<"
TAGS = (None, "!", TEXT, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class Plain(str):
    """A scalar written without quotes."""


def parse(data: bytes, name: str) -> Any:
    """The one document in `data`: dict, list, str, Plain, or None if it is empty. UserError names `name` and the line."""
    if len(data) > MOST_BYTES:
        raise UserError(f"{name}: has more than {MOST_BYTES >> 20} MiB, too much for a config")
    try:
        return _Document(data.decode("utf-8")).read()
    except UnicodeDecodeError:
        raise UserError(f"{name}: is not UTF-8 text, so it is not a config") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1})" if mark else ""
        problem = error.problem or error.context
        raise UserError(f"{name}: not valid YAML: {printable(problem, 300)}{line}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: an escape above U+10FFFF
        raise UserError(f"{name}: not valid YAML: {printable(' '.join(str(error).split()), 300)}") from None


class _Document:
    """Builds the values of one document from PyYAML's events, because PyYAML's event parser is not recursive."""

    def __init__(self, text: str) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.anchors: dict[str, Any] = {}
        self.open: set[str] = set()  # anchors of values that are not finished yet
        self.count = 0

    def read(self) -> Any:
        next(self.events)  # the stream's start
        value = None
        event = next(self.events)
        if isinstance(event, yaml.DocumentStartEvent):
            value = self.value(next(self.events), 1)
            next(self.events)  # the document's end
            event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise _error("a second document begins; a config has only one", event)
        return value

    def value(self, event: Any, depth: int) -> Any:
        self.take(event, depth)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        if event.tag not in TAGS:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise _error(f"the tag {tag} is not supported; remove it, the key decides the type of its value", event)
        if event.anchor:
            self.open.add(event.anchor)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self.value(item, depth + 1) for item in self.until(yaml.SequenceEndEvent)]
        else:
            value = self.mapping(depth)
        if event.anchor:
            self.open.discard(event.anchor)
            self.anchors[event.anchor] = value
        return value

    def take(self, event: Any, depth: int) -> None:
        """Count one more value."""
        self.count += 1
        if self.count > MOST_VALUES:
            raise _error(f"more than {MOST_VALUES:,} values (with aliases expanded), too many for a config", event)
        if depth > DEEPEST:
            raise _error(f"more than {DEEPEST} levels of nesting, too many for a config", event)

    def until(self, end: type) -> Iterator[Any]:
        while not isinstance(event := next(self.events), end):
            yield event

    def mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for event in self.until(yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _error("a key must be a word, not an alias, a list or a mapping", event)
            key, value = str(event.value), self.value(next(self.events), depth + 1)
            if key == MERGE and event.style is None:
                for part in reversed(value if isinstance(value, list) else [value]):  # the first part wins
                    if not isinstance(part, dict):
                        raise _error("`<<` takes the alias of a mapping, or a list of such aliases", event)
                    merged |= part
            elif key in own:
                raise _error(f"key {key!r} occurs twice", event)
            else:
                own[key] = value
        return merged | own

    def alias(self, event: Any, depth: int) -> Any:
        if event.anchor in self.open:
            raise _error(f"*{event.anchor} occurs inside its own value", event)
        if event.anchor not in self.anchors:
            raise _error(f"*{event.anchor} is not defined; no &{event.anchor} comes before it", event)
        return self.copy(self.anchors[event.anchor], event, depth)

    def copy(self, value: Any, event: Any, depth: int) -> Any:
        """A separate copy of `value` for an alias. Each of its parts is counted."""
        self.take(event, depth)
        if isinstance(value, list):
            return [self.copy(item, event, depth + 1) for item in value]
        if isinstance(value, dict):
            return {key: self.copy(item, event, depth + 1) for key, item in value.items()}
        return value


def scalar(event: Any) -> str | None:
    if any("\ud800" <= character <= "\udfff" for character in event.value):
        raise _error("half a character (an escape from \\ud800 to \\udfff) is not text", event)
    if event.style is not None or event.tag is not None:
        return str(event.value)
    return None if event.value in NULLS else Plain(event.value)


def _error(problem: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def untyped(value: Any) -> Any:
    """`value` when its type is not known: numbers, true and false are recognised if they are written as `dump` writes them.

    Everything else stays text, so that code that learns the type later still has the text as it was written.
    """
    if isinstance(value, dict):
        return {key: untyped(item) for key, item in value.items()}
    if isinstance(value, list):
        return type(value)(map(untyped, value))
    if not isinstance(value, Plain):
        return value
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            number = kind(value) if len(value) <= 32 else None
        except ValueError:
            continue
        if number is not None and repr(number) in (value, value.replace(".0e", "e", 1)):  # PyYAML writes 1.0e-05
            return number
    return str(value)


def dump(values: dict[str, Any]) -> str:
    """`values` as YAML text. `parse` reads the same values from it."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes if `untyped` would read it as a number, true or false."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    clear = untyped(Plain(text)) == text and text.isprintable()
    return dumper.represent_scalar(TEXT, str(text), style=None if clear else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(list, yaml.SafeDumper.represent_list)
