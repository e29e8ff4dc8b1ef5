"""metrics.jsonl (always) and wandb (by choice): one row per optimiser step."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from trainer.errors import UserError

KEYS = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte", "tokens_per_second", "seconds")


class MetricsFile:
    """Rows of `metrics.jsonl`. A resumed run drops the rows past its checkpoint, so each step stands once."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        if path.exists():
            rows = [row for row in read_rows(path) if row["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            temporary.rename(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; the run goes on from its last checkpoint"
            ) from None

    def sync(self) -> None:
        """On disk now: called before a checkpoint that a resumed run would continue from."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _run_id(file: Path) -> str:
    """A random id, written once into the run folder: a resumed run has the same, a new one in its place has not."""
    if not file.exists():
        file.write_text(secrets.token_hex(6), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() >= set(KEYS):
            rows.append(row)
    return rows


class Wandb:
    """A wandb run that never stands in the way: offline without login or network, the same run id on resume."""

    def __init__(self, mode: str, project: str, folder: Path, config: dict[str, Any], say: Any) -> None:
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb: wandb is not installed; `pip install wandb` or --log.wandb disabled") from None
        settings: dict[str, Any] = {
            "project": project,
            "dir": str(folder),
            "id": _run_id(folder / "wandb-id"),
            "resume": "allow",
            "config": config,
        }
        settings["name"] = folder.name
        if mode in ("auto", "online"):
            try:
                if not wandb.api.api_key:
                    raise RuntimeError("no API key")  # on a terminal wandb would ask for one
                self._run = wandb.init(mode="online", settings=wandb.Settings(init_timeout=20, silent=True), **settings)
                return
            except Exception as error:
                reason = " ".join(f"{error}".split())[:100]
                say(f"wandb: no login or network ({reason}); recording offline under {folder / 'wandb'}")
        self._run = wandb.init(mode="offline", settings=wandb.Settings(silent=True), **settings)

    def write(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            values = {key: value for key, value in row.items() if value is not None and key != "step"}
            self._run.log(values, step=row["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
