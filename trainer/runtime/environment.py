"""The environment of a process: versions, machine, git state."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.runtime.launcher import find_rank_info


def environment() -> dict[str, Any]:
    """Time, command, versions, machine, number of processes and git state of this start."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": package_versions(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "processes": find_rank_info(os.environ).size,
        "git": git_state(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter to a run, as far as they are installed."""
    import importlib.metadata

    versions = {}
    for package in ("torch", "numpy", "mosaicml-streaming", "deepspeed", "accelerate", "crescendo-lm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@functools.cache
def git_state() -> dict[str, Any] | None:
    """The commit of this checkout, and whether files differ from it; None without git or outside a repository."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"sha": sha.stdout.strip(), "dirty": bool(dirty.stdout.strip())} if sha.returncode == 0 else None
