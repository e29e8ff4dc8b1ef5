"""Token ids that other programs stored: nanoGPT's, modded-nanogpt's and llm.c's .bin, and .npy. Mapped into memory, never read whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from trainer.core.errors import UserError
from trainer.core.files import system_error
from trainer.core.text import printable
from trainer.data.pieces import Piece

# llm.c's header: 256 int32, which are the magic number, the version, the number of ids, and zeros.
HEADER_BYTES = 1024
HEADERS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic -> version, type of the ids (GPT-2's, Llama 3's)
TYPES = ("uint16", "uint32", "int32", "int64")
BLOCK = 1 << 16  # ids read at a time, and the most in a piece
CONTEXT = 4  # ids: a character has at most 4 bytes, and an id stands for at least one

Blocks = Iterable[tuple[np.ndarray, str]]  # ids of a stream, and where they are, for error lines


def read_blocks(path: Path, raw_dtype: str | None, on_read: Callable[[int], None]) -> Iterator[tuple[np.ndarray, str]]:
    """(ids, where they are) for a whole file, in blocks. raw_dtype: the type in a .bin without a header; None: uint16.

    on_read: called with the size of each block in bytes. Raises UserError.
    """
    ids = open_ids(path, raw_dtype)
    for start in range(0, len(ids), BLOCK):
        block = np.array(ids[start : start + BLOCK])
        on_read(block.nbytes)
        yield block, f"{printable(path)}: from token {start:,} on"


def open_ids(path: Path, raw_dtype: str | None = None) -> np.ndarray:
    """The ids in a file, mapped into memory: [N], of one of TYPES. Raises UserError if it is not such a file."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{printable(path)}: is empty; there must be some ids")
        return _npy(path) if path.suffix.lower() == ".npy" else _bin(path, raw_dtype)
    except OSError as error:
        raise system_error(error, f"{printable(path)}: cannot be read") from None


def _npy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{printable(path)}: not a readable .npy file ({printable(error, 200)}); copy it again"
        ) from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.name not in TYPES:
        found = f"{ids.dtype.name} of shape {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise UserError(f"{printable(path)}: holds {found}, not one row of token ids ({', '.join(TYPES)})")
    return ids


def _bin(path: Path, raw_dtype: str | None) -> np.ndarray:
    with path.open("rb") as file:
        head = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\1"), "<i4")
    magic, version, count = head[:3].tolist()
    size, name = path.stat().st_size, printable(path)
    if magic not in HEADERS:
        if not head[3:].any():  # no text has 506 times id 0 near its beginning
            raise UserError(
                f"{name}: has a header with the magic number {magic}; known are {', '.join(map(str, HEADERS))}"
            )
        dtype = np.dtype(raw_dtype or "uint16").newbyteorder("<")
        if size % dtype.itemsize:
            raise UserError(
                f"{name}: its {size:,} bytes are not whole {dtype.name} ids; it is cut off, or has another type"
            )
        return np.memmap(path, dtype, "r")
    known, dtype = HEADERS[magic][0], np.dtype(HEADERS[magic][1]).newbyteorder("<")
    if version != known:
        raise UserError(
            f"{name}: its header says version {version}; only {known} is known for the magic number {magic}"
        )
    if size != HEADER_BYTES + count * dtype.itemsize:
        held = (size - HEADER_BYTES) / dtype.itemsize
        raise UserError(
            f"{name}: its header says {count:,} ids, but there are {held:,g}; it is cut off or damaged, copy it again"
        )
    return np.memmap(path, dtype, "r", HEADER_BYTES)


def to_documents(blocks: Blocks, eot_id: int) -> Iterator[Piece]:
    """The pieces of the documents of a stream of ids: what lies between ids `eot_id`, which may begin or end documents.

    A piece holds no `eot_id`. Documents without any id are left out. The end of the stream ends the last document. Each piece of
    a document after the first begins with the last CONTEXT ids before it.
    """
    held: Piece | None = None  # until it is known whether a document ends there
    for block, where in blocks:
        start = 0
        for end in [*np.flatnonzero(block == eot_id).tolist(), len(block)]:
            if end > start:
                ids, context = block[start:end], 0
                if held is not None:
                    yield held
                    before = np.asarray(held.data)[-CONTEXT:]
                    ids, context = np.concatenate([before, ids]), len(before)
                held = Piece(ids, False, where, context=context)
            if end < len(block) and held is not None:
                yield held._replace(ends_document=True)
                held = None
            start = end + 1
    if held is not None:
        yield held._replace(ends_document=True)
