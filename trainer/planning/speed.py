"""The speed of a run on this machine, measured by `bench` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.core import yaml_text
from trainer.core.errors import UserError
from trainer.core.files import write_file
from trainer.core.settings import merge
from trainer.core.text import printable

BENCH = {"baselines": [], "rounds": 3, "steps_per_round": 3}
CONFIG = "bench.yaml"


def measure_speed(
    values: dict[str, Any], folder: Path, plugins: list[str], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The row of bench.json for the run of these values: `tokens_per_second`, `peak_memory_bytes` and more.

    folder: keeps the bench; one that is there already, of the same values, is read, not made again. environment: variables besides those
    of this process. UserError if the speed cannot be measured.
    """
    result = folder / "bench.json"
    if not is_measured(values, folder):
        result.unlink(missing_ok=True)
        _bench(values, folder, plugins, environment or {})
    try:
        return json.loads(result.read_bytes())["rows"][0]
    except (ValueError, LookupError):
        raise UserError(f"{printable(result)}: is not what `bench` writes; delete it") from None


def is_measured(values: dict[str, Any], folder: Path) -> bool:
    """Whether the folder has a bench of these values."""
    config = folder / CONFIG
    return (
        (folder / "bench.json").exists()
        and config.exists()
        and config.read_text(encoding="utf-8") == _config(values, folder)
    )


def _config(values: dict[str, Any], folder: Path) -> str:
    return yaml_text.dump(yaml_text.untyped(merge(values, {**BENCH, "bench_dir": str(folder)})))


def _bench(values: dict[str, Any], folder: Path, plugins: list[str], environment: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / CONFIG
    write_file(config, _config(values, folder))
    words = [sys.executable, "-m", "trainer", "bench", str(config)]
    words += [word for plugin in plugins for word in ("--plugin", plugin)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env={**os.environ, **environment})
    if done.returncode:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("error: ")), "error: ")
        raise UserError(f"the speed cannot be measured: {printable(said.removeprefix('error: '), 500)}")
