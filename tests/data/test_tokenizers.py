"""Tokenizers: the fast encoders agree with the stored tokenizer.json, and nothing a text holds becomes special."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.tokenizers import Tokenizer, get_tokenizer
from trainer.errors import UserError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
GPT2, NEOX = DATA / "tokenizers" / "gpt2", DATA / "tokenizers" / "gpt-neox-20b"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
CORPUS = ["the cat sat on the mat, the cat's hat  \n\n was 123 <|endoftext|> flat\n"] * 50 + ["ünï 字字 \t\t x\n"] * 20

# Characters that Python's Unicode tables know: newer ones may be letters to one library and nothing to the other.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"])) | st.text(
    " \n\t\r\u00a0\u3000\u0085ab's1.é字😀", max_size=40
)


@pytest.fixture(scope="module")
def gpt2():
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data")
    return get_tokenizer(str(GPT2))


@pytest.fixture(scope="module")
def trained():
    return get_tokenizer("train-bpe:300", CORPUS)


def reference(tokenizer, folder):
    """The Hugging Face library's own reading of the stored file."""
    tokenizer.save(folder / "tokenizer.json")
    plain = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.encode_special_tokens = True
    return plain


def check_agreement(tokenizer, plain, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot_id not in ids


@pytest.mark.parametrize("name", ["gpt2", "trained", "bytes"])
def test_fast_encoders_agree_with_the_library(name, request, tmp_path_factory):
    tokenizer = get_tokenizer("bytes") if name == "bytes" else request.getfixturevalue(name)
    plain = reference(tokenizer, tmp_path_factory.mktemp("tokenizer"))

    @settings(deadline=None, max_examples=300)
    @given(TEXT)
    @example("<|endoftext|>")
    @example("  \n\n   a  \n")
    @example("")
    def agree(text):
        check_agreement(tokenizer, plain, text)

    agree()


def test_agreement_on_real_text(gpt2, tmp_path):
    text = (DATA / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")[:200_000]
    check_agreement(gpt2, reference(gpt2, tmp_path), text)


def test_gpt2(gpt2):
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.name) == (50257, 50256, "gpt2")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"


@needs_data
@pytest.mark.parametrize("path", [NEOX, NEOX / "20B_tokenizer.json"])
def test_gpt_neox(path):
    neox = get_tokenizer(str(path))
    assert (neox.vocab_size, neox.eot_id) == (50277, 0)
    assert neox.encode("Hello world!").tolist() == [12092, 1533, 2]
    text = "a<|endoftext|>b   <|padding|>\n\n    x"
    ids = neox.encode(text)
    assert not {0, 1} & set(ids.tolist()) and neox.decode(ids) == text


def test_bytes():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.name) == (257, 256, "bytes")
    assert tokenizer.encode("é\x00a").tolist() == [0xC3, 0xA9, 0, 97]


def test_training_is_deterministic_and_counts_all_ids(trained):
    assert (trained.vocab_size, trained.eot_id, trained.name) == (300, 299, "train-bpe:300")
    assert trained.sha256 == get_tokenizer("train-bpe:300", CORPUS).sha256
    assert len(trained.encode("the cat sat on the mat")) < 10
    assert get_tokenizer("train-bpe:257", []).vocab_size == 257


@pytest.mark.parametrize("size", ["256", "x", "", "-3", "99999999999"])
def test_impossible_sizes(size):
    with pytest.raises(UserError, match="train-bpe:N"):
        get_tokenizer(f"train-bpe:{size}", CORPUS)


def test_an_error_in_the_training_text_comes_through():
    def texts():
        yield "good"
        raise UserError("a.jsonl:2: bad row")

    with pytest.raises(UserError, match="a.jsonl:2: bad row"):
        get_tokenizer("train-bpe:300", texts())


@pytest.mark.parametrize("name", ["gpt2", "trained", "bytes"])
def test_decoding_never_fails(name, request):
    tokenizer = get_tokenizer("bytes") if name == "bytes" else request.getfixturevalue(name)
    assert tokenizer.decode([10**9, -1, tokenizer.vocab_size]) == ""
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("😀")[:1])


def test_saved_and_loaded_again(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    again = Tokenizer.from_file(path)
    assert again.sha256 == trained.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (again.vocab_size, again.eot_id) == (trained.vocab_size, trained.eot_id)


def test_other_spellings_of_the_same_tokenizer_are_the_same(trained, tmp_path):
    """The hub's GPT-2 file writes merges as strings and leaves defaults out; the stored file is one and the same."""
    trained.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_bytes())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["pre_tokenizer"]["use_regex"], content["model"]["ignore_merges"]
    content["model"]["continuing_subword_prefix"] = ""
    hub = tmp_path / "hub.json"
    hub.write_text(json.dumps(content))
    assert get_tokenizer(str(hub)).sha256 == trained.sha256


def test_gpt2_files_under_either_name(gpt2, tmp_path):
    (tmp_path / "vocab.json").write_bytes((GPT2 / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((GPT2 / "vocab.bpe").read_bytes())
    assert get_tokenizer(str(tmp_path)).sha256 == gpt2.sha256


def test_a_file_without_end_of_text_gets_one_id_more(tmp_path):
    plain = library.Tokenizer(library.models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    plain.pre_tokenizer = library.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = get_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (4, 3)
    assert tokenizer.encode("hello world").tolist() == [0, 1]
    tokenizer.save(tmp_path / "again.json")
    again = Tokenizer.from_file(tmp_path / "again.json")
    assert (again.eot_id, again.sha256) == (3, tokenizer.sha256)


@pytest.mark.parametrize("eot", ["</s>", "<eos>", "<|end_of_text|>"])
def test_other_end_of_text_names(tmp_path, eot):
    plain = library.Tokenizer(library.models.WordLevel({"a": 0, eot: 1, "?": 2}, unk_token="?"))
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = get_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (3, 1)


def test_mistakes(tmp_path, monkeypatch):
    def error(spec):
        with pytest.raises(UserError) as caught:
            get_tokenizer(str(spec))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "did you mean gpt2?" in error("gpt-2")
    assert "holds no *tokenizer.json" in error(tmp_path)
    bad = tmp_path / "tokenizer.json"
    bad.write_bytes(b"\xff{")
    assert "not a readable tokenizer.json" in error(bad)
    bad.write_text('{"model": 3}')
    assert "not a readable tokenizer.json" in error(bad)
    (tmp_path / "b.tokenizer.json").write_text("{}")
    assert "several candidates" in error(tmp_path)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "vocab.json").write_text("[]")
    (tmp_path / "files" / "merges.txt").write_text("")
    assert "malformed" in error(tmp_path / "files")

    import huggingface_hub

    def no_network(*names):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    assert "pass a local folder" in error("gpt2")
