"""metrics.jsonl: one row per optimiser step. Each step appears once, even after a run resumes from a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import MachineError
from trainer.core.files import sync_path, system_error
from trainer.core.text import printable
from trainer.runs.history import History

KEYS = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte", "tokens_per_second", "seconds")
FORMER_KEY = "microbatch_steps"  # the name of batch_multiplier in runs of 0.2.0 and earlier
LINE_BYTES = 1 << 20  # longest row


class MetricsFile:
    """Rows of metrics.jsonl. A resumed run drops the rows after its checkpoint, and moves lines that are not rows to
    metrics.jsonl.damaged with a warning.

    Where a write fails, `write` and `sync` raise MachineError. The rows stay in memory, and the next call tries again.
    """

    def __init__(self, path: Path, resume_step: int, say: Callable[[str], None], expected: str = "") -> None:
        """expected: the `digest` in the checkpoint that the run resumes from; "" if there is none."""
        self.path, self.history = path, History()
        self._digest = hashlib.sha256()
        self._unwritten = b""
        self._descriptor: int | None = None
        try:
            if path.exists():
                self._rewind(resume_step, say)
            self._open()
        except OSError as error:
            raise system_error(error, f"{printable(path)}: cannot be read or written") from None
        if expected and expected != self.digest:
            say(f"warning: {printable(path)}: the rows up to step {resume_step:,} are not the ones that this run wrote")

    @property
    def digest(self) -> str:
        """sha256 of all rows, as a checkpoint keeps it."""
        return self._digest.hexdigest()

    def _rewind(self, resume_step: int, say: Callable[[str], None]) -> None:
        """Keep the rows up to `resume_step`, byte for byte. Move lines that are not rows to another file."""
        odd: list[tuple[int, bytes]] = []
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            for number, line, row in numbered_lines(self.path):
                if row is None:
                    odd.append((number, line))
                elif row["step"] <= resume_step:
                    file.write(line)
                    self._digest.update(line)
                    self.history.add(row)
            file.flush()
            os.fsync(file.fileno())
        if odd:
            aside = self.path.with_name(self.path.name + ".damaged")
            with aside.open("ab") as file:
                file.writelines(line for _, line in odd)
                file.flush()
                os.fsync(file.fileno())
            count = "1 line is not a row" if len(odd) == 1 else f"{len(odd)} lines are not rows"
            say(f"warning: {printable(self.path)}: {count} (line {odd[0][0]}); kept in {aside.name}")
        temporary.rename(self.path)
        sync_path(self.path.parent)

    def write(self, row: dict[str, Any]) -> None:
        self.history.add(row)
        line = json.dumps(row).encode() + b"\n"
        self._digest.update(line)
        self._unwritten += line
        self._flush()

    def sync(self) -> None:
        """Put all rows on disk. Called before a checkpoint is saved, from which the run may resume."""
        self._flush()
        try:
            os.fsync(self._descriptor or 0)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._close()

    def _flush(self) -> None:
        """Write what is in memory. After a failure within a row, `_unwritten` is exactly what the file lacks."""
        try:
            self._open()
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._descriptor or 0, self._unwritten) :]
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> MachineError:
        self._close()  # on a network file system a stale handle may never recover
        rows = self._unwritten.count(b"\n")
        return MachineError(
            f"{printable(self.path)}: cannot be written: {printable(error.strerror or error)}; "
            f"{rows} rows wait in memory for the next try"
        )

    def _open(self) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError:
                pass  # an error that no write or fsync reported


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows. Other lines are skipped."""
    return [row for _, _, row in numbered_lines(path) if row is not None]


def last_row(path: Path) -> dict[str, Any] | None:
    """The last complete row; None if there is none. It reads the end of the file only."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - 2 * LINE_BYTES)
            file.seek(start)
            # The first line may lack its beginning, the last one its end.
            lines = file.read().split(b"\n")[1 if start else 0 : -1]
    except FileNotFoundError:
        return None
    return next(filter(None, map(parse_row, reversed(lines))), None)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(number from 1, line with its newline, its row or None). A last line that a kill cut off is skipped."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            row = parse_row(line)
            if row is not None or line.endswith(b"\n") or len(line) == LINE_BYTES:
                yield number, line if line.endswith(b"\n") else line + b"\n", row


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line, with today's keys; None if it is not a row of metrics.jsonl."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return checked_row(row)


def checked_row(row: Any) -> dict[str, Any] | None:
    """`row` with today's keys, if it is a row of metrics.jsonl; else None."""
    if not isinstance(row, dict) or not row.keys() >= set(KEYS):
        return None
    numbers = all(type(row[key]) in (int, float, type(None)) for key in KEYS)
    whole = type(row["step"]) is int and type(row["tokens"]) is int and type(row["seconds"]) in (int, float)
    if FORMER_KEY in row:
        row["batch_multiplier"] = row.pop(FORMER_KEY)
    return row if numbers and whole else None


def rewind_samples(path: Path, resume_step: int) -> None:
    """Cut the samples after step `resume_step` off samples.txt. The resumed run writes them again."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        while line := file.readline():
            header = re.match(rb"=== step (\d{1,18})(?:, final)?\n", line)
            if header and int(header[1]) > resume_step:
                file.truncate(file.tell() - len(line))
                return
