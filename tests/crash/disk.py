"""A disk as it stands after a crash: a trace of file operations, applied to files and folders of which a part was never flushed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# What a crash may leave of what was not flushed: all of it (the process was killed), nothing, or names without their content.
KINDS = ("written", "lost", "hollow")


class Record(NamedTuple):
    """One operation of the trace that the shim has written."""

    name: str
    opening: int
    flags: int
    position: int
    path: str
    other: str
    data: bytes


def read_trace(path: Path) -> list[Record]:
    content, records, at = path.read_bytes(), [], 0
    while at < len(content):
        end = content.index(b"\n", at)
        name, opening, flags, position, size, first, second = content[at:end].decode().split(" ")
        at = end + 1 + int(size)
        records.append(Record(name, int(opening), int(flags), int(position), first, second, content[end + 1 : at]))
    return records


@dataclass
class File:
    now: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""


@dataclass
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    flushed: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """The files below `root`, which is there and flushed."""

    def __init__(self, root: str) -> None:
        self.root, self.top = root, Folder()
        self.openings: dict[int, File | Folder] = {}

    def _at(self, path: str) -> tuple[Folder, str]:
        """The folder that holds `path`, and its name there."""
        *folders, name = path.removeprefix(self.root).strip("/").split("/")
        folder = self.top
        for part in folders:
            if part in ("", "."):
                continue
            step = folder.now[part]
            assert isinstance(step, Folder)
            folder = step
        return folder, name

    def apply(self, record: Record) -> None:
        getattr(self, "_" + record.name)(record)

    def _open(self, record: Record) -> None:
        folder, name = self._at(record.path)
        entry: File | Folder | None = self.top if name == "" else folder.now.get(name)
        if entry is None and record.flags & os.O_CREAT:
            entry = folder.now[name] = File()
        if isinstance(entry, File) and record.flags & os.O_TRUNC:
            del entry.now[:]
        if entry is not None:
            self.openings[record.opening] = entry

    def _write(self, record: Record) -> None:
        file = self.openings[record.opening]
        assert isinstance(file, File)
        file.now.extend(bytes(max(0, record.position - len(file.now))))
        file.now[record.position : record.position + len(record.data)] = record.data

    def _truncate(self, record: Record) -> None:
        file = self.openings[record.opening]
        assert isinstance(file, File)
        file.now[:] = file.now[: record.position].ljust(record.position, b"\0")

    def _sync(self, record: Record) -> None:
        entry = self.openings[record.opening]
        if isinstance(entry, File):
            entry.flushed = bytes(entry.now)
        else:
            entry.flushed = dict(entry.now)

    def _rename(self, record: Record) -> None:
        (source, name), (target, new) = self._at(record.path), self._at(record.other)
        target.now[new] = source.now.pop(name)

    def _remove(self, record: Record) -> None:
        folder, name = self._at(record.path)
        del folder.now[name]

    def _mkdir(self, record: Record) -> None:
        folder, name = self._at(record.path)
        folder.now[name] = Folder()

    def files(self, kind: str) -> dict[str, bytes | None]:
        """Path below root -> content (None: a folder) of what a crash leaves, by one of KINDS."""

        def walk(folder: Folder, prefix: str) -> Iterator[tuple[str, bytes | None]]:
            for name, entry in (folder.flushed if kind == "lost" else folder.now).items():
                if isinstance(entry, Folder):
                    yield prefix + name, None
                    yield from walk(entry, f"{prefix}{name}/")
                else:
                    yield prefix + name, self._content(entry, kind)

        return dict(walk(self.top, ""))

    @staticmethod
    def _content(file: File, kind: str) -> bytes:
        if kind == "written":
            return bytes(file.now)
        if kind == "lost":
            return file.flushed
        return file.flushed[: len(file.now)].ljust(len(file.now), b"\0")


def crashes(trace: list[Record], root: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(name, files) of every different disk that a crash during the trace may leave, also in the middle of a write."""
    seen: set[int] = set()
    disk = Disk(root)

    def different(name: str, files: dict[str, bytes | None]) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        key = hash(tuple(sorted((path, content) for path, content in files.items() if content is not None)))
        if key not in seen:
            seen.add(key)
            yield name, files

    for number, record in enumerate(trace, 1):
        if record.name == "write" and len(record.data) > 1:
            torn = record._replace(data=record.data[: len(record.data) // 2])
            before = bytes(disk.openings[record.opening].now)  # type: ignore[union-attr]
            disk.apply(torn)
            yield from different(f"{number} torn", disk.files("written"))
            disk.openings[record.opening].now[:] = before  # type: ignore[union-attr]
        disk.apply(record)
        for kind in KINDS:
            yield from different(f"{number} {kind} ({record.name} {os.path.basename(record.path)})", disk.files(kind))


def lay_out(files: dict[str, bytes | None], folder: Path) -> None:
    """Write `files` below `folder`."""
    for path, content in files.items():
        target = folder / path
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
