"""Tokenizers: one stored format (Hugging Face's tokenizer.json), the fastest encoder that gives the same ids."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError

END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
HUB = {"gpt2": "openai-community/gpt2", "gpt-neox-20b": "EleutherAI/gpt-neox-20b"}
TRAINING_CHARACTERS = 64 << 20  # of the corpus' first training text; more hardly changes the merges
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte value, as byte-level vocabularies spell their tokens."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class Tokenizer:
    """Text to ids and back. Text never becomes a special token: a literal `<|endoftext|>` is encoded as characters."""

    def __init__(self, data: bytes, name: str):
        """`data` is the content of a tokenizer.json. Raises UserError if it is none."""
        import tokenizers

        self.name = name
        try:
            library = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            content = json.loads(data)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"tokenizer {name}: not a readable tokenizer.json ({error})") from None
        eot = next((token for token in END_OF_TEXT if library.token_to_id(token) is not None), None)
        library.add_special_tokens([eot or END_OF_TEXT[0]])  # marks it as special if it is there, appends it if not
        library.encode_special_tokens = True
        if eot is None:
            eot, data = END_OF_TEXT[0], library.to_str().encode()
        self.eot_id = int(library.token_to_id(eot))
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self._library = library
        self._fast: Any = None
        self._byte_ids: np.ndarray | None = None
        tokens = byte_level_tokens(content, eot)
        if tokens is not None:
            self._use_fast(tokens, content["model"], eot)
            data = byte_level_json(content["model"]["vocab"], content["model"]["merges"], eot, self.eot_id)
        self._data = data
        self.sha256 = hashlib.sha256(data).hexdigest()

    def _use_fast(self, ranks: dict[bytes, int], model: dict[str, Any], eot: str) -> None:
        import tiktoken

        self._fast = tiktoken.Encoding(
            self.name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={eot: self.eot_id}
        )
        if not model["merges"]:
            self._byte_ids = np.array([ranks[bytes([byte])] for byte in range(256)], np.uint32)

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> Tokenizer:
        """The tokenizer in a tokenizer.json."""
        path = Path(path).expanduser()
        try:
            return cls(path.read_bytes(), name or path.stem)
        except OSError as error:
            raise UserError(f"{path}: cannot be read as a tokenizer.json ({error.strerror})") from None

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json whose hash is `sha256`."""
        Path(path).write_bytes(self._data)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32, without any special token. Raises UnicodeEncodeError on lone surrogates."""
        if self._byte_ids is not None:
            return self._byte_ids[np.frombuffer(text.encode("utf-8"), np.uint8)]
        if self._fast is not None:
            return self._fast.encode_to_numpy(text, disallowed_special=())
        encoded = self._library.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoded.ids, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Ids out of range are left out, broken UTF-8 becomes U+FFFD, end of text is spelled out."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        if self._fast is not None:
            return self._fast.decode_bytes(known).decode("utf-8", errors="replace")
        return self._library.decode(known, skip_special_tokens=False)


def get_tokenizer(spec: str, texts: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `spec` names (see `--tokenizer`); `train-bpe:N` learns from `texts`. Raises UserError."""
    if spec == "bytes":
        vocabulary = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        return Tokenizer(byte_level_json(vocabulary, [], END_OF_TEXT[0], 256), spec)
    if spec.startswith("train-bpe"):
        return _train(spec, texts if texts is not None else ())
    if spec in HUB:
        return Tokenizer.from_file(_download(spec), spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return Tokenizer.from_file(path)
    near = difflib.get_close_matches(spec, [*HUB, "bytes", "train-bpe:8192"], 1)
    raise UserError(
        f"tokenizer {spec!r}: unknown, and no such file{f'; did you mean {near[0]}?' if near else ''} "
        f"(allowed: {', '.join(HUB)}, bytes, train-bpe:N, a tokenizer.json, or a folder that holds one)"
    )


def _download(name: str) -> str:
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries would drown the one line below
    try:
        cached = huggingface_hub.try_to_load_from_cache(HUB[name], "tokenizer.json")
        return cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(HUB[name], "tokenizer.json")
    except Exception as error:  # network, hub and cache errors have no common base
        raise UserError(
            f"tokenizer {name}: {HUB[name]} cannot be fetched from the Hugging Face hub ({type(error).__name__}); "
            "pass a local folder with its tokenizer.json, or encoder.json and vocab.bpe"
        ) from None


def _from_folder(folder: Path) -> Tokenizer:
    name = folder.resolve().name
    found = sorted(folder.glob("*tokenizer.json"))
    if len(found) == 1:
        return Tokenizer.from_file(found[0], name)
    if len(found) > 1:
        raise UserError(f"tokenizer {folder}: several candidates ({', '.join(p.name for p in found)}); name one file")
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _from_gpt2_files(folder / vocabulary, folder / merges, name)
    raise UserError(
        f"tokenizer {folder}: holds no *tokenizer.json, encoder.json with vocab.bpe, or vocab.json with merges.txt"
    )


def _from_gpt2_files(vocabulary_file: Path, merges_file: Path, name: str) -> Tokenizer:
    try:
        vocabulary = json.loads(vocabulary_file.read_bytes())
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        eot = END_OF_TEXT[0]
        data = byte_level_json(vocabulary, merges, eot, vocabulary.get(eot, len(vocabulary)))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer {vocabulary_file.parent}: malformed vocabulary or merges ({error})") from None
    return Tokenizer(data, name)


def _train(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation, learned from the first 64 M characters of `texts`."""
    import tokenizers

    size = spec.removeprefix("train-bpe:")
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 24:
        raise UserError(f"tokenizer {spec}: expected train-bpe:N with N from 257 (256 bytes, end of text) to 16777216")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=int(size) - 1, min_frequency=2, initial_alphabet=BYTE_CHARACTERS, show_progress=False
    )
    model.train_from_iterator(_first(texts, TRAINING_CHARACTERS), trainer)
    learned = json.loads(model.to_str())["model"]
    data = byte_level_json(learned["vocab"], learned["merges"], END_OF_TEXT[0], len(learned["vocab"]))
    return Tokenizer(data, spec)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def byte_level_json(vocabulary: dict[str, int], merges: Sequence[Any], eot: str, eot_id: int) -> bytes:
    """The tokenizer.json of a GPT-2-style byte-level BPE, the same bytes for the same vocabulary and merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": dict(sorted({**vocabulary, eot: eot_id}.items(), key=lambda item: item[1])),
        "merges": [_pair(merge) for merge in merges],
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": eot_id, "content": eot, **special}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def byte_level_tokens(content: dict[str, Any], eot: str) -> dict[bytes, int] | None:
    """Bytes -> id of a tokenizer.json that is a pure GPT-2-style byte-level BPE; None if it is anything else.

    tiktoken merges by id where BPE merges by rank, so ids must rise with the merges, one new token for each.
    """
    model, pre = content.get("model") or {}, content.get("pre_tokenizer") or {}
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space", True) and pre.get("use_regex", True)
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    if not plain or content.get("normalizer") or model.get("type", "BPE") != "BPE" or any(map(model.get, odd)):
        return None
    if {token["content"] for token in content.get("added_tokens") or []} - {eot} or "merges" not in model:
        return None
    vocabulary = {token: i for token, i in model["vocab"].items() if token != eot}
    merged = [vocabulary.get("".join(_pair(merge)), -1) for merge in model["merges"]]
    order = merged == sorted(set(merged)) and -1 not in merged
    complete = set(BYTE_CHARACTERS) <= set(vocabulary) and len(vocabulary) == 256 + len(merged)
    dense = sorted([*vocabulary.values(), model["vocab"].get(eot, len(vocabulary))]) == list(range(len(vocabulary) + 1))
    if not (order and complete and dense):
        return None
    return {bytes(BYTE_OF_CHARACTER[c] for c in token): i for token, i in vocabulary.items()}


def _pair(merge: Any) -> list[str]:
    """A merge as a pair; older files write "a b"."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)
