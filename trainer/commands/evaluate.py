"""`evaluate`: the loss of a checkpoint on a split, by one protocol or both."""

from __future__ import annotations

import json
import sys
from typing import Any

from trainer.core.config import EvaluateConfig
from trainer.core.text import printable
from trainer.inference.evaluation import ESTIMATED, check_enough, validate
from trainer.runs.console import format_number


def run(config: EvaluateConfig, as_json: bool = False) -> None:
    """The verb: the loss of a checkpoint on its own validation split or on another dataset with the same tokenizer."""
    from trainer.runs.opening import open_run
    from trainer.runtime.distributed import join, read_world

    world = read_world()
    join(world, config.device)
    opened = open_run(config.run_dir, config.step, config.device, config.precision, world)
    split = opened.split(config.data, config.split)
    check_enough(split, config.protocol, "protocol")
    settings = opened.plan.config.evaluation
    settings.protocol = config.protocol
    settings.sequence_length = config.sequence_length or settings.sequence_length
    opened.check_length(settings.sequence_length)
    results = validate(opened, split, opened.plan, world, opened.step, config.seed)
    if world.leader:
        where = {"run": str(opened.folder), "step": opened.step, "data": str(split.folder), "split": config.split}
        report = where | results
        sys.stdout.write((json.dumps(report) if as_json else render(report)) + "\n")
    world.stop()


def render(report: dict[str, Any]) -> str:
    """The results as a few lines."""
    lines = [printable(f"{report['run']}, step {report['step']}, {report['split']} split of {report['data']}")]
    for protocol in ("full", "hlb"):
        if protocol in report:
            values = report[protocol]
            shown = [
                f"{key} {format_number(value)}" if isinstance(value, float) else f"{key} {value:,}"
                for key, value in values.items()
                if value is not None and not isinstance(value, bool)
            ]
            lines.append(f"{protocol}: " + ", ".join(shown))
            if values["bits_per_byte_is_estimate"]:
                lines[-1] += f" (what is per byte or word is an estimate: {ESTIMATED[protocol]})"
    return "\n".join(lines)
