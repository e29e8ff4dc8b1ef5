"""Sources: every kind is read whole, in order and in small pieces, and every mistake is one line that says where."""

import gzip
import json
import re
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import CorpusConfig
from trainer.data import sources
from trainer.data.sources import CHUNK, open_source, open_sources, to_pieces, unread
from trainer.data.tokenizers import get_tokenizer
from trainer.errors import UserError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def documents(spec, split=None, **options):
    """{split: [texts]} of a source."""
    config = CorpusConfig(**options)
    found, parts = {}, []
    for piece in open_source(str(spec), config, split).pieces():
        parts.append(piece.text(config.text_field))
        if piece.ends_document:
            found.setdefault(piece.split, []).append("".join(parts))
            parts = []
    assert not parts, "the last piece ends a document"
    return found


def train(spec, **options):
    return documents(spec, "train", **options)["train"]


def error(spec, split="train", **options):
    with pytest.raises(UserError) as caught:
        documents(spec, split, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def write_rows(path, rows, field="text"):
    text = "".join(json.dumps({field: row}, ensure_ascii=False) + "\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo é\n\n".encode())
    assert train(path) == ["one\r\ntwo é\n\n"]


def test_home_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train("~/a.txt") == ["text"]


def test_folder_is_read_sorted_below_and_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.md", "b/a.raw", "b/b.tokens", "a.text", ".hidden.txt", ".git/x.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    write_rows(tmp_path / "b" / "c.jsonl", ["row 1", "row 2"])
    assert train(tmp_path) == ["a.text", "b/a.raw", "b/b.tokens", "row 1", "row 2", "z.md"]


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path):
    def line():
        [source] = open_sources(CorpusConfig(source=str(tmp_path)))
        return unread(source)

    for name in ("a.txt", ".hidden.html"):
        (tmp_path / name).write_text(name)
    assert line() is None
    for name in ("a.html", "b.html", "LICENCE"):
        (tmp_path / name).write_text(name)
    assert line() == f"{tmp_path}: left out what is no text by its name: 2 .html, 1 without a suffix"
    [source] = open_sources(CorpusConfig(source=str(tmp_path / "LICENCE")))
    assert unread(source) is None


def test_missing_empty_and_useless_sources(tmp_path):
    assert "no such file" in error(tmp_path / "nothing")
    (tmp_path / "empty.txt").touch()
    assert "is empty" in error(tmp_path / "empty.txt")
    assert "is empty" in error(tmp_path / "empty.txt", split=None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").touch()
    assert "holds no text" in error(tmp_path / "folder")
    assert "python-stdlib" in error("builtin:other")
    assert "document_start" in error(tmp_path / "empty.txt", document_start="(")
    with pytest.raises(UserError, match="source: is not set"):
        open_sources(CorpusConfig())
    with pytest.raises(UserError, match="validation_fraction"):
        open_sources(CorpusConfig(source=str(tmp_path), validation_fraction=0.0))


@pytest.mark.parametrize("place", [0, 5, (1 << 18) - 1, 300_000])
def test_bytes_that_are_not_utf8_are_named(tmp_path, place):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * place + b"\xc3(")
    assert f"{path}: not UTF-8 at byte {place} " in error(path)
    path.write_bytes(b"x" * place + b"\xc3")  # the file ends inside a character
    assert f"{path}: not UTF-8 at byte {place} " in error(path)


def test_characters_across_block_borders_survive(tmp_path):
    text = "x" + "é€😀" * 100_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert train(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write_rows(tmp_path / name, ["one", "zwei ü", "three\n"], "body")
    assert train(path, text_field="body") == ["one", "zwei ü", "three\n"]


def test_jsonl_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = [f"row {i} " * 50 for i in range(5000)]
    plain = write_rows(tmp_path / "a.jsonl", rows).read_bytes()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(plain[:700]) + zstandard.compress(plain[700:]))  # two frames
    assert train(path) == rows
    path.write_bytes(b"no zstandard at all")
    assert f"{path}: damaged" in error(path)


def test_jsonl_mistakes_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    cases = {
        b'{"text": ': "not valid JSON",
        b'{"title": "t", "body": "b"}': "no field 'text'; set text_field to one of: title, body",
        b'{"text": 3}': "field 'text' holds int, not text",
        b'["text"]': "expected a JSON object, found list",
        b'{"text": "\xff"}': "not UTF-8",
        b"[" * 100_000: "not valid JSON",
    }
    for line, message in cases.items():
        path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
        assert error(path).startswith(f"{path}:3: {message}")


def test_cut_off_gzip(tmp_path):
    path = write_rows(tmp_path / "a.jsonl.gz", ["some text"] * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: damaged or cut-off gz" in error(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [f"row {i}" for i in range(1000)]
    parquet.write_table(pyarrow.table({"text": rows, "id": list(range(1000))}), path, row_group_size=300)
    assert train(path) == rows
    assert "no field 'body'; set text_field to one of: text, id" in error(path, text_field="body")
    assert f"{path}:row 1: field 'id' holds int" in error(path, text_field="id")
    path.write_bytes(b"not parquet")
    assert f"{path}: not a readable .parquet file" in error(path)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("pyarrow", "a.parquet", "parquet"), ("zstandard", "a.jsonl.zst", "zstd"), ("datasets", "hf://x", "hf")],
)
def test_missing_library_says_how_to_install_it(tmp_path, monkeypatch, module, name, extra):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / name
    if "://" not in name:
        path.write_bytes(b"x")
    assert f"pip install 'crescendo-lm[{extra}]'" in error(name if "://" in name else path)


class FakeHub(types.ModuleType):
    """Stands for the `datasets` library."""

    def __init__(self, rows):
        super().__init__("datasets")
        self.config = types.SimpleNamespace(HF_DATASETS_TRUST_REMOTE_CODE=True)
        self.rows = rows
        self.calls = []

    def load_dataset(self, *names, **options):
        self.calls.append((names, options))
        if isinstance(self.rows, Exception):
            raise self.rows
        return iter(self.rows)


def test_hub_names(monkeypatch):
    hub = FakeHub([{"text": "one"}, {"text": "two"}])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for spec in ("hf://imdb", "hf://own/name:test", "hf://Salesforce/wikitext/wikitext-103-raw-v1:validation"):
        assert train(spec) == ["one", "two"]
    options = [{"split": split, "streaming": True} for split in ("train", "test", "validation")]
    names = [("imdb",), ("own/name",), ("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert hub.calls == list(zip(names, options, strict=True))
    assert hub.config.HF_DATASETS_TRUST_REMOTE_CODE is False
    assert open_source("hf://imdb", CorpusConfig()).total_bytes is None
    assert "expected hf://NAME" in error("hf://a/b/c/d")


def test_hub_mistakes(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(ConnectionError("no way\nto get there")))
    assert "hf://imdb: cannot be read from the Hugging Face hub" in error("hf://imdb")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([{"text": "one"}, {"body": "two"}]))
    assert error("hf://imdb").startswith("hf://imdb:row 2: no field 'text'")


def test_standard_library():
    source = open_source("builtin:python-stdlib", CorpusConfig())
    names = [path.name for path in source.files]
    assert len(names) > 300 and "argparse.py" in names
    assert not any({"site-packages", "test", "idlelib"} & set(path.parts[-4:]) for path in source.files)
    found = documents("builtin:python-stdlib")
    assert any("class ArgumentParser(" in text for split in found.values() for text in split)
    assert found["validation"]


def test_document_start_in_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n = A = \none\n == deeper == \n = B = \ntwo\n = C = \nthree")
    expected = [" \n", " = A = \none\n == deeper == \n", " = B = \ntwo\n", " = C = \nthree"]
    assert train(path, document_start="^ = [^=]") == expected
    (tmp_path / "b.txt").write_text("a new file\n")
    assert train(tmp_path, document_start="^ = [^=]") == [*expected, "a new file\n"]


def test_document_start_sees_only_the_beginning_of_an_overlong_line(tmp_path):
    text = "x" * (3 * CHUNK) + "\n" + "B" + "y" * (2 * CHUNK) + " B\nB end"
    path = tmp_path / "a.txt"
    path.write_text(text)
    long, second, last = train(path, document_start="^(B|y)")
    assert long + second + last == text
    assert (second[0], last) == ("B", "B end")


def test_document_start_in_rows(tmp_path):
    rows = ["", " = A = \n", "", "one\n", " = B = \n", "", "two\n"]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert train(path, document_start="^ = ") == [" = A = \none\n", " = B = \ntwo\n"]


def test_lone_text_file_is_halved_at_a_line_start(tmp_path):
    lines = [f"line {i} é\n" for i in range(1000)]
    path = tmp_path / "a.txt"
    path.write_text("".join(lines), encoding="utf-8")
    found = documents(path, validation_fraction=0.1)
    (first,), (second,) = found["train"], found["validation"]
    assert first + second == "".join(lines) and second in "".join(lines[-101:]) and second.startswith("line 9")
    assert 0.09 < len(second) / len(first + second) <= 0.1


def test_halves_of_odd_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\nsecond and last")
    assert documents(path) == {"train": ["first\n"], "validation": ["second and last"]}
    path.write_text("a\nb\n")
    assert documents(path) == {"train": ["a\n"], "validation": ["b\n"]}
    path.write_text("only one line\n")
    assert "set validation_source" in error(path, split=None)


def test_documents_are_held_out_whole_and_always_the_same(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [f"row {i}" for i in range(5000)])
    found = documents(path, validation_fraction=0.1)
    assert found == documents(path, validation_fraction=0.1)
    assert sorted(found["train"] + found["validation"]) == sorted(f"row {i}" for i in range(5000))
    assert 400 < len(found["validation"]) < 600


def test_few_files_still_give_a_validation_document(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n")
    found = documents(tmp_path)
    assert found["validation"] == ["file 1\n"] and len(found["train"]) == 4


def test_validation_source_takes_every_document(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["1", "2", "3"])
    write_rows(tmp_path / "b.jsonl", ["4", "5"])
    config = CorpusConfig(source=str(tmp_path / "a.jsonl"), validation_source=str(tmp_path / "b.jsonl"))
    pieces = [piece for source in open_sources(config) for piece in source.pieces()]
    assert [piece.split for piece in pieces] == ["train"] * 3 + ["validation"] * 2


def test_pieces_are_small_and_reading_does_not_run_ahead(tmp_path):
    path = tmp_path / "a.txt"
    text = "some words to read\n" * 200_000
    path.write_text(text)
    source = open_source(str(path), CorpusConfig(), "train")
    pieces = source.pieces()
    first = next(pieces)
    assert source.bytes_read <= 1 << 19 < source.total_bytes == len(text)
    rest = list(pieces)
    assert all(0 < len(piece.data) <= CHUNK for piece in [first, *rest])
    assert [piece.ends_document for piece in rest] == [False] * (len(rest) - 1) + [True]
    assert first.data + "".join(piece.data for piece in rest) == text


@pytest.mark.parametrize("text", ["x" * 300_000, " " * 300_000, "\n" * 300_000, "a\t" * 150_000, "字。\n" * 90_000])
def test_odd_texts_are_cut_too(text):
    pieces = list(to_pieces([(text, True)], "here"))
    assert "".join(piece.data for piece in pieces) == text
    assert all(0 < len(piece.data) <= CHUNK for piece in pieces)


TOKENIZER = get_tokenizer(
    "train-bpe:600", ["a \n b  \n\n cd\n e's  f.\n\n\n1 2\t3 \r\n  x" * 20, "def f(x):\n    x = 1\n" * 20]
)


@given(st.text(alphabet=" \n\t\r\u00a0abc'sd12.,é\u3000。", max_size=30))
def test_cuts_never_change_tokens_where_a_good_place_exists(text):
    whole = TOKENIZER.encode(text).tolist()
    good = [m.start() for m in re.finditer(r"(?<=\S)(?= \S)", text)]
    good += [m.end() for m in re.finditer(r"(?<=\S)\n(?=\S)", text)]
    for at in good:
        assert [*TOKENIZER.encode(text[:at]), *TOKENIZER.encode(text[at:])] == whole


@needs_data
@pytest.mark.parametrize("tokenizer", ["gpt2", "gpt-neox-20b"])
@pytest.mark.parametrize("name", ["wikitext-2-raw/wiki.valid.raw", "tinyshakespeare/input.txt"])
def test_pieces_of_real_text_give_the_tokens_of_the_whole(monkeypatch, tokenizer, name):
    monkeypatch.setattr(sources, "CHUNK", 4096)  # many cuts
    encoder = get_tokenizer(str(DATA / "tokenizers" / tokenizer))
    text = (DATA / name).read_text(encoding="utf-8")[:400_000]
    pieces = list(to_pieces([(text, True)], name))
    assert len(pieces) > 90
    assert [i for piece in pieces for i in encoder.encode(piece.data)] == encoder.encode(text).tolist()
