"""The verbs of the command line. Each file or folder here declares its own as a `Verb`; to add a verb, add a file.

`python -m trainer --help` imports all of these files. So they import torch and other slow modules only inside the
functions that do the work.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.core.errors import UserError
from trainer.core.settings import build, load_yaml

Values = dict[str, Any]


def config_file(word: str, flags: Values) -> Values:
    """Read the word before the flags as a config file."""
    return load_yaml(word)


def run_folder(word: str, flags: Values) -> Values:
    """Read the word before the flags as a config file if it ends in .yaml or .yml, otherwise as a run's folder."""
    return load_yaml(word) if word.endswith((".yaml", ".yml")) else {"run_dir": word}


@dataclass(frozen=True)
class Verb:
    """What the command line needs to know about a verb.

    name: one word, or two; help: one line
    config: the dataclass of its keys
    run: does the work; called as run(config) or, if `json` is true, run(config, as_json)
    alone: if a launcher starts several processes, rank 0 runs the verb and the others exit at once
    json: whether the verb has the flag --json
    positional: (word, flags) -> the values that the word before the flags stands for
    words: the key of a list that takes all words before the flags, of a verb that takes several; `positional` is not used then
    read: values -> the first argument of `run`; by default an instance of `config`
    resolved: that argument -> what --print_config shows
    interrupted: the message of an interrupt that comes before the verb handles signals itself
    """

    name: str
    help: str
    config: type
    run: Callable[..., None]
    alone: bool = False
    json: bool = False
    positional: Callable[[str, Values], Values] = config_file
    words: str = ""
    read: Callable[[Values], Any] | None = None
    resolved: Callable[[Any], Any] = lambda config: config
    interrupted: str = "interrupted"

    def given(self, words: list[str], flags: Values) -> Values:
        """The values that the words before the flags stand for. UserError if the verb does not take that many."""
        if self.words:
            return {self.words: words} if words else {}
        if len(words) > 1:
            raise UserError(f"{words[1]!r}: {self.name} takes one file or folder before its flags; flags begin with --")
        return self.positional(words[0], flags) if words else {}

    def argument(self, values: Values) -> Any:
        """The first argument of `run`. Raises UserError for a wrong key or value."""
        return build(self.config, values) if self.read is None else self.read(values)


def over_parent(config: type) -> Callable[[Values], Any]:
    """For `read`, of a verb whose keys are a run's: the instance of `config` over what it takes from its parent (init_from)."""

    def read(values: Values) -> Any:
        built: Any = build(config, values)
        if built.init_from is None:
            return built
        from trainer.planning.parent import with_parent

        return build(config, with_parent(values, built, lambda line: None))

    return read


def find_verbs() -> dict[str, Verb]:
    """Every verb that a file or folder of this package declares, by name."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {verb.name: verb for module in modules for verb in vars(module).values() if isinstance(verb, Verb)}
