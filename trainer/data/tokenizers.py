"""Tokenizers: one stored format (Hugging Face's tokenizer.json), the fastest encoder that gives the same ids."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.core.errors import UserError
from trainer.core.files import system_error, user_path
from trainer.core.text import printable
from trainer.data.characters import CharacterTable, character_json, learn_characters
from trainer.data.coder import BYTE_CHARACTERS, BYTE_OF_CHARACTER, Coder, native_errors, pair, silent_stderr
from trainer.data.learn import Learned, learn_bpe
from trainer.data.readers import hub_error

END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
SIZES = {"gpt2": 50_257, "gpt-neox-20b": 50_277, "bytes": 257}  # ids of the tokenizers that are always the same
HUB = {"gpt2": "openai-community/gpt2", "gpt-neox-20b": "EleutherAI/gpt-neox-20b"}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Turns text into ids and back. Text never becomes the end-of-text id or another special token: its spelling is encoded in pieces.

    notes: lines that tell the user about changes to the tokenizer.
    """

    def __init__(self, data: bytes, name: str, end: str | int | None = None, new: bool = False):
        """data: the content of a tokenizer.json. Raises UserError if it is not one.

        end: the token (or, for a stored tokenizer, its id) that ends documents; None: the first of END_OF_TEXT that it has; if it
        has none, END_OF_TEXT[0] is appended. new: for a new dataset, so state that would cut, pad or vary ids is not stored;
        otherwise `data` must keep its hash.
        """
        self.name = name
        self.notes: list[str] = []
        library = _library(data, name)
        content, switched_off = _parsed(data, name)
        if switched_off:
            usable = _json(content)
            library = _library(usable, name)
            if new:
                data = usable
                told = " and ".join(switched_off)
                self.notes.append(f"tokenizer {name}: switched off its {told}; no text is cut or padded")
        eot, appended = _end_token(library, content, name, end)
        library.add_special_tokens([eot])  # marks it as special if it is there, appends it if not
        if appended:
            data = library.to_str().encode()
            self.notes.append(
                f"tokenizer {name}: has none of {', '.join(END_OF_TEXT)}, so {eot} was appended to end documents; to use another "
                f"token, name it with end_of_text (its special tokens: {_special(content)})"
            )
        self.eot_id = int(library.token_to_id(eot))
        self.vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
        self._library = library
        self._coder: Coder | CharacterTable | None = None
        self._fast: Any = None
        self._byte_ids: np.ndarray | None = None
        tokens = byte_level_tokens(content, eot)
        if tokens is not None:
            self._use_fast(tokens, content["model"], eot)
            if new or not switched_off:
                data = byte_level_json(content["model"]["vocab"], content["model"]["merges"], eot, self.eot_id)
        else:
            self._coder = CharacterTable.of(content, eot) or Coder(library, content, eot, name)
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
    def from_file(cls, path: str | Path, name: str | None = None, eot_id: int | None = None) -> Tokenizer:
        """The tokenizer in a stored tokenizer.json; eot_id: the id that ends documents there."""
        path = Path(path).expanduser()
        return cls(_bytes(path), name or path.stem, eot_id)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json whose hash is `sha256`."""
        Path(path).write_bytes(self._data)

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, uint32, without any special token. Raises UnicodeEncodeError on lone surrogates."""
        with silent_stderr():
            return self.encode_telling_losses(text)[0]

    def encode_telling_losses(self, text: str) -> tuple[np.ndarray, str]:
        """The ids of `text`, and its characters that no id stands for, except white space."""
        if self._byte_ids is not None:
            return self._byte_ids[np.frombuffer(text.encode("utf-8"), np.uint8)], ""
        if self._fast is not None:
            return self._fast.encode_to_numpy(text, disallowed_special=()), ""
        assert self._coder is not None
        return self._coder(text)

    def id_of(self, token: str) -> int | None:
        """The id of the token of that name, or to which `token` is encoded alone; None if there is none."""
        found = self._library.token_to_id(token)
        if found is None and len(ids := self.encode(token)) == 1:
            found = ids[0]
        return None if found is None else int(found)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Ids out of range are left out, broken UTF-8 becomes U+FFFD, end of text is spelled out."""
        return self.decode_bytes([int(i) for i in ids if 0 <= i < self.vocab_size]).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The UTF-8 text of `ids`, all below `vocab_size`; of a byte-level tokenizer also bytes that are not whole characters."""
        if self._fast is not None:
            return self._fast.decode_bytes(ids)
        return self._library.decode(ids, skip_special_tokens=False).encode("utf-8")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise system_error(error, f"{printable(path)}: cannot be read as a tokenizer.json") from None


def _parsed(data: bytes, name: str) -> tuple[dict[str, Any], list[str]]:
    """A tokenizer.json without the state that would cut, pad or vary its ids, and the names of what was switched off."""
    try:
        content = json.loads(data)
        model = content["model"]
        state = ((content, "truncation"), (content, "padding"), (model, "dropout"))
        switched_off = [key for place, key in state if place.get(key)]
        for place, key in state:
            if place.get(key):
                place[key] = None
        return content, switched_off
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"tokenizer {name}: not a readable tokenizer.json ({printable(error, 200)})") from None


def _library(data: bytes, name: str) -> Any:
    import tokenizers

    what = f"tokenizer {name}: not a readable tokenizer.json"
    try:
        with native_errors(what), silent_stderr():
            library = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} ({error.reason} at byte {error.start})") from None
    library.encode_special_tokens = True
    return library


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _end_token(library: Any, content: dict[str, Any], name: str, end: str | int | None) -> tuple[str, bool]:
    """The token that ends documents, and whether it must be appended."""
    if end is None:
        found = next((token for token in END_OF_TEXT if library.token_to_id(token) is not None), None)
        return found or END_OF_TEXT[0], found is None
    token = library.id_to_token(end) if isinstance(end, int) else end
    if token is not None and library.token_to_id(token) is not None:
        return token, False
    raise UserError(
        f"end_of_text: {printable(end)!r} is not a token of tokenizer {name} (its special tokens: {_special(content)})"
    )


def _special(content: dict[str, Any]) -> str:
    names = [printable(token["content"], 40) for token in content.get("added_tokens") or [] if token.get("special")]
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8) or "none"


def get_tokenizer(
    spec: str,
    texts: Iterable[str] | None = None,
    end_of_text: str | None = None,
    learn: Callable[[int, Iterable[str]], Learned] = learn_bpe,
) -> Tokenizer:
    """The tokenizer that `spec` names (see `--tokenizer`); `chars` and `train-bpe:N` learn from `texts`. Raises UserError.

    end_of_text: the token that ends documents. learn: the function that learns a BPE, in this process or in another.
    """
    if spec == "bytes":
        vocabulary = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        return Tokenizer(byte_level_json(vocabulary, [], END_OF_TEXT[0], 256), spec, end_of_text)
    if spec == "chars":
        characters = learn_characters(texts if texts is not None else ())
        return Tokenizer(character_json(characters, END_OF_TEXT[0]), spec, end_of_text)
    if spec.startswith("train-bpe"):
        return _train(spec, texts if texts is not None else (), end_of_text, learn)
    if spec in HUB:
        return Tokenizer(_bytes(Path(_download(spec))), spec, end_of_text, new=True)
    path = user_path(spec, "tokenizer")
    if path.is_dir():
        return _from_folder(path, end_of_text)
    if path.is_file():
        return Tokenizer(_bytes(path), path.stem, end_of_text, new=True)
    near = difflib.get_close_matches(spec, [*HUB, "bytes", "chars", "train-bpe:8192"], 1)
    raise UserError(
        f"tokenizer {spec!r}: unknown, and no such file{f'; did you mean {near[0]}?' if near else ''} "
        f"(allowed: {', '.join(HUB)}, bytes, chars, train-bpe:N, a tokenizer.json, or a folder that holds one)"
    )


def _download(name: str) -> str:
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its lines about retries would hide the one below
    try:
        cached = huggingface_hub.try_to_load_from_cache(HUB[name], "tokenizer.json")
        return cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(HUB[name], "tokenizer.json")
    except Exception as error:  # network, hub and cache errors have no common base
        raise hub_error(error)(
            f"tokenizer {name}: {HUB[name]} cannot be fetched from the Hugging Face hub ({type(error).__name__}); "
            "pass a local folder with its tokenizer.json, or encoder.json and vocab.bpe"
        ) from None


def _from_folder(folder: Path, end_of_text: str | None) -> Tokenizer:
    name = folder.resolve().name
    found = sorted(folder.glob("*tokenizer.json"))
    if len(found) == 1:
        return Tokenizer(_bytes(found[0]), name, end_of_text, new=True)
    if len(found) > 1:
        raise UserError(f"tokenizer {folder}: several candidates ({', '.join(p.name for p in found)}); name one file")
    for vocabulary, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _from_gpt2_files(folder / vocabulary, folder / merges, name, end_of_text)
    raise UserError(
        f"tokenizer {folder}: holds no *tokenizer.json, encoder.json with vocab.bpe, or vocab.json with merges.txt"
    )


def _from_gpt2_files(vocabulary_file: Path, merges_file: Path, name: str, end_of_text: str | None) -> Tokenizer:
    try:
        vocabulary = json.loads(vocabulary_file.read_bytes())
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        eot = END_OF_TEXT[0]
        data = byte_level_json(vocabulary, merges, eot, vocabulary.get(eot, len(vocabulary)))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"tokenizer {vocabulary_file.parent}: malformed vocabulary or merges ({error})") from None
    return Tokenizer(data, name, end_of_text)


def _train(
    spec: str, texts: Iterable[str], end_of_text: str | None, learn: Callable[[int, Iterable[str]], Learned]
) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenisation, learned from the first 64 M characters of `texts`."""
    size = spec.removeprefix("train-bpe:")
    if not size.isdecimal() or not 257 <= int(size) <= 1 << 24:
        raise UserError(f"tokenizer {spec}: expected train-bpe:N with N from 257 (256 bytes, end of text) to 16777216")
    vocabulary, merges = learn(int(size) - 1, texts)
    tokenizer = Tokenizer(byte_level_json(vocabulary, merges, END_OF_TEXT[0], len(vocabulary)), spec, end_of_text)
    if tokenizer.vocab_size < int(size):
        tokenizer.notes.append(
            f"tokenizer {spec}: the training text repeats too little for {int(size):,} ids; only {tokenizer.vocab_size:,} were learned"
        )
    return tokenizer


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
        "merges": [pair(merge) for merge in merges],
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
    merged = [vocabulary.get("".join(pair(merge)), -1) for merge in model["merges"]]
    order = merged == sorted(set(merged)) and -1 not in merged
    complete = set(BYTE_CHARACTERS) <= set(vocabulary) and len(vocabulary) == 256 + len(merged)
    dense = sorted([*vocabulary.values(), model["vocab"].get(eot, len(vocabulary))]) == list(range(len(vocabulary) + 1))
    if not (order and complete and dense):
        return None
    return {bytes(BYTE_OF_CHARACTER[c] for c in token): i for token, i in vocabulary.items()}
