"""Which files a source names, which formats they have, and which splits their names indicate."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainer.core.errors import Absent, UserError
from trainer.core.files import system_error, user_path
from trainer.core.text import printable
from trainer.data.dataset import INDEX
from trainer.data.mds_source import is_index
from trainer.data.readers import BLOCK

TEXT_SUFFIXES = (".txt", ".md", ".raw", ".tokens", ".text")
ROW_SUFFIXES = tuple(name + packed for name in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst"))
PARQUET_SUFFIXES = (".parquet",)
TOKEN_SUFFIXES = (".bin", ".npy")
ABOUT = ("readme", "license", "licence")  # texts that are not the data of a folder
READ = (*TEXT_SUFFIXES, *ROW_SUFFIXES, *PARQUET_SUFFIXES)
STDLIB = "builtin:python-stdlib"
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Files that are not meant to be read as text, although some are valid UTF-8.
ARCHIVES = (*(".gz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"),)
TABLES = (".csv", ".tsv", ".psv")
DATABASES = (*(".arrow", ".feather", ".avro", ".orc", ".h5", ".hdf5", ".sqlite", ".db", ".pkl", ".pickle", ".lance"),)
DOCUMENTS = (*(".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".ods", ".ppt", ".pptx"),)
NUMBERS = (*(".idx", ".npz", ".mds", ".tfrecord", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf"),)
REFUSED = {
    **dict.fromkeys(ARCHIVES, "is packed; unpack it first (.jsonl, .ndjson and .json may be .gz or .zst)"),
    **dict.fromkeys(
        TABLES,
        "is a table; convert it to rows of JSON: python -c \"import pandas; pandas.read_csv('FILE')"
        ".to_json('NEW.jsonl', orient='records', lines=True)\"",
    ),
    **dict.fromkeys(DATABASES, "is not a supported format; write its text to a .parquet or .jsonl file"),
    **dict.fromkeys(DOCUMENTS, "is not plain text; convert it to a .txt file first"),
    **dict.fromkeys(NUMBERS, "holds numbers, not text; of token ids, .bin, .npy and folders of MDS shards can be read"),
}


def kind_of(path: Path) -> str:
    """The format of a file by its name, in upper or lower case: "mds", "rows", "parquet", "ids" or "text"."""
    name = path.name.lower()
    if name == INDEX:
        return "mds"
    if name.endswith(ROW_SUFFIXES):
        return "rows"
    if name.endswith(TOKEN_SUFFIXES):
        return "ids"
    return "parquet" if name.endswith(PARQUET_SUFFIXES) else "text"


def find_files(spec: str, key: str, text_field: str) -> tuple[list[Path], list[str]]:
    """The files that `spec` names, and notes on what is left out; `key` is the setting that holds `spec`.

    Raises Absent if the path is not there, another UserError if there is nothing to read, or if a file cannot be read.
    """
    if spec.startswith("hf://"):
        return [], []
    if spec.startswith("builtin:"):
        return _stdlib(spec), []
    if spec == "-":
        raise UserError(f"{key}: standard input cannot be read twice; write the text to a file first, and name that")
    path = user_path(spec, key)
    if path.is_dir():
        return _of_folder(path, spec, text_field)
    if not path.exists():
        raise Absent(f"{printable(spec)}: no such file or folder; give one, hf://NAME, or {STDLIB}")
    if not path.is_file():
        raise UserError(
            f"{printable(spec)}: is a pipe or a device, which cannot be read twice; write the text to a file first, and "
            "name that"
        )
    if kind_of(path) == "text" and path.suffix.lower() in REFUSED:
        raise UserError(f"{printable(spec)}: {REFUSED[path.suffix.lower()]}")
    _check_access([path])
    return [path], []


def _of_folder(folder: Path, spec: str, text_field: str) -> tuple[list[Path], list[str]]:
    found = list(_walk(folder))
    found.sort(key=lambda path: path.relative_to(folder).parts)
    files = [path for path in found if path.name.lower().endswith(READ) and path.is_file()]
    _check_access(files)
    json_files = [path for path in files if path.name.lower().endswith(".json")]
    others = {path for path in json_files if path.name == INDEX or not _holds_rows(path, text_field)}
    files = [path for path in files if path not in others]
    if all(path.stem.lower() in ABOUT for path in files):
        files = _indexes(found) or [path for path in found if kind_of(path) == "ids"] or files
        _check_access(files)
    if not files:
        hint = f" (a .json file counts if its first line is a JSON object with {text_field!r} in it)" if others else ""
        raise UserError(
            f"{printable(spec)}: holds no text; looked for *{', *'.join((*READ, *TOKEN_SUFFIXES))} in it and below{hint}"
        )
    mds = files[0].name == INDEX
    left_out = [path for path in found if path not in set(files) and not (mds and ".mds" in path.suffixes)]
    counts = Counter(path.suffix or "without a suffix" for path in left_out).most_common()
    if not counts:
        return files, []
    named = ", ".join(f"{count} {printable(suffix)}" for suffix, count in counts[:5]) + ", and others" * (
        len(counts) > 5
    )
    return files, [f"{printable(spec)}: left out files whose names are not those of text: {named}"]


def _indexes(found: list[Path]) -> list[Path]:
    """The files among `found` that list MDS shards, without those whose shards an index further up lists too."""
    indexes = [path for path in found if is_index(path)]
    folders = {path.parent for path in indexes}
    return [path for path in indexes if folders.isdisjoint(path.parent.parents)]


def _walk(folder: Path) -> Iterator[Path]:
    """All files below `folder` except hidden ones. It follows links to folders, and reads each folder once, so loops end."""
    seen: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        waiting = [links.pop(0)]  # real folders come before links, so that links never rename their files
        while waiting:
            here = waiting.pop()
            try:
                state = here.stat()
                if (state.st_dev, state.st_ino) in seen:
                    continue
                seen.add((state.st_dev, state.st_ino))
                with os.scandir(here) as entries:
                    shown = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
                for entry in shown:
                    path = here / entry.name
                    if entry.is_symlink() and not path.exists():
                        raise UserError(f"{printable(path)}: is a broken link; repair or remove it")
                    if not entry.is_dir():
                        yield path
                    else:
                        (links if entry.is_symlink() else waiting).append(path)
            except OSError as error:
                raise system_error(error, f"{printable(here)}: cannot be read") from None


def _check_access(files: list[Path]) -> None:
    for path in files:
        if not os.access(path, os.R_OK):
            raise UserError(f"{printable(path)}: may not be read by this user; change its mode, or move it away")


def _holds_rows(path: Path, text_field: str) -> bool:
    """Whether a .json file of a folder holds rows with text, rather than information about other files."""
    with path.open("rb") as file:
        line = file.readline(BLOCK).removeprefix(b"\xef\xbb\xbf")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a row longer than a block also fails; its beginning decides
        return len(line) == BLOCK and f'"{text_field}"'.encode() in line
    return isinstance(row, dict) and (text_field in row or text_field.split(".")[0] in row)


def _stdlib(spec: str) -> list[Path]:
    if spec != STDLIB:
        raise UserError(f"{printable(spec)}: unknown; the only built-in source is {STDLIB}")
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT and not name.startswith(".")]
        paths = (Path(here, name) for name in names if name.endswith(".py") and name[0] != ".")
        found += (path for path in paths if path.is_file())
    if not found:
        raise UserError(f"{spec}: no .py files in {root}; this Python comes without its source, use another source")
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def splits_by_name(files: list[Path], folder: Path) -> tuple[dict[Path, str], bool]:
    """The split that each file's name indicates, if any, and whether the folder is laid out by such names.

    It is, if the names indicate training text and other text, and such files are most of the files or have most of the text.
    A few such names among many documents are chance.
    """
    named = {path: split for path in files if (split := _split_named(path.relative_to(folder)))}
    splits = set(named.values())
    most = 2 * len(named) > len(files) or 2 * _size(list(named)) > _size(files)
    laid_out = "train" in splits and len(splits) > 1 and most
    return named, laid_out


def _size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _split_named(path: Path) -> str | None:
    """The split in the name of a file, otherwise of a folder above it. If one name holds several: test first, train last."""
    for part in reversed(path.parts):
        words = (word.strip("0123456789") for word in re.split(r"[^a-z0-9]+", part.lower()))
        found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if found:
            return next(split for split in ("test", "validation", "train") if split in found)
    return None
