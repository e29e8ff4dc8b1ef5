"""The one place that writes what must survive, reads small files of ours, and turns text into paths."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from trainer.core.errors import Damaged, MachineError, UserError
from trainer.core.files import bare_name, digest_of, parse_json, read_json, sealed, system_error, user_path, write_file
from trainer.core.text import for_stream, printable, printable_lines


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_file(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_every_changed_digit_of_a_sealed_file_is_found() -> None:
    content = {"step": 10, "state": {"n": 1.25, "norm": None}, "files": {"a": {"bytes": 123}}}
    text = sealed(content)
    assert parse_json(text, "a.json") == {**content, "digest": digest_of(content)}
    digits = [place for place, character in enumerate(text) if character.isdigit()]
    for place in digits:
        other = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        with pytest.raises(Damaged):
            parse_json(other, "a.json")


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"[1]", b'{"a": 1, "a": 2}', b"[" * 100_000, b"", b'{"a": ' + b"1" * 5000]
)
def test_what_is_no_json_object_is_damage(data: bytes) -> None:
    with pytest.raises(Damaged):
        parse_json(data, "a.json")


def test_an_error_of_reading_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": 1}))

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(MachineError):
        read_json(path)


def test_errors_of_the_system_are_told_apart() -> None:
    assert type(system_error(OSError(errno.EIO, "Input/output error"), "a")) is MachineError
    assert type(system_error(OSError(errno.EACCES, "Permission denied"), "a")) is UserError


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "\udc80x", "~nosuchuserhere/x"])
def test_text_that_is_no_path_is_refused_with_its_key(text: str) -> None:
    with pytest.raises(UserError, match="^run_dir: ") as refusal:
        user_path(text, "run_dir")
    assert str(refusal.value).isprintable()


def test_home_and_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert user_path("$SCRATCH/run", "run_dir") == Path("/scratch/me/run")
    assert user_path("~/run", "run_dir") == Path.home() / "run"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a\0", "a\\b", 3, None])
def test_a_name_that_leads_elsewhere_is_damage(name: object) -> None:
    with pytest.raises(Damaged):
        bare_name(name, "index.json")


def test_shown_text_moves_no_cursor() -> None:
    assert printable("a\x1b[2Jb\n\u202ec\udc80 é 漢") == "a\\x1b[2Jb\\n\\u202ec\\udc80 é 漢"
    assert len(printable("x" * 10_000)) < 2100


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is a pipe or a device; name a regular file"):
            read_json(path)


def test_lines_of_ours_keep_their_ends_and_move_no_cursor() -> None:
    assert printable_lines("a\tb\n\x1b[31mc\r\n\x9b\u202e") == "a\tb\n\\x1b[31mc\\r\n\\x9b\\u202e"
    assert printable_lines("é 漢 🙂") == "é 漢 🙂"


def test_a_terminal_gets_no_escapes_and_a_pipe_gets_all() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert for_stream("\x1b[2Ja\n", Terminal()) == "\\x1b[2Ja\n"
    assert for_stream("\x1b[2Ja\n", io.StringIO()) == "\x1b[2Ja\n"
