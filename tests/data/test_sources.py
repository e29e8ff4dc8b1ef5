"""Sources: every kind is read whole, in order and in small pieces, and every mistake is one line that says where."""

import gzip
import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.config import CorpusConfig
from trainer.core.errors import UserError
from trainer.data import pieces as pieces_module
from trainer.data import readers
from trainer.data.pieces import CHUNK, to_pieces
from trainer.data.sources import open_source, open_sources
from trainer.data.tokenizers import get_tokenizer

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
    def notes(path=tmp_path):
        [source] = open_sources(CorpusConfig(source=str(path)))
        return source.notes

    for name in ("a.txt", ".hidden.html"):
        (tmp_path / name).write_text(name)
    assert notes() == []
    for name in ("a.html", "b.html", "LICENCE"):
        (tmp_path / name).write_text(name)
    assert notes() == [f"{tmp_path}: left out files whose names are not those of text: 2 .html, 1 without a suffix"]
    assert notes(tmp_path / "LICENCE") == []


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


class Endless:
    """Rows without end, that know how many were asked for and whether their reader let them go."""

    def __init__(self):
        self.given, self.closed = 0, False

    def __iter__(self):
        try:
            while True:
                self.given += 1
                yield {"text": "" if self.given == 3 else f"row {self.given}"}
        finally:
            self.closed = True


def test_max_documents_closes_a_stream(monkeypatch):
    rows = Endless()
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(rows))
    found = documents("hf://imdb", max_documents=4)
    assert found == {"train": ["row 1", "row 4", "row 5", "row 6"], "validation": ["row 2"]}
    assert (rows.closed, rows.given) == (True, 7), "a document ends where the next one begins"
    assert documents("hf://imdb", "validation", max_documents=2) == {"validation": ["row 8", "row 9"]}


def test_max_documents_counts_documents_with_text(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["", "one", "", "two", "three", "four", "five"])
    found = documents(path, max_documents=2)
    assert {split: [text for text in texts if text] for split, texts in found.items()} == {
        "train": ["two", "three"],
        "validation": ["one"],
    }
    assert documents(path, max_documents=100) == documents(path)


def test_max_documents_of_files_that_are_named(tmp_path):
    for name in ("train-0", "train-1", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} row {i}" for i in range(4)])
    for count in (3, 4, 5, 9):
        found, whole = documents(tmp_path, max_documents=count), documents(tmp_path)
        assert found == {split: texts[:count] for split, texts in whole.items()}


def test_max_documents_of_files_whose_ends_are_held_out(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"line of {number}\n" * 200)
    assert documents(tmp_path, max_documents=100) == documents(tmp_path)
    found = documents(tmp_path, max_documents=1)
    assert {split: len(texts) for split, texts in found.items()} == {"train": 1, "validation": 1}


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
    assert documents(path) == {"train": ["only one "], "validation": ["line\n"]}
    path.write_text("x")
    assert "is too short to hold out a part of it" in error(path, split=None)


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
    monkeypatch.setattr(pieces_module, "CHUNK", 4096)  # many cuts
    encoder = get_tokenizer(str(DATA / "tokenizers" / tokenizer))
    text = (DATA / name).read_text(encoding="utf-8")[:400_000]
    pieces = list(to_pieces([(text, True)], name))
    assert len(pieces) > 90
    assert [i for piece in pieces for i in encoder.encode(piece.data)] == encoder.encode(text).tolist()


@pytest.mark.parametrize("mark", ["\r", " ", ""])
def test_a_text_without_line_ends_is_cut_at_another_place(tmp_path, mark):
    words = [f"wörd{i}é" for i in range(1000)]
    text = mark.join(words)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode("utf-8"))
    (first,), (second,) = documents(path, validation_fraction=0.1).values()
    assert first + second == text and 0.09 < len(second) / len(text) < 0.11
    assert first.endswith(mark)


def test_document_start_knows_line_ends_of_other_systems(tmp_path):
    for end in ("\r\n", "\r"):
        path = tmp_path / "a.txt"
        text = end.join(["= A =", "one", "= B =", "two", ""])
        path.write_bytes(text.encode())
        assert train(path, document_start="^= . =$") == [f"= A ={end}one{end}", f"= B ={end}two{end}"]
    rows = write_rows(tmp_path / "a.jsonl", ["= A =\r\n", "one\r\n", "= B =\r\n"])
    assert train(rows, document_start="^= . =$") == ["= A =\r\none\r\n", "= B =\r\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf= one =\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf= two =\nand \xef\xbb\xbf inside")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    assert train(tmp_path) == ["= one =\n", "= two =\nand \ufeff inside", "row"]
    assert train(tmp_path / "b.txt", document_start="^= ") == ["= two =\nand \ufeff inside"]
    assert documents(tmp_path / "b.txt")["train"] == ["= two =\n"]


def test_utf16_and_zeros_are_refused(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes('{"text": "some"}\n'.encode("utf-16"))
        assert f"{path}: is UTF-16, not UTF-8; convert it: iconv" in error(path)
        path.write_bytes('{"text": "some"}\n'.encode("utf-16-le"))
        assert "% of the" in error(path) and "are zero" in error(path)
    path = tmp_path / "torn.txt"
    path.write_bytes(b"x" * (1 << 18) + b"\0" * 10_000)  # as a power cut leaves it
    assert f"from byte {1 << 18} on are zero" in error(path)
    path.write_bytes(b"x" * 1000 + b"\0")
    assert len(train(path)[0]) == 1001


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", "a.json.gz", "a.NDJSON.GZ"])
def test_rows_have_many_suffixes(tmp_path, name):
    path = tmp_path / name
    data = b"".join(b'{"text": "row %d"}\n' % i for i in range(3))
    path.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert train(path) == train(tmp_path) == ["row 0", "row 1", "row 2"]


def test_other_json_in_a_folder_is_left_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["row"])
    (tmp_path / "info.json").write_text('{\n "text": "about the others"\n}')
    (tmp_path / "b.json").write_text('{"title": "about the others"}')
    assert train(tmp_path) == ["row"]
    assert "2 .json" in open_source(str(tmp_path), CorpusConfig()).notes[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(("a.csv", "is a table; convert it to rows of JSON"), ("a.TSV", "is a table"), ("a.idx", "holds numbers")),
        *(
            ("a.mds", "holds numbers"),
            ("a.zip", "is packed"),
            ("a.txt.gz", "is packed"),
            ("a.pdf", "is not plain text"),
        ),
        ("a.arrow", "is not a supported format"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, name, message):
    (tmp_path / name).write_text("text")
    assert f"{tmp_path / name}: {message}" in error(tmp_path / name)


def test_an_array_is_refused(tmp_path):
    for name in ("a.json", "a.jsonl"):
        path = tmp_path / name
        path.write_text('\n [{"text": "one"}, {"text": "two"}]\n')
        assert f"{path}: is one JSON array" in error(path) and "jq -c" in error(path)


def test_cut_off_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = [json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(1000)]
    frames = zstandard.compress(b"".join(rows[:500])), zstandard.compress(b"".join(rows[500:]))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(frames))
    assert len(train(path)) == 1000
    for left in (1, 5, len(frames[1]) - 1, len(frames[1]) // 2):
        path.write_bytes(frames[0] + frames[1][:left])
        assert f"{path}: damaged or cut-off zst file (it ends inside a frame); copy it again" in error(path)
    for name in ("b.jsonl.zst", "b.jsonl.gz"):
        (tmp_path / name).touch()
        assert "has no bytes" in error(tmp_path / name)


def test_zst_with_a_large_window(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(
        compression_params=settings
    ).compressobj()  # of a stream whose size it does not know
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packer.compress(b'{"text": "row"}\n') + packer.flush())
    assert train(path) == ["row"]


def test_an_endless_row_is_named_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROW_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "good"}\n' + b'{"text": "' + b"x" * (1 << 25)))
    assert f"{path}:2: is longer than 1 MiB, too much for one row" in error(path)


def test_nested_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"meta": {"text": "one"}}\n{"meta.text": "two"}\n')
    assert train(path, text_field="meta.text") == ["one", "two"]
    assert "no field 'meta.body'; set text_field to one of: meta" in error(path, text_field="meta.body")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"meta": [{"text": "one"}, None, {"text": None}, {"text": "two"}]}), path)
    assert train(path, text_field="meta.text") == ["one", "two"]
    assert "no field 'text'; set text_field to one of: meta, meta.text" in error(path)


def test_parquet_text_of_other_types(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.large_string()):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", "zwei ü", None], kind)}), path)
        assert train(path) == ["one", "zwei ü"]
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", "one"]).dictionary_encode()}), path)
    assert train(path) == ["one", "one"]
    broken = pyarrow.array([b"one", b"\xff", b"two"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), path)
    assert f"{path}:row 2: field 'text' is not UTF-8 at byte 0" in error(path)
    assert train(path, on_bad_row="skip") == ["one", "two"]


def test_bad_rows_that_are_read_here_can_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "= A"}\nnot JSON\n{"text": null}\n{"text": "\\ud800"}\n{"text": "one"}\n')
    source = open_source(str(path), CorpusConfig(document_start="^=", on_bad_row="skip"), "train")
    for _ in range(2):  # each reading counts anew
        assert [piece.data for piece in source.pieces()] == ["= Aone"]
        assert source.skipped_rows == 2 and source.first_skipped.startswith(f"{path}:2: not valid JSON")


def test_null_is_no_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "one"}\n')
    assert train(path) == ["", "one"]
    hub = FakeHub([{"text": None}, {"text": "one"}])
    sys.modules["datasets"], before = hub, sys.modules.get("datasets")
    try:
        assert train("hf://imdb") == ["one"]
    finally:
        sys.modules.pop("datasets")
        if before:
            sys.modules["datasets"] = before


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        (["a", "b", "c"], "b"),
        (["a", "", "c", "d"], "c"),
        (["", "", "c", "d"], "d"),
        (["a", None, "", "d"], "d"),
        (["a", ""], ""),
    ],
)
def test_an_empty_second_row_is_not_the_validation_document(tmp_path, rows, held):
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert documents(path)["validation"] == [held]


def test_an_empty_second_row_changes_nothing_where_others_are_drawn(tmp_path):
    rows = [f"row {i}" for i in range(1000)]
    full = documents(write_rows(tmp_path / "a.jsonl", rows))
    holed = documents(write_rows(tmp_path / "a.jsonl", [rows[0], "", *rows[2:]]))
    assert holed["validation"] == ["", *full["validation"][1:]] and holed["train"] == full["train"]


def test_links_are_followed_and_loops_end(tmp_path):
    inside, outside = tmp_path / "folder", tmp_path / "elsewhere"
    (inside / "z").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (inside / "z" / "a.txt").write_text("a")
    (outside / "b.txt").write_text("b")
    (outside / "deep" / "c.txt").write_text("c")
    (inside / "link").symlink_to(outside)
    (inside / "again").symlink_to(inside / "z")  # is read once, under its own name
    (inside / "z" / "loop").symlink_to(inside)
    (outside / "deep" / "loop").symlink_to(outside)
    (inside / "one.txt").symlink_to(outside / "b.txt")
    assert train(inside) == ["b", "c", "b", "a"]
    (inside / "z" / "gone").symlink_to(tmp_path / "nowhere")
    assert f"{inside / 'z' / 'gone'}: is a broken link" in error(inside)


def test_what_cannot_be_read_stops(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("a")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"{tmp_path / 'b'}: cannot be read: Permission denied" in error(tmp_path)
    monkeypatch.setattr(os, "scandir", real)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.txt")
    assert f"{tmp_path / 'a.txt'}: may not be read by this user" in error(tmp_path)
    assert f"{tmp_path / 'a.txt'}: may not be read by this user" in error(tmp_path / "a.txt")


def test_what_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is a pipe or a device, which cannot be read twice" in error(tmp_path / "pipe.txt")
    assert "source: standard input cannot be read twice" in error("-")
    assert "source: is empty" in error("")


def named_files(folder, *names, size=1000):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("l"):
            write_rows(folder / name, [f"{name} {i} {'x' * (size // 10)}" for i in range(10)])
        else:
            (folder / name).write_text(f"{name} has text\n" * (size // 10))
    return folder


@pytest.mark.parametrize(
    ("train_file", "valid", "test"),
    [
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train-00000-of-00002.jsonl", "validation-00000.jsonl", "test.jsonl"),
        ("TRAIN.TXT", "dev.txt", "test2.txt"),
        ("train/a.txt", "val/a.txt", "test/b.txt"),
        ("data_train.md", "data_eval.md", "train_test.md"),
    ],
)
def test_files_are_of_the_split_that_their_names_say(tmp_path, train_file, valid, test):
    named_files(tmp_path, train_file, valid, test, "README.md", size=5000)
    (tmp_path / "README.md").write_text("about it\n")
    found = documents(tmp_path)
    assert all(str(Path(valid)) in text for text in found["validation"])
    assert all(str(Path(train_file)) in text or text == "about it\n" for text in found["train"])
    note = open_source(str(tmp_path), CorpusConfig()).notes[0]
    assert "2 for train, 1 for validation; left out: 1 others" in note
    # With a validation source of its own such a folder gives its training text, and as such its validation text.
    assert documents(tmp_path, "train")["train"] == found["train"]
    assert documents(tmp_path, "validation")["validation"] == found["validation"]


def test_test_files_are_left_out_where_no_others_are_for_validation(tmp_path):
    named_files(tmp_path, "train.jsonl", "test.jsonl")
    found = documents(tmp_path, validation_fraction=0.2)
    assert [text[:5] for text in found["train"] + found["validation"]] == ["train"] * 10 and found["validation"]


def test_such_names_among_many_others_are_chance(tmp_path):
    named_files(tmp_path, *(f"{name}.jsonl" for name in ("a", "b", "c", "train", "test", "z")))
    found = documents(tmp_path)
    assert sum(map(len, found.values())) == 60
    assert (
        "1 files with validation or test in their names (such as test.jsonl) are read like all others"
        in (open_source(str(tmp_path), CorpusConfig()).notes[0])
    )


def test_few_large_files_give_their_ends(tmp_path):
    for name, lines in (("README.md", 1), ("big.txt", 10_000), ("large.txt", 5_000)):
        (tmp_path / name).write_text("".join(f"line {i} of {name}\n" for i in range(lines)))
    source = open_source(str(tmp_path), CorpusConfig())
    assert source.ends == {tmp_path / "big.txt", tmp_path / "large.txt"}
    assert "whole files would make validation 64.71% of the text" in source.notes[0]
    found = documents(tmp_path)
    assert [len(found[split]) for split in ("train", "validation")] == [3, 2]
    assert "".join(found["train"][1:2] + found["validation"][:1]) == (tmp_path / "big.txt").read_text()
    share = sum(map(len, found["validation"])) / sum(len(text) for texts in found.values() for text in texts)
    assert 0.009 < share < 0.011


def test_many_files_are_drawn_whole_as_before(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}\n" * 100)
    source = open_source(str(tmp_path), CorpusConfig())
    assert (source.ends, source.notes) == (frozenset(), [])
    assert documents(tmp_path)["validation"] == ["file 1\n" * 100]


def test_names_of_files_cannot_move_the_cursor(tmp_path):
    path = tmp_path / "a\x1b[2Jb.txt"
    path.write_bytes(b"\xff")
    assert "a\\x1b[2Jb.txt: not UTF-8" in error(path)
    assert r"to one of: a\x1b" in error(write_rows(tmp_path / "b.jsonl", ["x"], "a\x1b"))
