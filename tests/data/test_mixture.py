"""Mixed datasets: at every row each has had less than a row more or fewer than asked, and rows do not depend on who reads them."""

import numpy as np
import pytest
from conftest import words_text

from trainer.core.config import DataConfig, MixConfig, PrepareConfig
from trainer.core.errors import UserError
from trainer.data.mixture import further_datasets
from trainer.data.prepare import prepare
from trainer.data.proportions import CHUNK, Proportions, Ramp
from trainer.data.stream import find_dataset, open_stream

LENGTH = 16


def random_ramps(seed):
    """The main dataset, and up to five with weights that are constant, grow, shrink, or are 0 at one end."""
    draw = np.random.default_rng(seed)

    def weight():
        return float(draw.choice([0.0, 0.01, 1.0]) * draw.uniform(0, 3))

    return [Ramp(1, 1)] + [
        Ramp(weight(), weight(), float(draw.choice([0.0, draw.uniform(1, 1.5 * CHUNK)]))) for _ in range(1 + seed % 5)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_every_dataset_is_within_a_row_of_what_is_asked(seed):
    ramps, rows = random_ramps(seed), 2 * CHUNK
    order = Proportions(ramps)
    chosen, before = order.assigned(0, rows)
    given = np.cumsum(np.eye(len(ramps))[chosen], axis=0)
    asked = order.asked(np.arange(1.0, rows + 1))
    assert (np.abs(given - asked) < 1).all() and not before.any()
    # What is asked is the sum of the shares; in the middle of a row they are off by the curvature of a ramp alone.
    shares = np.array([order.weights(row + 0.5) for row in range(rows)])
    shares /= shares.sum(axis=1, keepdims=True)
    steepest = max([abs(ramp.end - ramp.start) / ramp.until for ramp in ramps if ramp.until], default=0)
    np.testing.assert_allclose(np.cumsum(shares, axis=0), asked, atol=1e-9 * rows + 2 * len(ramps) * steepest)


def test_two_to_one():
    assert Proportions([Ramp(1, 1), Ramp(0.5, 0.5)]).assigned(0, 9)[0].tolist().count(1) == 3


def test_any_part_is_that_of_the_whole_also_from_a_mark():
    ramps = random_ramps(8)
    whole, _ = Proportions(ramps).assigned(0, 3 * CHUNK)
    first = CHUNK + 1234
    chosen, before = Proportions(ramps).assigned(first, CHUNK)
    assert chosen.tolist() == whole[first : first + CHUNK].tolist()
    assert before.tolist() == np.bincount(whole[:first], minlength=len(ramps)).tolist()
    later = Proportions(ramps)
    later.go_on(Proportions(ramps).mark(first))
    later._counts.pop(0)  # so that nothing can begin at row 0
    assert later.assigned(first, CHUNK)[0].tolist() == chosen.tolist()
    with pytest.raises(ValueError, match="are not those of"):
        later.go_on([1, CHUNK, *[0] * (len(ramps) - 1)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two datasets of the same tokenizer: words, and the digits that they never hold."""
    folder = tmp_path_factory.mktemp("mixture")
    texts = {"words": words_text(0, 2000), "digits": "0123456789 " * 200}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(text[i : i + 200] for i in range(0, len(text), 200)))
        values = {"source": str(folder / f"{name}.txt"), "tokenizer": "bytes", "workers": 1, "sample_length": LENGTH}
        out = {"document_start": "^$", "validation_fraction": 0.2, "out": str(folder / name)}
        prepare(PrepareConfig(**values, **out), lambda line: None)
    return folder


def mixed(folders, packing="concat", threads=2, **entry):
    return DataConfig(
        path=str(folders / "words"),
        packing=packing,
        threads=threads,
        separate_documents=packing == "best_fit",
        mix={"digits": MixConfig(path=str(folders / "digits"), **{"weight": 0.5, **entry})},
    )


def is_digits(tokens):
    return np.isin(tokens, np.frombuffer(b"0123456789", np.uint8)).any(axis=-1)


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_rows_are_those_of_each_stream_in_the_order_of_the_proportions(folders, packing):
    data = mixed(folders, packing)
    info = find_dataset(data)
    stream = open_stream(data, info, 1, LENGTH)
    alone = {path: DataConfig(**{**vars(data), "mix": {}, "path": str(folders / path)}) for path in ("words", "digits")}
    streams = [open_stream(own, find_dataset(own), 1, LENGTH) for own in alone.values()]
    whole = stream.batch(0, LENGTH, 0, 30)
    assert is_digits(whole["tokens"]).sum() == 10
    for number, own in enumerate(streams):
        rows = is_digits(whole["tokens"]) == bool(number)
        expected = own.batch(0, LENGTH, 0, int(rows.sum()))
        for name, values in expected.items():
            width = values.shape[1]
            assert (whole[name][rows][:, :width] == values).all()
            assert name != "targets" or (whole[name][rows][:, width:] == -1).all()
    assert stream.tokens(0, LENGTH, 30) == sum(
        own.tokens(0, LENGTH, count) for own, count in zip(streams, (20, 10), strict=True)
    )
    assert stream.epochs(30 * LENGTH) == {"digits": streams[1].epoch(10 * LENGTH)}
    assert stream.epoch(30 * LENGTH) == streams[0].epoch(20 * LENGTH)
    for ranks, threads in ((2, 1), (4, 3)):  # their rows together, in the middle of the run, after reading ahead
        data.threads = threads
        shares = [open_stream(data, info, 1, LENGTH) for _ in range(ranks)]
        for rank, share in enumerate(shares):
            share.read_ahead(10 * LENGTH, LENGTH, rank * 20 // ranks, 20 // ranks)
        parts = [share.batch(10 * LENGTH, LENGTH, rank * 20 // ranks, 20 // ranks) for rank, share in enumerate(shares)]
        place = 10
        for part in parts:
            for row in part["tokens"]:
                assert (whole["tokens"][place, : len(row)] == row[: whole["tokens"].shape[1]]).all()
                place += 1
        assert place == 30


def test_what_does_not_fit_is_one_line(folders, tmp_path):
    data = mixed(folders)
    info = find_dataset(data)
    values = {"source": str(folders / "words.txt"), "tokenizer": "chars", "workers": 1, "validation_fraction": 0.2}
    prepare(PrepareConfig(**values, out=str(tmp_path / "other")), lambda line: None)
    for path, line in (
        (None, "data.mix.digits.path: name a prepared dataset"),
        (str(tmp_path / "other"), "differs from .* in its tokenizer; prepare both alike"),
        (str(tmp_path / "none"), "no dataset at"),
    ):
        data.mix["digits"].path = path
        with pytest.raises(UserError, match=line):
            further_datasets(data, info)
