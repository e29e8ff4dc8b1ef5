"""Reading: global position, sequence growth, resumption past an epoch's end, damaged shards."""

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import open_split

from trainer.core.errors import Damaged, MachineError, UserError
from trainer.data.stream import TrainStream, ordered_windows
from trainer.data.tokenizers import Tokenizer


@pytest.fixture
def split(tiny_dataset):
    return open_split(tiny_dataset)


@pytest.fixture
def stream(split):
    opened = TrainStream(split, seed=1)
    yield opened
    opened.close()


def test_read_is_the_stream_of_documents(split, tiny_dataset):
    tokens = split.read(0, split.counts.tokens)
    assert len(tokens) == split.counts.tokens
    text = Tokenizer.from_file(tiny_dataset / "tokenizer.json").decode(tokens[tokens != 256].tolist())
    assert len(text.encode()) == split.counts.bytes
    assert (tokens == 256).sum() == split.counts.documents


def test_an_epoch_holds_every_sample_once(stream):
    length = stream.split.length
    windows = stream.windows(0, length, 0, stream.n_samples)
    seen = {tuple(row) for row in windows}
    expected = {tuple(stream.split.sample(i)["tokens"]) for i in range(stream.n_samples)}
    assert seen == expected
    assert [tuple(row) for row in windows] != [tuple(stream.split.sample(i)["tokens"]) for i in range(stream.n_samples)]


@pytest.mark.parametrize("order", ["samples", "windows"])
@pytest.mark.parametrize("threads", [1, 4])
def test_position_alone_decides_across_growth_and_epochs(split, threads, order):
    """A run cut anywhere, also past the end of an epoch, reads on exactly where the uninterrupted one does."""
    plan = [(16, 7), (16, 9), (32, 5), (64, 40), (64, split.full_samples), (64, 3), (16, 11)]

    def read(begin_at=0, position=0):
        stream = TrainStream(split, seed=5, threads=threads, order=order)
        out, positions = [], [position]
        for number, (length, sequences) in enumerate(plan[begin_at:], begin_at):
            position = stream.start(position, length, plan[max(0, number - 1)][0])
            out.append(stream.windows(position, length, 0, sequences))
            position += length * sequences
            stream.read_ahead(position, length, 0, sequences)  # a guess, sometimes wrong
            positions.append(position)
        stream.close()
        return out, positions

    whole, positions = read()
    assert positions[-1] > split.full_samples * split.length, "the plan passes the end of an epoch"
    for cut in range(len(plan)):
        part, _ = read(cut, positions[cut])
        for expected, got in zip(whole[cut:], part, strict=True):
            np.testing.assert_array_equal(expected, got)


def test_lengths_are_views_on_one_order(stream):
    long = stream.windows(0, 64, 0, 4)
    short = stream.windows(0, 16, 0, 16)
    np.testing.assert_array_equal(long[:, :-1].reshape(-1), short[:, :-1].reshape(-1))
    np.testing.assert_array_equal(long[:, 1:].reshape(-1), short[:, 1:].reshape(-1))


def test_no_sample_is_read_for_every_one_of_its_windows(split, monkeypatch):
    """An epoch of short windows, a few at a time, as a step reads them: each is what the order says, each sample is read once."""
    read, sample = [], split.sample
    monkeypatch.setattr(split, "sample", lambda index: read.append(index) or sample(index))
    stream = TrainStream(split, seed=1, order="windows")
    seen = set()
    for position in range(0, stream.epoch_tokens, 16 * 50):
        count = min(50, (stream.epoch_tokens - position) // 16)
        windows = stream.windows(position, 16, 0, count)
        stream.read_ahead(position + 16 * count, 16, 0, count)
        seen |= set(map(tuple, windows.tolist()))
    stream.close()
    expected = {
        tuple(sample(i)["tokens"][at : at + 17].tolist()) for i in range(stream.n_samples) for at in range(0, 64, 16)
    }
    assert seen == expected
    ahead = len(read) - stream.n_samples  # of the next epoch
    assert sorted(read[: len(read) - ahead]) == list(range(stream.n_samples)) and ahead <= 50


def test_growth_passes_over_less_than_one_window(stream):
    assert stream.start(80, 64) == 128
    assert stream.start(128, 64) == 128


def test_validation_is_read_in_full_and_in_order(tiny_dataset):
    split = open_split(tiny_dataset, "validation")
    everything = split.read(0, split.counts.tokens)
    for length in (64, 100, 1000):
        targets = [split.read(start, count + 1)[1:] for start, count in ordered_windows(split, length)]
        np.testing.assert_array_equal(np.concatenate(targets), everything[1:])
    assert sum(count for _, count in ordered_windows(split, 64, max_tokens=100)) == 128


def test_missing_shard_is_named(copy):
    shard = next((copy / "train").glob("*.mds"))
    size = shard.stat().st_size
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing .{size:,} bytes expected"):
        open_split(copy)


def test_truncated_shard_is_named(copy):
    shard = next((copy / "train").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{shard.name} has .* expected; it is truncated"):
        open_split(copy)


def test_one_flipped_bit_is_found_before_it_is_trained_on(copy):
    shard = next((copy / "train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    stream = TrainStream(open_split(copy), seed=0)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: its xxh64 is .* expected"):
        stream.windows(0, 64, 0, 1)


def test_too_little_text(copy, monkeypatch):
    split = open_split(copy)
    split.counts = replace(split.counts, tokens=10)
    with pytest.raises(UserError, match="fewer than one sample"):
        TrainStream(split, seed=0)


def test_a_read_error_that_may_pass_is_no_damage(copy, monkeypatch):
    split = open_split(copy)

    def stale(self, *args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(MachineError, match="cannot be read: Stale file handle"):
        split.sample(0)


def test_a_sample_of_a_strange_shape_or_with_unknown_ids_is_damage(split, monkeypatch):
    split.sample(0)
    for tokens in (np.zeros(64, np.uint16), np.full(65, 257, np.uint16)):
        monkeypatch.setattr(type(split._readers[0]), "get_item", lambda self, index, tokens=tokens: {"tokens": tokens})
        with pytest.raises(Damaged, match="holds a sample that is not 65 ids below 257"):
            split.sample(0)
