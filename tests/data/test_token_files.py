"""Files of token ids: every format is read exactly, documents and counts are those of the text, mistakes are one line."""

import numpy as np
import pytest
from test_prepare import error, files, make, samples, stream

from trainer.core.config import PrepareConfig
from trainer.data.dataset import DatasetInfo
from trainer.data.prepare import prepare
from trainer.data.token_files import BLOCK, CONTEXT, open_ids, read_blocks, to_documents
from trainer.data.tokenizers import Tokenizer

END = 256  # of the tokenizer `bytes`


def header(magic, version, count):
    words = np.zeros(256, "<i4")
    words[:3] = magic, version, count
    return words.tobytes()


def write(path, ids, magic=None):
    """Write ids as other programs do: raw, .npy, or with llm.c's header."""
    if path.suffix == ".npy":
        np.save(path, ids)
    elif magic is None:
        path.write_bytes(np.asarray(ids, "<u2").tobytes())
    else:
        version, dtype = {20240520: (1, "<u2"), 20240801: (7, "<u4")}[magic]
        path.write_bytes(header(magic, version, len(ids)) + np.asarray(ids, dtype).tobytes())
    return path


def texts(count, seed=0):
    draw = np.random.default_rng(seed)
    words = ["cat", "sat", "ünï", "字", "\n", "　", "on"]
    return [" ".join(draw.choice(words, draw.integers(1, 60))) + "x" for _ in range(count)]


def ids_of(documents, first=False):
    """The stream of some texts: bytes, and END before each document or behind it."""
    parts = [[*text.encode()] for text in documents]
    return [i for part in parts for i in ([END, *part] if first else [*part, END])]


def described(folder, length=64):
    """{split: texts} of a prepared dataset, after a check of its counts."""
    info = DatasetInfo.load(folder)
    coder = Tokenizer.from_file(folder / "tokenizer.json", eot_id=info.tokenizer.eot_id)
    found = {}
    for split, size in info.splits.items():
        tokens = stream(folder, split, length)
        assert tokens[-1] == coder.eot_id
        parts = np.split(tokens, np.flatnonzero(tokens == coder.eot_id) + 1)[:-1]
        found[split] = [coder.decode(part[:-1]) for part in parts]
        assert size.documents == len(parts)
        assert size.bytes == sum(len(text.encode()) for text in found[split])
        assert size.words == sum(len(text.split()) for text in found[split])
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "magic"),
    [
        ("a.bin", "uint16", None),
        ("a.bin", "uint16", 20240520),
        ("a.bin", "uint32", 20240801),
        *(("a.npy", dtype, None) for dtype in ("uint16", "uint32", "int32", "int64")),
    ],
)
def test_ids_come_back_from_every_format(tmp_path, name, dtype, magic):
    ids = np.array([65535, 0, 1, 50256, *range(300)], dtype)
    found = open_ids(write(tmp_path / name, ids, magic))
    assert isinstance(found, np.memmap), "a shard is never in memory as a whole"
    assert (found.dtype.name, found.tolist()) == (dtype, ids.tolist())


def test_a_file_without_a_header_has_the_type_that_is_named(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(np.array([70_000, 5], "<u4").tobytes())
    assert open_ids(path, "uint32").tolist() == [70_000, 5]


def test_blocks_cover_a_file_and_are_counted(tmp_path):
    ids = np.arange(2 * BLOCK + 3) % 60_000
    counted = []
    blocks = list(read_blocks(write(tmp_path / "a.bin", ids), None, counted.append))
    assert np.array_equal(np.concatenate([block for block, _ in blocks]), ids)
    assert sum(counted) == 2 * len(ids)
    assert blocks[2][1] == f"{tmp_path}/a.bin: from token {2 * BLOCK:,} on"


@pytest.mark.parametrize("first", [False, True])
def test_documents_are_the_same_whatever_the_blocks(first):
    stream_of_ids = np.array(ids_of(["one", "two", "three"], first) + [END, END, 7, 8])
    for size in range(1, len(stream_of_ids) + 1):
        blocks = [(stream_of_ids[i : i + size], "") for i in range(0, len(stream_of_ids), size)]
        documents, ids = [], []
        for piece in to_documents(blocks, END):
            assert piece.data[: piece.context].tolist() == ids[-CONTEXT:], "the context is what came before"
            ids += piece.data[piece.context :].tolist()
            if piece.ends_document:
                documents.append(bytes(ids))
                ids = []
        assert documents == [b"one", b"two", b"three", bytes([7, 8])] and not ids


@pytest.mark.parametrize("first", [False, True])
def test_shards_of_each_split_are_one_stream(tmp_path, monkeypatch, first):
    """As fineweb.py writes them: shard 0 for validation, documents go on in the next shard, end of text first."""
    monkeypatch.setattr("trainer.data.token_files.BLOCK", 100)  # cuts words and characters of the documents
    (tmp_path / "shards").mkdir()
    training, held = texts(100), texts(10, seed=1)
    write(tmp_path / "shards" / "fineweb_val_000000.bin", ids_of(held, first), 20240520)
    ids = ids_of(training, first)
    ends = [i for i, token in enumerate(ids) if token == END]
    cuts = [0, 700, ends[40], ends[60] + 1, len(ids)]  # inside a document, before an end, behind an end
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
        write(tmp_path / "shards" / f"fineweb_train_{number:06}.bin", ids[start:stop], 20240520)
    make(tmp_path, source=str(tmp_path / "shards"))
    assert described(tmp_path / "out") == {"train": training, "validation": held}
    assert stream(tmp_path / "out", "train", 64).tolist() == ids_of(training), "no token is lost or doubled"


def test_documents_of_a_single_file_are_drawn_and_workers_change_nothing(tmp_path):
    written = texts(300)
    write(tmp_path / "a.npy", np.array(ids_of(written), np.int64))
    make(tmp_path, source=str(tmp_path / "a.npy"))
    found = described(tmp_path / "out")
    assert sorted(found["train"] + found["validation"]) == sorted(written)
    make(tmp_path, source=str(tmp_path / "a.npy"), workers=2, out=str(tmp_path / "two"))
    assert files(tmp_path / "two") == files(tmp_path / "out")


def test_ids_and_their_text_give_the_same_dataset(tmp_path):
    for name, count in (("train", 50), ("val", 5)):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "ids").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.txt").write_text("\n".join(texts(count)))
        write(tmp_path / "ids" / f"{name}.bin", ids_of(["\n".join(texts(count))]))
    by_text, _ = make(tmp_path, source=str(tmp_path / "text"))
    by_ids, _ = make(tmp_path, source=str(tmp_path / "ids"), out=str(tmp_path / "other"))
    assert by_ids.fingerprint == by_text.fingerprint
    assert by_ids.splits == by_text.splits, "also bytes and words"


def test_a_folder_with_text_is_read_as_text(tmp_path):
    (tmp_path / "input").mkdir()
    for name in ("train", "val"):
        (tmp_path / "input" / f"{name}.txt").write_text("text " * 100)
        write(tmp_path / "input" / f"{name}.bin", [1, 2, 3])
    info, _ = make(tmp_path, source=str(tmp_path / "input"))
    assert info.splits["train"].tokens == 501


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "are not whole uint16 ids"),
        (header(20240520, 2, 1) + b"ab", "version 2; only 1 is known"),
        (header(20240801, 1, 1) + b"abcd", "version 1; only 7 is known"),
        (header(20240520, 1, 3) + b"ab", "its header says 3 ids, but there are 1"),
        (header(20240520, 1, 1) + b"abc", "its header says 1 ids, but there are 1.5"),
        (header(20240520, 1, -1), "its header says -1 ids, but there are 0"),
        (header(20251130, 1, 1) + b"ab", "the magic number 20251130; known are 20240520, 20240801"),
    ],
)
def test_a_wrong_bin_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    found = error(tmp_path, source=str(tmp_path / "a.bin"))
    assert found.startswith(f"{tmp_path}/a.bin: ") and message in found


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.uint16), "uint16 of shape (2, 3), not one row"),
        (np.zeros(3), "float64 of shape (3,), not one row"),
        (np.array(["a", None], object), "not a readable .npy file"),
    ],
)
def test_a_wrong_npy_file_is_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    assert message in error(tmp_path, source=str(tmp_path / "a.npy"))
    whole = (tmp_path / "a.npy").read_bytes()
    for cut in (3, 40):
        (tmp_path / "a.npy").write_bytes(whole[:cut])
        assert "not a readable .npy file" in error(tmp_path, source=str(tmp_path / "a.npy"))


def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path):
    path = write(tmp_path / "a.npy", np.array([5, END, 6, 257, END, 7]))
    assert "from token 0 on: holds the id 257, but the tokenizer has 257 ids" in error(tmp_path, source=str(path))
    write(path, np.array([5, END, -1]))
    assert "holds the id -1" in error(tmp_path, source=str(path))
    for learned in ("chars", "train-bpe:300"):
        assert "so the tokenizer that made them is needed" in error(tmp_path, source=str(path), tokenizer=learned)


def test_it_says_where_the_end_of_text_goes(tmp_path):
    path, lines = write(tmp_path / "a.bin", ids_of(texts(5), first=True)), []
    prepare(PrepareConfig(source=str(path), tokenizer="bytes", workers=1, out=str(tmp_path / "out")), lines.append)
    told = [line for line in lines if "token ids" in line]
    assert told == [
        f"{path}: holds token ids; <|endoftext|> separates documents, and is stored at their end even if it stood at their beginning"
    ]
    assert len(samples(tmp_path / "out", "train")) > 0
