"""Encoding with the tokenizers library. Text never becomes the end-of-text id, and every character that has no id is reported."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.core.errors import UserError
from trainer.core.text import printable

OUT_OF_REACH = "\U0010ffff"  # not a character; put before a token of a vocabulary, so that no text spells it
# Normalizers and pre-tokenizers that keep every character of a text in some form.
LOSSLESS = {
    *("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"),
    *("NFC", "Prepend"),
}
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # Llama's; some files list them as special, but byte fallback needs them


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte value, as byte-level vocabularies spell their tokens."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # no other byte occurs in UTF-8
BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class Coder:
    """Encodes text as the tokenizer.json `content` does. library: made from `content`; eot: the token that ends documents."""

    def __init__(self, library: Any, content: dict[str, Any], eot: str, name: str):
        import tokenizers

        self._what = "the tokenizer cannot encode this text"
        self._eot_id = library.token_to_id(eot)
        self._keeps_all = keeps_all_text(content)
        encoding = encoding_only(content, eot)
        if not self._keeps_all or encoding["model"] is not content["model"]:
            with native_errors(f"tokenizer {name}: cannot be used"), silent_stderr():
                library = tokenizers.Tokenizer.from_str(json.dumps(encoding))
            library.encode_special_tokens = True
        self._library = library
        unknown = _unknown_id(content["model"])
        self._without_text = [self._eot_id] if unknown is None else [self._eot_id, unknown]
        self._removes = not all(map(_keeps_characters, _steps(content)))
        # Models that begin with characters. BPE without an unknown token silently leaves out an unknown character.
        self._by_character = "merges" in content["model"] or isinstance(content["model"]["vocab"], list)
        self._always_look = self._removes or (self._by_character and unknown is None)  # the ids do not show losses
        self._has_id: dict[str, bool] = {}

    def __call__(self, text: str) -> tuple[np.ndarray, str]:
        """The ids of `text`, uint32, and its characters that no id stands for, except white space."""
        with native_errors(self._what):
            if self._always_look and not self._by_character:
                ids, lost = self._covering(text)
            else:
                ids = np.array(self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)
                lost = ""
                if not self._keeps_all and (self._always_look or np.isin(ids, self._without_text).any()):
                    lost = self._without_id(text) if self._by_character else self._covering(text)[1]
        return ids[ids != self._eot_id], lost

    def _without_id(self, text: str) -> str:
        """The characters of `text` that, encoded alone, give only the ids of a character that no vocabulary has."""
        characters = set(text)
        for new in characters - self._has_id.keys():
            ids, nothing = (self._library.encode(one, add_special_tokens=False).ids for one in (new, OUT_OF_REACH))
            self._has_id[new] = new.isspace() or not set(ids) <= set(nothing)
        if all(map(self._has_id.__getitem__, characters)):
            return ""
        return "".join(character for character in text if not self._has_id[character])

    def _covering(self, text: str) -> tuple[np.ndarray, str]:
        """The ids of `text`, and the characters that no id stands for, not counting the unknown id."""
        encoding = self._library.encode(text, add_special_tokens=False)  # slower, but gives the span of each id
        ids = np.array(encoding.ids, np.uint32)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)[~np.isin(ids, self._without_text)]
        size = len(text) + 1
        depth = np.cumsum(np.bincount(spans[:, 0], minlength=size) - np.bincount(spans[:, 1], minlength=size))
        left_out = (text[place] for place in np.flatnonzero(depth[:-1] == 0))
        return ids, "".join(character for character in left_out if not character.isspace())


def _unknown_id(model: dict[str, Any]) -> int | None:
    """The id for text that is not in the vocabulary, None if the model has none."""
    if isinstance(model["vocab"], list):
        return model.get("unk_id")
    return model["vocab"].get(model.get("unk_token"))


def encoding_only(content: dict[str, Any], eot: str) -> dict[str, Any]:
    """A tokenizer.json that encodes like `content`, but never turns the spelling of `eot` or another special token into the token.

    If the model's own vocabulary holds such a token, the token is renamed there to a string that no text holds.
    """
    added = [
        {**token, "special": token.get("special") or token["content"] == eot}
        for token in content.get("added_tokens") or []
    ]
    special = {token["content"] for token in added if token["special"]} | {eot}
    special = {token for token in special if not BYTE_TOKEN.fullmatch(token)}
    model = content["model"]
    if _can_spell(model, special):
        model = {**model, "vocab": _renamed(model["vocab"], special)}
        if model.get("unk_token") in special:
            model["unk_token"] = OUT_OF_REACH + model["unk_token"]
        if "merges" in model:
            pairs = [pair(merge) for merge in model["merges"]]
            model["merges"] = [both for both in pairs if special.isdisjoint((*both, "".join(both)))]
        renamed = special & _tokens(content["model"])
        added = [token for token in added if token["content"] not in renamed]
    # The post-processor adds special tokens and trims spans; neither is wanted here.
    return {**content, "post_processor": None, "model": model, "added_tokens": added}


def _renamed(vocabulary: Any, special: set[str]) -> Any:
    def name(token: str) -> str:
        return OUT_OF_REACH + token if token in special else token

    if isinstance(vocabulary, list):  # Unigram's
        return [[name(token), score] for token, score in vocabulary]
    return {name(token): i for token, i in vocabulary.items()}


def _can_spell(model: dict[str, Any], special: set[str]) -> bool:
    """Whether the model itself could make a special token out of text."""
    held = special & _tokens(model)
    if not held or "merges" not in model:
        return bool(held)
    if model.get("ignore_merges") or model.get("unk_token") in held or min(map(len, held)) == 1:
        return True
    return any("".join(pair(merge)) in held for merge in model["merges"])


def _tokens(model: dict[str, Any]) -> set[str]:
    vocabulary = model["vocab"]
    return {token for token, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)


def keeps_all_text(content: dict[str, Any]) -> bool:
    """Whether the ids keep every character of any text: all bytes are in the vocabulary, and no step before removes any."""
    steps = _steps(content)
    if not all(map(_keeps_characters, steps)):
        return False
    model = content["model"]
    vocabulary = _tokens(model)
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in UTF8_BYTES)
    return any(step["type"] == "ByteLevel" for step in steps) and all(
        BYTE_CHARACTERS[byte] in vocabulary for byte in UTF8_BYTES
    )


def _steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps before the model: all normalizers and pre-tokenizers, without nesting."""
    waiting = [content.get("normalizer"), content.get("pre_tokenizer")]
    found = []
    while waiting:
        step = waiting.pop(0)
        if step is not None and step["type"] == "Sequence":
            waiting = [*(step.get("normalizers") or step.get("pretokenizers") or []), *waiting]
        elif step is not None:
            found.append(step)
    return found


def _keeps_characters(step: dict[str, Any]) -> bool:
    """Whether a step keeps every character in some form."""
    if step["type"] == "Replace":
        return bool(step["content"])
    if step["type"] in ("Split", "Punctuation"):
        return step.get("behavior") not in (None, "Removed")
    return step["type"] in LOSSLESS


def pair(merge: Any) -> list[str]:
    """A merge as a pair; older files write "a b"."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


@contextlib.contextmanager
def native_errors(what: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into one-line UserErrors, and also its panics, which are not Exceptions."""
    try:
        yield
    except UnicodeError:
        raise
    except Exception as error:  # it raises bare Exceptions
        raise UserError(f"{what} ({printable(error, 200)})") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: the tokenizers library gave up ({printable(error, 200)})") from None


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Within the block nothing reaches stderr: the library prints its panics there before `native_errors` can report them."""
    try:
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
