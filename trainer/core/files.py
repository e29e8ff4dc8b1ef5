"""Files that are old or new, never half; what is read from them is checked; text from outside becomes a path in one place."""

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

DIGEST = "digest"  # key of a sealed JSON file that holds the digest of all else in it
JSON_BYTES = 1 << 26  # no small file of ours is larger
# What the user has to change. Any other error of the system may pass: a network file system, another node, a full disk.
LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EXDEV),
)


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content` aside, flush it to disk, then rename it to `path`; after an error `path` is what it was."""
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
        pass  # the error that led here is the one to tell


def sync_path(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(content: dict[str, Any]) -> str:
    """`content` as JSON text that also holds a digest of itself, for `read_json` to check."""
    return json.dumps({**content, DIGEST: digest_of(content)}, indent=1, ensure_ascii=False) + "\n"


def digest_of(content: Any) -> str:
    """sha256 of JSON content (without its own digest), whatever the order of its keys and its white space."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != DIGEST}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of ours; its digest is checked where it has one.

    Raises Damaged where what was read is no such object or not what was written, MachineError or UserError where it cannot be
    read.
    """
    return parse_json(read_small(path), path)


def read_small(path: Path) -> bytes:
    """The content of a small file. Raises MachineError or UserError where it cannot be read, Damaged where it is no small file."""
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):  # opening a pipe waits for a writer
            raise UserError(f"{printable(path)}: is a pipe or a device; name a regular file")
        with path.open("rb") as file:
            data = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise system_error(error, f"{printable(path)}: cannot be read") from None
    if len(data) > JSON_BYTES:
        raise Damaged(f"{printable(path)}: has more than {JSON_BYTES >> 20} MiB; no such file was written here")
    return data


def parse_json(data: bytes | str, where: Path | str) -> dict[str, Any]:
    """`data` as a JSON object, its digest checked where it has one; `where` names the file in Damaged."""
    name = printable(where)
    try:
        content = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise Damaged(f"{name}: is not valid JSON ({printable(error)})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{name}: holds no JSON object")
    if DIGEST in content and content[DIGEST] != digest_of(content):
        raise Damaged(f"{name}: its digest is not that of its content; it was changed after it was written")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice")
    return content


def may_pass(error: OSError) -> bool:
    """Whether the same call may succeed later (a network, another node, room on a disk), with nothing changed by the user."""
    return error.errno not in LASTING


def system_error(error: OSError, what: str) -> UserError:
    """The line for an error of the system; a MachineError where it may pass. what: as in "FILE: cannot be read"."""
    kind = MachineError if may_pass(error) else UserError
    return kind(f"{what}: {printable(error.strerror or error)}")


def user_path(text: str | os.PathLike[str], key: str) -> Path:
    """The path that text from outside means: `~` and `$NAME` are filled in. UserError names `key` where it can be none."""
    text = os.fspath(text)
    if not text.strip():
        raise UserError(f"{key}: is empty; name a path (is a shell variable unset?)")
    expanded = os.path.expandvars(text)
    if "\0" in text or any(0xD800 <= ord(character) <= 0xDFFF for character in expanded):
        raise UserError(f"{key}: {printable(text)} holds a character that no file name may hold")
    path = Path(expanded)
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{key}: {printable(path.parts[0])} is no user of this machine") from None


def bare_name(name: Any, where: str) -> str:
    """`name` where it names a file within its folder and nothing else; else Damaged, with `where` in front."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise Damaged(f"{where}: {printable(repr(name))} is not the name of a file in this folder")
    return name
