"""Datasets that lie elsewhere: seen anew at each start, kept under their fingerprint, whole or not at all."""

import errno
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, open_split

from trainer.core.config import DataConfig, PrepareConfig
from trainer.core.errors import Damaged, MachineError, UserError
from trainer.data import remote
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def find(folder, cache, said=None):
    said = [] if said is None else said
    return find_dataset(DataConfig(path=f"file://{folder}", cache=str(cache)), said.append)


def read(folder, cache):
    return open_split(f"file://{folder}", cache=str(cache)).read(0, 500)


def prepare_again(folder, text):
    shutil.rmtree(folder)
    source = folder.parent / "again.txt"
    source.write_text(text)
    values = {
        "source": str(source),
        "tokenizer": "bytes",
        "sample_length": 64,
        "validation_fraction": 0.1,
        "workers": 1,
    }
    return prepare(PrepareConfig(**values, out=str(folder)), lambda line: None)


def test_remote_data_is_cached_and_checked(tiny_dataset, copy, cache):
    near = open_split(tiny_dataset).read(0, 500)
    np.testing.assert_array_equal(read(copy, cache), near)
    said = []
    info = find(copy, cache, said)
    assert said == []
    shutil.rmtree(copy)  # everything needed is here now
    assert find(copy, cache, said) == info
    (line,) = said
    assert f"cannot fetch file://{copy}/dataset.json: FileNotFoundError" in line and str(cache) in line
    np.testing.assert_array_equal(read(copy, cache), near)


def test_data_prepared_again_is_seen_and_the_old_is_kept(copy, cache):
    first = find(copy, cache)
    old = read(copy, cache)
    aside = shutil.copytree(copy, copy.parent / "aside")
    again = prepare_again(copy, "a dog ran far away.\n" * 1000)
    info = find(copy, cache)
    assert info == again and info.fingerprint != first.fingerprint
    assert not np.array_equal(read(copy, cache), old)
    shutil.rmtree(aside / "train")
    shutil.rmtree(copy)
    shutil.copytree(aside, copy)
    np.testing.assert_array_equal(read(copy, cache), old)  # nothing of it had to be fetched once more


def test_only_the_description_is_fetched_when_nothing_changed(copy, cache, monkeypatch):
    read(copy, cache)
    fetched, fetch = [], remote.fetch
    monkeypatch.setattr(remote, "fetch", lambda *words: fetched.append(words[1]) or fetch(*words))
    read(copy, cache)
    assert fetched == ["dataset.json"]


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json", "train/index.json", "train/shard.00000.mds"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone", "a link", "a link to the same"])
def test_a_damaged_cache_is_mended(copy, cache, tmp_path, name, how):
    good = read(copy, cache)
    (folder,) = (path for path in cache.iterdir() if (path / "train").is_dir())
    path, outside = folder / name, tmp_path / "outside"
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        path.write_bytes(content[:-9] + b"?" + content[-8:])
    else:
        path.unlink()
    mine = content if how == "a link to the same" else b"mine"
    if "link" in how:
        outside.write_bytes(mine)
        path.symlink_to(outside)
    np.testing.assert_array_equal(read(copy, cache), good)
    assert path.read_bytes() == content and not path.is_symlink()
    assert "link" not in how or outside.read_bytes() == mine


def test_a_folder_of_the_cache_that_is_a_link_is_refused(copy, cache, tmp_path):
    read(copy, cache)
    (folder,) = (path for path in cache.iterdir() if (path / "train").is_dir())
    (folder / "train").rename(tmp_path / "elsewhere")
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="train is a link; remove it"):
        read(copy, cache)


def test_damaged_download_is_refused_and_not_kept(copy, cache):
    shard = next((copy / "train").glob("*.mds"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + b"?")
    with pytest.raises(
        Damaged, match=r"cannot fetch shard .*: it arrived damaged twice .*; copy the prepared dataset there"
    ):
        read(copy, cache)
    assert not list(cache.rglob("*.mds"))
    shard.write_bytes(good)
    assert len(read(copy, cache)) == 500


def test_a_remote_that_contradicts_itself_is_not_kept(copy, cache):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(
        Damaged, match="data.path: file://.*/copy: tokenizer.json: is not the tokenizer that dataset.json"
    ):
        find(copy, cache)
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {".lock"}


def test_unreachable_remote_is_one_line(cache):
    with pytest.raises(UserError, match="cannot fetch file:///no/such/place/dataset.json") as caught:
        find("/no/such/place", cache)
    assert not isinstance(caught.value, MachineError)


class Client(Exception):
    """As botocore's, whose answers are mappings."""

    def __init__(self, status):
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class Http(OSError):
    """As that of requests and huggingface_hub."""

    def __init__(self, status):
        self.response = type("Response", (), {"status_code": status})


class Google(Exception):
    def __init__(self, status):
        self.code = status


class LocalEntryNotFoundError(FileNotFoundError, ValueError):
    """As huggingface_hub's, which means that there is no network."""

    response = None


class NoCredentialsError(Exception):
    """As botocore's."""


STATUSES = {404: False, 403: False, 401: False, 429: True, 408: True, 500: True, 503: True}


@pytest.mark.parametrize(
    "error, passes",
    [
        *((kind(status), passes) for kind in (Client, Http, Google) for status, passes in STATUSES.items()),
        (LocalEntryNotFoundError("no network"), True),
        (NoCredentialsError("Unable to locate credentials"), False),
        (FileNotFoundError("x"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("slow"), True),
        (ModuleNotFoundError("boto3"), False),
        (ValueError("Unsupported remote path"), False),
        (RuntimeError("whatever"), True),
    ],
)
def test_errors_that_may_pass_are_told_from_those_to_mend(error, passes):
    assert remote.kind_of(error) is (MachineError if passes else UserError)


def test_a_fault_that_passes_is_tried_again(copy, cache, monkeypatch):
    from streaming.base.storage.download import LocalDownloader

    download, slept, faults = (
        LocalDownloader._download_file_impl,
        [],
        [ConnectionResetError("reset"), TimeoutError("slow")],
    )

    def flaky(self, *words):
        if faults:
            raise faults.pop(0)
        return download(self, *words)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", flaky)
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    assert find(copy, cache).sealed
    assert slept == [0.5, 1.0]
    faults += [ConnectionResetError("reset")] * 3
    with pytest.raises(MachineError, match="cannot fetch .*dataset.json: ConnectionResetError: reset"):
        find(copy, cache.parent / "another")


READER = """
import sys
from trainer.core.config import DataConfig
from trainer.data.stream import Split, TrainStream, find_dataset
data = DataConfig(path=sys.argv[1], cache=sys.argv[2])
stream = TrainStream(Split(data, find_dataset(data), "train"), seed=1, order="windows")
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
