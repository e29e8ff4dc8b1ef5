"""`bench`: measures every combination of a sweep, and baselines beside them, in one process."""

from __future__ import annotations

from typing import Any

import torch

from trainer.commands.bench import BenchConfig
from trainer.commands.bench.baselines import baselines
from trainer.commands.bench.report import train_report
from trainer.commands.bench.turns import ROOM, fit_together, measure, memory_of_process, share_compiled_code
from trainer.commands.bench.variants import Candidate, Variant, variants
from trainer.core.errors import UserError
from trainer.data.obtain import agree_on_dataset, obtain_dataset
from trainer.planning.memory import GIB
from trainer.runtime.device import choose_device
from trainer.runtime.distributed import World, join, read_world


def run(config: BenchConfig, as_json: bool = False) -> None:
    """Run the verb: write bench.json, bench.md and bench.png, and print the table or the JSON to stdout."""
    world, found, notes, _ = enter(config)
    first, memory = found[0], memory_of_process(found[0].device, world)
    candidates: list[Candidate] = [*found]
    for baseline in baselines(config, first):
        need = baseline.needs()["total"]
        if need > ROOM * memory:
            notes.append(f"{baseline.name} left out: expected to need {need / GIB:.1f} of {memory / GIB:.1f} GiB")
        else:
            candidates.append(baseline)
    together = world.on_leader(lambda: fit_together(candidates, memory)) and not share_compiled_code(candidates)
    notes += measure(candidates, config, together)
    if world.leader:
        measured = [one for one in candidates if one.record.rates]
        train_report(config, measured, together, notes).publish(as_json)
    world.stop()


def enter(config: BenchConfig) -> tuple[World, list[Variant], list[str], Any]:
    """Returns the process group, the variants of the sweep (at least one, none built), a note on each combination that cannot run
    here, and the dataset (prepared first if it is missing)."""
    if config.profile:
        raise UserError("profile: bench records only phases; `train --profile` records operations")
    world = read_world()
    obtain_dataset(config, world)
    join(world, config.device, config.engine.timeout_minutes, alone=True)
    device: torch.device = choose_device(config.device, world.local_rank)
    dataset = agree_on_dataset(config, world)
    found, notes = variants(config, dataset, world, device)
    for variant in found:
        if (packing := variant.plan.config.data.packing) != "concat":
            raise UserError(
                f"data.packing: bench measures full rows, and those of {packing} hold padding; set it to concat"
            )
    return world, found, notes, dataset
