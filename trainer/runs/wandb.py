"""Weights & Biases. It is optional, and its failures never stop a run."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.text import printable
from trainer.runtime.distributed import World

INIT_SECONDS = 20
FINISH_SECONDS = 60.0


class Wandb:
    """A wandb run, offline without login or network. A resumed run keeps its id. Only rank 0 makes one."""

    def __init__(self, mode: str, project: str, folder: Path, config: dict[str, Any], world: World) -> None:
        self._run: Any = None
        self._world = world
        mode = chosen_mode(mode, os.environ)
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb: wandb is not installed; `pip install wandb` or --log.wandb disabled") from None
        with world.decoration("wandb"):
            self._run = self._start(wandb, mode, project, folder, config)

    def _start(self, wandb: Any, mode: str, project: str, folder: Path, config: dict[str, Any]) -> Any:
        settings = {"project": project, "dir": str(folder), "name": folder.name, "config": config, "resume": "allow"}
        run_id = _run_id(folder / "wandb-id")
        if mode in ("auto", "online"):
            known = False
            try:
                known = wandb.login(prompt=False, verify=False)  # whether there is a key, without asking for one
                if not known:
                    raise RuntimeError("no API key")
                quiet = wandb.Settings(init_timeout=INIT_SECONDS, silent=True)
                return wandb.init(mode="online", id=run_id, settings=quiet, **settings)
            except Exception as error:
                reason = printable(" ".join(f"{error}".split()), 100)
                self._world.say(f"wandb: no login or network ({reason}); recording offline under {folder / 'wandb'}")
                if known:  # the service keeps the id of a run that failed to start
                    run_id = secrets.token_hex(6)
        return wandb.init(mode="offline", id=run_id, settings=wandb.Settings(silent=True), **settings)

    def write(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            values = {key: value for key, value in row.items() if value is not None and key != "step"}
            with self._world.decoration("wandb"):
                self._run.log(values, step=row["step"])

    def summarise(self, values: dict[str, float]) -> None:
        """Set values of the run that belong to none of its steps, such as those of an evaluation after it."""
        if self._run is not None:
            with self._world.decoration("wandb"):
                self._run.summary.update(values)

    def close(self) -> None:
        """Send what is left. Wait at most a minute."""
        if self._run is None:
            return
        with self._world.decoration("wandb"):
            sending = threading.Thread(target=self._run.finish, daemon=True)
            sending.start()
            sending.join(FINISH_SECONDS)
            if sending.is_alive():
                raise TimeoutError(
                    f"not everything was sent within {FINISH_SECONDS:.0f} s; `wandb sync` sends the rest"
                )


def chosen_mode(mode: str, environ: Mapping[str, str]) -> str:
    """The mode from `log.wandb` and WANDB_MODE, which can only make it offline or disabled, for a machine without network."""
    wanted = environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or wanted == "disabled":
        return "disabled"
    return "offline" if wanted in ("offline", "dryrun") else mode


def _run_id(file: Path) -> str:
    """A random id, stored in the run folder. A resumed run finds it there; a new run in its place gets another id."""
    if not file.exists():
        file.write_text(secrets.token_hex(6), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
