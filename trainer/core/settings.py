"""Fills dataclasses from YAML files and flags. The dataclass defines the keys, types, defaults and help texts.

Every mistake raises a `UserError` of one line: the full key, what is allowed and the nearest spelling. No torch import.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

from trainer.core import yaml_text
from trainer.core.errors import UserError
from trainer.core.files import read_small, user_path
from trainer.core.text import printable

T = TypeVar("T")
MISSING = dataclasses.MISSING
ROOT = Path(__file__).parents[2]  # holds configs/, in a checkout and where a wheel is installed
NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
LARGEST = 2**63 - 1  # torch and the files of a run store 64-bit integers
WORDS_OF_BOOL = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
ALTERNATIVES = (("model_scale", "parameters"), ("max_steps", "tokens", "tokens_per_parameter", "epochs", "max_seconds"))
# Names from other trainers -> (the key here, an explanation).
KNOWN_ELSEWHERE = {
    **dict.fromkeys(
        ("n_epochs", "num_epochs", "num_train_epochs", "max_epochs"),
        ("epochs", "how often the run reads its training split"),
    ),
    **dict.fromkeys(
        ("max_tokens", "total_tokens", "n_tokens", "num_tokens"),
        ("tokens", "length of the run"),
    ),
    **dict.fromkeys(
        ("seconds", "max_minutes", "minutes", "max_hours", "hours", "max_time", "time"),
        ("max_seconds", "seconds of training on this machine, whose speed is measured first"),
    ),
    **dict.fromkeys(
        ("n_parameters", "num_parameters", "params", "n_params", "num_params", "size", "model_size"),
        ("parameters", "size of the model; or set model_scale: 1 is 46 M parameters, 148 is 3 B"),
    ),
    **dict.fromkeys(
        ("steps", "n_steps", "num_steps", "max_iters", "iterations", "train_steps"), ("max_steps", "optimiser steps")
    ),
    **dict.fromkeys(
        ("batch_size", "batch.size", "global_batch_size", "train_batch_size"),
        ("batch.tokens_per_step", "a batch is counted in tokens, over all devices"),
    ),
}


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
):
    """A dataclass field with help text and, for numbers, the allowed range: low <= x <= high, or x > above, x < below.

    A tuple as `default` becomes a list.
    """
    metadata = {"help": help, "low": low, "above": above, "high": high, "below": below}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Repeated(list):
    """The values of a flag that was given several times. A list key takes all of them; any other key takes the last one."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping of text. `base: other.yaml` (a path relative to the file) is read first; the file overrides it."""
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    wanted: Path | None = user_path(path, "config")
    while wanted is not None:
        found = _find_config(wanted, seen)
        content = yaml_text.parse(read_small(found), printable(found))
        if found.resolve() in map(Path.resolve, seen):
            raise UserError(f"{printable(found)}: `base` leads back to this file; remove the cycle")
        seen.append(found)
        if content is None:
            content = {}
        if not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else "text"
            raise UserError(f"{printable(found)}: a config is a mapping of keys to values, found {kind}")
        base = content.pop("base", None)
        if not isinstance(base, (str, type(None))):
            raise UserError(f"{printable(found)}: `base` names one file, got {shown(base)}")
        layers.append(content)
        wanted = None if base is None else found.parent / user_path(base, f"{printable(found)}: `base`")
    merged: dict[str, Any] = {}
    for content in reversed(layers):
        merged = merge(merged, content)
    return merged


def _find_config(path: Path, seen: list[Path]) -> Path:
    """`path`, if it exists. If not, and `path` is configs/NAME: the config of that name in this installation."""
    try:
        path.stat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return path  # the caller reads it and raises a clear error
    beside = seen[-1].parent if seen else Path()
    named = path.relative_to(beside) if path.is_relative_to(beside) else path
    ours = ROOT / "configs" / path.name
    if named == Path("configs", path.name) and ours.exists():
        return ours
    asked = f"{printable(seen[-1])}: `base` is {printable(path)}" if seen else printable(path)
    raise UserError(f"{asked}: no such config file{_near_files(path, seen)}")


def _near_files(path: Path, besides: list[Path]) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    files = list(folder.glob("*.yaml")) or list((ROOT / folder).glob("*.yaml") if folder == Path("configs") else [])
    names = [file.name for file in files if file.resolve() not in map(Path.resolve, besides)]
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    return f"; did you mean {printable(folder / near[0])}?" if near else ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` overridden by the values of `over`, section by section. A key of ALTERNATIVES also replaces the others."""
    stated = [key for keys in ALTERNATIVES for key in keys if str(over.get(key) or "auto") != "auto"]
    for key in stated:
        base = drop_alternatives(base, key)
    return _merge(base, over)


def drop_alternatives(values: dict[str, Any], key: str) -> dict[str, Any]:
    """`values` without `key` and the other keys that say the same in another way: see ALTERNATIVES."""
    dropped = next(keys for keys in ALTERNATIVES if key in keys)
    return {name: value for name, value in values.items() if name not in dropped}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict)):
            merged[key] = _merge(merged[key], value or {})  # an empty section changes nothing
        else:
            merged[key] = value
    return merged


def parse_flags(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Command-line words -> (positional words, nested mapping of flag values).

    `--a.b value` and `--a.b=value` set a key; a flag without a value is `true`; a repeated flag gives a `Repeated`.
    """
    positional: list[str] = []
    nested: dict[str, Any] = {}
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--"):
            positional.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not all(key.split(".")) or key.count(".") >= yaml_text.DEEPEST:
            raise UserError(f"--{printable(key, 100)}: is not a key; write words joined by dots, such as --optim.lr")
        if not equals:
            has_value = i < len(words) and not words[i].startswith("--")
            value = words[i] if has_value else "true"
            i += has_value
        _put(nested, key.split("."), value, key)
    return positional, nested


def _put(nested: dict[str, Any], path: list[str], value: str, full: str) -> None:
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
        if not isinstance(nested, dict):
            raise UserError(f"--{printable(full, 100)}: {part} got both a value and sub-keys; give only one of them")
    leaf = path[-1]
    if isinstance(nested.get(leaf), dict):
        raise UserError(f"--{full}: is a section; set one of its keys instead")
    before = nested.get(leaf)
    nested[leaf] = value if before is None else Repeated([*(before if isinstance(before, list) else [before]), value])


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """Field -> type. A plan asks for them a hundred times, and they are texts that Python evaluates each time."""
    return typing.get_type_hints(cls)


def build(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """The dataclass `cls` from nested `values`, each coerced to its field's type. Raises `UserError` for a bad key or value."""
    return cls(**coerced(cls, values, prefix))


def coerced(cls: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values`, each coerced to the type of its field of `cls`. Raises `UserError` for a bad key or value."""
    hints = type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    known = leaf_keys(cls, prefix)
    built: dict[str, Any] = {}
    for key, value in values.items():
        full = prefix + str(key)
        if key not in fields:
            raise UserError(unknown_key(full, known))
        hint = hints[key]
        if value is None and (dataclasses.is_dataclass(hint) or is_free_section(hint)):
            continue  # an empty section changes nothing
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{full}: is a section with keys {', '.join(leaf_keys(hint))}; got {shown(value)}")
            built[key] = build(typing.cast(type, hint), value, full + ".")
        else:
            built[key] = coerce(hint, value, full)
            _check_range(built[key], fields[key].metadata, full)
    return built


def is_free_section(hint: Any) -> bool:
    """Whether a key holds sub-keys that become known later, such as the fields of a model."""
    return hint is dict or typing.get_origin(hint) is dict


def shown(value: Any) -> str:
    """A value for a message: shortened, and quoted if it is text."""
    return printable(repr(value), 100)


def _check_range(value: Any, limits: Any, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, above, high, below = (limits.get(name) for name in ("low", "above", "high", "below"))
    if low is not None and value < low:
        raise UserError(f"{key}: {value} is too small; at least {_limit(low)}")
    if above is not None and value <= above:
        raise UserError(f"{key}: {value} is too small; it must be above {_limit(above)}")
    if high is not None and value > high:
        raise UserError(f"{key}: {value} is too large; at most {_limit(high)}")
    if below is not None and value >= below:
        raise UserError(f"{key}: {value} is too large; it must be below {_limit(below)}")


def _limit(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def unknown_key(full: str, known: list[str]) -> str:
    """The message for an unknown key: the nearest spelling if there is one, and the keys that are allowed there."""
    leaf = full.rsplit(".", 1)[-1]
    elsewhere, word = KNOWN_ELSEWHERE.get(leaf, ("", ""))
    if elsewhere in known:
        return f"unknown key {printable(full, 100)}; use {elsewhere}: {word}"
    if full in known:
        section, _, leaf = full.rpartition(".")
        return f"unknown key {full}: write the key {leaf} inside the section {section}, as {section}: {{{leaf}: ...}}"
    near = difflib.get_close_matches(full, known, 1, 0.6)
    if not near:  # right leaf, wrong section (--lr for --optim.lr), or a near miss of the leaf
        leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, list(leaves), 1, 0.6)]
    section = full.rsplit(".", 1)[0] + "." if "." in full else ""
    allowed = [key for key in known if key.startswith(section) and section] or sorted({k.split(".")[0] for k in known})
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {printable(full, 100)}{hint} (allowed: {', '.join(allowed)})"


def leaf_keys(cls: Any, prefix: str = "") -> list[str]:
    """All keys of a dataclass that can be set, with dots, in order."""
    hints = type_hints(cls)
    keys: list[str] = []
    for f in dataclasses.fields(cls):
        if f.init:
            nested = dataclasses.is_dataclass(hints[f.name])
            keys += leaf_keys(hints[f.name], f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def free_sections(cls: Any, prefix: str = "") -> list[str]:
    """The sections of a dataclass whose keys it does not know, dotted, in order: model, objective, optim.settings, optim.roles."""
    hints = type_hints(cls)
    found: list[str] = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += free_sections(hints[f.name], f"{prefix}{f.name}.")
        elif is_free_section(hints[f.name]):
            found.append(prefix + f.name)
    return found


def coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` (from YAML or a flag) as type `hint`. The `UserError` names the key and what is allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        *words, inner = [a for a in arguments if a is not type(None)]  # words: Literals besides a type
        last = _last(value, inner)
        if any(last in typing.get_args(one) for one in words):
            return last
        is_auto = isinstance(last, str) and last.lower() in ("none", "null", "auto")
        return None if value is None or is_auto else coerce(inner, value, key)
    if value is None:
        raise UserError(f"{key}: has no value; expected {describe_type(hint)}")
    if is_free_section(hint):
        if not isinstance(value, dict):
            raise UserError(f"{key}: is a section and holds keys; got {shown(value)}")
        if arguments and dataclasses.is_dataclass(arguments[1]):
            return {name: _named_section(arguments[1], part, f"{key}.{name}") for name, part in value.items()}
        return yaml_text.untyped(value)
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_item(arguments[0], item, key) for item in items]
    value = _last(value, hint)
    if origin is typing.Literal:
        return _choice(arguments, value, key)
    if hint is str:
        return _text(value, key)
    if hint is bool:
        if str(value).lower() not in WORDS_OF_BOOL:
            raise _wrong(hint, value, key)
        return WORDS_OF_BOOL[str(value).lower()]
    return _number(hint, value, key)


def _named_section(cls: Any, value: Any, key: str) -> Any:
    """One entry of a section whose entries are all of the dataclass `cls`."""
    if not isinstance(value, dict | None):
        raise UserError(f"{key}: is a section with keys {', '.join(leaf_keys(cls))}; got {shown(value)}")
    return build(cls, value or {}, f"{key}.")


def _item(hint: Any, value: Any, key: str) -> Any:
    """One value of a list. The UserError for "a,b" says how to give several; numbers may have a decimal comma, so nothing is split."""
    if hint is str or not isinstance(value, str) or "," not in value:
        return coerce(hint, value, key)
    flags = printable(" ".join(f"--{key} {part.strip()}" for part in value.split(",") if part.strip()), 200)
    raise UserError(f"{key}: expected {describe_type(hint)}, got {shown(value)}; for several, repeat the flag: {flags}")


def _last(value: Any, hint: Any) -> Any:
    """The last value of a flag that was given several times, unless the key takes a list."""
    return value[-1] if isinstance(value, Repeated) and typing.get_origin(hint) is not list else value


def _wrong(hint: Any, value: Any, key: str) -> UserError:
    return UserError(f"{key}: expected {describe_type(hint)}, got {shown(value)}")


def _choice(allowed: tuple[str, ...], value: Any, key: str) -> str:
    text = str(value)
    if text in allowed:
        return text
    if "disabled" in allowed and WORDS_OF_BOOL.get(text.lower()) is False:
        return "disabled"
    near = difflib.get_close_matches(text, allowed, 1, 0.5)
    raise UserError(
        f"{key}: {shown(value)} is not allowed{f'; did you mean {near[0]}?' if near else ''} "
        f"(allowed: {', '.join(allowed)})"
    )


def _text(value: Any, key: str) -> str:
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ",".join(_text(item, key) for item in value)  # a flag would give the same list as "a,b"
    if isinstance(value, (dict, list)):
        raise _wrong(str, value, key)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):  # placeholders for bytes that are not UTF-8
        raise UserError(f"{key}: {shown(text)} is not valid UTF-8 text")
    return text


def _number(hint: Any, value: Any, key: str) -> Any:
    """An int or a float with exactly the written value. Decimal digits only: 010 is ten, and 0x10 raises UserError."""
    text = str(value).strip()
    if isinstance(value, (bool, dict, list)) or len(text) > 400 or not NUMBER.fullmatch(text):
        raise _wrong(hint, value, key)
    number = float(text)
    try:
        exact = Decimal(text)
    except InvalidOperation:  # the exponent is too long, for example twenty digits
        raise _wrong(hint, value, key) from None
    if number in (float("inf"), float("-inf")) or (number == 0 and exact != 0):
        raise _wrong(hint, value, key)
    if hint is float:
        return number
    if exact != exact.to_integral_value():
        raise _wrong(hint, value, key)
    whole = int(exact) if number else 0
    if abs(whole) > LARGEST:
        raise UserError(
            f"{key}: {shown(value)} is too {'large; at most ' if whole > 0 else 'small; at least -'}{LARGEST}"
        )
    return whole


def describe_type(hint: Any) -> str:
    """A type in words, for help and error messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments if a is not type(None)) + " or auto"
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is list:
        return f"{describe_type(arguments[0])} (repeatable)"
    if origin is dict:
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "true|false"}.get(hint, str(hint))


def help_text(cls: Any) -> str:
    """Every key of `cls` with its type, default and meaning."""
    lines = []
    for key, hint, default, help in _walk(cls, ""):
        shown = "auto" if default is None else "" if default in ([], "") else f"{default}"
        default_text = f" [{shown}]" if shown else ""
        lines.append(f"  --{key} <{describe_type(hint)}>{default_text}\n        {help}")
    return "\n".join(lines)


def helps(cls: Any) -> dict[str, str]:
    """The meaning of every key of `cls`, by dotted key."""
    return {key: meaning for key, _, _, meaning in _walk(cls, "")}


def _walk(cls: Any, prefix: str):
    hints = type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{f.name}.")
        else:
            default = f.default if f.default is not MISSING else typing.cast(Any, f.default_factory)()
            yield prefix + f.name, hint, default, f.metadata.get("help", "")


def to_yaml(config: Any) -> str:
    """A dataclass as YAML that `load_yaml` and `build` read back to the same values."""
    return yaml_text.dump(dataclasses.asdict(config))
