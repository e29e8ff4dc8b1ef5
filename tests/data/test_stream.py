"""Reading: global position, sequence growth, resumption past an epoch's end, damage, remotes, two readers at once."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import PATIENCE, ROOT

from trainer.config import DataConfig
from trainer.data.stream import Order, Split, TrainStream, find_dataset, ordered_windows
from trainer.data.tokenizers import Tokenizer
from trainer.errors import UserError


def open_split(folder, name="train", **data):
    config = DataConfig(path=str(folder), **data)
    return Split(config, find_dataset(config), name)


@pytest.fixture
def split(tiny_dataset):
    return open_split(tiny_dataset)


@pytest.fixture
def stream(split):
    opened = TrainStream(split, seed=1)
    yield opened
    opened.close()


@pytest.fixture
def copy(tiny_dataset, tmp_path):
    return shutil.copytree(tiny_dataset, tmp_path / "copy")


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
    expected = {tuple(stream.split.sample(i)) for i in range(stream.n_samples)}
    assert seen == expected
    assert [tuple(row) for row in windows] != [tuple(stream.split.sample(i)) for i in range(stream.n_samples)]


def test_epochs_differ_and_seeds_differ(split):
    order = Order(split.shard_sizes, split.full_samples, seed=1)
    first = [order(0, i) for i in range(split.full_samples)]
    assert first != [order(1, i) for i in range(split.full_samples)]
    assert first != [Order(split.shard_sizes, split.full_samples, seed=2)(0, i) for i in range(split.full_samples)]


def test_order_is_pinned():
    """The order is part of the resumption contract: a change of it must not slip in."""
    order = Order([5, 5], 9, seed=7)
    assert [order(0, i) for i in range(9)] == PINNED
    assert sorted(order(3, i) for i in range(9)) == list(range(9))


PINNED = [8, 0, 7, 1, 3, 6, 2, 4, 5]


def test_large_orders_are_shuffled_block_by_block(monkeypatch):
    monkeypatch.setattr("trainer.data.stream.SHUFFLE_BLOCK", 64)
    order = Order([100, 50, 75, 30], 250, seed=3)
    values = [order(2, i) for i in range(250)]
    assert sorted(values) == list(range(250))
    shuffled_again = Order([100, 50, 75, 30], 250, seed=3)
    assert [shuffled_again(2, i) for i in (200, 10, 130)] == [values[200], values[10], values[130]]


@pytest.mark.parametrize("threads", [1, 4])
def test_position_alone_decides_across_growth_and_epochs(split, threads):
    """A run cut anywhere, also past the end of an epoch, reads on exactly where the uninterrupted one does."""
    plan = [(16, 7), (16, 9), (32, 5), (64, 40), (64, split.full_samples), (64, 3), (16, 11)]

    def read(begin_at=0, position=0):
        stream = TrainStream(split, seed=5, threads=threads)
        out, positions = [], [position]
        for length, sequences in plan[begin_at:]:
            out.append(stream.windows(position, length, 0, sequences))
            position = stream.start(position, length) + length * sequences
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


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_of_ranks_make_the_global_batch(stream, size):
    whole = stream.windows(128, 16, 0, 11)
    shares = [(11 * rank // size, 11 * (rank + 1) // size) for rank in range(size)]
    parts = [stream.windows(128, 16, first, after - first) for first, after in shares]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


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


def test_damaged_index(copy):
    (copy / "train" / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json is missing or damaged"):
        open_split(copy)


def test_index_of_other_data(copy):
    index = json.loads((copy / "train" / "index.json").read_text())
    index["shards"] = index["shards"] * 2
    (copy / "train" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="prepare the data again"):
        open_split(copy)


def test_unsafe_columns_are_refused(copy):
    """MDS can hold pickles; a shard that says so is not read."""
    path = copy / "train" / "index.json"
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        shard["column_encodings"] = ["pkl"]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="missing or damaged"):
        open_split(copy)


def test_too_little_text(copy, monkeypatch):
    split = open_split(copy)
    split.counts = replace(split.counts, tokens=10)
    with pytest.raises(UserError, match="fewer than one sample"):
        TrainStream(split, seed=0)


def test_remote_data_is_cached_and_checked(tiny_dataset, copy, tmp_path):
    data = {"cache": str(tmp_path / "cache")}
    far = open_split(f"file://{copy}", **data)
    near = open_split(tiny_dataset)
    np.testing.assert_array_equal(far.read(0, 500), near.read(0, 500))
    shutil.rmtree(copy)  # everything needed is here now
    again = open_split(f"file://{copy}", **data)
    np.testing.assert_array_equal(again.read(0, 500), near.read(0, 500))


def test_damaged_download_is_refused_and_not_kept(copy, tmp_path):
    shard = next((copy / "train").glob("*.mds"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"?")
    data = {"cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="cannot fetch shard"):
        open_split(f"file://{copy}", **data).read(0, 10)
    shard.write_bytes(good)
    assert len(open_split(f"file://{copy}", **data).read(0, 10)) == 10


def test_unreachable_remote_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot fetch file:///no/such/place/dataset.json"):
        find_dataset(DataConfig(path="file:///no/such/place", cache=str(tmp_path)))


READER = """
import sys
from trainer.config import DataConfig
from trainer.data.stream import Split, TrainStream, find_dataset
data = DataConfig(path=sys.argv[1], cache=sys.argv[2])
stream = TrainStream(Split(data, find_dataset(data), "train"), seed=1)
position, total = 0, 0
while "forever" in sys.argv or position < 3 * stream.epoch_tokens:
    total += int(stream.windows(position, 64, 0, 8).sum())
    position += 64 * 8
    if position == 64 * 8: print("reading", flush=True)
print(total, flush=True)
"""


def reader(*words):
    return subprocess.Popen([sys.executable, "-c", READER, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_two_runs_and_a_killed_one_do_not_disturb_each_other(copy, tmp_path):
    words = (f"file://{copy}", str(tmp_path / "cache"))
    killed = reader(*words, "forever")
    assert killed.stdout.readline() == "reading\n"
    killed.kill()
    killed.wait()
    pair = [reader(*words), reader(*words)]
    sums = [process.communicate(timeout=PATIENCE)[0].split()[-1] for process in pair]
    assert sums[0] == sums[1]
    assert all(process.returncode == 0 for process in pair)
