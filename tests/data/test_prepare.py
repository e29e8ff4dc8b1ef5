"""prepare: the shards hold exactly the text, whatever the number of workers, and a broken run never looks finished."""

import errno
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import tokenizers as library
from conftest import PATIENCE, WHOLE
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.config import PrepareConfig
from trainer.core.errors import MachineError, UserError
from trainer.data import dataset, encode, prepare, progress, target
from trainer.data.dataset import DatasetInfo
from trainer.data.mds import import_streaming
from trainer.data.pieces import Piece
from trainer.data.tokenizers import Tokenizer, get_tokenizer

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
SCRIPT = """
import sys
from trainer.core.config import PrepareConfig
from trainer.commands.prepare import run
from trainer.core.errors import UserError
if __name__ == "__main__":
    try:
        run(PrepareConfig(source=sys.argv[1], out=sys.argv[2], tokenizer="bytes", workers=int(sys.argv[3])))
    except UserError as error:
        sys.exit(f"error: {error}")
"""


def write_rows(path, count=300, seed=0):
    draw = random.Random(seed)
    rows = [
        " ".join(draw.choices(["cat", "sat", "ünï", "字", "\n", "on"], k=draw.randint(1, 60))) for _ in range(count)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return rows


def make(tmp_path, **options):
    """Prepare quietly with small defaults; the description and the folder."""
    options = {"tokenizer": "bytes", "workers": 1, "sample_length": 64, "out": str(tmp_path / "out"), **options}
    return prepare.prepare(PrepareConfig(**options), log=lambda line: None), Path(options["out"])


def error(tmp_path, **options):
    with pytest.raises(UserError) as caught:
        make(tmp_path, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def samples(folder, split) -> list[np.ndarray]:
    """The stored samples of a split, read by the library."""
    reader = import_streaming().LocalDataset(local=str(folder), split=split)
    return [reader[i]["tokens"] for i in range(len(reader))]


def stream(folder, split, length) -> np.ndarray:
    """The token stream of a split, having checked how its samples overlap."""
    found = samples(folder, split)
    assert all(len(sample) == length + 1 for sample in found[:-1]) and 2 <= len(found[-1]) <= length + 1
    assert all(before[-1] == after[0] for before, after in zip(found, found[1:], strict=False))
    return np.concatenate([found[0][:1], *(sample[1:] for sample in found)])


def files(folder) -> dict[str, bytes]:
    """Everything but dataset.json, which names the folder and the number of workers."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "dataset.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("length", [1, 64, 10**6])
@pytest.mark.parametrize("tokenizer", ["bytes", "train-bpe:300"])
def test_the_shards_hold_the_text(tmp_path, tokenizer, length):
    rows = write_rows(tmp_path / "a.jsonl")
    info, out = make(tmp_path, source=str(tmp_path / "a.jsonl"), tokenizer=tokenizer, sample_length=length)
    assert info == DatasetInfo.load(out)
    coder = Tokenizer.from_file(out / "tokenizer.json")
    assert coder.sha256 == info.tokenizer.sha256
    found = []
    for split, size in info.splits.items():
        tokens = stream(out, split, length)
        assert (tokens.dtype, tokens[-1], len(tokens)) == (np.uint16, info.tokenizer.eot_id, size.tokens)
        ends = np.flatnonzero(tokens == info.tokenizer.eot_id)
        texts = [coder.decode(part[part != coder.eot_id]) for part in np.split(tokens, ends + 1)[:-1]]
        assert size.documents == len(texts)
        assert size.bytes == sum(len(text.encode()) for text in texts)
        assert size.words == sum(len(text.split()) for text in texts)
        assert size.samples == len(samples(out, split))
        found += texts
    assert sorted(found) == sorted(rows)
    assert not list(tmp_path.glob(".out*")), "neither a partial folder nor a lock is left"


def test_text_file_and_validation_source(tmp_path):
    (tmp_path / "a.txt").write_text("training text\n" * 1000)
    (tmp_path / "b.txt").write_text("validation text\n")
    info, out = make(tmp_path, source=str(tmp_path / "a.txt"), validation_source=str(tmp_path / "b.txt"))
    assert info.splits["train"].bytes == 14_000 and info.splits["validation"].bytes == 16
    assert bytes(stream(out, "validation", 64)[:-1].tolist()) == b"validation text\n"


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl")
    monkeypatch.setattr(dataset, "UINT16_IDS", 256)
    info, out = make(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert info.dtype == "uint32" and stream(out, "train", 64).dtype == np.uint32


@pytest.mark.slow
def test_the_output_is_the_same_for_any_number_of_workers(tmp_path):
    for i in range(4):
        write_rows(tmp_path / f"{i}.jsonl", 5000, seed=i)
    (tmp_path / "text.txt").write_text("some words\nand lines\n" * 50_000)
    options = {"source": str(tmp_path), "shard_megabytes": 1}
    made = [make(tmp_path, **options, workers=n, out=str(tmp_path / f"out{n}")) for n in (1, 2, 3)]
    assert files(made[0][1]) == files(made[1][1]) == files(made[2][1])
    assert len({info.fingerprint for info, _ in made}) == 1
    assert len(list(made[0][1].glob("train/shard*"))) > 1


def test_small_shards(tmp_path):
    (tmp_path / "a.txt").write_text("some words\nand lines\n" * 80_000)
    info, out = make(tmp_path, source=str(tmp_path / "a.txt"), shard_megabytes=1)
    hashes = dataset.shard_hashes(out / "train")
    assert len(hashes) == 4
    assert info.fingerprint == dataset.fingerprint(
        info.tokenizer.sha256, 64, {split: dataset.shard_hashes(out / split) for split in info.splits}
    )


def test_the_fingerprint_follows_tokenizer_length_and_text(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    write_rows(tmp_path / "b.jsonl", seed=1)
    variants = [{}, {"tokenizer": "train-bpe:300"}, {"sample_length": 32}, {"source": str(tmp_path / "b.jsonl")}]
    prints = set()
    for i, variant in enumerate(variants):
        info, _ = make(tmp_path, **{"source": str(tmp_path / "a.jsonl"), "out": str(tmp_path / f"o{i}"), **variant})
        prints.add(info.fingerprint)
    assert len(prints) == len(variants)


def test_nothing_is_overwritten(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / "out").mkdir()
    assert "exists already" in error(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert list((tmp_path / "out").iterdir()) == []


def test_two_prepares_into_one_folder_do_not_collide(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    with filelock.FileLock(tmp_path / ".out.partial.lock"):
        assert "is being prepared by another process" in error(tmp_path, source=str(tmp_path / "a.jsonl"))


def test_what_a_killed_run_left_is_replaced(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    stale = tmp_path / ".out.partial"
    (stale / "train").mkdir(parents=True)
    (stale / "train" / "shard.00000.mds").write_bytes(b"half")
    with pytest.raises(UserError, match="did not finish"):
        DatasetInfo.load(tmp_path / "out")
    make(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert not stale.exists()


def test_wrong_arguments(tmp_path):
    path = str(tmp_path / "a.jsonl")
    write_rows(Path(path))
    assert "source: is not set" in error(tmp_path)
    assert "not a local folder" in error(tmp_path, source=path, out="s3://bucket/x")
    assert "sample_length" in error(tmp_path, source=path, sample_length=0)
    assert "shard_megabytes" in error(tmp_path, source=path, shard_megabytes=4096)
    assert "workers" in error(tmp_path, source=path, workers=0)
    assert "unknown" in error(tmp_path, source=path, tokenizer="gtp2")
    assert "Not a directory" in error(tmp_path, source=path, out=f"{path}/x/y")
    with pytest.raises(UserError, match="out: is not set"):
        prepare.prepare(PrepareConfig(source=path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_row_stops_with_its_place_and_leaves_nothing(tmp_path, workers):
    write_rows(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "half \\ud800 pair"}\n')
    line = error(tmp_path, source=str(tmp_path / "a.jsonl"), workers=workers)
    assert f"{tmp_path / 'a.jsonl'}:301: holds half a surrogate pair at character 5" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_no_text_for_a_split(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the only row"}\n')
    assert "no text for the validation split" in error(tmp_path, source=str(path))
    path.write_text('{"text": ""}\n' * 5)
    assert "is empty" in error(tmp_path, source=str(path))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (KeyboardInterrupt(), "was interrupted"),
    ],
)
def test_failing_writes_leave_nothing(tmp_path, monkeypatch, raised, message):
    (tmp_path / "a.txt").write_text("some words\nand lines\n" * 80_000)

    def fail(*arguments):
        raise raised

    monkeypatch.setattr(import_streaming().MDSWriter, "flush_shard", fail)
    assert message in error(tmp_path, source=str(tmp_path / "a.txt"), shard_megabytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_work_in_flight_is_bounded():
    read, yielded = 0, 0

    def batches() -> Iterator[list[Piece]]:
        nonlocal read
        for i in range(100):
            read += 1
            yield [Piece(str(i), True, "here")]

    class Pool:
        def submit(self, function, batch):
            future: Future = Future()
            future.set_result(batch[0].data)
            return future

    order = []
    for result in prepare.in_order(Pool(), batches(), 6):
        assert read - yielded <= 6
        yielded += 1
        order.append(int(result))
    assert order == list(range(100))


def test_batches_are_bounded_and_keep_the_order_within_a_split():
    pieces = [Piece("x" * 1000, True, str(i), "validation" if i % 7 == 0 else "train") for i in range(2000)]
    made = list(encode.batches(iter(pieces)))
    assert all(len(batch) <= encode.BATCH // 1000 + 1 and len({p.split for p in batch}) == 1 for batch in made)
    for split in ("train", "validation"):
        joined = [piece for batch in made for piece in batch if piece.split == split]
        assert joined == [piece for piece in pieces if piece.split == split]


def test_progress_off_a_terminal_is_a_line_every_ten_seconds(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    said: list[str] = []
    source = SimpleNamespace(bytes_read=0, total_bytes=100_000_000)
    shown = progress.Progress([source], said.append)
    for second in range(1, 26):
        now, source.bytes_read = float(second), second * 1_000_000
        shown.advance(2_000_000)
    assert said == [
        "20 MB of text, 2.0 MB/s, 10% read, 0:01:30 left",
        "40 MB of text, 2.0 MB/s, 20% read, 0:01:20 left",
    ]


def lines_of(tmp_path, **options):
    """What prepare says, quietly."""
    said: list[str] = []
    options = {"tokenizer": "bytes", "workers": 1, "sample_length": 64, "out": str(tmp_path / "out"), **options}
    prepare.prepare(PrepareConfig(**options), log=said.append)
    return said


BAD_ROWS = ['{"text": 3}', "no JSON", '{"body": "b"}', '{"text": "half \\ud800"}', "[1]"]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(tmp_path, workers):
    rows = write_rows(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n".join([*BAD_ROWS, '{"text": null}', '{"text": ""}']) + "\n")
    options = {"source": str(tmp_path / "a.jsonl"), "workers": workers}
    assert ":301: field 'text' holds int" in error(tmp_path, **options)
    said = lines_of(tmp_path, **options, on_bad_row="skip")
    assert [line for line in said if "bad rows were" in line] == [
        f"5 bad rows were skipped, the first one: {tmp_path / 'a.jsonl'}:301: field 'text' holds int, not text; "
        "set text_field to a text field"
    ]
    splits = DatasetInfo.load(tmp_path / "out").splits.values()
    assert sum(split.documents for split in splits) == len(rows)


def test_bad_rows_do_not_end_the_learning_of_a_tokenizer(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no JSON\n")
    said = lines_of(tmp_path, source=str(tmp_path / "a.jsonl"), tokenizer="train-bpe:260", on_bad_row="skip")
    assert any("1 bad rows were skipped" in line for line in said)
    assert "tokenizer train-bpe:260: 260 ids, <|endoftext|> (id 259) ends documents" in said


def test_lost_characters_are_told_and_are_not_in_the_counts_of_bytes(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    plain = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate("catsonü ")}, []))
    plain.save(str(tmp_path / "letters.json"))
    said = lines_of(tmp_path, source=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "letters.json"))
    [line] = [line for line in said if line.startswith("warning: the tokenizer has no id")]
    assert "(such as ï 字)" in line
    lost = int(re.search(r"([\d,]+) bytes are lost", line)[1].replace(",", ""))
    made, _ = make(tmp_path, source=str(tmp_path / "a.jsonl"), out=str(tmp_path / "whole"))
    less = DatasetInfo.load(tmp_path / "out")
    assert lost == sum(made.splits[split].bytes - less.splits[split].bytes for split in made.splits) > 0


def test_a_validation_split_of_an_odd_size_is_told(tmp_path):
    write_rows(tmp_path / "a.jsonl", 4)
    assert any(
        line.startswith("warning: validation is") for line in lines_of(tmp_path, source=str(tmp_path / "a.jsonl"))
    )
    write_rows(tmp_path / "b.jsonl", 3000)
    said = lines_of(tmp_path, source=str(tmp_path / "b.jsonl"), out=str(tmp_path / "two"))
    assert not any("warning" in line for line in said)


@given(st.text(alphabet="ab \n\u3000", max_size=60))
def test_words_of_long_texts_are_counted_in_parts(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "SPLIT", 7)
        assert encode._word_count(text) == len(text.split())


def test_a_long_row_takes_a_few_times_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SPLIT", 1 << 16)
    get_tokenizer("bytes").save(tmp_path / "tokenizer.json")
    encoder = encode.Encoder(tmp_path / "tokenizer.json", 256, "uint16", "text", False)
    row = json.dumps({"text": "ab " * 300_000}).encode()
    tracemalloc.start()
    try:
        encoded = encoder([Piece(row, True, "here")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (encoded.words, encoded.tokens.dtype, encoded.bytes) == (300_000, np.uint16, 900_000)
    assert peak < 8 * len(row)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_a_process_leave_nothing(tmp_path, monkeypatch, number):
    (tmp_path / "a.txt").write_text("some words\nand lines\n" * 80_000)
    before = signal.signal(number, lambda *arguments: None)
    mine = signal.getsignal(number)

    def interrupt(*arguments):
        os.kill(os.getpid(), number)
        time.sleep(5)

    try:
        monkeypatch.setattr(import_streaming().MDSWriter, "flush_shard", interrupt)
        with pytest.raises(MachineError, match="prepare was interrupted"):
            make(tmp_path, source=str(tmp_path / "a.txt"), shard_megabytes=1)
        assert signal.getsignal(number) is mine, "what the signal did before is put back"
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with target.signals_as_interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_ends_the_learning_of_a_tokenizer(tmp_path, monkeypatch):
    """Which is native code, deaf to signals: so in a child."""

    def texts(source):
        yield "some text"
        os.kill(os.getpid(), signal.SIGTERM)
        yield "more text"

    write_rows(tmp_path / "a.jsonl")
    monkeypatch.setattr(prepare, "_training_texts", texts)
    assert "was interrupted" in error(tmp_path, source=str(tmp_path / "a.jsonl"), tokenizer="train-bpe:300")
    assert multiprocessing.active_children() == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_odd_leftovers_do_not_block(tmp_path, kind):
    write_rows(tmp_path / "a.jsonl")
    stale = tmp_path / ".out.partial"
    if kind == "file":
        stale.touch()
    else:
        stale.symlink_to(tmp_path)
    (tmp_path / ".out.partial.lock").touch()
    make(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_faults_that_may_pass_are_told_apart(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl")

    def fail(code):
        def writer(*arguments, **options):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(prepare, "SplitWriter", writer)
        with pytest.raises(UserError) as caught:
            make(tmp_path, source=str(tmp_path / "a.jsonl"))
        return caught.value

    assert all(isinstance(fail(code), MachineError) for code in (errno.EIO, errno.ENOSPC, errno.ESTALE))
    assert not isinstance(fail(errno.EACCES), MachineError)


def test_too_little_memory_is_not_told_as_that_of_training(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl")

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(encode.Encoder, "__call__", fail)
    line = error(tmp_path, source=str(tmp_path / "a.jsonl"))
    assert line.startswith("out of memory;") and "fewer workers" in line


def test_names_that_are_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    write_rows(folder / "a.jsonl")
    for options in ({"source": str(folder)}, {"source": str(tmp_path), "out": str(folder / "out")}):
        assert "is not UTF-8" in error(tmp_path, **options)
    assert "document_start: \\udcff is not UTF-8" in error(tmp_path, source=str(tmp_path), document_start="\udcff")
    make(tmp_path, source=str(tmp_path))  # a name in it does no harm


def test_dataset_mistakes(tmp_path):
    def load_error(path):
        with pytest.raises(UserError) as caught:
            DatasetInfo.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"--out {tmp_path / 'none'}`, or set data.source" in load_error(tmp_path / "none")
    assert "if it was moved, give its --data.path" in load_error(tmp_path / "none")
    assert "has no dataset.json" in load_error(tmp_path)
    write_rows(tmp_path / "a.jsonl")
    assert (
        f"is a file, not a prepared dataset; run `python -m trainer prepare --source {tmp_path}/a.jsonl"
        in load_error(tmp_path / "a.jsonl")
    )
    _, out = make(tmp_path, source=str(tmp_path / "a.jsonl"))
    file = out / "dataset.json"
    good = json.loads(file.read_text())
    unsealed = {key: value for key, value in good.items() if key != "digest"}
    for content, message in [
        ('{"format": 1', "malformed"),
        ("[]", "malformed"),
        (json.dumps({**good, "format": 4}), "its digest is not that of its content"),
        (json.dumps({**unsealed, "format": 4}), "format 4, this version reads 1 to 3"),
        (json.dumps({key: value for key, value in good.items() if key != "splits"}), "malformed"),
        (json.dumps({**good, "tokenizer": {"name": "x"}}), "malformed"),
    ]:
        file.write_text(content)
        assert message in load_error(out)


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    # Also where a shell runs us in the background.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def children(pid) -> list[int]:
    """Tokenising processes that `pid` started (its other child only tracks resources)."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def running(tmp_path):
    """A prepare that has begun to write, with work for long enough: (process, its workers, source, out)."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs /proc")
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("some words\nand lines\n" * 4_000_000)  # 84 MB
    process = start(source, out, 2)
    shards = tmp_path / ".out.partial" / "train"
    wait_for(lambda: list(shards.glob("shard*")))
    yield process, children(process.pid), source, out
    process.kill()
    process.wait()


@pytest.mark.slow
def test_kill_then_run_again(running):
    process, workers, source, out = running
    process.kill()
    process.wait()
    assert not out.exists()
    with pytest.raises(UserError, match="did not finish"):
        DatasetInfo.load(out)
    wait_for(lambda: not any(map(alive, workers)))  # no process stays behind
    source.write_text("some words\nand lines\n" * 1000)
    again = start(source, out, 2)
    assert again.wait(60) == 0, again.stderr.read()
    assert DatasetInfo.load(out).splits["train"].documents == 1
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.txt", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "everyone by Ctrl-C"])
def test_a_killed_worker_or_ctrl_c_end_with_one_line(running, victim):
    process, workers, source, out = running
    assert len(workers) == 2
    if victim == "worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        for pid in (*workers, process.pid):
            os.kill(pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    *before, last = said.strip().split("\n")
    assert re.search("process died" if victim == "worker" else "was interrupted", last)
    assert not any("Traceback" in line for line in before)
    assert [path.name for path in out.parent.iterdir()] == ["a.txt"]
    wait_for(lambda: not any(map(alive, workers)))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    code = """
import resource, sys
from trainer.core.config import PrepareConfig
from trainer.data.prepare import prepare
def peak(source, out):
    prepare(PrepareConfig(source=source, out=out, tokenizer="bytes", workers=1, shard_megabytes=4), log=print)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = peak(sys.argv[1], sys.argv[3])
print(peak(sys.argv[2], sys.argv[4]) - small)
"""
    (tmp_path / "small.txt").write_text("some words\nand lines\n" * 500_000)
    (tmp_path / "large.txt").write_text("some words\nand lines\n" * 4_000_000)
    names = [str(tmp_path / name) for name in ("small.txt", "large.txt", "out1", "out2")]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 30  # MiB, for 73 MB more


@pytest.mark.slow
def test_streaming_is_imported_past_a_broken_torchvision(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").touch()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torchvision.part\nraise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = """
import sys
from trainer.data.mds import import_streaming
assert import_streaming() is import_streaming()
assert import_streaming().MDSWriter and import_streaming().StreamingDataset
assert not [name for name in sys.modules if name.split(".")[0] in ("torchvision", "transformers")]
"""
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr.decode()


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("whole", WHOLE)
def test_token_counts_of_real_text(tmp_path, whole):
    """Of a part of enwiki-2015, and of all."""
    gpt2 = str(DATA / "tokenizers" / "gpt2")
    source, valid = DATA / "enwiki-2015", str(DATA / "wikitext-2-raw" / "wiki.valid.raw")
    tokens, documents, words = 342_115, 114, 249_722
    if whole:
        tokens, documents, words = 23_846_858, 6_533, 17_584_503
    else:
        source /= "enwiki-2015-train-011.jsonl"
    info, _ = make(tmp_path, source=str(source), tokenizer=gpt2, workers=2, sample_length=1024)
    assert sum(split.tokens for split in info.splits.values()) == tokens + documents
    assert sum(split.documents for split in info.splits.values()) == documents
    assert sum(split.words for split in info.splits.values()) == words
    info, _ = make(tmp_path, source=valid, validation_source=valid, tokenizer=gpt2, out=str(tmp_path / "valid"))
    assert info.splits["validation"].tokens == 249_887 + 1
    assert info.splits["train"].bytes == 1_146_846


def test_characters_are_those_of_all_training_text(tmp_path):
    """The validation text has no say in the vocabulary: what only it holds is unknown, and told."""
    (tmp_path / "train.txt").write_text("abé\n" * 200_000 + "z")
    (tmp_path / "validation.txt").write_text("abq\n" * 200)
    lines = []
    config = PrepareConfig(source=str(tmp_path), tokenizer="chars", workers=1, out=str(tmp_path / "out"))
    info = prepare.prepare(config, log=lines.append)
    assert f"reading {tmp_path} once for its characters" in lines
    assert "tokenizer chars: 7 ids, <|endoftext|> (id 5) ends documents" in lines
    assert info.splits["train"].bytes == 200_000 * 5 + 1 and info.splits["validation"].bytes == 200 * 3
    assert any(line.startswith("warning: the tokenizer has no id for") and "(such as q)" in line for line in lines)


# -- document_start that searches for ever -----------------------------------------------------------------------------


@pytest.mark.parametrize("interrupts", [False, True])
def test_an_endless_search_is_told_and_control_c_ends_it(tmp_path, monkeypatch, interrupts):
    """Each further a doubles the work: some seconds where nothing interrupts it, and a tenth of one."""
    monkeypatch.setattr(progress, "STILL_SECONDS", 0.01)
    (tmp_path / "text.txt").write_text("b\n" + "a" * (23 if interrupts else 19) + "b\n" + "text\n" * 100)
    said = []

    def log(line):
        if "one line" in line:
            said.append(line)
            if interrupts:
                os.kill(os.getpid(), signal.SIGINT)

    wanted = PrepareConfig(
        source=str(tmp_path / "text.txt"),
        tokenizer="bytes",
        document_start="(a+)+$",
        sample_length=16,
        out=str(tmp_path / "data"),
        workers=1,
    )
    before = signal.getsignal(signal.SIGALRM)
    if interrupts:
        with pytest.raises(MachineError, match="was interrupted"):
            prepare.prepare(wanted, log)
        assert not (tmp_path / "data").exists()
    else:
        with pytest.raises(UserError, match="no text for the validation split"):
            prepare.prepare(wanted, log)
    assert len(said) == 1 and said[0].startswith("document_start: the search in one line of ")
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
