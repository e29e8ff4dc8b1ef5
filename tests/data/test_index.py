"""What describes a dataset is checked, not trusted: every digit of it, and whatever a stranger's remote may say."""

import hashlib
import json
import re
import shutil

import pytest
from conftest import open_split

from trainer.core.config import DataConfig, PrepareConfig
from trainer.core.errors import Damaged, UserError
from trainer.core.files import DIGEST, digest_of
from trainer.data import dataset
from trainer.data.dataset import DatasetInfo
from trainer.data.prepare import prepare
from trainer.data.stream import find_dataset

SMALL_FILES = ("dataset.json", "tokenizer.json", "train/index.json", "validation/index.json")


def find(folder, **data):
    return find_dataset(DataConfig(path=str(folder), **data))


def change(path, edit):
    """The JSON file at `path` with `edit` made to its content."""
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def as_format_1(folder):
    """The dataset's description as it was written before there were digests."""

    def edit(content):
        del content[DIGEST], content["indexes"], content["lengths"], content["columns"]
        content["format"] = 1

    change(folder / "dataset.json", edit)


def sign(folder):
    """dataset.json made to fit whatever lies beside it, as one who means ill can."""

    def edit(content):
        content["indexes"] = {
            split: hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest()
            for split in content["splits"]
        }
        hashes = {split: dataset.shard_hashes(folder / split) for split in content["splits"]}
        content["fingerprint"] = dataset.fingerprint(content["tokenizer"]["sha256"], content["sample_length"], hashes)
        content[DIGEST] = digest_of(content)

    change(folder / "dataset.json", edit)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_any_digit_that_changed_is_found(copy, name):
    assert find(copy).sealed
    path = copy / name
    good = path.read_bytes()
    places = [match.start() for match in re.finditer(rb"\d", good)]
    assert len(places) > 30
    for place in places:
        other = b"%d" % ((int(good[place : place + 1]) + 1 + place % 9) % 10)
        path.write_bytes(good[:place] + other + good[place + 1 :])
        with pytest.raises(UserError):
            find(copy)
    path.write_bytes(good)
    assert find(copy)


def test_a_dataset_of_format_1_is_read_and_known_as_such(copy, tiny_dataset):
    as_format_1(copy)
    info = find(copy)
    assert not info.sealed and info.fingerprint == find(tiny_dataset).fingerprint
    assert (open_split(copy).read(3, 90) == open_split(tiny_dataset).read(3, 90)).all()


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """A dataset whose training split has several shards of equally many samples."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "a.txt").write_text("some words\nand lines\n" * 80_000)
    values = {"source": str(folder / "a.txt"), "tokenizer": "bytes", "sample_length": 256, "workers": 1}
    prepare(PrepareConfig(**values, out=str(folder / "data"), shard_megabytes=1), lambda line: None)
    return folder / "data"


@pytest.mark.parametrize("format_1", [True, False])
def test_exchanged_shards_and_other_counts_are_found(two_shards, tmp_path, format_1):
    out = shutil.copytree(two_shards, tmp_path / "data")
    if format_1:
        as_format_1(out)
    path = out / "train" / "index.json"
    good = path.read_text()

    def exchange(index):
        first, second = index["shards"][:2]
        first["raw_data"], second["raw_data"] = second["raw_data"], first["raw_data"]
        first["raw_data"]["basename"], second["raw_data"]["basename"] = "shard.00000.mds", "shard.00001.mds"

    def recount(index):
        index["shards"][0]["samples"] -= 1
        index["shards"][1]["samples"] += 1

    for edit in (exchange, recount):
        change(path, edit)
        with pytest.raises(Damaged):
            open_split(out)
        path.write_text(good)
    assert open_split(out)


HOSTILE = {
    "a path as a name": lambda shard: shard["raw_data"].update(basename="../../stolen.pth"),
    "an absolute name": lambda shard: shard["raw_data"].update(basename="/etc/passwd"),
    "another file's name": lambda shard: shard["raw_data"].update(basename="index.json"),
    "no name": lambda shard: shard["raw_data"].update(basename=["shard.00000.mds"]),
    "a compressed shard": lambda shard: shard.update(
        compression="zstd", zip_data={"basename": "../x", "bytes": 9, "hashes": {}}
    ),
    "a zip file alone": lambda shard: shard.update(zip_data={"basename": "x.zstd", "bytes": 9, "hashes": {}}),
    "compression alone": lambda shard: shard.update(compression="gz"),
    "pickled columns": lambda shard: shard.update(column_encodings=["pkl"]),
    "floats": lambda shard: shard.update(column_encodings=["ndarray:float16"]),
    "another column": lambda shard: shard.update(column_names=["text"]),
    "fixed sizes": lambda shard: shard.update(column_sizes=[8]),
    "another format": lambda shard: shard.update(format="json"),
    "another version": lambda shard: shard.update(version=3),
    "bytes as text": lambda shard: shard["raw_data"].update(bytes="64"),
    "a negative size": lambda shard: shard["raw_data"].update(bytes=-1),
    "a size beyond offsets": lambda shard: shard["raw_data"].update(bytes=2**40),
    "fewer bytes than tokens": lambda shard: shard["raw_data"].update(bytes=1000),
    "samples as text": lambda shard: shard.update(samples=str(shard["samples"])),
    "samples as a float": lambda shard: shard.update(samples=float(shard["samples"])),
    "a truth as a number": lambda shard: shard.update(samples=True),
    "no hash": lambda shard: shard["raw_data"].update(hashes={}),
    "half a hash": lambda shard: shard["raw_data"].update(hashes={"xxh64": "12"}),
    "one key more": lambda shard: shard.update(odd=1),
    "one key less": lambda shard: shard.pop("size_limit"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_index_that_is_none_of_ours_is_refused_before_anything_is_touched(copy, tmp_path, what):
    change(copy / "train" / "index.json", lambda index: HOSTILE[what](index["shards"][0]))
    try:
        sign(copy)
    except (KeyError, TypeError):
        as_format_1(copy)  # a dataset without digests reaches the same checks
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")}
    for path, data in ((copy, {}), (f"file://{copy}", {"cache": str(tmp_path / "cache")})):
        with pytest.raises(Damaged, match="index.json is missing or damaged: .*; copy or prepare"):
            find(path, **data)
    assert before == {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")}
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} <= {".lock"}


def test_a_shard_listed_twice_is_refused(copy):
    change(copy / "train" / "index.json", lambda index: index.update(shards=index["shards"] * 2))
    sign(copy)
    with pytest.raises(Damaged, match="raw_data.basename is 'shard.00000.mds', not 'shard.00001.mds'"):
        find(copy)


def test_an_index_that_is_no_json_or_not_there(copy):
    as_format_1(copy)
    path = copy / "train" / "index.json"
    for text in ("{", "[]", "{}", '{"shards": 3, "version": 2}', '{"shards": [3], "version": 2}', '{"version": 2}'):
        path.write_text(text)
        with pytest.raises(Damaged, match="index.json is missing or damaged"):
            find(copy)
    path.unlink()
    with pytest.raises(Damaged, match="index.json is missing or damaged: there is no such file"):
        find(copy)


DESCRIPTIONS = {
    "floats": lambda info: info.update(dtype="float16"),
    "wider ids than needed": lambda info: info.update(dtype="uint32"),
    "more ids than the type holds": lambda info: info["tokenizer"].update(vocab_size=2**17),
    "an end of text that is no id": lambda info: info["tokenizer"].update(eot_id=257),
    "another split": lambda info: info["splits"].update({"../x": info["splits"]["train"]}),
    "no split": lambda info: info.update(splits={}),
    "more samples than tokens": lambda info: info["splits"]["train"].update(tokens=65),
    "a fraction of a byte": lambda info: info["splits"]["train"].update(bytes=0.5),
    "a truth as a count": lambda info: info["splits"]["train"].update(words=True),
    "a fingerprint that is a path": lambda info: info.update(fingerprint="../" * 20 + "abcd"),
    "samples of no length": lambda info: info.update(sample_length=0),
    "a source that is a list": lambda info: info.update(source=[]),
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_a_description_that_is_none_of_ours_is_refused(copy, tmp_path, what):
    """Also one whose digest is right."""

    def edit(info):
        DESCRIPTIONS[what](info)
        info[DIGEST] = digest_of(info)

    change(copy / "dataset.json", edit)
    for path, data in ((copy, {}), (f"file://{copy}", {"cache": str(tmp_path / "cache")})):
        with pytest.raises(Damaged, match="dataset.json: malformed .*; prepare or copy the dataset again"):
            find(path, **data)


def test_a_description_without_its_digest_or_of_a_later_version(copy):
    change(copy / "dataset.json", lambda info: info.pop(DIGEST))
    with pytest.raises(Damaged, match="has lost its digest"):
        find(copy)
    for version in (4, True, "1", None):
        change(copy / "dataset.json", lambda info, version=version: info.update(format=version))
        with pytest.raises(UserError, match=f"format {version!r}, this version reads 1 to 3"):
            find(copy)


def test_shards_of_another_dataset_are_found(copy, tiny_dataset, tmp_path):
    """Also without digests: the fingerprint is computed anew."""
    as_format_1(copy)
    change(copy / "train" / "index.json", lambda index: index["shards"][0]["raw_data"]["hashes"].update(xxh64="0" * 16))
    with pytest.raises(Damaged, match="the fingerprint in .* does not match its tokenizer and shards"):
        find(copy)


def test_a_run_folder_is_compared_without_shards(tiny_dataset, tmp_path):
    for name in ("dataset.json", "tokenizer.json"):
        shutil.copy(tiny_dataset / name, tmp_path / name)
    assert DatasetInfo.load(tmp_path).splits == find(tiny_dataset).splits
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[:-20])
    with pytest.raises(Damaged, match="tokenizer.json: is not the tokenizer that dataset.json names"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize("path", ["", " ", "a\0b", "~nosuchuser/x"])
def test_paths_that_are_none(path):
    with pytest.raises(UserError, match="^data.path: "):
        find(path)
