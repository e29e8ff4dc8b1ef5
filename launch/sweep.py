"""Write and check the elements of a sweep for array.sh: every combination of comma-separated values.

    python launch/sweep.py FOLDER CONFIG.yaml[,CONFIG.yaml ...] [--key value[,value ...] ...]

Writes FOLDER/elements/0, 1, ...: the words of a `train` command, one per line. Each element has its own run folder in FOLDER,
named after its config and values. Prints a line for each element.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, load_yaml, merge, parse_flags
from trainer.core.sweep import combinations, parse_sweep
from trainer.core.text import printable


class Word(NamedTuple):
    """A word of a command: `prefix` and `value`. key: the key that the value belongs to; "" for a word without a value."""

    prefix: str
    value: str
    key: str


def split_words(words: list[str]) -> list[Word]:
    """Parse the words after the config: --key VALUE or --key=VALUE."""
    found, key = [], ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag and not equals:
            found.append(Word(flag, "", ""))
            key = flag.removeprefix("--")
        else:
            found.append(Word(flag + equals, value, flag.removeprefix("--") or key))
            key = ""
    return found


def elements(folder: Path, words: list[str]) -> list[list[str]]:
    """The words of each command. UserError if a command is not valid, or if two would train in one folder."""
    if not words or words[0].startswith("-"):
        raise UserError("no config; CONFIG.yaml comes first, then --key value")
    if any("\n" in word for word in words):
        raise UserError("a word holds a line break, which an element's file cannot; put that value into the config")
    rest = split_words(words[1:])
    swept = {word.key for word in rest if "," in word.value}
    sweep = parse_sweep([f"{word.key}={word.value}" for word in rest if word.key in swept])
    commands = []
    for config in words[0].split(","):
        for changes in combinations(sweep):
            command = [config, *(word.prefix + changes.get(word.key, word.value) for word in rest)]
            _, flags = parse_flags(command[1:])
            flags.pop("plugin", None)
            if "run_dir" in flags:
                raise UserError(f"run_dir: each element has its own, in {folder}")
            build(RunConfig, merge(load_yaml(config), flags))
            name = "-".join([Path(config).stem, *(f"{key}={value}" for key, value in changes.items())])
            commands.append([*command, "--run_dir", str(folder / name.replace("/", "_"))])
    folders = Counter(command[-1] for command in commands)
    twice = next((name for name, count in folders.items() if count > 1), None)
    if twice:
        raise UserError(f"run_dir: two elements would train in {twice}; give configs and values different names")
    return commands


def write(folder: Path, commands: list[list[str]]) -> None:
    """Write a file for each command. UserError if the folder holds another sweep."""
    texts = {str(number): "\n".join(command) + "\n" for number, command in enumerate(commands)}
    if folder.exists():
        if texts != {path.name: path.read_text() for path in folder.iterdir()}:
            raise UserError(f"{folder}: holds another sweep; choose another name, or delete this folder")
        return
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def main() -> None:
    try:
        if len(sys.argv) < 3:
            raise UserError("usage: python launch/sweep.py FOLDER CONFIG.yaml[,...] [--key value[,value ...] ...]")
        folder = Path(sys.argv[1])
        commands = elements(folder, sys.argv[2:])
        write(folder / "elements", commands)
    except UserError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    for number, command in enumerate(commands):
        print(number, " ".join(command))


if __name__ == "__main__":
    main()
