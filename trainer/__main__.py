"""`python -m trainer VERB [CONFIG.yaml] [--key value ...]`: parses the command line, calls the verb, and reports errors.

The verbs are defined in trainer/commands.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.commands import Verb, find_verbs
from trainer.core.config import RunConfig
from trainer.core.errors import MachineError, Stopped, UserError
from trainer.core.files import system_error
from trainer.core.settings import build, coerce, help_text, merge, parse_flags, to_yaml
from trainer.core.text import for_stream, printable, printable_lines
from trainer.runtime.exit_status import write_exit_status
from trainer.runtime.launcher import RankInfo, find_rank_info

# Texts in the errors of gloo and NCCL.
LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "communicator was aborted"),
)
# New objects until Python's garbage collector runs, instead of 700: imports make half a million that stay, and going through
# them again and again takes a tenth of a start. The training loop collects by hand.
COLLECT_AFTER = 100_000
BEYOND_64_BITS = ("Storage size calculation overflowed", "integer multiplication overflow")  # texts in torch's errors
USAGE = """python -m trainer VERB [CONFIG.yaml | RUN] [--key value ...]

{verbs}

Flags override the YAML file, which overrides its `base:`, which overrides the defaults; `auto` means inferred.
`python -m trainer VERB --help` lists the keys of a verb. --print_config prints the resolved YAML, --print_run_dir the
folder of a run; --json ({with_json}) prints one JSON object on stdout; --plugin MODULE or
--plugin FILE.py (repeatable) imports code that registers models, optimizers or objectives."""


def main() -> None:
    """Run a verb; a UserError becomes one line and exit code 2."""
    gc.set_threshold(COLLECT_AFTER)
    rank_info = RankInfo()
    try:
        rank_info = find_rank_info(os.environ)
        with known_errors():
            dispatch(without_local_rank(sys.argv[1:], rank_info))
    except UserError as error:
        if not isinstance(error, MachineError):
            write_exit_status(f"refused: {printable(error)}")
        if rank_info.rank:  # if rank 0 fails too, it prints, and the launcher ends this process while it sleeps
            time.sleep(3)
        who = f"[rank {rank_info.rank}] " if rank_info.rank else ""
        print(f"error: {who}{printable(error, 4000)}", file=sys.stderr, flush=True)
        leave(2)
    except KeyboardInterrupt as stop:
        if rank_info.rank == 0:
            print(interrupted_line(stop), file=sys.stderr, flush=True)
        leave(128 + stop.number if isinstance(stop, Stopped) else 130)
    except BrokenPipeError:  # the reader of our output (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if is_broken_model(error):
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
            leave(1)
        if rank_info.size == 1:
            raise
        text = f"[rank {rank_info.rank}] {traceback.format_exc()}"
        lost = next((words for words in LOST_CONNECTION if words in str(error)), None)
        if lost is not None:
            time.sleep(3)  # the launcher should first see the rank that failed; it then ends this process
            text = (
                f"error: [rank {rank_info.rank}] lost another rank ({lost}): read what that one printed, then start the same "
                "command again; training goes on from the last checkpoint"
            )
        # A normal exit with a traceback would wait for the other ranks, and the launcher would wait for this process.
        print(printable_lines(text), file=sys.stderr, flush=True)
        leave(1)


@contextlib.contextmanager
def known_errors() -> Iterator[None]:
    """Raises UserError for errors of the system: files that cannot be read or written, and too little memory."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise system_error(error, printable(error.filename or "input or output")) from None
    except (MemoryError, RuntimeError) as error:
        if any(text in str(error) for text in BEYOND_64_BITS):
            raise UserError(
                "a tensor of this run would have more than 2^63 bytes: lower the sizes in model.*"
            ) from None
        words = ("out of memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in words):
            raise
        raise UserError(
            "out of memory: lower batch.tokens_per_microbatch, batch.sequence_length or model_scale"
        ) from None


def interrupted_line(stop: KeyboardInterrupt) -> str:
    """The line for a run that a signal interrupts. A run in training handles signals itself, so nothing is left to save here."""
    if isinstance(stop, Stopped):
        return stop.line
    verb = find_verbs().get(sys.argv[1] if len(sys.argv) > 1 else "")
    return "interrupted" if verb is None else verb.interrupted


def is_broken_model(error: Exception) -> bool:
    """Whether a model's file cannot be imported. This is a bug, but its message says where it is."""
    if not isinstance(error, ImportError):
        return False
    from models.base import BrokenModel

    return isinstance(error, BrokenModel)


def leave(code: int) -> None:
    """Exit at once, without waiting for other ranks (which may be stuck in a collective) or for threads that read data."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the stream is closed
            stream.flush()
    os._exit(code)


def without_local_rank(words: list[str], rank_info: RankInfo) -> list[str]:
    """The command line without --local_rank=N, which the deepspeed launcher adds although it also sets LOCAL_RANK."""
    kept = []
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
        elif value != str(rank_info.local_rank):
            raise UserError(f"{word}: LOCAL_RANK is {rank_info.local_rank}; remove the option, the launcher sets it")
    return kept


def dispatch(words: list[str]) -> None:
    """Parse the command line and call the verb."""
    verbs = find_verbs()
    if not words or words[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {verb.name:<16} {verb.help}" for verb in verbs.values())
        print(USAGE.format(verbs=lines, with_json=with_json(verbs)))
        return
    verb, rest = find_verb(words, verbs)
    if "-h" in rest or "--help" in rest:
        print(f"python -m trainer {verb.name} ...   {verb.help}\n\n{help_text(verb.config)}")
        return
    positional, flags = parse_flags(rest)
    print_config, print_run_dir, as_json = (
        coerce(bool, flags.pop(name, False), f"--{name}") for name in ("print_config", "print_run_dir", "json")
    )
    plugins = flags.pop("plugin", [])
    if as_json and not verb.json:
        raise UserError(f"--json: {verb.name} has no JSON output; these verbs have it: {with_json(verbs)}")
    values = verb.given(positional, flags)
    if find_rank_info(os.environ).rank != 0 and (verb.alone or print_config):
        return
    values = merge(values, flags)
    if print_run_dir:
        from trainer.planning.run_config import folder_of

        print(for_stream(str(folder_of(build(RunConfig, values)).absolute()), sys.stdout))
        return
    given = coerce(list[str], plugins, "--plugin")
    import_plugins(given)
    with naming_missing_plugins(values.get("run_dir"), given):
        argument = verb.argument(values)
        if print_config:
            print(to_yaml(verb.resolved(argument)), end="")
        else:
            verb.run(argument, *([as_json] if verb.json else []))


def find_verb(words: list[str], verbs: dict[str, Verb]) -> tuple[Verb, list[str]]:
    """The verb at the beginning of a command line, and the words after it. UserError if the verb is unknown."""
    for length in (2, 1):  # some verbs are two words
        verb = verbs.get(" ".join(words[:length]))
        if verb is not None:
            return verb, words[length:]
    import difflib

    near = difflib.get_close_matches(words[0], verbs, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown verb {printable(repr(words[0]), 100)}{hint} (verbs: {', '.join(verbs)})")


def with_json(verbs: dict[str, Verb]) -> str:
    """The names of the verbs that accept --json."""
    return ", ".join(verb.name for verb in verbs.values() if verb.json)


def import_plugins(names: list[str]) -> None:
    """Import the plug-ins of `--plugin`. Only a flag can name them, because a config must not run code."""
    for name in names:
        from trainer.commands.plugins import import_plugin

        import_plugin(name)


@contextlib.contextmanager
def naming_missing_plugins(run_dir: Any, given: list[str]) -> Iterator[None]:
    """Adds to a UserError the plug-ins that the run in `run_dir` was started with and this command lacks: they may be the reason."""
    try:
        yield
    except UserError as error:
        from trainer.planning.run_config import plugins_of

        names = {Path(name).name for name in given}  # a file may have moved
        started = plugins_of(Path(run_dir)) if isinstance(run_dir, str) else []
        lacking = [name for name in started if Path(name).name not in names]
        if lacking:
            flags = " ".join(f"--plugin {name}" for name in lacking)
            error.args = (f"{error} ({printable(run_dir)} was started with {printable(flags)}: add it)",)
        raise


if __name__ == "__main__":
    main()
