"""Tokenizers: the fast encoders agree with the stored tokenizer.json, and nothing a text holds becomes special."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.core.errors import MachineError, UserError
from trainer.data.coder import Coder, keeps_all_text
from trainer.data.learn import learn_bpe, learn_in_child
from trainer.data.tokenizers import Tokenizer, get_tokenizer

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
    assert keeps_all_text(json.loads((NEOX / "20B_tokenizer.json").read_bytes()))
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


def saved(tmp_path, model, name="tokenizer.json", special=(), pre=None, **state):
    """The tokenizer.json of a model, with what the keyword arguments put into it."""
    made = library.Tokenizer(model)
    made.pre_tokenizer = pre
    made.add_special_tokens(list(special))
    path = tmp_path / name
    made.save(str(path))
    path.write_text(json.dumps({**json.loads(path.read_text()), **state}))
    return path


WORDS = {"a": 0, "b": 1, "</s>": 2, "?": 3}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
}


@pytest.mark.parametrize(("key", "state"), [("truncation", TRUNCATION), ("padding", PADDING)])
def test_state_that_cuts_or_pads_is_switched_off(tmp_path, key, state):
    path = saved(
        tmp_path,
        library.models.WordLevel(WORDS, unk_token="?"),
        pre=library.pre_tokenizers.Whitespace(),
        **{key: state},
    )
    tokenizer = get_tokenizer(str(path))
    assert tokenizer.encode("a b a b").tolist() == [0, 1, 0, 1]
    assert tokenizer.notes == [f"tokenizer tokenizer: switched off its {key}; no text is cut or padded"]
    tokenizer.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())[key] is None
    assert hashlib.sha256((tmp_path / "again.json").read_bytes()).hexdigest() == tokenizer.sha256
    assert Tokenizer.from_file(tmp_path / "again.json").sha256 == tokenizer.sha256
    # A dataset that was prepared when such a file was stored as it is is still known by its hash.
    stored = Tokenizer.from_file(path)
    assert stored.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stored.encode("a b a b").tolist() == [0, 1, 0, 1]


def test_merges_are_never_dropped_at_random(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "random.json").write_text(json.dumps(content))
    tokenizer = get_tokenizer(str(tmp_path / "random.json"))
    assert tokenizer.sha256 == trained.sha256 and "switched off its dropout" in tokenizer.notes[0]
    stored = Tokenizer.from_file(tmp_path / "random.json")
    assert stored.encode(CORPUS[0]).tolist() == trained.encode(CORPUS[0]).tolist()
    assert stored.sha256 == hashlib.sha256((tmp_path / "random.json").read_bytes()).hexdigest()


UNIGRAM = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "</s>abu nk"[:-1]), ("ab", -2.0)]
MODELS = {
    "Unigram": library.models.Unigram(UNIGRAM, 0),
    "WordLevel": library.models.WordLevel({**WORDS, "<unk>": 4}, unk_token="<unk>"),
    "BPE": library.models.BPE(
        {c: i for i, c in enumerate(["<", "/", "s", ">", "a", "b", "</", "s>", "</s>"])},
        [("<", "/"), ("s", ">"), ("</", "s>")],
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("special", [("</s>",), ()])
def test_text_never_becomes_the_end_of_text(tmp_path, name, special):
    """Also where the model's own vocabulary has it, as token or as a merge of others."""
    tokenizer = get_tokenizer(str(saved(tmp_path, MODELS[name], special=special)))
    end = tokenizer.eot_id
    assert tokenizer.decode([end]) == "</s>"
    text = "</s>" if name == "WordLevel" else "ab</s>a"
    ids = tokenizer.encode(text)
    assert end not in ids
    if name != "WordLevel":
        assert tokenizer.decode(ids).replace(" ", "") == text
    assert end not in get_tokenizer(str(saved(tmp_path, MODELS[name], special=special))).encode("</s></s>" * 20)


def test_a_special_token_that_is_not_marked_so_is_not_found_in_text_either(tmp_path):
    path = saved(tmp_path, MODELS["BPE"])
    content = json.loads(path.read_text())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] = [{"id": 8, "content": "</s>", **token}]
    path.write_text(json.dumps(content))
    tokenizer = get_tokenizer(str(path))
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.eot_id == 8 and 8 not in ids and len(ids) > 3


def test_characters_without_an_id_are_told(tmp_path):
    letters = library.models.BPE({c: i for i, c in enumerate("abé")}, [])
    tokenizer = get_tokenizer(str(saved(tmp_path, letters)))
    ids, lost = tokenizer.encode_telling_losses("a x字\né b")
    assert (ids.tolist(), lost) == ([0, 2, 1], "x字")
    words = library.models.WordLevel(WORDS, unk_token="?")
    tokenizer = get_tokenizer(str(saved(tmp_path, words, pre=library.pre_tokenizers.Whitespace())))
    ids, lost = tokenizer.encode_telling_losses("a never b")
    assert (ids.tolist(), lost) == ([0, 3, 1], "never")


def test_an_unknown_token_that_is_the_end_of_text_does_not_stand_for_text(tmp_path):
    words = library.models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>")
    tokenizer = get_tokenizer(str(saved(tmp_path, words, pre=library.pre_tokenizers.Whitespace())))
    ids, lost = tokenizer.encode_telling_losses("a never a")
    assert (ids.tolist(), lost) == ([0, 0], "never")


def test_the_end_of_text_can_be_named(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {
        t.replace("<|endoftext|>", "<|im_end|>"): i for t, i in content["model"]["vocab"].items()
    }
    content["added_tokens"][0]["content"] = "<|im_end|>"
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(content))
    appended = get_tokenizer(str(path))
    assert (appended.vocab_size, appended.eot_id) == (301, 300)
    assert "<|endoftext|> was appended" in appended.notes[0] and "(its special tokens: <|im_end|>)" in appended.notes[0]
    named = get_tokenizer(str(path), end_of_text="<|im_end|>")
    assert (named.vocab_size, named.eot_id, named.notes) == (300, 299, [])
    named.save(tmp_path / "named.json")
    again = Tokenizer.from_file(tmp_path / "named.json", eot_id=299)
    assert (again.eot_id, again.sha256, again.vocab_size) == (299, named.sha256, 300)
    assert 299 not in again.encode("a <|im_end|> b")
    with pytest.raises(UserError, match="end_of_text: 'nope' is not a token of tokenizer chat "):
        get_tokenizer(str(path), end_of_text="nope")
    with pytest.raises(UserError, match="end_of_text: 'nope'"):
        get_tokenizer("bytes", end_of_text="nope")


def test_a_pattern_that_the_library_gives_up_on_is_one_line(tmp_path, capfd):
    pre = library.pre_tokenizers.Split(library.Regex("(a+)+$"), "isolated")
    tokenizer = get_tokenizer(str(saved(tmp_path, library.models.WordLevel(WORDS, unk_token="?"), pre=pre)))
    with pytest.raises(UserError, match="cannot encode this text: the tokenizers library gave up") as caught:
        tokenizer.encode("a" * 60 + "b")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_too_little_to_learn_is_told():
    tokenizer = get_tokenizer("train-bpe:8192", ["x" * 100])
    assert tokenizer.vocab_size < 300
    assert f"for 8,192 ids; only {tokenizer.vocab_size:,} were learned" in tokenizer.notes[0]
    assert get_tokenizer("train-bpe:257", []).notes == []


def test_learning_in_a_child_gives_the_same_and_its_end_is_told(monkeypatch):
    assert learn_in_child(299, CORPUS) == learn_bpe(299, CORPUS)

    def texts():
        import multiprocessing

        yield "some text"
        [child] = multiprocessing.active_children()
        child.kill()
        child.join()
        yield from ["more text"] * 10_000

    with pytest.raises(MachineError, match="the process that learns the tokenizer died"):
        learn_in_child(299, texts())


CHARACTERS = ["to be, or not to be\n", "that is the question: é字😀\n"]


@pytest.fixture(scope="module")
def chars():
    return get_tokenizer("chars", CHARACTERS)


def test_characters_are_sorted_and_end_of_text_and_unknown_follow(chars):
    alphabet = sorted(set("".join(CHARACTERS)))
    assert (chars.vocab_size, chars.eot_id, chars.name) == (len(alphabet) + 2, len(alphabet), "chars")
    assert [chars.decode([i]) for i in range(chars.vocab_size)] == [*alphabet, "<|endoftext|>", "<unk>"]
    assert chars.encode("to é😀").tolist() == [alphabet.index(c) for c in "to é😀"]
    # The order of the text plays no part, nor how it comes in parts.
    assert chars.sha256 == get_tokenizer("chars", list("".join(reversed(CHARACTERS)))).sha256
    assert get_tokenizer("chars", ["b\ud800a"]).vocab_size == 4


def test_characters_agree_with_the_library(chars, tmp_path):
    plain = reference(chars, tmp_path)
    for text in (*CHARACTERS, "", "a<|endoftext|>b<unk>", "q z\u3000!\U0010ffff"):
        ids, lost = chars.encode_telling_losses(text)
        assert ids.dtype == np.uint32 and ids.tolist() == plain.encode(text, add_special_tokens=False).ids
        assert chars.decode(ids) == plain.decode(ids.tolist(), skip_special_tokens=False)
        assert chars.eot_id not in ids
        # As the encoder of any other tokenizer.json tells it.
        general = Coder(plain, json.loads((tmp_path / "tokenizer.json").read_bytes()), "<|endoftext|>", "chars")
        assert lost == general(text)[1] and ids.tolist() == general(text)[0].tolist()
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", eot_id=chars.eot_id)
    assert again.sha256 == chars.sha256 and again.encode(CHARACTERS[1]).tolist() == chars.encode(CHARACTERS[1]).tolist()
    with pytest.raises(UnicodeEncodeError):
        chars.encode("\ud800")


def test_characters_without_an_id_are_lost_but_for_white_space(chars):
    ids, lost = chars.encode_telling_losses("zeit\u3000!")
    assert lost == "z!" and (ids == chars.vocab_size - 1).tolist() == [True, False, False, False, True, True]


def test_a_character_that_ends_documents_is_none_of_the_text(chars):
    lines = get_tokenizer("chars", CHARACTERS, end_of_text="\n")
    assert lines.decode([lines.eot_id]) == "\n" and lines.eot_id not in lines.encode(CHARACTERS[0])


@pytest.mark.parametrize("name", ["bytes", "chars"])
def test_ten_megabytes_a_second(name):
    """The simple tokenizers take little of the time of `prepare`: the goal is 10 MB/s on one core, and they do hundreds."""
    text = "".join(CORPUS) * 500
    tokenizer = get_tokenizer(name, [text])
    parts = [text[start : start + 65_536] for start in range(0, len(text), 65_536)]
    began = time.process_time()
    for part in parts:
        tokenizer.encode_telling_losses(part)
    assert len(text.encode()) / (time.process_time() - began) > 10e6
