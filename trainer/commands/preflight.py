"""`preflight`: shows what differs between the machines of a run, and which one is slow."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from trainer.commands import Verb
from trainer.core.config import RunConfig
from trainer.core.text import printable_lines

VERB_MINUTES = 5.0  # the verb ends after this long without progress


def run(config: RunConfig) -> None:
    """Run the verb: print a table to stdout. It starts no run, and reads only device, run_dir and engine.timeout_minutes."""
    from trainer.runtime.device import choose_device
    from trainer.runtime.distributed import join, read_world
    from trainer.runtime.watchdog import Watchdog
    from trainer.training.preflight import judge, say_survey, summary, survey, table

    world = read_world()
    minutes = min(config.engine.timeout_minutes, VERB_MINUTES)
    join(world, config.device, 2 * minutes)
    device = choose_device(config.device, world.local_rank)
    with contextlib.closing(Watchdog(world, 60 * minutes)):
        seen = survey(world, device, Path(config.run_dir or ".").expanduser())
    if world.leader:
        print(printable_lines(table(seen)), file=sys.stdout, flush=True)
        say_survey(world, summary(seen), judge(seen))
    world.stop()


VERB = Verb(
    name="preflight",
    help="what differs between the machines of a run, and which is slow",
    config=RunConfig,
    run=run,
)
