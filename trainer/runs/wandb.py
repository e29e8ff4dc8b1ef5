"""Weights & Biases, by choice: it never stands in a run's way."""

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
    """A wandb run, offline without login or network; a resumed run goes on under its id. Call it on rank 0."""

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
                if known:  # its service holds on to the id that it could not begin
                    run_id = secrets.token_hex(6)
        return wandb.init(mode="offline", id=run_id, settings=wandb.Settings(silent=True), **settings)

    def write(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            values = {key: value for key, value in row.items() if value is not None and key != "step"}
            with self._world.decoration("wandb"):
                self._run.log(values, step=row["step"])

    def close(self) -> None:
        """Send what is left, for a minute at most."""
        if self._run is None:
            return
        with self._world.decoration("wandb"):
            sending = threading.Thread(target=self._run.finish, daemon=True)
            sending.start()
            sending.join(FINISH_SECONDS)
            if sending.is_alive():
                raise TimeoutError(f"not all is sent after {FINISH_SECONDS:.0f} s; `wandb sync` sends the rest")


def chosen_mode(mode: str, environ: Mapping[str, str]) -> str:
    """`log.wandb` as the environment lets it be: WANDB_MODE can make it quieter, for a machine without network."""
    wanted = environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or wanted == "disabled":
        return "disabled"
    return "offline" if wanted in ("offline", "dryrun") else mode


def _run_id(file: Path) -> str:
    """A random id, written once into the run folder: a resumed run has the same, a new one in its place has not."""
    if not file.exists():
        file.write_text(secrets.token_hex(6), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
