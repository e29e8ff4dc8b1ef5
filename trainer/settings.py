"""Dataclasses <- YAML <- flags. The dataclass is the one source of keys, types, defaults and help.

Every mistake is a `UserError` of one line with the full key, what is allowed and the nearest spelling. No torch import.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trainer.errors import UserError

T = TypeVar("T")
MISSING = dataclasses.MISSING


def setting(default: Any, help: str, low: float | None = None, above: float | None = None, high: float | None = None):
    """A dataclass field with help text and, for numbers, the range low <= x <= high, or x > above.

    A tuple stands for a list default.
    """
    metadata = {"help": help, "low": low, "above": above, "high": high}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Repeated(list):
    """The values of a flag that was given several times."""


yaml.SafeDumper.add_representer(Repeated, yaml.SafeDumper.represent_list)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4) and refuses duplicate keys."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: str | Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as a mapping; `base: other.yaml` (relative to the file) is read first and built upon."""
    path = Path(path)
    if path.resolve() in map(Path.resolve, _seen):
        raise UserError(f"{path}: `base` leads back to this file; remove the circle")
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        asked = f"{_seen[-1]}: `base` is {path}" if _seen else path
        raise UserError(f"{asked}: no such config file{_near_files(path, _seen)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, found {type(content).__name__}")
    base = content.pop("base", None)
    if base is None:
        return content
    return merge(load_yaml(path.parent / str(base), (*_seen, path)), content)


def _near_files(path: Path, besides: tuple[Path, ...]) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    names = [p.name for p in folder.glob("*.yaml") if p.resolve() not in map(Path.resolve, besides)]
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    return f"; did you mean {folder / near[0]}?" if near else ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict)):
            merged[key] = merge(merged[key], value or {})  # a section left empty changes nothing
        else:
            merged[key] = value
    return merged


def parse_flags(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Command-line words -> (positional words, nested mapping of flag values).

    `--a.b value` and `--a.b=value` set a key; a flag without a value is `true`; a repeated flag makes a `Repeated`.
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
            raise UserError(f"--{full}: {part} was given both a value and sub-keys")
    leaf = path[-1]
    if isinstance(nested.get(leaf), dict):
        raise UserError(f"--{full}: is a section; name one of its keys")
    before = nested.get(leaf)
    nested[leaf] = value if before is None else Repeated([*(before if isinstance(before, list) else [before]), value])


def build(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """The dataclass `cls` from nested `values`, each coerced to its field's type. Raises `UserError` for a bad key or value."""
    return cls(**coerced(cls, values, prefix))


def coerced(cls: type, values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values`, each coerced to the type of its field of `cls`. Raises `UserError` for a bad key or value."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    known = leaf_keys(cls, prefix)
    built: dict[str, Any] = {}
    for key, value in values.items():
        full = prefix + str(key)
        if key not in fields:
            raise UserError(unknown_key(full, known))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{full}: is a section with keys {', '.join(leaf_keys(hint))}; got {value!r}")
            built[key] = build(typing.cast(type, hint), value or {}, full + ".")
        else:
            built[key] = coerce(hint, value, full)
            _check_range(built[key], fields[key].metadata, full)
    return built


def _check_range(value: Any, limits: Any, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, above, high = (limits.get(name) for name in ("low", "above", "high"))
    if low is not None and value < low:
        raise UserError(f"{key}: {value} is too small; at least {low:g}")
    if above is not None and value <= above:
        raise UserError(f"{key}: {value} is too small; it must be above {above:g}")
    if high is not None and value > high:
        raise UserError(f"{key}: {value} is too large; at most {high:g}")


def unknown_key(full: str, known: list[str]) -> str:
    """The line for a key that does not exist: nearest spelling first, else the keys of that section."""
    near = difflib.get_close_matches(full, known, 1, 0.6)
    if not near:  # right leaf, wrong section (--lr for --optim.lr), or a near miss of the leaf
        leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(full.rsplit(".", 1)[-1], list(leaves), 1, 0.6)]
    section = full.rsplit(".", 1)[0] + "." if "." in full else ""
    allowed = [key for key in known if key.startswith(section) and section] or sorted({k.split(".")[0] for k in known})
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {full}{hint} (allowed: {', '.join(allowed)})"


def leaf_keys(cls: Any, prefix: str = "") -> list[str]:
    """Every settable key of a dataclass, dotted, in order."""
    hints = typing.get_type_hints(cls)
    keys: list[str] = []
    for f in dataclasses.fields(cls):
        if f.init:
            nested = dataclasses.is_dataclass(hints[f.name])
            keys += leaf_keys(hints[f.name], f"{prefix}{f.name}.") if nested else [prefix + f.name]
    return keys


def coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` (from YAML, or a flag's string) as type `hint`; `UserError` names the key and what is allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "auto")):
            return None
        return coerce(inner[0], value, key)
    if value is None:
        raise UserError(f"{key}: has no value; expected {describe_type(hint)}")
    if origin is typing.Literal:
        text = str(value)
        if text in arguments:
            return text
        near = difflib.get_close_matches(text, arguments, 1, 0.5)
        raise UserError(
            f"{key}: {text!r} is not allowed{f'; did you mean {near[0]}?' if near else ''} "
            f"(allowed: {', '.join(map(str, arguments))})"
        )
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [coerce(arguments[0], item, key) for item in items]
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise UserError(f"{key}: is a section; got {value!r}")
        return value
    return _scalar(hint, value, key)


def _scalar(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, Repeated):
        raise UserError(f"{key}: was given {len(value)} times ({', '.join(value)}); it takes one value")
    wrong = UserError(f"{key}: expected {describe_type(hint)}, got {value!r}")
    if hint is str and isinstance(value, list) and all(type(item) in (str, int, float) for item in value):
        return ",".join(map(str, value))  # YAML's way to write what a flag writes as words with commas
    if isinstance(value, (dict, list)):
        raise wrong
    if hint is str:
        return str(value)
    if hint is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if isinstance(value, bool):
        raise wrong
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        raise wrong from None
    if number != number or number in (float("inf"), float("-inf")):
        raise wrong
    if hint is float:
        return number
    if number != int(number):
        raise wrong
    return int(str(value).replace("_", "")) if re.fullmatch(r"[-+]?[\d_]+", str(value)) else int(number)


def describe_type(hint: Any) -> str:
    """A type in words, as help and errors show it."""
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
    """Every key of `cls` with type, default and meaning, a line each."""
    lines = []
    for key, hint, default, help in _walk(cls, ""):
        shown = "auto" if default is None else "" if default in ([], "") else f"{default}"
        default_text = f" [{shown}]" if shown else ""
        lines.append(f"  --{key} <{describe_type(hint)}>{default_text}\n        {help}")
    return "\n".join(lines)


def _walk(cls: Any, prefix: str):
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{f.name}.")
        else:
            default = f.default if f.default is not MISSING else typing.cast(Any, f.default_factory)()
            yield prefix + f.name, hint, default, f.metadata.get("help", "")


def to_yaml(config: Any) -> str:
    """A dataclass as YAML that `load_yaml` and `build` read back to the same values."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)
