"""`python -m trainer VERB [CONFIG.yaml] [--key value ...]`. Verbs are imported only when called."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import MachineError, Stopped, UserError
from trainer.core.files import system_error
from trainer.core.text import for_stream, printable, printable_lines
from trainer.runtime.exit_status import write_exit_status
from trainer.runtime.launcher import RankInfo, find_rank_info

# Under a launcher of several processes, rank 0 does these by itself.
ALONE = ("prepare", "plan", "generate", "export", "check")
WITH_JSON = ("plan", "evaluate", "bench", "bench data", "bench checkpoint")
# As gloo's and NCCL's errors say.
LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "communicator was aborted"),
)
BEYOND_64_BITS = ("Storage size calculation overflowed", "integer multiplication overflow")  # as torch says
VERBS = {
    "prepare": "text to MDS shards",
    "plan": "every number of a run and the rule it came from",
    "train": "train; in an existing run folder: go on from its newest good checkpoint",
    "generate": "continue prompts with a run's model",
    "evaluate": "loss of a run's checkpoint on a validation split",
    "check": "whether a model keeps the contract: one line per promise",
    "export": "a run's weights as safetensors, for other programs",
    "bench": "speed and memory of a training step: sweeps, beside a bare PyTorch loop and transformers",
    "bench data": "speed of loader and tokenizer, against what training consumes",
    "bench checkpoint": "speed of saving and loading, against a plain file",
    "preflight": "what differs between the machines of a run, and which is slow",
}

USAGE = """python -m trainer VERB [CONFIG.yaml | RUN] [--key value ...]

{verbs}

Keys come from defaults, then the YAML file (and its `base:`), then flags; `auto` means inferred.
`python -m trainer VERB --help` lists the keys of a verb. --print_config shows the resolved YAML, --print_run_dir the
folder of a run; --json (plan, evaluate, bench) prints one JSON object on stdout; --plugin MODULE or
--plugin FILE.py (repeatable) imports what registers models or optimizers."""


def main() -> None:
    """Run a verb; a UserError becomes one line and exit code 2."""
    rank_info = RankInfo()
    try:
        rank_info = find_rank_info(os.environ)
        with known_errors():
            dispatch(without_local_rank(sys.argv[1:], rank_info))
    except UserError as error:
        if not isinstance(error, MachineError):
            write_exit_status(f"refused: {printable(error)}")
        if rank_info.rank:  # rank 0 alone speaks; where it fails too, the launcher ends this process before it wakes
            time.sleep(3)
        who = f"[rank {rank_info.rank}] " if rank_info.rank else ""
        print(f"error: {who}{printable(error, 4000)}", file=sys.stderr, flush=True)
        leave(2)
    except KeyboardInterrupt as stop:
        if rank_info.rank == 0:
            print(interrupted_line(stop), file=sys.stderr, flush=True)
        leave(128 + stop.number if isinstance(stop, Stopped) else 130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
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
            time.sleep(3)  # so that the launcher sees first the rank that failed; it ends this process meanwhile
            text = (
                f"error: [rank {rank_info.rank}] lost another rank ({lost}): see what that one printed, then start the same "
                "command again; training goes on from the last checkpoint"
            )
        # A traceback alone would leave this process waiting for its peers at exit, and the launcher for this process.
        print(printable_lines(text), file=sys.stderr, flush=True)
        leave(1)


@contextlib.contextmanager
def known_errors() -> Iterator[None]:
    """Failures of the machine, told as the user's errors are: files that cannot be read or written, memory that is not there."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise system_error(error, printable(error.filename or "input or output")) from None
    except (MemoryError, RuntimeError) as error:
        if any(text in str(error) for text in BEYOND_64_BITS):
            raise UserError(
                "a tensor of this run would have more than 2^63 bytes: lower the sizes of model.*"
            ) from None
        words = ("out of memory", "can't allocate memory")
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in words):
            raise
        raise UserError(
            "out of memory: lower batch.tokens_per_microbatch, batch.sequence_length or model_scale"
        ) from None


def interrupted_line(stop: KeyboardInterrupt) -> str:
    """A run that has begun hears of signals itself: what ends here has nothing to save."""
    if isinstance(stop, Stopped):
        return stop.line
    return "interrupted before training began" if sys.argv[1:2] == ["train"] else "interrupted"


def is_broken_model(error: Exception) -> bool:
    """Whether a file of the zoo cannot be imported: a bug, but one whose place its message names."""
    if not isinstance(error, ImportError):
        return False
    from models.base import BrokenModel

    return isinstance(error, BrokenModel)


def leave(code: int) -> None:
    """Exit at once: other ranks may wait in a collective that will never come, and reading threads must not hold us."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def without_local_rank(words: list[str], rank_info: RankInfo) -> list[str]:
    """The command line without the --local_rank=N that the deepspeed launcher puts into it beside LOCAL_RANK."""
    kept = []
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
        elif value != str(rank_info.local_rank):
            raise UserError(f"{word}: LOCAL_RANK is {rank_info.local_rank}; leave the option to the launcher")
    return kept


def dispatch(words: list[str]) -> None:
    """Parse the command line and call the verb."""
    if not words or words[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {name:<16} {text}" for name, text in VERBS.items())
        print(USAGE.format(verbs=verbs))
        return
    length = 2 if " ".join(words[:2]) in VERBS else 1  # some verbs are two words
    verb, rest = " ".join(words[:length]), words[length:]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown verb {printable(repr(verb), 100)}{hint} (verbs: {', '.join(VERBS)})")

    from trainer.core import config as schema
    from trainer.core.settings import build, coerce, help_text, load_yaml, merge, parse_flags

    classes = {
        "prepare": schema.PrepareConfig,
        "plan": schema.PlanConfig,
        "train": schema.RunConfig,
        "generate": schema.GenerateConfig,
        "evaluate": schema.EvaluateConfig,
        "check": schema.CheckConfig,
        "export": schema.ExportConfig,
        "bench": schema.BenchConfig,
        "bench data": schema.BenchConfig,
        "bench checkpoint": schema.BenchConfig,
        "preflight": schema.RunConfig,
    }
    cls = classes[verb]
    if "-h" in rest or "--help" in rest:
        print(f"python -m trainer {verb} ...   {VERBS[verb]}\n\n{help_text(cls)}")
        return
    positional, flags = parse_flags(rest)
    print_config = _switch(flags, "print_config")
    print_run_dir = _switch(flags, "print_run_dir")
    as_json = _switch(flags, "json")
    plugins = flags.pop("plugin", [])
    if as_json and verb not in WITH_JSON:
        raise UserError(f"--json: {verb} has no JSON output ({', '.join(WITH_JSON)} have)")
    if len(positional) > 1:
        raise UserError(f"{positional[1]!r}: {verb} takes one file or folder before its flags, and flags begin with --")
    values: dict[str, Any] = {}
    if (
        positional
        and verb in ("train", "generate", "evaluate", "export")
        and not positional[0].endswith((".yaml", ".yml"))
    ):
        values = {"run_dir": positional[0]}
    elif positional and verb == "train" and "run_dir" not in flags and is_config_of_run(positional[0]):
        values = {"run_dir": str(Path(positional[0]).parent)}  # the run goes on where its config lies, also when moved
    elif positional and verb == "check":
        values = {"module": positional[0]}
    elif positional:
        values = load_yaml(positional[0])
    if find_rank_info(os.environ).rank != 0 and (verb in ALONE or print_config):
        return
    if print_run_dir:
        from trainer.planning.run_config import folder_of

        print(for_stream(str(folder_of(build(schema.RunConfig, merge(values, flags))).absolute()), sys.stdout))
        return
    import_plugins(coerce(list[str], plugins, "--plugin"))
    call(verb, cls, merge(values, flags), print_config, as_json)


def is_config_of_run(path: str) -> bool:
    """Whether `path` is the config.yaml in the folder of a run."""
    from trainer.planning.run_config import CONFIG, is_run

    return Path(path).name == CONFIG and is_run(Path(path).parent)


def import_plugins(names: list[str]) -> None:
    """Import the plug-ins of `--plugin`, which register models. Only a flag can name them: no config may run code."""
    for name in names:
        from trainer.commands.plugins import import_plugin

        import_plugin(name)


def _switch(flags: dict[str, Any], name: str) -> bool:
    from trainer.core.settings import coerce

    return coerce(bool, flags.pop(name, False), f"--{name}")


def call(verb: str, cls: Any, values: dict[str, Any], print_config: bool, as_json: bool) -> None:
    """Import the verb's module and run it."""
    from trainer.core.settings import build, to_yaml

    if verb == "train" and print_config:
        from trainer.planning.run_config import combined_values

        values, _ = combined_values(values)
    config = build(cls, values)
    if print_config and verb == "plan":
        from trainer.commands.plan import resolve_for

        print(to_yaml(resolve_for(config)[0].config), end="")
    elif print_config and verb == "train":
        from trainer.data.stream import find_dataset
        from trainer.planning.plan import resolve

        print(to_yaml(resolve(config, find_dataset(config.data)).config), end="")
    elif print_config:
        print(to_yaml(config), end="")
    else:
        module = importlib.import_module(f"trainer.commands.{verb.replace(' ', '.')}")
        # A run's own values are needed once more, on top of what its folder holds.
        module.run(values if verb == "train" else config, *([as_json] if verb in WITH_JSON else []))


if __name__ == "__main__":
    main()
