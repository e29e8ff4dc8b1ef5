"""Atomic writes, checked reads, and the conversion of user text to paths."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from trainer.core.errors import Damaged, MachineError, UserError
from trainer.core.text import printable

DIGEST = "digest"  # key in a sealed JSON file; its value is the digest of all other content
JSON_BYTES = 1 << 26  # the trainer writes no larger small file
# Errors that last until the user changes something. All others may pass by themselves: a network file system, another node,
# a full disk.
LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EXDEV),
)


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file, flush it to disk, rename it to `path`. After an error `path` is unchanged."""
    temporary = path.with_name(path.name + ".tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        _remove_quietly(temporary)
        raise
    sync_path(path.parent)


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the caller reports the first error


def sync_path(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to disk, so that it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(content: dict[str, Any]) -> str:
    """`content` as JSON text, with a digest of the content added. `read_json` checks the digest."""
    return json.dumps({**content, DIGEST: digest_of(content)}, indent=1, ensure_ascii=False) + "\n"


def digest_of(content: Any) -> str:
    """sha256 of JSON content without its digest key. The order of keys and the white space do not change it."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != DIGEST}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file that the trainer wrote. If it has a digest, the digest is checked.

    Raises Damaged if the content is not a JSON object or not what was written; MachineError or UserError if the file cannot
    be read.
    """
    return parse_json(read_small(path), path)


def read_small(path: Path) -> bytes:
    """The content of a small file. Raises MachineError or UserError if it cannot be read, Damaged if it is too large."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # opening a pipe would wait for a writer
            raise UserError(f"{printable(path)}: is a pipe or a device; name a regular file")
        with path.open("rb") as file:
            data = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise system_error(error, f"{printable(path)}: cannot be read") from None
    if len(data) > JSON_BYTES:
        raise Damaged(f"{printable(path)}: has more than {JSON_BYTES >> 20} MiB; the trainer did not write this file")
    return data


def parse_json(data: bytes | str, where: Path | str) -> dict[str, Any]:
    """`data` as a JSON object. If it has a digest, the digest is checked. `where` names the file in the message of Damaged."""
    name = printable(where)
    try:
        content = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise Damaged(f"{name}: is not valid JSON ({printable(error)})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{name}: holds no JSON object")
    if DIGEST in content and content[DIGEST] != digest_of(content):
        raise Damaged(f"{name}: its digest is not that of its content; the file was changed after it was written")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def may_pass(error: OSError) -> bool:
    """Whether the same call may succeed later without a change by the user (network, another node, free disk space)."""
    return error.errno not in LASTING


def system_error(error: OSError, what: str) -> UserError:
    """The exception for an OSError: MachineError if the error may pass, else UserError. what: such as "FILE: cannot be read"."""
    kind = MachineError if may_pass(error) else UserError
    return kind(f"{what}: {printable(error.strerror or error)}")


def user_path(text: str | os.PathLike[str], key: str) -> Path:
    """The path that the user's `text` means, with `~` and `$NAME` expanded. UserError, which names `key`, if it is not a path."""
    text = os.fspath(text)
    if not text.strip():
        raise UserError(f"{key}: is empty; name a path (is a shell variable unset?)")
    expanded = os.path.expandvars(text)
    if "\0" in text or any(0xD800 <= ord(character) <= 0xDFFF for character in expanded):
        raise UserError(f"{key}: {printable(text)} holds a character that is not allowed in file names")
    path = Path(expanded)
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{key}: {printable(path.parts[0])} is not a user of this machine") from None


def bare_name(name: Any, where: str) -> str:
    """`name`, if it is only a file name, without a folder. Else raises Damaged, whose message starts with `where`."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise Damaged(f"{where}: {printable(repr(name))} is not the name of a file in this folder")
    return name
