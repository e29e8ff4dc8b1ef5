"""`data.packing`: what rows hold, in which order they come, and that nothing is lost."""

from collections import Counter

import numpy as np
import pytest
from conftest import open_split

from models.base import IGNORE
from trainer.core.config import DataConfig, PrepareConfig
from trainer.core.errors import UserError
from trainer.data.packing import CHUNK, kinds_of_rows, rows_of
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset, open_stream

LENGTH, SEED = 64, 3


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """500 documents of 1 to 200 bytes, in samples of 64 tokens."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    (folder / "texts").mkdir()
    for i, size in enumerate(rng.integers(1, 60, 500)):
        text = "".join(map(chr, rng.integers(97, 123, size if i % 20 else size + 140)))
        (folder / "texts" / f"{i:03d}.txt").write_text(text)
    values = {"source": str(folder / "texts"), "tokenizer": "bytes", "workers": 1, "sample_length": LENGTH}
    prepare(PrepareConfig(**values, out=str(folder / "data")), lambda line: None)
    return folder / "data"


def opened(folder, packing, threads=4, separate=True, length=LENGTH):
    data = DataConfig(path=str(folder), packing=packing, threads=threads, separate_documents=separate)
    return open_stream(data, find_dataset(data), SEED, length)


def epoch_of(stream, number=0, length=LENGTH):
    """The rows of an epoch, one by one."""
    count = stream.rows.count
    for row in range(number * count, (number + 1) * count):
        batch = stream.batch(row * length, length, 0, 1)
        yield {name: values[0] for name, values in batch.items()}


def split_documents(folder):
    split = open_split(folder)
    ends = np.cumsum(split.lengths())
    return np.split(split.read(0, split.counts.tokens), ends[:-1])


@pytest.mark.parametrize("epoch", [0, 2])
def test_best_fit_trains_on_each_token_once_and_joins_whole_documents(documents, epoch):
    stream = opened(documents, "best_fit")
    expected, pieces, pairs = split_documents(documents), [], Counter()
    for row in epoch_of(stream, epoch):
        numbers = row["documents"]
        for number in np.unique(numbers):
            here = numbers == number
            tokens, targets = row["tokens"][here], row["targets"][here]
            if number == numbers.max() and (targets == IGNORE).all() and (tokens == 256).all():
                continue  # padding
            pieces.append(tuple(tokens))
            np.testing.assert_array_equal(targets[:-1], tokens[1:])
            assert (targets[-1] == IGNORE) == (tokens[-1] == 256)
            pairs.update(zip(tokens[targets != IGNORE].tolist(), targets[targets != IGNORE].tolist(), strict=True))
    stream.close()
    cut = [tuple(text[at : at + LENGTH]) for text in expected for at in range(0, len(text), LENGTH)]
    assert Counter(pieces) == Counter(cut)
    assert pairs == Counter(
        pair for text in expected for pair in zip(text[:-1].tolist(), text[1:].tolist(), strict=True)
    )


def test_each_row_of_none_is_a_document(documents):
    stream, expected = opened(documents, "none"), split_documents(documents)
    rows = list(epoch_of(stream))
    assert {len(row["tokens"]) for row in rows} == {16, 32, 48, 64}
    found = Counter()
    for row in rows:
        length = int((row["targets"] != IGNORE).sum()) + 1
        assert (row["targets"][length - 1 :] == IGNORE).all() or length > LENGTH
        assert "documents" not in row
        found[tuple(row["tokens"][:length].tolist())] += 1
    assert found == Counter(tuple(text[:LENGTH].tolist()) for text in expected)
    stream.close()


def test_a_longer_document_of_none_is_cut(documents):
    stream = opened(documents, "none")
    long = [row for row in epoch_of(stream) if (row["tokens"] != 256).all()]
    assert long and all((row["targets"] != IGNORE).all() for row in long)  # its next token is known
    assert stream.rows.longer == len(long) == sum(len(text) > LENGTH for text in split_documents(documents))
    stream.close()


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_the_padding_that_is_told_is_that_of_the_rows(documents, packing):
    stream = opened(documents, packing)
    slots = tokens = 0
    for first in range(0, stream.rows.count, CHUNK):
        count = min(CHUNK, stream.rows.count - first)
        batch = stream.batch(first * LENGTH, LENGTH, 0, count)
        slots += batch["tokens"].size
        tokens += stream.tokens(first * LENGTH, LENGTH, count)
    assert tokens == stream.rows.tokens
    assert stream.rows.padding() == pytest.approx(1 - tokens / slots, abs=1e-12)
    stream.close()


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_order_is_that_of_any_number_of_ranks_and_threads(documents, packing, threads):
    """Two steps of 8 rows across the end of the epoch."""
    one = opened(documents, packing)
    position = (one.rows.count - 5) * LENGTH
    whole = [one.batch(position + step * 8 * LENGTH, LENGTH, 0, 8) for step in range(2)]
    one.close()
    for ranks in (1, 2, 4):
        streams = [opened(documents, packing, threads) for _ in range(ranks)]
        for step, expected in enumerate(whole):
            at, count = position + step * 8 * LENGTH, 8 // ranks
            for rank, stream in enumerate(streams):
                part = stream.batch(at, LENGTH, rank * count, count)
                stream.read_ahead(at + 8 * LENGTH, LENGTH, rank * count, count)
                width = part["tokens"].shape[1]
                for name, values in part.items():
                    rows = expected[name][rank * count : (rank + 1) * count]
                    np.testing.assert_array_equal(values, rows[:, :width])
                    assert (expected["targets"][rank * count : (rank + 1) * count, width:] == IGNORE).all()
        for stream in streams:
            stream.close()


def test_epochs_differ_in_the_order_of_the_rows_alone(documents):
    stream = opened(documents, "best_fit")
    first, second = ([tuple(row["tokens"]) for row in epoch_of(stream, epoch)] for epoch in (0, 1))
    assert first != second and Counter(first) == Counter(second)
    assert stream.epoch(stream.rows.count * LENGTH) == 1.0
    stream.close()


def test_neighbours_of_none_are_about_equally_long(documents):
    rows = rows_of(np.random.default_rng(0).integers(2, 1000, 10_000), "none", 1000, SEED, 1)
    lengths = rows.at(np.arange(rows.count)).lengths
    spread = [np.ptp(lengths[first : first + CHUNK]) for first in range(0, 4096, CHUNK)]
    assert np.mean(spread) < 2 * 1000 / (4096 / CHUNK)
    means = [lengths[first : first + CHUNK].mean() for first in range(0, 4096, CHUNK)]
    assert not np.all(np.diff(means) >= 0)


def test_pairs_stay_together():
    rows = rows_of(np.arange(2, 202), "none", 64, SEED, 2)
    pieces = rows.at(np.arange(rows.count))
    assert rows.count == 100
    assert (
        np.diff(pieces.starts.reshape(100, 2)).ravel()
        == np.arange(2, 202)[0::2][np.argsort(np.argsort(pieces.starts[0::2]))]
    ).all()


def test_best_fit_of_a_small_case():
    """Rows of 10: 7 + 3, 6 + 4, 5 + 5, 5 + 2 + 2, as one by one, each where it fits most tightly."""
    counts = np.bincount([7, 6, 5, 5, 5, 4, 3, 2, 2], minlength=11)
    kinds = Counter()
    for rows, sizes in kinds_of_rows(counts):
        kinds[sizes] += rows
    assert kinds == {(7, 3): 1, (6, 4): 1, (5, 5): 1, (5, 2, 2): 1}


def test_best_fit_places_as_one_by_one():
    """The number of rows of each room is that of the plain algorithm."""
    sizes = np.sort(np.random.default_rng(1).integers(1, 41, 3000))[::-1]
    rooms = []
    for size in sizes.tolist():
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting)[1]] -= size
        else:
            rooms.append(40 - size)
    kinds = kinds_of_rows(np.bincount(sizes, minlength=41))
    assert Counter(rooms) == sum((Counter({40 - sum(one): rows}) for rows, one in kinds), Counter())


def test_no_document_is_one_line():
    with pytest.raises(UserError, match="the training split has no document"):
        rows_of(np.zeros(0, np.int64), "best_fit", 64, 0, 1)
