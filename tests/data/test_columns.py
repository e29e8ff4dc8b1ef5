"""Lengths of documents, and columns beside the tokens: what is written is what is read."""

import numpy as np
import pytest
from conftest import open_split

from trainer.core.config import DataConfig, PrepareConfig
from trainer.core.errors import Damaged, UserError
from trainer.data import dataset
from trainer.data.dataset import LENGTHS, ColumnInfo, DatasetInfo
from trainer.data.encode import Encoded
from trainer.data.index import check_fingerprint
from trainer.data.mds import SplitWriter
from trainer.data.prepare import prepare
from trainer.data.stream import Split, TrainStream, find_dataset

COLUMNS = {"mask": ColumnInfo("uint8", []), "ids": ColumnInfo("uint32", [3])}
LENGTH, TOKENS = 16, 16 * 9 + 5


def found(folder):
    return find_dataset(DataConfig(path=str(folder)), print)


@pytest.mark.parametrize("workers", [1, 2])
def test_lengths_are_those_between_the_ends(tmp_path, workers):
    """Some documents are longer than what one process encodes at once, so they end in a later batch."""
    texts = ["a" * 700_000, "bc", "d e " * 200_000, "f", "g" * 40, "h" * 300_000]
    source = tmp_path / "rows"
    source.mkdir()
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_text(text)
    config = PrepareConfig(source=str(source), tokenizer="bytes", out=str(tmp_path / "out"), workers=workers)
    prepare(config, lambda line: None)
    for split in ("train", "validation"):
        opened = open_split(tmp_path / "out", split)
        ends = np.flatnonzero(opened.read(0, opened.counts.tokens) == 256) + 1
        assert len(ends) > 0
        assert opened.lengths().tolist() == np.diff(ends, prepend=0).tolist()


def test_lengths_that_are_not_what_was_written_are_refused(copy, tmp_path):
    path = copy / "train" / LENGTHS
    good = open_split(copy).lengths()
    far = open_split(f"file://{copy}", cache=str(tmp_path / "cache"))
    assert far.lengths().tolist() == good.tolist()
    path.write_bytes(path.read_bytes()[:-4] + b"\x01\x00\x00\x00")
    with pytest.raises(Damaged, match=r"lengths.bin is missing or damaged: its sha256"):
        open_split(copy).lengths()
    path.unlink()
    with pytest.raises(Damaged, match=r"lengths.bin is missing or damaged"):
        open_split(copy).lengths()
    assert far.lengths().tolist() == good.tolist()  # it is in the cache


def test_a_dataset_of_format_2_has_no_lengths(copy):
    info = found(copy)
    info.format, info.lengths, info.columns = 2, {}, {}
    info.save(copy)
    split = open_split(copy)
    assert split.read(0, 10).tolist()
    with pytest.raises(UserError, match=r"was prepared before the lengths of documents were stored; prepare the data"):
        split.lengths()


@pytest.fixture
def columns(tmp_path, tiny_dataset):
    """A dataset whose columns follow from the token's place in the stream."""
    info = DatasetInfo.load(tiny_dataset)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, TOKENS).astype(info.dtype)
    places = np.arange(TOKENS)
    folder = tmp_path / "columns"
    for split in dataset.SPLITS:
        writer = SplitWriter(folder / split, info.dtype, LENGTH, 1, COLUMNS)
        for first, after in ((0, 50), (50, 51), (51, TOKENS)):
            part = places[first:after]
            given = {
                "mask": (part % 2).astype("uint8"),
                "ids": np.stack([part, part + 1, part * 2], 1).astype("uint32"),
            }
            ends = np.array([after - first], np.int64)
            writer.add(Encoded(split, tokens[first:after], ends, after - first, 1, columns=given))
        writer.finish()
        info.splits[split] = writer.info
        info.indexes[split] = dataset.sha256_of(folder / split / "index.json")
        info.lengths[split] = dataset.sha256_of(folder / split / LENGTHS)
    info.sample_length, info.columns = LENGTH, dict(COLUMNS)
    hashes = {split: dataset.shard_hashes(folder / split) for split in dataset.SPLITS}
    info.fingerprint = dataset.fingerprint(info.tokenizer.sha256, LENGTH, hashes, info.lengths)
    (folder / "tokenizer.json").write_bytes((tiny_dataset / "tokenizer.json").read_bytes())
    info.save(folder)
    return folder, tokens


def opened(folder):
    return Split(DataConfig(path=str(folder)), found(folder), "train")


def test_columns_are_read_beside_the_tokens(columns):
    folder, tokens = columns
    split = opened(folder)
    assert split.lengths().tolist() == [50, 1, TOKENS - 51]
    np.testing.assert_array_equal(split.read(7, 100), tokens[7:107])
    np.testing.assert_array_equal(split.read(7, 100, "ids")[:, 2], 2 * np.arange(7, 107))


def test_a_batch_holds_what_the_columns_say_about_its_targets(columns):
    folder, tokens = columns
    stream = TrainStream(opened(folder), seed=0)
    try:
        batch = stream.batch(0, 8, 0, 18)
    finally:
        stream.close()
    places = batch["ids"][:, :, 0]
    assert sorted(places.flatten()) == list(range(1, 145))  # every full sample's targets, each once
    np.testing.assert_array_equal(batch["targets"], tokens[places])
    np.testing.assert_array_equal(batch["tokens"], tokens[places - 1])
    np.testing.assert_array_equal(batch["mask"], places % 2)


def test_a_row_of_no_windows_has_the_shape_of_its_columns(columns):
    stream = TrainStream(opened(columns[0]), seed=0)
    try:
        assert {name: values.shape for name, values in stream.batch(0, 8, 0, 0).items()} == {
            "tokens": (0, 8),
            "targets": (0, 8),
            "mask": (0, 8),
            "ids": (0, 8, 3),
        }
    finally:
        stream.close()


def test_other_lengths_are_another_dataset(columns):
    """With columns, where documents end does not follow from the tokens."""
    folder, _ = columns
    info = found(folder)
    lengths = np.array([49, 2, TOKENS - 51], "<u4")
    (folder / "train" / LENGTHS).write_bytes(lengths.tobytes())
    info.lengths["train"] = dataset.sha256_of(folder / "train" / LENGTHS)
    info.save(folder)
    with pytest.raises(Damaged, match="the fingerprint in"):
        check_fingerprint(folder, DatasetInfo.load(folder))


@pytest.mark.parametrize(
    "column", [{"mask": ColumnInfo("object", [])}, {"../x": COLUMNS["mask"]}, {"mask": ColumnInfo("uint8", [0])}]
)
def test_strange_columns_are_refused(columns, column):
    folder, _ = columns
    info = DatasetInfo.load(folder)
    info.columns = column
    info.save(folder)
    with pytest.raises(Damaged, match="malformed"):
        DatasetInfo.load(folder)


def test_a_column_of_another_shape_is_damaged(columns):
    folder, _ = columns
    info = found(folder)
    info.columns["ids"] = ColumnInfo("uint32", [4])
    with pytest.raises(Damaged, match="holds a sample whose ids are not those of 17 tokens"):
        Split(DataConfig(path=str(folder)), info, "train").sample(0)
