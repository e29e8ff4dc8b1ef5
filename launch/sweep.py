"""The elements of a sweep, for array.sh: every combination of values given with commas between them, each checked.

    python launch/sweep.py FOLDER CONFIG.yaml[,CONFIG.yaml ...] [--key value[,value ...] ...]

Writes FOLDER/elements/0, 1, ...: the words of a `train` command, one in each line, with a run folder in FOLDER of its own,
named after what differs. Prints a line for each.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

from trainer.core.config import RunConfig
from trainer.core.errors import UserError
from trainer.core.settings import build, load_yaml, merge, parse_flags
from trainer.core.text import printable


def choices(words: list[str]) -> list[list[tuple[str, str]]]:
    """For each word of a command its alternatives, as (word, what to call it): "" where there is no other."""
    found = []
    for before, word in zip([None, *words], words, strict=False):
        key, equals, values = word.rpartition("=") if word.startswith("--") else ("", "", word)
        if word.startswith("--") and not equals:
            found.append([(word, "")])
            continue
        parts, name = values.split(","), (key or before or "").lstrip("-")
        found.append([(f"{key}{equals}{part}", f"{name}={part}" if len(parts) > 1 else "") for part in parts])
    found[0] = [(config, Path(config).stem) for config, _ in found[0]]
    return found


def elements(folder: Path, words: list[str]) -> list[list[str]]:
    """The commands' words. UserError where one is no valid command, or two would train in one folder."""
    if not words or words[0].startswith("-"):
        raise UserError("no config; CONFIG.yaml comes first, then --key value")
    if any("\n" in word for word in words):
        raise UserError("a word holds a line break, which an element's file cannot; put that value into the config")
    commands = []
    for combination in itertools.product(*choices(words)):
        command = [word for word, _ in combination]
        name = "-".join(label.replace("/", "_") for _, label in combination if label)
        _, flags = parse_flags(command[1:])
        flags.pop("plugin", None)
        if "run_dir" in flags:
            raise UserError(f"run_dir: each element has its own, in {folder}")
        build(RunConfig, merge(load_yaml(command[0]), flags))
        commands.append([*command, "--run_dir", str(folder / name)])
    folders = Counter(command[-1] for command in commands)
    twice = next((name for name, count in folders.items() if count > 1), None)
    if twice:
        raise UserError(f"run_dir: two elements would train in {twice}; give configs and values different names")
    return commands


def write(folder: Path, commands: list[list[str]]) -> None:
    """A file for each command. UserError where the folder holds another sweep."""
    texts = {str(number): "\n".join(command) + "\n" for number, command in enumerate(commands)}
    if folder.exists():
        if texts != {path.name: path.read_text() for path in folder.iterdir()}:
            raise UserError(f"{folder}: holds another sweep; choose another name, or delete that folder")
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
