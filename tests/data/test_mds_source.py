"""MDS shards of other programs: mosaicml-streaming's writer makes them, and `prepare` reads exactly what is in them."""

import json
import shutil
import time

import numpy as np
import pytest
from test_prepare import error, make, stream
from test_token_files import END, described, ids_of, texts

from trainer.core.errors import UserError
from trainer.data.dataset import DatasetInfo
from trainer.data.mds import import_streaming
from trainer.data.mds_source import open_index

ROW = 128  # ids in a row of a stream


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The library's writer sleeps for a second until its threads have done what takes a millisecond."""
    import_streaming()
    monkeypatch.setattr("streaming.base.format.base.writer.sleep", lambda seconds: time.sleep(seconds / 100))


def write(folder, column, encoding, rows, other=None, **options):
    """Write rows as a user of the library does; other: a second column, before or after this one."""
    columns = {column: encoding} | ({other: "str"} if other else {})
    with import_streaming().MDSWriter(out=str(folder), columns=columns, **{"size_limit": 1 << 13, **options}) as writer:
        for number, row in enumerate(rows):
            writer.write({column: row, **({other: f"of {number}" * (number % 3)} if other else {})})
    return folder


def cut(ids, dtype):
    """A stream in rows of the same length, as llm-foundry's concat_tokens cuts it; it drops the rest, here it is a shorter row."""
    return [np.array(ids[start : start + ROW], dtype) for start in range(0, len(ids), ROW)]


@pytest.mark.parametrize("options", [{}, {"hashes": ["sha1", "xxh64"]}, {"compression": "zstd:7", "hashes": ["sha1"]}])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_rows_of_raw_bytes_are_one_stream(tmp_path, dtype, options):
    written = {"train_small": texts(60), "val_small": texts(5, seed=1)}
    for split, documents in written.items():
        rows = [row.tobytes() for row in cut(ids_of(documents), dtype)]
        write(tmp_path / "mds" / split, "tokens", "bytes", rows, **options)
    shards = list((tmp_path / "mds" / "train_small").glob("shard.*"))
    assert len(shards) > 1 and all(path.suffix == (".zstd" if "compression" in options else ".mds") for path in shards)
    make(tmp_path, source=str(tmp_path / "mds"), token_dtype=dtype)
    assert described(tmp_path / "out") == {"train": written["train_small"], "validation": written["val_small"]}
    assert sorted(shards) == sorted((tmp_path / "mds" / "train_small").glob("shard.*")), "nothing is written there"


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:int32", f"ndarray:uint16:{ROW}"])
@pytest.mark.parametrize("other", [None, "a", "z"])
def test_arrays_are_decoded_beside_other_columns(tmp_path, encoding, other):
    ids = ids_of(texts(60))
    rows = cut(ids[: len(ids) // ROW * ROW], "uint16" if "uint16" in encoding else "int32")
    write(tmp_path / "mds", "tokens", encoding, rows, other)
    make(tmp_path, source=str(tmp_path / "mds"))
    kept = [*stream(tmp_path / "out", "train", 64), *stream(tmp_path / "out", "validation", 64)]
    assert sorted(map(int, kept)) == sorted([*ids[: len(ids) // ROW * ROW], END]), "the last document is ended"


@pytest.mark.parametrize("end", [[], [END]])
def test_rows_of_different_lengths_are_documents(tmp_path, end):
    written = texts(30)
    rows = [np.array([*text.encode(), *end], np.int64) for text in written]
    write(tmp_path / "mds" / "train", "ids", "ndarray:int64", rows)
    write(tmp_path / "mds" / "val", "ids", "ndarray:int64", rows[:3])
    make(tmp_path, source=str(tmp_path / "mds"), text_field="ids")
    assert described(tmp_path / "out") == {"train": written, "validation": written[:3]}


def test_documents_that_begin_like_a_stream(tmp_path):
    """The rows of the first shard have one length, a later one has not."""
    written = ["a" * 1000] * 20 + ["b" * 999, "c" * 1000]
    write(
        tmp_path / "mds" / "train", "ids", "ndarray:uint16", [np.array([*text.encode()], np.uint16) for text in written]
    )
    write(tmp_path / "mds" / "val", "ids", "ndarray:int64", [np.arange(9), np.arange(8), np.arange(9)])
    assert len(list((tmp_path / "mds" / "train").glob("shard.*"))) > 5
    make(tmp_path, source=str(tmp_path / "mds"), text_field="ids")
    assert described(tmp_path / "out")["train"] == written


@pytest.mark.parametrize("encoding", ["str", "bytes"])
def test_a_text_column(tmp_path, encoding):
    written = texts(60)
    rows = [text.encode() if encoding == "bytes" else text for text in written]
    write(tmp_path / "mds", "text", encoding, rows, "a", compression="zstd")
    make(tmp_path, source=str(tmp_path / "mds"))
    found = described(tmp_path / "out")
    assert sorted(found["train"] + found["validation"]) == sorted(written)


def test_a_merged_index_is_read_once(tmp_path):
    """As several writers leave it: each folder has an index, and so has the folder above, of all shards."""
    written = texts(20)
    for part in range(2):
        write(tmp_path / "mds" / str(part), "text", "str", written[part::2])
    from streaming.base.util import merge_index

    merge_index(str(tmp_path / "mds"), keep_local=True)
    make(tmp_path, source=str(tmp_path / "mds"))
    found = described(tmp_path / "out")
    assert sorted(found["train"] + found["validation"]) == sorted(written)


def test_a_readme_beside_the_shards_is_not_the_data(tmp_path):
    write(tmp_path / "mds", "text", "str", texts(20))
    (tmp_path / "mds" / "README.md").write_text("# About these shards")
    info, _ = make(tmp_path, source=str(tmp_path / "mds"))
    assert sum(split.documents for split in info.splits.values()) == 20


def test_what_is_wrong_is_said(tmp_path):
    folder = write(tmp_path / "mds", "tokens", "bytes", [np.arange(9).tobytes()], "more")
    assert "set token_dtype to the type of its ids" in error(tmp_path, source=str(folder))
    assert "no column 'body'; set text_field to one of: more, tokens" in error(
        tmp_path, source=str(folder), text_field="body"
    )
    write(tmp_path / "pickled", "tokens", "pkl", [[1]])
    assert "is of type pkl; str, bytes and ndarray" in error(tmp_path, source=str(tmp_path / "pickled"))
    write(tmp_path / "floats", "tokens", "ndarray", [np.zeros(3)])
    assert "float64 of shape (3,), not token ids" in error(tmp_path, source=str(tmp_path / "floats"))
    good = write(tmp_path / "good", "text", "str", texts(20), hashes=["sha1"])
    for folder in (good, tmp_path):  # the shards, and a folder with folders of them
        with pytest.raises(
            UserError, match="has no dataset.json.*for MDS shards of another program, give it as data.source"
        ):
            DatasetInfo.load(folder)
    make(tmp_path, source=str(good))
    index = good / "index.json"
    index.write_text(index.read_text().replace("sha1", "sha0"))
    assert "states only hashes that are not known here (sha0)" in error(
        tmp_path, source=str(good), out=str(tmp_path / "x")
    )
    assert "is a prepared dataset, which is trained on as it is" in error(
        tmp_path, source=str(tmp_path / "out"), out=str(tmp_path / "again")
    )


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damage_is_found(tmp_path, compression):
    whole = write(
        tmp_path / "whole", "text", "str", texts(60), hashes=["sha1"], compression=compression, size_limit=4000
    )
    ending = ".zstd" if compression else ""
    for number, harm in enumerate(("flip", "cut", "empty", "remove")):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        shard = folder / f"shard.00001.mds{ending}"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        if harm == "remove":
            shard.unlink()
        else:
            shard.write_bytes({"flip": content, "cut": content[:-7], "empty": b""}[harm])
        found = error(tmp_path, source=str(folder))
        assert found.startswith(str(folder)) and "copy it again" in found


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder = write(tmp_path / "mds", "text", "str", texts(20))
    index = json.loads((folder / "index.json").read_text())
    for name in ("../secret.mds", "/etc/passwd", "a/../../b"):
        index["shards"][0]["raw_data"]["basename"] = name
        (folder / "index.json").write_text(json.dumps(index))
        assert "is not the name of a file in this folder" in error(tmp_path, source=str(folder))


def test_the_library_reads_what_prepare_writes(tmp_path):
    written = texts(40)
    make(tmp_path, source=str(write(tmp_path / "mds", "text", "str", written)))
    rows = import_streaming().StreamingDataset(local=str(tmp_path / "out"), split="train", batch_size=1)
    assert [row["tokens"].tolist() for row in rows] == [
        stream(tmp_path / "out", "train", 64)[start : start + 65].tolist() for start in range(0, 64 * len(rows), 64)
    ]


def test_only_the_column_is_decoded(tmp_path):
    """Another column may hold a pickle, which would run its author's code."""
    columns = {"text": "str", "zz": "pkl"}
    with import_streaming().MDSWriter(out=str(tmp_path / "mds"), columns=columns) as writer:
        writer.write({"text": "one", "zz": {"no": "text"}})
    [(value, _)] = open_index(tmp_path / "mds" / "index.json", "text", None)._values(lambda size: None)
    assert value == b"one"
